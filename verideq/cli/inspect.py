"""``verideq inspect``: what a model is made of, which class its weights come from, and what the stored ones prove."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import ROUND_FLOOR, Context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import nn

from verideq.cli.options import Json, Weights, read_model
from verideq.equilibrium import Dense, Equilibrium, Gauge, Monotone, gauge
from verideq.equilibrium.monotonicity import proved_m
from verideq.errors import NoGaugeError
from verideq.graph import model_hash, trace, unsupported
from verideq.graph.file import KEY
from verideq.graph.operations import parametrizations_of


def inspect(
    model: Annotated[str, typer.Argument(help="A model file, or package.module:builder.")],
    weights: Weights = None,
    as_json: Json = False,
) -> int:
    """Show a model's operations, what is unsupported, its parameters, and what each equilibrium's weights prove."""
    network, name = read_model(model, weights)
    facts = describe(network, name, recorded_classes(Path(model)))
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show(facts)
    return 1 if facts["unsupported"] else 0


def recorded_classes(path: Path) -> dict[str, list[str]]:
    """The parametrizations that a model file records, by node; empty where there is no such file.

    A record and no more: what holds for the weights is read from the weights.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as handle:
            nodes = json.loads(handle.metadata()[KEY])["nodes"]
        return {node["name"]: [str(name) for name in node["parametrizations"]] for node in nodes}
    except (SafetensorError, TypeError, ValueError, KeyError):  # another file, or an older one
        return {}


def describe(network: nn.Module, name: str, recorded: Mapping[str, list[str]]) -> dict[str, Any]:
    """What `inspect` shows, JSON-ready.

    Args:
        network: the model.
        name: of it.
        recorded: by node, the class names that its file has for weights that no longer are parametrized.
    """
    facts: dict[str, Any] = {"model": name, "unsupported": unsupported(network), "operations": [], "equilibria": []}
    facts["parameters"] = sum(p.numel() for p in network.parameters())
    if facts["unsupported"]:
        return facts
    graph = trace(network)
    stored = 0
    for node in graph.nodes:
        state = node.operation.state(node.module)
        shapes = {key: list(tensor.shape) for key, tensor in state.items()}
        stored += sum(tensor.numel() for tensor in state.values())
        facts["operations"].append(
            {"name": node.name, "operation": node.operation.kind, "inputs": list(node.inputs), "tensors": shapes}
        )
    facts["equilibria"] = [
        {
            "name": place,
            "class": ", ".join(parametrizations_of(layer.fusion) or recorded.get(place, [])) or None,
            "activation": layer.activation.name,
            "units": len(layer.operator().absolute_units()),
            **_guarantee(layer),
        }
        for place, layer in graph.equilibria()
    ]
    return facts | {
        "parameters": stored,
        "hash": model_hash(network),
        "dtype": str(graph.dtype).removeprefix("torch."),
        "input_shape": graph.input_shape,
        "pixel_range": graph.pixel_range,
        "classes": graph.classes,
    }


def _guarantee(layer: Equilibrium) -> dict[str, Any]:
    """What the stored weights of one equilibrium prove, and how far they are from it where they prove nothing.

    ``guarantee`` is ``gauge``, from which bounds of every kind follow; else ``monotone``, ``I - sym W ⪰ m I`` with
    ``m > 0``, from which the equilibrium exists and is unique; else ``None``.
    """
    try:
        return _contraction(layer, gauge(layer))
    except NoGaugeError as error:
        rate = error.rate if math.isfinite(error.rate) else None
        # Of numbers that are not finite nothing follows, by algebra or otherwise.
        m, by, eigenvalue = (None, None, None) if rate is None else _monotone(layer)
        return {
            "guarantee": None if m is None else "monotone",
            "gauge": None,
            "reason": str(error),
            "rate": rate,
            "steps": None,
            "excess": None if rate is None else rate - 1,
            "m": m,
            "by": by,
            "smallest_eigenvalue": eigenvalue,
        }


def _contraction(layer: Equilibrium, found: Gauge) -> dict[str, Any]:
    rate = found.rate(layer)
    operator = layer.operator()
    return {
        "guarantee": "gauge",
        "gauge": "transformed layer" if found.transformed else "W",
        "smallest_slack": float(found.slack(layer).min()),
        "rate": rate,
        "steps": predicted_steps(rate),
        "m": operator.m if isinstance(operator, Monotone) else None,
    }


def _monotone(layer: Equilibrium) -> tuple[float | None, str | None, float | None]:
    """A positive ``m`` with ``I - sym W ⪰ m I`` of the stored numbers, if one is known, and by what.

    By algebra for a factored ``W``; by a proof for a dense one, whose measured smallest eigenvalue is the third part.
    """
    operator = layer.operator()
    if isinstance(operator, Monotone):
        return operator.m, "factors", None
    if not isinstance(operator, Dense):
        return None, None, None
    proved, measured = proved_m(operator.weight)
    return (proved, "proof", measured) if proved > 0 else (None, None, measured)


def predicted_steps(rate: float, tol: float = 1e-5) -> int:
    """Picard steps until the error has fallen by the factor `tol` at a contraction rate below 1."""
    return 1 if rate <= 0 else math.ceil(math.log(tol) / math.log(min(rate, 1 - 2.0**-53)))


def _show(facts: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    if facts["unsupported"]:
        console.print(f"{facts['model']}: not supported", *facts["unsupported"], sep="\n", markup=False)
        return
    console.print(f"{facts['model']}: {facts['parameters']} parameters, {facts['dtype']}, hash {facts['hash'][:16]}")
    shape, pixels = facts["input_shape"], facts["pixel_range"]
    console.print(f"input shape {shape or 'not recorded'}, pixel range {pixels or 'none'}, classes {facts['classes']}")
    table = Table("node", "operation", "reads", "tensors")
    for node in facts["operations"]:
        tensors = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in node["tensors"].items())
        table.add_row(node["name"], node["operation"], ", ".join(node["inputs"]), tensors)
    console.print(table)
    for layer in facts["equilibria"]:
        kind = "" if layer["activation"] == "relu" else f"{layer['activation']}, "
        head = f"{layer['name']}: {layer['units']} units, {kind}{layer['class'] or 'no class recorded'}"
        console.print(f"{head}: {_sentence(layer)}", markup=False)


def _sentence(layer: Mapping[str, Any]) -> str:
    """What `_guarantee` found, in words; a proved `m` is rounded down."""
    known = "" if layer["m"] is None else f"monotone with m = {Context(4, ROUND_FLOOR).create_decimal(layer['m'])}"
    if layer["guarantee"] == "gauge":
        text = (
            f"gauge of {'the ' * (layer['gauge'] != 'W')}{layer['gauge']}, "
            f"smallest slack {layer['smallest_slack']:.3g}, "
            f"contraction rate {layer['rate']:.4g}: about {layer['steps']} Picard steps to 1e-5 (worst case)"
        )
        return f"{text}; {known}" if known else text
    if layer["guarantee"] == "monotone":
        reason = "by its factors" if layer["by"] == "factors" else "proved of the stored W"
        return f"{known}, {reason}: one equilibrium for every input; {layer['reason']}"
    missed = "" if layer["excess"] is None else f" (too large by about {layer['excess']:.3g})"
    eigenvalue = layer["smallest_eigenvalue"]
    text = f"nothing is guaranteed{missed}: {layer['reason']}"
    if eigenvalue is None:
        return text
    return f"{text}. The smallest eigenvalue of I - sym W is about {eigenvalue:.3g}: no m > 0"
