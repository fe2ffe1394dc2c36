"""Projected gradient descent (Madry et al., ICLR 2018), through the equilibrium by implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
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
        for restart in range(self.restarts if region.eps else 1):  # one look at the centre, where it is all there is
            active = (~(margins < 0)).nonzero().flatten()
            if not len(active) or stop():
                break
            part = region[active]
            start = part.center
            if restart:
                noise = uniform_noise(seed, indices[active.cpu()], region.eps, restart, tuple(start.shape[1:])).to(
                    start
                )
                start = part.project(
                    start + noise * float(region.eps) * (1.0 if part.weights is None else part.weights)
                )
            point, margin = self._descend(model, part, start, C[active], rhs[active], restart % 2 == 0, stop)
            better = margin < margins[active]
            best[active[better]], margins[active[better]] = point[better], margin[better]
        return best, margins

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
        found, margin = self._descend(model, own, start, C[samples], rhs[samples], rows, stop)
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
        loss_of: bool | Tensor,
        stop: Callable[[], bool],
    ) -> tuple[Tensor, Tensor]:
        """Steps down a loss: the smallest margin, the cross-entropy (``False``), or the row that a tensor names."""
        best, best_margin = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        steps = self.steps if region.eps else 0
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            rows = (C @ model(x)[:, :, None])[:, :, 0] - rhs
            margin = rows.detach().amin(1)
            better = (margin < best_margin).view(-1, *[1] * (x.dim() - 1))
            best = torch.where(better, x.detach(), best)
            best_margin = torch.minimum(margin, best_margin)
            if step == steps or stop():
                break
            if isinstance(loss_of, Tensor):
                loss = rows.gather(1, loss_of[:, None]).sum()
            elif loss_of:
                loss = rows.amin(1).sum()
            else:
                # Cross-entropy of the logits 0, -rows: log(1 + Σ exp(-rows)), to go up.
                loss = -torch.logsumexp(torch.cat((torch.zeros_like(rows[:, :1]), -rows), 1), 1).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            size = self.step_size * (1 - 0.95 * step / steps) * float(region.eps)
            x = region.project(x.detach() - size * _direction(gradient, region))
        return best, best_margin


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
