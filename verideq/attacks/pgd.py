"""Projected gradient descent (Madry et al., ICLR 2018), through the equilibrium by implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verideq.attacks.noise import uniform_noise
from verideq.region import Region


@dataclass(frozen=True)
class PGD:
    """A PGD attack on linear specifications ``C @ model(x) > rhs``.

    The first restart starts at the centre with the margin loss ``min_k (C f - rhs)_k``; the others from uniform noise,
    with the cross-entropy of the margins and the margin loss in turn.

    Args:
        steps: a restart.
        restarts: the number of them.
        step_size: of the first step, in units of eps; it falls linearly to a twentieth.
    """

    steps: int = 20
    restarts: int = 3
    step_size: float = 0.5

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
        best = region.center.clone()
        margins = torch.full((len(best),), torch.inf, dtype=best.dtype, device=best.device)
        # One look at the centre where it is all there is. After the first restart they come in pairs, one with either
        # loss: a small batch takes as long as one twice its size.
        restarts = range(self.restarts if any(region.radii) else 1)
        for some in (restarts[:1], *(restarts[k : k + 2] for k in restarts[1::2])):
            active = (~(margins < 0)).nonzero().flatten()
            if not len(active) or stop():
                break
            part, count = region[active.repeat(len(some))], len(active)
            starts = [self._start(region[active], indices[active.cpu()], seed, restart) for restart in some]
            losses = [_least if restart % 2 == 0 else _likelihood for restart in some]

            def loss(rows: Tensor, losses: Sequence[Loss] = losses, count: int = count) -> Tensor:
                return torch.cat([of(part) for of, part in zip(losses, torch.split(rows, count), strict=True)])

            both = active.repeat(len(some))
            found, margin = self._descend(model, part, torch.cat(starts), C[both], rhs[both], loss, stop)
            for point, value in zip(torch.split(found, count), torch.split(margin, count), strict=True):
                better = value < margins[active]
                best[active[better]], margins[active[better]] = point[better], value[better]
        return best, margins

    @staticmethod
    def _start(region: Region, indices: Tensor, seed: int, restart: int) -> Tensor:
        center = region.center
        if not restart:
            return center
        noise = uniform_noise(seed, indices, region.radii, restart, tuple(center.shape[1:])).to(center)
        reach = region.spread(region.radii_down())
        return region.project(center + noise * (reach if region.weights is None else reach * region.weights))

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
        best = region.center.clone()
        margins = torch.full((len(best),), torch.inf, dtype=best.dtype, device=best.device)
        samples, rows = wanted.nonzero().unbind(1)
        if not len(samples):
            return best, margins
        own = region[samples]
        start = own.project(points[samples, rows])

        def row(values: Tensor) -> Tensor:
            return values.gather(1, rows[:, None])[:, 0]

        found, margin = self._descend(model, own, start, C[samples], rhs[samples], row, stop)
        # Of the rows of a sample the lowest, the first of equals.
        for k in margin.argsort(descending=True, stable=True).tolist():
            best[samples[k]], margins[samples[k]] = found[k], margin[k]
        return best, margins

    def _descend(
        self,
        model: nn.Module,
        region: Region,
        x: Tensor,
        C: Tensor,
        rhs: Tensor,
        loss: Loss,
        stop: Callable[[], bool],
    ) -> tuple[Tensor, Tensor]:
        """Steps down a loss."""
        best, best_margin = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        steps, reach = self.steps if any(region.radii) else 0, region.spread(region.radii_down())
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            rows = (C @ model(x)[:, :, None])[:, :, 0] - rhs
            margin = rows.detach().amin(1)
            better = (margin < best_margin).view(-1, *[1] * (x.dim() - 1))
            best = torch.where(better, x.detach(), best)
            best_margin = torch.minimum(margin, best_margin)
            if step == steps or stop():
                break
            (gradient,) = torch.autograd.grad(loss(rows).sum(), x)
            size = self.step_size * (1 - 0.95 * step / steps) * reach
            x = region.project(x.detach() - size * _direction(gradient, region))
        return best, best_margin


Loss = Callable[[Tensor], Tensor]
"""Of the rows of a specification, (batch, rows): (batch,) numbers to go down."""


def _least(rows: Tensor) -> Tensor:
    """The smallest margin."""
    return rows.amin(1)


def _likelihood(rows: Tensor) -> Tensor:
    """The logarithm of the label's probability: the logits are 0 and -rows."""
    return -torch.logsumexp(torch.cat((torch.zeros_like(rows[:, :1]), -rows), 1), 1)


def _direction(gradient: Tensor, region: Region) -> Tensor:
    """The steepest direction of the norm, scaled by the weights of the region."""
    if region.weights is not None:
        gradient = gradient * region.weights
    flat = gradient.flatten(1)
    if region.norm == "l2":
        direction = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
    else:
        # A gradient that is zero up to rounding has no sign: it would depend on the batch.
        direction = flat.sign() * (flat.abs() > 1e-9 * flat.abs().amax(1, keepdim=True))
    shaped: Tensor = direction.view_as(gradient)
    return shaped if region.weights is None else shaped * region.weights
