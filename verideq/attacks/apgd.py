"""Auto-PGD: a step that halves itself where it does not pay (Croce & Hein, ICML 2020, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.attacks.problem import (
    Attack,
    Found,
    Problem,
    RowLoss,
    cross_entropy,
    nearest_rows,
    ratio_loss,
    targeted_ratio_loss,
    vanishing,
)
from verideq.errors import InputError, UnknownName

LOSSES = {"ce": cross_entropy, "dlr": ratio_loss}


@dataclass(frozen=True)
class APGD(Attack):
    """APGD with the cross-entropy (``ce``), the ratio of logit differences (``dlr``), or that towards one class after
    the other (``t``), nearest first. A sample that is broken drops out.

    Args:
        loss: ``ce``, ``dlr`` or ``t``.
        steps: of a run.
        restarts: runs, each from other noise; for ``t``, a class.
        targets: classes that ``t`` tries, at most.
        rho: share of steps that have to pay, or the step is halved.
    """

    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    rho: float = 0.75

    def __post_init__(self) -> None:
        if self.loss not in (*LOSSES, "t"):
            raise UnknownName("loss of APGD", self.loss, (*LOSSES, "t"))
        if min(self.steps, self.restarts, self.targets) < 1:
            raise InputError(
                f"APGD takes 1 or more steps, restarts and targets; got {self.steps}, {self.restarts}, {self.targets}"
            )

    @property
    def name(self) -> str:
        return f"APGD-{self.loss.upper()}"

    def search(self, problem: Problem) -> Found:
        found = Found.nothing(problem)
        blind = torch.ones_like(found.margins, dtype=torch.bool)
        ranked = nearest_rows(problem) if self.loss == "t" else None
        runs = self.restarts * (1 if ranked is None else min(self.targets, ranked.shape[1]))
        for run in range(runs):
            active = found.open()
            if not len(active) or problem.stop():
                break
            part = problem[active]
            loss = LOSSES[self.loss] if ranked is None else targeted_ratio_loss(ranked[active, run // self.restarts])
            own, seen = self._climb(part, self._start(part, run), loss)
            found.note(own.points, own.margins, active)
            blind[active] &= seen
        return Found(found.points, found.margins, blind)

    def _start(self, problem: Problem, run: int) -> Tensor:
        """Noise that touches the border of the ball."""
        flat = problem.noise(run).flatten(1)
        size = flat.norm(dim=1) if problem.region.norm == "l2" else flat.abs().amax(1)
        noise = (flat / size[:, None].clamp(min=1e-12)).view_as(problem.region.center)
        return problem.region.project(problem.region.center + noise * problem.reach())

    def _climb(self, problem: Problem, x: Tensor, loss: RowLoss) -> tuple[Found, Tensor]:
        found = Found.nothing(problem)
        region = problem.region
        value, gradient, margins = problem.climb(x, loss)
        found.note(x, margins)
        blind = vanishing(gradient)
        best, best_value, best_gradient = x, value, gradient
        size = 2 * region.radii_down()
        before, paid = x, torch.zeros_like(value)
        last_size, last_value = size, best_value
        marks, start = checkpoints(self.steps), 0
        for step in range(1, self.steps + 1 if problem.movable else 0):
            if problem.stop():
                break
            ahead = region.project(x + problem.broadcast(size) * problem.direction(gradient))
            momentum = 0.75 if step > 1 else 1.0
            moved = region.project(x + momentum * (ahead - x) + (1 - momentum) * (x - before))
            before, x = x, moved
            previous = value
            value, gradient, margins = problem.climb(x, loss)
            found.note(x, margins)
            blind &= vanishing(gradient)
            # A loss that is not a number neither pays nor becomes the best.
            paid = paid + (value > previous)
            better = value > best_value
            best = torch.where(problem.broadcast(better), x, best)
            best_gradient = torch.where(problem.broadcast(better), gradient, best_gradient)
            best_value = torch.where(better, value, best_value)
            if step in marks:
                stuck = (size == last_size) & (best_value == last_value)
                halve = (paid < self.rho * (step - start)) | stuck
                last_size, last_value = size, best_value
                size = torch.where(halve, size / 2, size)
                where = problem.broadcast(halve)
                x, gradient = torch.where(where, best, x), torch.where(where, best_gradient, gradient)
                value = torch.where(halve, best_value, value)
                paid, start = torch.zeros_like(paid), step
        return found, blind


def checkpoints(steps: int) -> set[int]:
    """The steps after which the step size is looked at: ``⌈p_j N⌉`` with ``p_1 = 0.22`` and
    ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``.

    >>> sorted(checkpoints(100))
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    marks, before, now = set(), 0.0, 0.22
    while now <= 1:
        marks.add(math.ceil(round(now * steps, 9)))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return marks
