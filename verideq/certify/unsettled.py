"""Ascent on the multipliers themselves, for layers without a gauge: no adjoint equilibrium need settle there.

The dual is concave in the multipliers of all nodes together, and a smoothed gradient (Nesterov, *Smooth minimization of
non-smooth functions*, 2005) moves every coefficient in proportion where a plain one would pick corners by noise. It
takes more steps than `verideq.certify.ascent` on slopes, and does not get as far. Steps are Adam's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from verideq.box import TINY
from verideq.certify.adjoint import rules
from verideq.certify.backward import Scene, given, most

Multipliers = dict[str, Tensor]
"""By node, (rows, 1, *state): every row is a sample of its own."""

FIRST, SECOND, FLOOR, LOOK = 0.9, 0.98, 1e-2, 5
RATE, SMOOTH = 0.03, 0.02
"""Of the first step, in units of a row's largest multiplier, and see `Scene.smooth`; both fall quadratically."""


def moved(
    scene: Scene, C: Tensor, start: Mapping[str, Tensor], goal: Tensor, steps: int, deadline: float = math.inf
) -> Multipliers:
    """Better multipliers for rows each of which is a sample of its own.

    Args:
        scene: of (rows,) samples.
        C: (rows, outputs).
        start: multipliers by node, (rows, 1, *state).
        goal: (rows,) a row above it is left alone.
        steps: at most.
        deadline: `time.monotonic` at which to stop.
    """
    scene, found, top = replace(scene, rigorous=False), dict(start), torch.full_like(goal, -torch.inf)
    # Steps need a length also where the best bound so far has no multipliers.
    _, usual = scene.least({scene.output: C}, rules(scene, "adaptive"))
    walks = {name: _Walk.begin(scene, name, start[name], usual[name]) for name in usual}
    alive = torch.arange(len(C), device=C.device)
    for step in range(steps if walks else 0):
        left = 1 - step / steps
        low, slopes = _slopes(replace(scene, smooth=SMOOTH * max(left**2, 0.01)), C, walks)
        better = low > top[alive]
        top[alive] = torch.where(better, low, top[alive])
        for name, walk in walks.items():
            found[name] = found[name].index_put((alive[better],), walk.g[better])
        walks = {name: walk.on(slopes[name], step, RATE * left**2) for name, walk in walks.items()}
        if step % LOOK == LOOK - 1:
            open_ = (~(low > goal)).nonzero().flatten()
            if time.monotonic() > deadline or not len(open_):
                break
            if len(open_) < len(alive):
                alive, scene, C, goal = alive[open_], scene.select(open_), C[open_], goal[open_]
                walks = {name: _Walk(*(x[open_] for x in walk)) for name, walk in walks.items()}
    return found


def _slopes(scene: Scene, C: Tensor, walks: Mapping[str, _Walk]) -> tuple[Tensor, Multipliers]:
    """The bounds of rows, (rows,), and their smoothed gradients by node."""
    with torch.enable_grad():
        own = {name: walk.g.requires_grad_() for name, walk in walks.items()}
        low, _ = scene.least({scene.output: C}, {name: given(g) for name, g in own.items()})
        slopes = torch.autograd.grad(low.sum(), list(own.values()))
    return low.detach()[:, 0], dict(zip(own, slopes, strict=True))


class _Walk(NamedTuple):
    """Where the multipliers of one node are, (rows, 1, *state), and Adam's averages; the others broadcast.

    Args:
        g: the multipliers.
        mean: of the gradients.
        square: of their squares.
        scale: of each row's multipliers.
        grid: gradients are rounded to multiples of it. Without that the last bits of a product, which differ with the
            size of the batch, would grow from step to step.
        floor: below which none may be.
        roof: above which.
    """

    g: Tensor
    mean: Tensor
    square: Tensor
    scale: Tensor
    grid: Tensor
    floor: Tensor
    roof: Tensor

    @staticmethod
    def begin(scene: Scene, name: str, g: Tensor, usual: Tensor) -> _Walk:
        """Before the first step; `usual`: what CROWN's multipliers are like."""
        known, shape = scene.relaxed[name], (-1, *[1] * (g.dim() - 1))
        largest = torch.maximum(most(known.pre.lower[:, None]), most(known.pre.upper[:, None]))
        return _Walk(
            g,
            torch.zeros_like(g),
            torch.zeros_like(g),
            torch.maximum(most(g), most(usual)).view(shape),
            torch.exp2(torch.frexp(largest + TINY).exponent.to(g) - 20).view(shape),
            known.floor[:, None].to(g),
            known.roof[:, None].to(g),
        )

    def on(self, slope: Tensor, step: int, rate: float) -> _Walk:
        """One step upwards."""
        slope = (slope / self.grid).round() * self.grid
        mean = FIRST * self.mean + (1 - FIRST) * slope
        square = SECOND * self.square + (1 - SECOND) * slope * slope
        size = (square / (1 - SECOND ** (step + 1))).sqrt()
        size = size + FLOOR * most(size).view(self.scale.shape) + self.grid
        g = self.g.detach() + rate * self.scale * (mean / (1 - FIRST ** (step + 1)) / size)
        g = torch.clamp(g, self.floor, self.roof)
        return self._replace(g=torch.where(g.isfinite(), g, 0.0), mean=mean, square=square)
