"""``verideq inspect``: what a model is made of, which class its weights come from, and what the stored ones prove."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import nn

from verideq.cli.options import Json, Weights, read_model
from verideq.equilibrium import Equilibrium, gauge
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

    ``guarantee`` is ``gauge`` or ``None``.
    """
    try:
        found = gauge(layer)
    except NoGaugeError as error:
        rate = error.rate if math.isfinite(error.rate) else None
        missing = {"guarantee": None, "gauge": None, "reason": str(error), "rate": rate, "steps": None}
        return missing | {"excess": None if rate is None else rate - 1}
    rate = found.rate(layer)
    return {
        "guarantee": "gauge",
        "gauge": "transformed layer" if found.transformed else "W",
        "smallest_slack": float(found.slack(layer).min()),
        "rate": rate,
        "steps": predicted_steps(rate),
    }


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
        head = f"{layer['name']}: {layer['units']} units, {layer['class'] or 'no class recorded'}"
        if layer["guarantee"] is None:
            missed = "" if layer["excess"] is None else f" (too large by about {layer['excess']:.3g})"
            console.print(f"{head}: nothing is guaranteed{missed}: {layer['reason']}", markup=False)
        else:
            console.print(
                f"{head}: gauge of {'the ' * (layer['gauge'] != 'W')}{layer['gauge']}, "
                f"smallest slack {layer['smallest_slack']:.3g}, "
                f"contraction rate {layer['rate']:.4g}: about {layer['steps']} Picard steps to 1e-5 (worst case)",
                markup=False,
            )
