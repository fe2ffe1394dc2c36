"""What HiGHS makes of parts of a region: where no unit is unstable, the end of a tree; where few are, points to try.

Where none is the relaxation is exact, so that its optimum decides the part: above the goal, HiGHS's shadow prices are
multipliers that prove it; below, its minimiser is a counterexample. Neither is believed: the prices are rounded to
float32 and bounded as any others are (`verideq.certify.ascent.proved`), and the minimiser is tried on the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.certify.ascent import Multipliers, proved
from verideq.certify.backward import Scene
from verideq.certify.program import Encoding, Outcome, Program, cells, encode, fits

LOADING = 0.5
"""Seconds that it takes to load HiGHS, the first time, and `SECONDS_A_CELL` to multiply a network out."""
SECONDS_A_CELL = 5e-7
LIMIT = 40
"""Binary variables of a sample, one for every unit that is not known to be on or off: more take too long."""


@dataclass(frozen=True)
class Solved:
    """A part that was solved.

    Args:
        bound: of the row, proved by the multipliers; ``-inf`` where there are none.
        multipliers: by node, (1, 1, *state).
        point: (*features) where the program has its minimum; ``None`` where it has none.
    """

    bound: float
    multipliers: Multipliers
    point: Tensor | None


class Leaves:
    """Solves parts of a scene's region, where that would `decide` them; one network is multiplied out once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        # The dual ends at a maximum, and what it leaves open there no program over the same boxes decides.
        self.decide = fits(scene) and all(node.operation.kind != "max_pool2d" for node in scene.graph.nodes)
        self.encoding: Encoding | None = None

    @torch.no_grad()
    def solve(self, scene: Scene, place: int, row: Tensor, enough: float, until: float) -> Solved:
        """The least value of a row, (outputs,), on one part.

        Args:
            scene: of parts, and `place`: this one's place in it.
            enough: what the bound has to exceed where the part is empty, because there it has no end.
            until: `time.monotonic` at which to give up.
        """
        if self.encoding is None:
            self.encoding = encode(self.scene)
        own = scene.select(torch.tensor([place], device=row.device))
        program = Program(self.encoding, own, 0, integer=False)
        answer = program.least(row, until)
        if answer.outcome is Outcome.OPTIMAL:
            return self._proved(own, row, answer.multipliers, answer.point)
        if answer.outcome is not Outcome.EMPTY:
            return Solved(-math.inf, {}, None)
        # By this much every input breaks a row: the bound of anything at all grows with what that is multiplied by.
        broken = program.empty(until)
        if not broken.least > 0:
            return Solved(-math.inf, {}, None)
        none = {name: torch.zeros_like(g) for name, g in broken.multipliers.items()}
        lowest = self._proved(own, row, none, None).bound
        factor = 2 * max(enough - lowest, 0.0) / broken.least
        return self._proved(own, row, {name: factor * g for name, g in broken.multipliers.items()}, None)

    @torch.no_grad()
    def lowest(self, scene: Scene, place: int, row: Tensor, until: float) -> Tensor | None:
        """Where a row, (outputs,), is least on a part with few unstable units, (*features), or how far HiGHS came.

        ``None`` where there are too many, or where it has no point in time.
        """
        own = scene.select(torch.tensor([place], device=row.device))
        if not self.decide or sum(int(known.unstable.sum()) for known in own.relaxed.values()) > LIMIT:
            return None
        if self.encoding is None:
            if time.monotonic() + LOADING + SECONDS_A_CELL * cells(self.scene) > until:
                return None
            self.encoding = encode(self.scene)
        point = Program(self.encoding, own, 0, integer=True).least(row, until).point
        if point is None:
            return None
        point = point[None].to(row)
        return (point if own.region is None else own.region.project(point))[0]

    @staticmethod
    def _proved(own: Scene, row: Tensor, multipliers: Mapping[str, Tensor], point: Tensor | None) -> Solved:
        lower, found = proved(own, row[None], {name: g[None, None] for name, g in multipliers.items()})
        bound = float(lower)
        return Solved(-math.inf if math.isnan(bound) else bound, found, point)
