"""FAB, fast adaptive boundary: a search for the nearest point across a boundary (Croce & Hein, ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.attacks.problem import Attack, Found, Problem, nearest_rows, row_loss, vanishing
from verideq.errors import InputError


@dataclass(frozen=True)
class FAB(Attack):
    """Targeted FAB: towards one class after the other, nearest first, by linearisation and a pull to the centre.

    With ``d`` and ``d_0`` the projections of the iterate and of the centre onto the linearised boundary within the
    pixel range, and ``a = min(‖d‖ / (‖d‖ + ‖d_0‖), alpha)``::

        x <- (1-a) (x + η d) + a (center + η d_0)

    and from every point across the boundary back towards the centre by ``β``.

    Args:
        steps: of a run.
        restarts: runs a class; the first from the centre, the others from noise.
        targets: classes to try, at most.
        alpha: largest weight of the centre.
        eta: overshoot, ``η``.
        beta: ``β``.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts, self.targets) < 1:
            raise InputError(
                f"FAB takes 1 or more steps, restarts and targets; got {self.steps}, {self.restarts}, {self.targets}"
            )

    @property
    def name(self) -> str:
        return "FAB-T"

    def search(self, problem: Problem) -> Found:
        found = Found.nothing(problem)
        found.note(problem.region.center, problem.judge(problem.region.center))
        if not problem.movable:
            return found
        blind = torch.ones_like(found.margins, dtype=torch.bool)
        ranked = nearest_rows(problem)
        for run in range(min(self.targets, ranked.shape[1]) * self.restarts):
            active = found.open()
            if not len(active) or problem.stop():
                break
            part = problem[active]
            start = part.random_start(run) if run % self.restarts else part.region.center
            own, seen = self._approach(part, start, ranked[active, run // self.restarts])
            found.note(own.points, own.margins, active)
            blind[active] &= seen
        return Found(found.points, found.margins, blind)

    def _approach(self, problem: Problem, x: Tensor, targets: Tensor) -> tuple[Found, Tensor]:
        region, loss, center = problem.region, row_loss(targets), problem.region.center
        found = Found.nothing(problem)
        blind = torch.ones_like(found.margins, dtype=torch.bool)
        nearest = torch.full_like(found.margins, torch.inf)
        for _ in range(self.steps):
            if problem.stop():
                break
            slope = problem.slope(x, loss)
            gradient = slope.gradient.nan_to_num(0.0, 0.0, 0.0)
            blind &= vanishing(gradient)
            # Where the linearised loss, minus the row, is zero: from the iterate, and from the centre.
            needed = -slope.losses.nan_to_num(0.0, 0.0, 0.0)
            own = onto_plane(problem, x, gradient, needed)
            ahead = (gradient * (x - center)).flatten(1).sum(1)
            far = onto_plane(problem, center, gradient, needed + ahead)
            near_size, far_size = lengths(problem, own), lengths(problem, far)
            share = (near_size / (near_size + far_size).clamp(min=1e-30)).clamp(max=self.alpha)
            share = problem.broadcast(share)
            x = (1 - share) * (x + self.eta * own) + share * (center + self.eta * far)
            x = x if region.clip is None else x.clamp(*region.clip)
            distance = lengths(problem, x - center)
            crossed = problem.judge(x) < 0
            nearer = crossed & (distance < nearest)
            close = nearer & (distance <= region.radii_down() * (1 + 1e-9))
            if bool(close.any()):
                at = close.nonzero().flatten()
                kept = problem[at]
                points = kept.region.project(x[at])
                found.note(points, kept.judge(points), at)
            nearest = torch.where(nearer, distance, nearest)
            x = torch.where(problem.broadcast(crossed), center + self.beta * (x - center), x)
        return found, blind


def lengths(problem: Problem, shift: Tensor) -> Tensor:
    """The norm of shifts in units of the region's weights, (batch,)."""
    weights = problem.region.weights
    if weights is not None:
        shift = torch.where(weights > 0, shift / weights, 0.0)
    flat = shift.flatten(1)
    return flat.norm(dim=1) if problem.region.norm == "l2" else flat.abs().amax(1)


def onto_plane(problem: Problem, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The smallest shift ``d`` with ``wᵀ d = b`` that keeps `x` in the pixel range; where none reaches, the farthest.

    ``wᵀ d(s)`` for ``d(s)`` along the steepest direction, each feature stopped at its end of the range, is concave and
    piecewise linear in ``s``: its breakpoints are sorted, and the piece that reaches ``b`` is solved.

    Args:
        x: (batch, *features), in the range.
        w: likewise, the normal.
        b: (batch,).
    """
    region = problem.region
    weights = torch.ones_like(x[0]) if region.weights is None else region.weights
    sign = torch.where(b < 0, -1.0, 1.0).to(x)
    normal = (w * problem.broadcast(sign)).flatten(1)
    scale = weights.flatten()
    direction = normal * scale.square() if region.norm == "l2" else normal.sign() * scale
    low, high = (-_FAR, _FAR) if region.clip is None else region.clip
    flat = x.flatten(1)
    room = torch.where(direction > 0, high - flat, flat - low).clamp(min=0)
    pace = direction.abs()
    stops = torch.where(pace > 0, room / pace.clamp(min=1e-300), 0.0)
    order = stops.argsort(1)
    stops_in_order = stops.gather(1, order)
    gain = (normal.abs() * pace).gather(1, order)  # of wᵀ d by unit of s, while the feature moves
    spent = gain * stops_in_order  # what a stopped feature has given in all
    stopped = spent.cumsum(1)
    moving = gain.sum(1, keepdim=True) - gain.cumsum(1)
    reached = stopped + stops_in_order * moving.clamp(min=0)
    goal = b.abs()[:, None]
    piece = (reached < goal).sum(1, keepdim=True)  # the first breakpoint at which the goal is reached
    inside = piece < reached.shape[1]
    piece = piece.clamp(max=reached.shape[1] - 1)
    zero = torch.zeros_like(stopped[:, :1])
    before = torch.cat((zero, stopped), 1).gather(1, piece)
    rate = torch.cat((gain.sum(1, keepdim=True), moving), 1).gather(1, piece)
    s = torch.where(inside & (rate > 0), (goal - before) / rate.clamp(min=1e-300), stops_in_order[:, -1:])
    shift = direction.sign() * torch.minimum(pace * s, room)
    return shift.view_as(x)


_FAR = 1e12
"""Stands for the ends of a range that has none."""
