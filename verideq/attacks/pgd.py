"""Projected gradient descent (Madry et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verideq.attacks.opened import PlainDynamics
from verideq.attacks.problem import Attack, Found, Problem, RowLoss, cross_entropy, margin_loss, row_loss, vanishing
from verideq.errors import InputError
from verideq.region import Region


@dataclass(frozen=True)
class PGD(Attack):
    """A PGD attack on linear specifications ``C @ model(x) > rhs``.

    By default the first restart starts at the centre with the margin loss ``min_k (C f - rhs)_k``; the others from
    uniform noise, with the cross-entropy of the margins and the margin loss in turn.

    Args:
        steps: a restart.
        restarts: the number of them.
        step_size: of the first step, in units of eps.
        decay: let it fall linearly to a twentieth.
        plain: the ready-made attack of the papers: every restart from noise, with the cross-entropy.
    """

    steps: int = 20
    restarts: int = 3
    step_size: float = 0.5
    decay: bool = True
    plain: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not self.step_size > 0:
            raise InputError(
                f"PGD takes 1 or more steps and restarts and a positive step; got {self.steps}, {self.restarts} and "
                f"{self.step_size}"
            )

    @property
    def name(self) -> str:
        return f"PGD-{self.steps}" if self.restarts == 1 else f"PGD-{self.steps}x{self.restarts}"

    def __call__(
        self,
        model: nn.Module,
        region: Region,
        C: Tensor,
        rhs: Tensor,
        *,
        indices: Tensor,
        seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, Tensor]:
        """Look for a point of the region with a nonpositive margin.

        Args:
            model: differentiable, in float64.
            region: where to look; samples that are broken drop out of the batch.
            C: (batch, rows, outputs).
            rhs: (batch, rows).
            indices: (batch,) of the samples in their data set: with `seed` they fix the noise.
            seed: see `uniform_noise`.
            stop: asked before every step; true ends the attack early with the best so far.

        Returns:
            the best points, (batch, *features), all in the region; and their margins, (batch,), as the model computes
            them.
        """
        found = self.search(Problem(PlainDynamics(model), region, C, rhs, indices, seed=seed, stop=stop))
        return found.points, found.margins

    def search(self, problem: Problem) -> Found:
        found = Found.nothing(problem)
        blind = torch.ones_like(found.margins, dtype=torch.bool)
        restarts = range(self.restarts if problem.movable else 1)
        # One look at the centre where it is all there is. After the first restart they come in pairs, one with either
        # loss: a small batch takes as long as one twice its size.
        for some in (restarts[:1], *(restarts[k : k + 2] for k in restarts[1::2])):
            active = found.open()
            if not len(active) or problem.stop():
                break
            own, count = problem[active], len(active)
            starts = [self._start(own, restart) for restart in some]
            losses = [cross_entropy if self.plain or restart % 2 else margin_loss for restart in some]

            def loss(rows: Tensor, losses: Sequence[RowLoss] = losses, count: int = count) -> Tensor:
                return torch.cat([of(part) for of, part in zip(losses, torch.split(rows, count), strict=True)])

            result, seen = self._descend(problem[active.repeat(len(some))], torch.cat(starts), loss)
            for k in range(len(some)):
                part = slice(k * count, (k + 1) * count)
                found.note(result.points[part], result.margins[part], active)
                blind[active] &= seen[part]
        return Found(found.points, found.margins, blind if problem.movable else None)

    def _start(self, problem: Problem, restart: int) -> Tensor:
        noisy = (restart > 0 or self.plain) and problem.movable
        return problem.random_start(restart) if noisy else problem.region.center

    def follow(
        self,
        model: nn.Module,
        region: Region,
        C: Tensor,
        rhs: Tensor,
        points: Tensor,
        wanted: Tensor,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, Tensor]:
        """Look for a point with a nonpositive margin from one start a row: where a bound would be attained.

        Args:
            points: (batch, rows, *features): from each, down its own row.
            wanted: (batch, rows): which rows to try.

        Returns:
            as a call does; a sample without a wanted row keeps its centre and an infinite margin.
        """
        samples, rows = wanted.nonzero().unbind(1)
        whole = Problem(PlainDynamics(model), region, C, rhs, torch.arange(len(region)), stop=stop)
        best = Found.nothing(whole)
        if not len(samples):
            return best.points, best.margins
        own = whole[samples]
        found, _ = self._descend(own, own.region.project(points[samples, rows]), row_loss(rows))
        # Of the rows of a sample the lowest, the first of equals.
        for k in found.margins.argsort(descending=True, stable=True).tolist():
            best.points[samples[k]], best.margins[samples[k]] = found.points[k], found.margins[k]
        return best.points, best.margins

    def _descend(self, problem: Problem, x: Tensor, loss: RowLoss) -> tuple[Found, Tensor]:
        """Steps up a loss; and for every sample whether it had no gradient anywhere."""
        found = Found.nothing(problem)
        found.points.copy_(x)
        blind = torch.ones_like(found.margins, dtype=torch.bool)
        steps, reach = self.steps, problem.region.spread(problem.region.radii_down())
        for step in range(steps if problem.movable else 0):
            _, gradient, margins = problem.climb(x, loss)
            found.note(x, margins)
            blind &= vanishing(gradient)
            if problem.stop():
                return found, blind
            size = self.step_size * (1 - 0.95 * step / steps if self.decay else 1) * reach
            x = problem.region.project(x + size * problem.direction(gradient))
        found.note(x, problem.judge(x))
        return found, blind
