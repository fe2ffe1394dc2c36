"""Branch and bound on the linear dual: what one relaxation leaves open is cut in two, and each half bounded on its own.

Where a unit's pre-activation has one sign its relaxation is exact, so that the parts are smaller *and* easier. A part
inherits the multipliers of the part that it was cut from, and ascent (`verideq.certify.ascent`) goes on from there. A
part in which no unit is unstable is a linear program, which ascent solves only nearly: what it leaves open is solved
(`verideq.certify.leaf`), so that the search is complete for ReLUs and equilibria. Where there are few inputs they are
cut for what is no unit: maxima. Each (sample, row) has a tree of its own, grown where its bound is least; a
round takes the same number of parts from every tree, whatever the others do, and bounds all of them as one batch. The
worst point of every part is tried on the model: the search ends with a proof or, as often, with a counterexample.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.adjoint import ELEMENTS, Stage, opened, refined, rows_of
from verideq.certify.ascent import SPARE, Climb, Multipliers, Trial, ascended, climbed, proved, spare
from verideq.certify.backward import Scene, given
from verideq.certify.certificate import Proof, Split, Step, Then, Tree
from verideq.certify.footprint import Footprint
from verideq.certify.leaf import Leaves
from verideq.certify.method import Bounds, Prepared, Query
from verideq.clock import Accounts, OutOfTime, share
from verideq.graph import INPUT
from verideq.memory import fitting

PARTS = 8
"""Parts of a tree that are cut in a round."""
NODES = 4000
"""Parts that a row may be cut into where it is known how good its bound has to be."""
FREE_NODES = 100
"""And where it is not."""
DESCENTS = 4
"""Steps downhill from the worst point of a row without a goal, in a round: where to stop depends on it."""
GAP = 0.01
"""The share of the gap between bound and worst known point at the root that is left then."""
FEATURES = 10
"""Inputs with more features are not cut."""
SLICE = 0.05
"""The share of a sample's time that passes between two looks at the clock, about."""
HALF = 0.5
"""The share of a sample's time after which HiGHS is asked."""
DEPTH = 140
"""Cuts above one another: a checker reads no deeper trees."""
TIE = 1e-6
"""What a unit counts that costs nothing: it is cut when nothing else is left."""
CLIMB = Climb(steps=4, rate=0.1)
"""In every part, from the multipliers of the one that it was cut from."""


Cut = tuple[str, int, float]
"""Node (or the input), unit, threshold."""


@dataclass
class Part:
    """A part of a region, and what is known of one row on it.

    Args:
        cuts: that make it, each with whether it is above the threshold.
        multipliers: (1, *state) by node, as a certificate has them.
        bound: that they prove; infinite where they prove that the part is empty.
        cut: where to go on; ``None`` where there is nothing to cut.
        halves: below and above it; empty for a leaf.
    """

    cuts: tuple[tuple[Cut, bool], ...]
    multipliers: Multipliers
    bound: float = -math.inf
    cut: Cut | None = None
    halves: tuple[Part, ...] = ()

    def in_two(self) -> tuple[Part, ...]:
        """Below and above its cut."""
        cut = self.cut
        return () if cut is None else tuple(Part((*self.cuts, (cut, up)), self.multipliers) for up in (False, True))

    def leaves(self) -> Iterator[Part]:
        """The parts that were not cut."""
        waiting = [self]
        while waiting:
            part = waiting.pop()
            waiting += part.halves[::-1]
            if not part.halves:
                yield part


@dataclass
class Search:
    """The tree of one row of one sample.

    Args:
        sample: its place in the stage.
        row: its place among the rows.
        goal: what the bound has to exceed; infinite for as good as it goes.
        spare: a difference that only rounding makes.
        root: the whole region.
        attained: the least that was measured, and where.
        step: of the descent from there, in units of the region's width.
        nodes: that were bounded.
        heap: of the leaves that are open, by bound.
    """

    sample: int
    row: int
    goal: float
    spare: float
    root: Part
    attained: float = math.inf
    point: Tensor | None = None
    step: float = 0.25
    nodes: int = 0
    heap: list[tuple[float, int, Part]] = field(default_factory=list)

    def bounded(self, part: Part) -> None:
        """A part was bounded."""
        self.nodes += 1
        heapq.heappush(self.heap, (part.bound, self.nodes, part))

    def tried(self, point: Tensor, value: float) -> None:
        """The row was measured at a point."""
        if value < self.attained:
            self.attained, self.point = value, point

    def take(self) -> list[Part]:
        """The next parts to cut, the worst first; none when the search is over."""
        free = self.goal == math.inf
        gap = self.attained - self.root.bound
        enough, limit = (self.attained - max(self.spare, GAP * gap), FREE_NODES) if free else (self.goal, NODES)
        chosen: list[Part] = []
        while len(chosen) < PARTS and self.heap and not self.heap[0][0] > enough:
            # The worst part decides: with it open, nothing that is done elsewhere helps.
            if self.nodes >= limit or self.heap[0][2].cut is None:
                self.heap.clear()
            else:
                chosen.append(heapq.heappop(self.heap)[2])
        return chosen

    @property
    def lower(self) -> float:
        """What the tree proves."""
        return min(part.bound for part in self.root.leaves())


@torch.no_grad()
def branch_and_bound(prepared: Prepared, query: Query) -> Bounds:
    """The adjoint bounds, and for what they leave open branch and bound until the deadline or a limit of parts."""
    return refined(prepared, query, lambda stage: Branching(ascended(stage)).run())


class Branching:
    """Trees for all open rows of a stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.C, self.trial = stage, rows_of(stage.query, stage.scene), Trial(stage.prepared)
        self.witnesses, self.leaves = dict(stage.witnesses), Leaves(stage.scene)
        self.struck: set[int] = set()
        self.pace = 1e-6
        """Seconds a part."""
        self.features = stage.query.box.lower[0].numel()
        query, best = stage.query, stage.best
        free = query.upper or query.rhs is None
        self.searches = []
        for i, k in opened(query, best.lower).nonzero().tolist():
            if i not in self.witnesses:
                own = {name: g[i, k][None].float() for name, g in best.multipliers.items()}
                goal = math.inf if free or query.rhs is None else float(query.rhs[i, k])
                room = float(spare(stage.scene.select(torch.tensor([i])), self.C[i, k][None]))
                self.searches.append(Search(i, k, goal, room, Part((), own)))
        size = sum(known.z.lower[0].numel() for known in stage.scene.relaxed.values())
        shape = Footprint.of(stage.prepared, query.box.lower, 1)
        room = fitting(shape.climb, shape.device, "a part of a region")
        self.fitting = max(1, min(ELEMENTS // (16 * size + 1), room))
        self.accounts = Accounts(len(query), (query.deadline - time.monotonic()) / max(1, len(query)))

    def run(self) -> Bounds:
        """Search until everything is closed, or broken, or as good as the limits let it be."""
        self.bound([(search, search.root) for search in self.searches], replace(CLIMB, steps=0))
        while True:
            self.strike()
            active = [
                search
                for search in self.searches
                if search.sample not in self.witnesses and not self.accounts.late(search.sample)
            ]
            taken = [(search, part) for search in active for part in search.take()]
            for _, part in taken:
                part.halves = part.in_two()
            halves = [(search, half) for search, part in taken for half in part.halves]
            if not halves:
                self.stage.query.pay(self.accounts.spent)
                return self.bounds()
            self.bound(halves, CLIMB)
            for _, part in taken:  # those for which there was no time
                part.halves = part.halves if all(half.bound > -math.inf for half in part.halves) else ()
            going = {id(search): search for search, _ in taken if search.goal == math.inf and search.point is not None}
            with suppress(OutOfTime):
                for _ in range(DESCENTS if going else 0):
                    self.descend(list(going.values()))

    def strike(self) -> None:
        """Ask HiGHS for points to try, for each sample once: when half of its time is over and little may be left."""
        waiting = (search.sample for search in self.searches if search.heap and search.goal < math.inf)
        for i in {i for i in waiting if i not in self.struck | set(self.witnesses) and self.accounts.late(i, HALF)}:
            self.struck.add(i)
            searches = [search for search in self.searches if search.sample == i and search.heap]
            with self.accounts.charged([i]) as deadline:
                for k, search in enumerate(sorted(searches, key=lambda search: search.heap[0][0])):
                    if i in self.witnesses:
                        break
                    C = self.C[i, search.row]
                    point = self.leaves.lowest(self.stage.scene, i, C, share(deadline, min(2, len(searches) - k)))
                    if point is not None:
                        self.tried(search, point, float(self.trial.values(point[None], C[None])))

    def bound(self, parts: list[tuple[Search, Part]], climb: Climb) -> None:
        """Bound some parts: those of samples that have time left."""
        waiting = list(parts)
        while waiting:
            size = max(1, int(min(self.fitting, SLICE * self.accounts.limit / self.pace)))  # less than none may be left
            chunk = [pair for pair in waiting[:size] if not self.accounts.late(pair[0].sample)]
            del waiting[:size]
            if chunk:
                started = time.monotonic()
                with self.accounts.charged([search.sample for search, _ in chunk]) as deadline, suppress(OutOfTime):
                    self._bound(chunk, climb, deadline)
                self.pace = max((time.monotonic() - started) / len(chunk), 1e-6)

    def _bound(self, parts: list[tuple[Search, Part]], climb: Climb, deadline: float) -> None:
        device = self.C.device
        i, k = (
            torch.tensor([getattr(search, name) for search, _ in parts], device=device) for name in ("sample", "row")
        )
        scene, C = self.scene(i, [part for _, part in parts]), self.C[i, k]
        goal = torch.tensor([search.goal for search, _ in parts], dtype=C.dtype, device=device)
        # A node behind which rows end, at a maximum, has none.
        names = [name for name in scene.relaxed if all(name in part.multipliers for _, part in parts)]
        found = {name: torch.stack([part.multipliers[name] for _, part in parts]).to(C) for name in names}
        begun, found = found, climbed(scene, C, found, goal, climb, deadline)
        lower, found = proved(scene, C, found)
        # Where a part is empty the dual has no end, and where it went to is why. Over the box, because a ball that the
        # part does not meet needs no multipliers, and then a checker has nothing to look for it with.
        none, why = proved(
            replace(scene, region=None), torch.zeros_like(C), {name: g - begun[name] for name, g in found.items()}
        )
        empty = (none > self.room(scene, why)) & (lower <= goal)
        lower = torch.where(empty, torch.inf, lower)
        found = {name: torch.where(empty.view(-1, *[1] * (g.dim() - 1)), why[name], g) for name, g in found.items()}
        cuts = self.cuts(scene, C, found)
        points, values = self.trial.worst(scene, C, {name: given(g) for name, g in found.items()})
        ended = ~torch.stack([known.unstable.flatten(1).any(1) for known in scene.relaxed.values()] or [empty]).any(0)
        for place in (ended & ~empty & ~(lower > goal)).nonzero().flatten().tolist() if self.leaves.decide else []:
            search = parts[place][0]
            self.tried(search, points[place], float(values[place]))
            enough = search.goal if search.goal < math.inf else search.attained
            solved = self.leaves.solve(scene, place, C[place], enough + search.spare, deadline)
            if solved.bound > lower[place]:
                lower[place] = solved.bound
                for name, g in solved.multipliers.items():
                    found[name][place] = g[0]
            if solved.point is not None:
                cuts[place] = None  # it is as good as it gets
                point = solved.point[None].to(points)
                own = point if scene.region is None else scene.region[place : place + 1].project(point)
                self.tried(search, own[0], float(self.trial.values(own, C[place : place + 1])))
        for place, (search, part) in enumerate(parts):
            part.multipliers = {name: g[place].float() for name, g in found.items()}
            part.bound, part.cut = float(lower[place]), cuts[place] if len(part.cuts) < DEPTH else None
            if part.bound == math.inf:
                continue
            search.bounded(part)
            self.tried(search, points[place], float(values[place]))

    @staticmethod
    def room(scene: Scene, multipliers: Multipliers) -> Tensor:
        """(rows,) what a checker's rounding may take from the bound of no row at all."""
        total = torch.zeros(
            scene.samples, dtype=scene.values[INPUT].lower.dtype, device=scene.values[INPUT].lower.device
        )
        for name, g in multipliers.items():
            pre = scene.relaxed[name].pre
            total += (g[:, 0].abs() * torch.maximum(pre.lower.abs(), pre.upper.abs())).flatten(1).sum(1)
        return SPARE * total

    def tried(self, search: Search, point: Tensor, value: float) -> None:
        """A row was measured at a point: that may be the end of the search."""
        search.tried(point, value)
        if value < search.goal < math.inf:
            self.witnesses.setdefault(search.sample, point)

    def descend(self, searches: list[Search]) -> None:
        """One step downhill from the worst point of each search, a shorter one next time where it leads nowhere."""
        points, box = (
            torch.stack([search.point for search in searches if search.point is not None]),
            self.stage.query.box,
        )
        i, k = (
            torch.tensor([getattr(search, name) for search in searches]).to(points.device) for name in ("sample", "row")
        )
        steps = points.new_tensor([search.step for search in searches]).view(-1, *[1] * (points.dim() - 1))
        moved = points - steps * box.select(i).width * self.trial.slopes(points, self.C[i, k]).sign()
        moved = torch.minimum(torch.maximum(moved, box.lower[i]), box.upper[i])
        moved = moved if self.stage.query.region is None else self.stage.query.region[i].project(moved)
        for search, point, value in zip(searches, moved, self.trial.values(moved, self.C[i, k]).tolist(), strict=True):
            search.step *= 1 if value < search.attained else 0.5
            self.tried(search, point, value)

    def scene(self, samples: Tensor, parts: list[Part]) -> Scene:
        """What is known on some parts."""
        scene = self.stage.scene.select(samples)
        places: dict[str, list[tuple[int, int, float, bool]]] = {}
        for place, part in enumerate(parts):
            for (name, unit, at), above in part.cuts:
                places.setdefault(name, []).append((place, unit, at, above))
        values, relaxed = dict(scene.values), dict(scene.relaxed)
        for name, cuts in places.items():
            box = values[INPUT] if name == INPUT else relaxed[name].pre
            box = Box(box.lower.clone(), box.upper.clone())
            for side, above in ((box.lower, True), (box.upper, False)):
                own = [cut for cut in cuts if cut[3] is above]
                where = tuple(torch.tensor([cut[n] for cut in own], device=side.device).long() for n in range(2))
                side.flatten(1).index_put_(where, side.new_tensor([cut[2] for cut in own]))
            if name == INPUT:
                values[INPUT] = box
            else:
                relaxed[name] = relaxed[name].with_pre(box)
        return replace(scene, values=values, relaxed=relaxed)

    def cuts(self, scene: Scene, C: Tensor, multipliers: Multipliers) -> list[Cut | None]:
        """Where to cut each part: at the unit whose upper line costs the most; where no unit is left, at an input."""
        best = C.new_full((len(C),), 0.0)
        chosen: list[Cut | None] = [None] * len(C)
        for name, known in scene.relaxed.items():
            low, high = known.pre.lower, known.pre.upper
            # The line is furthest from the ReLU where P = 0.
            gap = torch.where(known.unstable, -low * high / (high - low), 0.0)
            lost = (multipliers[name][:, 0] * known.divisor()).clamp(max=0).neg() if name in multipliers else 0.0
            score, unit = (gap * (lost + TIE)).flatten(1).max(1)
            for place in (score > best).nonzero().flatten().tolist():
                chosen[place] = name, int(unit[place]), 0.0
            best = torch.maximum(best, score)
        if None in chosen and self.features <= FEATURES:
            _, rows, _ = replace(scene, rigorous=False).back(
                {scene.output: C}, {name: given(g) for name, g in multipliers.items()}
            )
            box = scene.values[INPUT]
            width = box.width.flatten(1)
            weight, unit = (width if rows is None else width * (rows.flatten(1).abs() + TIE)).max(1)
            middle = box.center.flatten(1)
            for place, cut in enumerate(chosen):
                if cut is None and weight[place] > 0:
                    at = float(middle[place, unit[place]])
                    chosen[place] = INPUT, int(unit[place]), at
        return chosen

    def bounds(self) -> Bounds:
        """The best of the trees and of what there was before."""
        lower = self.stage.best.lower.clone()
        trees: dict[int, dict[int, Part]] = {}
        for search in self.searches:
            if search.lower > lower[search.sample, search.row]:
                lower[search.sample, search.row] = search.lower
                trees.setdefault(search.sample, {})[search.row] = search.root
        stage = replace(self.stage, best=replace(self.stage.best, lower=lower), witnesses=self.witnesses)
        bounds = stage.bounds()
        count = bounds.box.lower.shape[1]
        return replace(bounds, proof=lambda i: self.proof(i, count, trees.get(i, {})))

    def proof(self, i: int, count: int, trees: dict[int, Part]) -> Proof:
        """Why the first `count` rows of a sample hold."""
        trees = {row: root for row, root in trees.items() if row < count}
        if not trees:
            return self.stage.proof(i, count)
        best, before = self.stage.best, tuple(self.stage.before[i])
        # What all parts have in common stands once.
        cases: list[tuple[Step, ...]] = [before] if before else []
        whole: list[tuple[tuple[int, ...], Tree]] = []

        def case(step: Step) -> int:
            cases.append((step,))
            return len(cases) - 1

        def tree(part: Part) -> Tree:
            if not part.halves or part.cut is None:
                own = {name: g.cpu().numpy() for name, g in part.multipliers.items()}
                return case(Step(empty=part.bound == math.inf, multipliers=own))
            name, unit, at = part.cut
            below, above = part.halves
            return Split(name, unit, Fraction(at), tree(below), tree(above))

        rest = [row for row in range(count) if row not in trees]
        plain = [row for row in rest if bool(best.plain[i, row])]
        for rows, step in ((plain, Step()), (rest := [row for row in rest if row not in plain], best.step(i, rest))):
            if rows:
                whole.append((tuple(rows), case(step)))
        whole += [((row,), tree(root)) for row, root in trees.items()]
        common = tuple((rows, Then(0, found) if before else found) for rows, found in whole)
        return replace(self.stage.known(i), cases=tuple(cases), trees=common)
