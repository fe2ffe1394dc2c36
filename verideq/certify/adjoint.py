"""The adjoint bound: CROWN for networks with equilibria, in one pass backwards.

The adjoint equilibrium ``g = D(q) q``, ``q = c + Wᵀ g`` contracts under the gauge of the layer (``|D| <= 1`` there), in
about as many steps as the equilibrium itself. It is solved for every row of the specification at once; each row keeps
the best of three choices of lower slopes and of the interval bound. Theorem and rounding: `verideq.certify.backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verideq.box import TINY, Box
from verideq.certify.backward import Relaxed, Rule, Scene, crown
from verideq.certify.certificate import Proof, Step
from verideq.certify.enclosure import pre_activations
from verideq.certify.footprint import ROUNDS, WORK, Footprint
from verideq.certify.interval import Arithmetic
from verideq.certify.method import Bounds, Prepared, Query, boxes_of, states_of
from verideq.clock import OutOfTime, tick, until
from verideq.graph import INPUT
from verideq.memory import fitting

SLOPES = ("adaptive", "zero", "one")


MOVED = 0.01
"""A round that narrows the pre-activations by a smaller share is the last, and left out."""
WORTH = 1e-3
"""And a unit's end that moves by less, of the unit's width: a checker would have to read why."""
PROBE = 8
"""Units that show whether a node's can be tightened at all, where it has more than twice as many."""
LITTLE = 1e-6
"""The share by which they have to."""
TOGETHER = 2**20
"""Coefficients of rows that tighten units at a time: the clock is looked at in between."""
ELEMENTS = 2**24
"""Coefficients that are worked on at a time, if memory allows."""


@dataclass(frozen=True)
class Stage:
    """What is known of some samples on the way from one method to the next.

    Args:
        prepared: the model.
        query: about these samples.
        scene: their relaxed nodes.
        arithmetic: that enclosed them.
        best: of every row so far.
        before: the tightenings of every sample.
        witnesses: see `Bounds`, and `closer`.
    """

    prepared: Prepared
    query: Query
    scene: Scene
    arithmetic: Arithmetic
    best: Best
    before: list[list[Step]]
    witnesses: Mapping[int, Tensor] = field(default_factory=dict)
    closer: Mapping[int, str] = field(default_factory=dict)

    def named(self, method: str) -> Stage:
        """The same, with the name of the method for the samples of which it leaves nothing open."""
        places = self.query.closed(self.best.lower).nonzero().flatten().tolist()
        return replace(self, closer={**dict.fromkeys(places, method), **self.closer})

    def bounds(self) -> Bounds:
        """As a method hands it back."""
        lower, count = self.best.lower, self.best.lower.shape[1] // (2 if self.query.upper else 1)
        upper = -lower[:, count:] if self.query.upper else torch.full_like(lower, torch.inf)
        steps = self.arithmetic.steps
        steps = torch.zeros(len(self.query), dtype=torch.long) if steps is None else steps
        return Bounds(
            Box(lower[:, :count], upper), steps, lambda i: self.proof(i, count), self.witnesses, closer=self.closer
        )

    def proof(self, i: int, count: int) -> Proof:
        """Why the first `count` rows of a sample hold."""
        before, own = tuple(self.before[i]), self.best.step(i, range(count))
        plain = [row for row in range(count) if bool(self.best.plain[i, row])]
        rest = [row for row in range(count) if row not in plain]
        if not plain or not rest:
            return replace(self.known(i), cases=((*before, own if rest else Step()),))
        cases = (*before, Step()), (*before, self.best.step(i, rest))
        return replace(self.known(i), cases=cases, trees=((tuple(plain), 0), (tuple(rest), 1)))

    def known(self, i: int) -> Proof:
        """A sample's boxes, as a certificate has them, and nothing about its rows."""
        return Proof(boxes_of(self.arithmetic.boxes, i), states_of(self.arithmetic.states, i))


@torch.no_grad()
def adjoint(prepared: Prepared, query: Query) -> Bounds:
    """The best of the adjoint bound's slopes and of the interval bound, row by row."""
    return first(prepared, query).bounds()


@torch.no_grad()
def adjoint_refined(prepared: Prepared, query: Query) -> Bounds:
    """The adjoint bound over pre-activations that were tightened by the same bound, for samples that need it."""
    return refined(prepared, query, Stage.bounds)


def first(prepared: Prepared, query: Query, *, tightened: bool = False) -> Stage:
    """All samples of a query by the adjoint bound, their pre-activations `tightened` by it or not."""
    before: list[list[Step]] = [[] for _ in range(len(query))]
    scene, arithmetic = scene_of(prepared, query, before if tightened else None)
    return Stage(prepared, query, scene, arithmetic, crossed(scene, query), before)


def refined(prepared: Prepared, query: Query, finish: Callable[[Stage], Bounds]) -> Bounds:
    """The adjoint bound for every sample; for those that it leaves open what `finish` makes of tightened boxes."""
    stage = first(prepared, query)
    found = stage.bounds()
    left = (~query.closed(found.box.lower)).nonzero().flatten()
    size = max((known.z.lower[0].numel() for known in stage.scene.relaxed.values()), default=1)
    shape = Footprint.of(prepared, query.box.lower, stage.best.lower.shape[1])
    most = min(ELEMENTS // (2 * size * size), shape.samples_at_once("adjoint-refined"))
    for part, own in query.parts(left, max(1, most)):
        with suppress(OutOfTime), until(own.deadline):
            found = found.replaced(part, finish(first(prepared, own, tightened=True).named("adjoint-refined")))
    return found


def crossed(scene: Scene, query: Query) -> Best:
    """All rows of the samples that intervals leave open by the first choice of slopes, open ones by the others too."""
    C = rows_of(query, scene)
    best = Best.interval(scene, C)
    left = (~query.closed(best.lower)).nonzero().flatten()
    if not len(left) or not scene.relaxed:
        return best
    own = scene if len(left) == len(query) else scene.select(left)
    lower, used = own.least({own.output: C[left].flatten(0, 1)}, rules(own, SLOPES[0]))
    rows = torch.arange(C.shape[1], device=C.device)
    i, k = left.repeat_interleave(len(rows)), rows.repeat(len(left))
    best = best.improved(i, k, lower.flatten(), {name: g.flatten(0, 1) for name, g in used.items()})
    for slopes in SLOPES[1:]:
        i, k = opened(query, best.lower).nonzero().unbind(1)
        if not len(i):
            break
        if 2 * len(i) < best.lower.numel():  # every row a sample of its own
            own = scene.select(i)
            lower, used = own.least({own.output: C[i, k]}, rules(own, slopes))
        else:
            lower, used = scene.least({scene.output: C.flatten(0, 1)}, rules(scene, slopes))
            i, k = torch.ones_like(best.plain).nonzero().unbind(1)
        best = best.improved(i, k, lower.flatten(), {name: g.flatten(0, 1) for name, g in used.items()})
    return best


def opened(query: Query, lower: Tensor) -> Tensor:
    """(samples, rows) the rows that need a better bound."""
    wanted = ~query.closed(lower)[:, None].expand_as(lower)
    return wanted if query.upper or query.rhs is None else wanted & ~(lower > query.rhs)


def scene_of(prepared: Prepared, query: Query, steps: list[list[Step]] | None = None) -> tuple[Scene, Arithmetic]:
    """Interval bounds of everything, node by node: where the duals begin.

    Args:
        steps: of every sample, to tighten pre-activations on the way and to write down how; ``None``: not to.
    """
    prepared.require_gauges()
    arithmetic = prepared.arithmetic(query)
    known: dict[str, Box] = {INPUT: query.box}
    relaxed: dict[str, Relaxed] = {}
    shape = Footprint.of(prepared, query.box.lower, 1)
    at_once = fitting(shape.row, shape.device, "a row that tightens a unit") if steps is not None else 0

    scene = Scene(prepared.graph, known, relaxed, query.region, balls=arithmetic.balls.known)
    for node in prepared.graph.nodes:
        v = [known[name] for name in node.inputs]
        known[node.name] = arithmetic.follow(node, v)
        if node.operation.kind == "relu":
            relaxed[node.name] = Relaxed(node, v[0], known[node.name])
        elif node.operation.kind == "equilibrium":
            layer, z = prepared.layer(node.name), arithmetic.boxes.get(node.name, known[node.name])
            pre, drift = pre_activations(layer, v[0], z), arithmetic.drifts.get(node.name)
            settles = node.name in prepared.gauges
            known_z = Relaxed(node, pre, z, layer.operator(), drift, layer.activation.ceiling, settles)
            relaxed[node.name] = known_z.with_pre(pre)
        if node.name in relaxed:
            if steps is not None:
                refine(scene, node.name, steps, at_once)
            known[node.name] = relaxed[node.name].computed
    return scene, arithmetic


def refine(scene: Scene, name: str, steps: list[list[Step]], at_once: int) -> None:
    """Tighten the pre-activations of a node, the unstable units' lower and upper ends, until little moves.

    Where there are many, a few show first whether anything is to be had: behind one affine map of the input nothing is.

    Args:
        steps: of every sample: how, written down.
        at_once: see `tighten`.
    """
    first = scene.relaxed[name]
    most = max(1, WORK // (2 * first.pre.lower[0].numel()))
    moving = torch.ones(scene.samples, dtype=torch.bool, device=first.pre.lower.device)
    for turn in range(ROUNDS + 1):
        known = scene.relaxed[name]
        # The widest first. What is too much is too much for everyone, whatever memory there is.
        whole = torch.where(moving, known.unstable.flatten(1).sum(1).clamp(max=most), 0)
        counts = torch.where(whole > 2 * PROBE, PROBE, whole) if turn == 0 else whole
        rows = int(counts.max())
        if not rows:
            return
        width = torch.where(known.unstable, known.pre.width, -1.0).flatten(1)
        units = width.argsort(dim=1, descending=True, stable=True)[:, :rows]
        own_rows = torch.arange(rows, device=units.device) < counts[:, None]
        both = torch.cat((units, -1 - units), 1)
        multipliers, useful = tighten(scene, name, both, own_rows.repeat(1, 2), at_once)
        found = scene.relaxed[name]
        left = torch.where(found.unstable, found.pre.width, 0.0).flatten(1)
        before, after = (torch.where(own_rows, x.gather(1, units), 0.0).sum(1) for x in (width, left))
        look = counts < whole
        moving = moving & (after < before * torch.where(look, 1 - LITTLE, 1 - MOVED))
        # What moves next to nothing is not worth a checker's time, and what was to show that will be there again.
        kept = moving & ~look
        scene.relaxed[name] = found.where(kept, known)
        for i in kept.nonzero().flatten().tolist():
            own = {node: g[i, useful[i]].float().cpu().numpy() for node, g in multipliers.items()}
            steps[i].append(Step(name, units=both[i, useful[i]].cpu().numpy(), multipliers=own))


def tighten(
    scene: Scene, name: str, units: Tensor, wanted: Tensor, at_once: int = 2**62
) -> tuple[dict[str, Tensor], Tensor]:
    """Better pre-activations of a node in `scene`, by the adjoint bound of their own rows.

    Args:
        units: (samples, rows): ``i`` for the lower end of unit ``i``, ``-1 - i`` for the upper one.
        wanted: (samples, rows) whether a row is a sample's own, and not there for its batch-mates.
        at_once: rows of all samples together that fit into memory.

    Returns:
        the multipliers, and which rows are of use, (samples, rows): those that move their end by a little at least.
    """
    together = min(at_once, TOGETHER // scene.relaxed[name].pre.lower[0].numel())
    size = max(1, together // scene.samples)
    parts = [
        _ends(scene, name, *part)
        for part in zip(torch.split(units, size, 1), torch.split(wanted, size, 1), strict=True)
    ]
    ends = torch.cat([part[0] for part in parts], 1)
    used = {node: torch.cat([part[1][node] for part in parts], 1) for node in parts[0][1]}
    known = scene.relaxed[name]
    lower = units >= 0
    places = torch.where(lower, units, -1 - units)
    flat = Box(known.pre.lower.flatten(1), known.pre.upper.flatten(1))
    gain = ends + torch.where(lower, -flat.lower.gather(1, places), flat.upper.gather(1, places))
    useful = gain > WORTH * flat.width.gather(1, places)
    ends = torch.where(useful, ends, -torch.inf)
    least = torch.where(lower, ends, -torch.inf).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    most = torch.where(lower, torch.inf, -ends).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    pre = Box(
        flat.lower.scatter_reduce(1, places, least, "amax").view_as(known.pre.lower),
        flat.upper.scatter_reduce(1, places, most, "amin").view_as(known.pre.upper),
    )
    scene.relaxed[name] = known.with_pre(pre)
    return used, useful


def _ends(scene: Scene, name: str, units: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of units, the ends and what gives them, in float32; see `tighten`."""
    tick()
    known = scene.relaxed[name]
    state, lower = known.pre.lower.shape[1:], units >= 0
    places = torch.where(lower, units, -1 - units)
    row = known.pre.lower.new_zeros(*units.shape, known.pre.lower[0].numel())
    row.scatter_(2, places[:, :, None], torch.where(lower, 1.0, -1.0).to(row)[:, :, None])
    row = row.view(-1, *state)
    start = {known.node.inputs[0]: row}
    if known.operator is not None:
        start[name] = known.off(row)
    bounds, used = scene.least(start, rules(scene, "adaptive"), tightened=name)
    bounds = bounds - known.charge.on(scene.by_sample(row))
    divisor, doubt = (x.expand(1, *state).flatten()[places] for x in (known.divisor(), known.doubt()))
    ends = bounds / divisor
    ends = torch.where(wanted, ends - ends.abs() * (2.0**-49 + 2 * doubt) - TINY, -torch.inf)
    return ends, {node: g.float() for node, g in used.items()}


def rules(scene: Scene, slopes: str) -> dict[str, Rule]:
    """CROWN's multipliers at every node, in float32, as a certificate keeps them."""

    def rule(known: Relaxed, q: Tensor) -> Tensor:
        return crown(slopes)(known, q).float().to(q)

    return dict.fromkeys(scene.relaxed, rule)


def rows_of(query: Query, scene: Scene) -> Tensor:
    """The rows to bound from below, (samples, rows, outputs); their negatives follow if upper bounds are wanted."""
    C = query.C
    if C is None:
        outputs = scene.values[scene.output].lower[0].numel()
        identity = torch.eye(outputs, dtype=query.box.lower.dtype, device=query.box.lower.device)
        C = identity.expand(len(query), outputs, outputs)
    return torch.cat((C, -C), 1) if query.upper else C


@dataclass(frozen=True)
class Best:
    """The best bound of every row so far, and what proves it.

    Args:
        lower: (samples, rows).
        multipliers: by node, (samples, rows, *state).
        plain: (samples, rows) whether it is the interval bound, which needs no multipliers.
    """

    lower: Tensor
    multipliers: dict[str, Tensor]
    plain: Tensor

    @staticmethod
    def interval(scene: Scene, C: Tensor) -> Best:
        """The bound without multipliers."""
        lower, _ = scene.least({scene.output: C.flatten(0, 1)}, {})
        zeros = {name: lower.new_zeros(*lower.shape, *known.z.lower.shape[1:]) for name, known in scene.relaxed.items()}
        return Best(lower, zeros, torch.ones_like(lower, dtype=torch.bool))

    def improved(self, i: Tensor, k: Tensor, lower: Tensor, multipliers: Mapping[str, Tensor]) -> Best:
        """These with other bounds of rows `k` of samples `i` where they are better.

        Args:
            lower: (some,), as `i` and `k`.
            multipliers: by node, (some, *state); none for a node is 0.
        """
        better = lower > self.lower[i, k]
        place = i[better], k[better]
        chosen = {
            name: g.index_put(place, multipliers[name][better] if name in multipliers else torch.zeros_like(g[0, 0]))
            for name, g in self.multipliers.items()
        }
        none = torch.zeros_like(place[0], dtype=torch.bool)
        return Best(self.lower.index_put(place, lower[better]), chosen, self.plain.index_put(place, none))

    def step(self, i: int, rows: Sequence[int]) -> Step:
        """The multipliers of some rows of a sample."""
        return Step(multipliers={name: g[i, list(rows)].float().cpu().numpy() for name, g in self.multipliers.items()})
