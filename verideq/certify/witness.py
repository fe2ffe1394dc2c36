"""What an attack has found, proved: a point in the region at which the stored model, and the user's own, lack the
property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verideq.attacks import PGD, Suite
from verideq.box import Box
from verideq.certify.bound import run_method
from verideq.certify.method import Bounds, Prepared
from verideq.certify.task import Task
from verideq.certify.verdict import Verdict
from verideq.equilibrium import Auto, Dense, Implicit, MonotoneDense, PeacemanRachford, Solver
from verideq.equilibrium.splitting import Splitting
from verideq.errors import InconsistencyError
from verideq.graph import evaluating


@dataclass(frozen=True)
class Found:
    """What the points of an attack are worth, (batch,) each.

    Args:
        points: (batch, *features).
        seen: in the region, by exact comparison, and of a negative margin as the attack measured it.
        proved: and interval bounds at the point prove that a row is below its ``rhs``.
        deployed: and the user's own model, in its own dtype, breaks there too.
    """

    points: Tensor
    seen: Tensor
    proved: Tensor
    deployed: Tensor


def target(prepared: Prepared) -> nn.Module:
    """The model for an attack, which needs a direction and not the last digit."""
    forward: Solver = Auto(tol=1e-6)
    backward: Solver = Auto(tol=1e-3)
    layers = dict(prepared.graph.equilibria())
    if set(layers) == set(prepared.monotone) and len(layers) == 1:
        # A step of Peaceman-Rachford is one product, and memory of steps would cost more than it saves.
        operator = layers.popitem()[1].operator()
        split = (
            Splitting.of(operator, tuple(operator.diagonal().shape))
            if isinstance(operator, Dense | MonotoneDense)
            else None
        )
        if split is not None:
            forward, backward = (PeacemanRachford(tol=tol, alpha=split.alpha) for tol in (1e-6, 1e-3))
    return prepared.graph.frozen(device=prepared.device, solver=forward, gradient=Implicit(backward), throw=False)


def examined(prepared: Prepared, part: Task, original: nn.Module | None, points: Tensor, margins: Tensor) -> Found:
    """Look closely at points that an attack measured to have these margins."""
    seen = (margins < 0) & part.region.contains(points)
    # A witness is proved like a bound, and has to break the user's own model, in its own dtype, as well.
    proved, deployed = torch.zeros_like(seen), seen
    if not prepared.missing and bool(seen.any()):
        highest = run_method(prepared, Box(points, points), part.C, "interval", 1000).box.upper
        proved = seen & (highest < part.rhs).any(1)
    if original is not None and bool(seen.any()):
        deployed = seen & (_rows(original, points, part) < 0).any(1)
    return Found(points, seen, proved, deployed)


def followed(
    prepared: Prepared,
    part: Task,
    original: nn.Module | None,
    attack: PGD | Suite | None,
    bounds: Bounds,
    places: list[int],
    stop: Callable[[], bool],
) -> Found:
    """Attack some samples of a batch where a bound has broken them on its way, or else from where it would be attained.

    Args:
        part: the batch.
        attack: ``None``: only what the bound has broken is examined.
        bounds: of it.
        places: of the samples.
        stop: as for the attack.
    """
    own = part[torch.tensor(places)]
    points, margins = own.region.center.clone(), torch.full_like(own.rhs[:, 0], torch.inf)
    for place, k in enumerate(places):
        if k in bounds.witnesses:
            points[place], margins[place] = bounds.witnesses[k].to(points), -1.0
    points = own.region.project(points)
    rest = (margins == torch.inf).nonzero().flatten()
    if attack is not None and bounds.points is not None and len(rest):
        rows, last = torch.tensor(places)[rest.cpu()], own[rest]
        wanted = bounds.box.lower[rows] <= last.rhs
        found = attack.follow(
            target(prepared), last.region, last.C, last.rhs, bounds.points[rows], wanted, stop=stop
        )  # fmt: skip
        points[rest], margins[rest] = found
    return examined(prepared, own, original, points, margins)


def inconsistency(verdict: Verdict, point: Tensor, index: int) -> InconsistencyError:
    """What to raise when a proved witness lies where a verdict says that there is none."""
    margin = "" if verdict.margin is None else f" (margin {verdict.margin:.6g})"
    return InconsistencyError(
        f"sample {index} is certified at {verdict.norm} eps {verdict.eps}{margin} and broken by a proved witness: one "
        "of the two is a bug; please report it with the saved files",
        {"index": index, "verdict": verdict, "witness": point.cpu().numpy()},
    )


@torch.no_grad()
def _rows(original: nn.Module, points: Tensor, part: Task) -> Tensor:
    """The specification's rows as the user's own model computes them, (batch, rows)."""
    first = next((p for p in [*original.parameters(), *original.buffers()] if p.is_floating_point()), points)
    with evaluating(original):
        outputs = original(points.to(first.device, first.dtype)).to(part.C)
    rows: Tensor = (part.C @ outputs[:, :, None])[:, :, 0] - part.rhs
    return rows
