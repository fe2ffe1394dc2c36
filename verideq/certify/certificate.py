"""From a bound to a certificate that the checker reads: the model's certificate once, a record a sample.

The formats are in ``docs/certificate.md``. What is written here is a suggestion: the checker believes none of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from verideq.checker.files import model_hash, parse_blob
from verideq.equilibrium import Gauge
from verideq.region import Region

VERSION = 1

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One use of a dual: a tightening of pre-activations, or the bound of the rows at the end of a case.

    Args:
        node: whose pre-activations are tightened; ``None``: the rows of the specification.
        slopes: the rule by which the checker makes the multipliers itself (``adaptive``, ``zero``, ``one``).
        iterations: of an equilibrium, with `slopes`.
        empty: that no input satisfies the splits, instead of the rows.
        units: (rows,) integers: ``i`` for the lower bound of unit ``i``, ``-1 - i`` for the upper one.
        multipliers: of the linear dual by node, (rows, *state).
        quadratic: of the quadratic dual by name.
    """

    node: str | None = None
    slopes: str | None = None
    iterations: int = 0
    empty: bool = False
    units: Numbers | None = None
    multipliers: Mapping[str, Numbers] = field(default_factory=dict)
    quadratic: Mapping[str, Numbers] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """A tree that goes on in two halves: ``unit`` of the node at most, or at least, `at`."""

    node: str
    unit: int
    at: Fraction
    below: Tree
    above: Tree


@dataclass(frozen=True)
class Then:
    """Tightenings of a part, once for all that is below: the number of a case of nothing else, and the tree."""

    case: int
    tree: Tree


Tree = int | Split | Then
"""The number of a case, a split, or tightenings for all of a tree."""


@dataclass(frozen=True)
class Proof:
    """What a method hands over for one sample.

    Args:
        boxes: of equilibria with a gauge by node, lower and upper, (*state).
        states: approximate equilibria at the centre, of monotone layers.
        cases: the steps of every case.
        trees: rows of the specification (``None``: all) and the tree of cases that proves them.
    """

    boxes: Mapping[str, tuple[Numbers, Numbers]] = field(default_factory=dict)
    states: Mapping[str, Numbers] = field(default_factory=dict)
    cases: tuple[tuple[Step, ...], ...] = ((Step(),),)
    trees: tuple[tuple[tuple[int, ...] | None, Tree], ...] = ((None, 0),)

    @staticmethod
    def beside(parts: Sequence[Proof], counts: Sequence[int]) -> Proof:
        """The proof of all rows of a sample, from those of so many rows each: the boxes are the same."""
        cases: list[tuple[Step, ...]] = []
        trees: list[tuple[tuple[int, ...] | None, Tree]] = []
        begin = 0
        for part, count in zip(parts, counts, strict=True):
            for rows, tree in part.trees:
                own = range(count) if rows is None else rows
                trees.append((tuple(begin + row for row in own), _renumbered(tree, len(cases))))
            cases += part.cases
            begin += count
        return replace(parts[0], cases=tuple(cases), trees=tuple(trees))


def _renumbered(tree: Tree, by: int) -> Tree:
    """A tree whose cases come after so many others."""
    if isinstance(tree, int):
        return tree + by
    if isinstance(tree, Then):
        return Then(tree.case + by, _renumbered(tree.tree, by))
    return replace(tree, below=_renumbered(tree.below, by), above=_renumbered(tree.above, by))


def gauge_file(model: bytes, gauges: Mapping[str, Gauge], monotone: Mapping[str, float] | None = None) -> bytes:
    """The model certificate of the model of this file: gauges, (units,), and an ``m`` for layers without one.

    Args:
        monotone: of dense layers; a factored one needs none.
    """
    arrays: dict[str, Numbers] = {f"gauge/{name}": gauge.u.cpu().numpy() for name, gauge in gauges.items()}
    arrays |= {f"m/{name}": np.array(m, dtype=np.float64) for name, m in (monotone or {}).items()}
    return _blob(arrays, {"version": VERSION, "model": model_hash(parse_blob(model))})


def record(
    model: str,
    index: int,
    region: Region,
    i: int,
    proof: Proof,
    *,
    label: int | None,
    C: NDArray[np.float64],
    rhs: NDArray[np.float64],
    margin: float,
    tolerance: Fraction = Fraction(0),
) -> bytes:
    """The record of one sample.

    Args:
        model: the model's hash.
        index: of the sample in its data set.
        region: the batch that it is in.
        i: its place in the batch.
        proof: why the claim holds.
        label: for the specification "its output is the largest"; ``None`` for `C` and `rhs`.
        C: (rows, outputs), written where there is no label.
        rhs: (rows,), likewise.
        margin: proved; what is claimed is a little less, because the checker rounds in its own way.
        tolerance: of the deployed solver, in units of the slack.
    """
    pixels = region.center[i].cpu().numpy()
    # An image of bytes is its bytes: a 255th of each is what is meant, and not the float64 next to it.
    bytes_ = np.rint(pixels * 255).clip(0, 255)
    whole = bool((bytes_ / 255 == pixels).all())
    arrays: dict[str, Numbers] = {"input": bytes_.astype(np.uint8) if whole else pixels}
    if region.weights is not None:
        arrays["weights"] = region.weights.cpu().numpy()
    if label is None:
        arrays |= {"C": C, "rhs": rhs}
    for name, (lower, upper) in proof.boxes.items():
        arrays |= {f"box/{name}/lower": lower, f"box/{name}/upper": upper}
    arrays |= {f"state/{name}": state for name, state in proof.states.items()}
    for place, steps in enumerate(proof.cases):
        for k, step in enumerate(steps):
            arrays |= _arrays_of(step, f"case/{place}/{k}")
    claimed = max(0.0, margin * (1 - 2.0**-18))
    head = {
        "version": VERSION,
        "model": model,
        "index": index,
        "label": label,
        "eps": str(region.radii[i]),
        "norm": region.norm,
        "clip": None if region.clip is None else [str(Fraction(end)) for end in region.clip],
        "scale": "1/255" if whole else None,
        "specification": "linear" if label is None else "label",
        "margin": str(Fraction(claimed)),
        "tolerance": str(tolerance),
        "refinements": 0,
        "cases": [[_head_of(step) for step in steps] for steps in proof.cases],
        "trees": [{"rows": None if rows is None else list(rows), "tree": _tree(tree)} for rows, tree in proof.trees],
    }
    return _blob(arrays, head)


def _head_of(step: Step) -> dict[str, Any]:
    return {"node": step.node, "slopes": step.slopes, "iterations": step.iterations, "empty": step.empty}


def _arrays_of(step: Step, place: str) -> dict[str, Numbers]:
    arrays = {f"{place}/g/{name}": g for name, g in step.multipliers.items()}
    arrays |= {f"{place}/q/{name}": array for name, array in step.quadratic.items()}
    return arrays if step.units is None else arrays | {f"{place}/units": step.units}


def _tree(tree: Tree) -> dict[str, Any]:
    if isinstance(tree, int):
        return {"case": tree}
    if isinstance(tree, Then):
        return {"case": tree.case, "then": _tree(tree.tree)}
    halves = {"below": _tree(tree.below), "above": _tree(tree.above)}
    return {"node": tree.node, "unit": tree.unit, "at": str(tree.at), **halves}


def framed(payload: bytes) -> bytes:
    """A record as it stands in ``records.bin``: its length in 8 bytes, the payload, its SHA-256."""
    return len(payload).to_bytes(8, "little") + payload + hashlib.sha256(payload).digest()


def _blob(arrays: Mapping[str, Numbers], head: Mapping[str, Any]) -> bytes:
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data: bytes = save(whole, metadata={"verideq": json.dumps(head, sort_keys=True, separators=(",", ":"))})
    return data
