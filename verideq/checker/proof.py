"""Whether a claim holds: through the network once, for a batch of cases of one form.

Forwards, every value gets a box, and under l2 also a ball (`verideq.checker.balls`). At a ReLU and at an equilibrium
the splits of a case cut the pre-activations, and its tightenings improve them. At the end the rows of the specification
go backwards (`verideq.checker.dual`), or through `verideq.checker.quadratic`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from verideq.checker.adjoint import PULLS, inner, pull
from verideq.checker.arithmetic import Arithmetic, Array, Interval, Rejected, constant, number, require
from verideq.checker.balls import MOVES, Ball, Moved, around, joined, rectified, settled, start, summed
from verideq.checker.claim import Case, regions
from verideq.checker.dual import Relaxation, Scene, relax
from verideq.checker.layers import Layer, enclosed, near
from verideq.checker.network import RULES, Node
from verideq.checker.quadratic import chain, quadratic

Layers = Callable[[Node, tuple[int, ...]], Layer]
"""The proved equilibrium of a node, for states of a shape."""


@dataclass(frozen=True)
class Boxes:
    """What a case of tightenings has shown on its part of the ball: every value and relaxed node, (1, *state)."""

    values: Mapping[str, Interval]
    pre: Mapping[str, Interval]
    z: Mapping[str, Interval]
    balls: Mapping[str, Ball]


def least_margins(calc: Arithmetic, nodes: Sequence[Node], layers: Layers, cases: Sequence[Case]) -> Array:
    """The smallest row of every case, (cases,); NaN where a box does not hold."""
    least: Array = row_bounds(calc, nodes, layers, cases).min(1)
    return least


def row_bounds(calc: Arithmetic, nodes: Sequence[Node], layers: Layers, cases: Sequence[Case]) -> Array:
    """A lower bound of every row of ``C f - rhs``, (cases, rows); NaN where a box does not hold."""
    return _Proof(calc, nodes, layers, cases).run()


@dataclass
class _Proof:
    """One pass over cases of one form."""

    calc: Arithmetic
    nodes: Sequence[Node]
    layers: Layers
    cases: Sequence[Case]

    def run(self) -> Array:
        """The rows of the specification."""
        calc = self.calc
        self._forwards()
        rows, shift = self._specification()
        bounds = self._quadratic(rows) if self.cases[0].steps[-1].quadratic else self._dual(rows, shift)
        return np.where(self.holds[:, None], calc.add((bounds, bounds), shift)[0], np.nan)

    def boxes(self) -> list[Boxes | None]:
        """What the tightenings have shown."""
        self._forwards()
        relaxed = self.scene.relaxations.items()
        parts = self.scene.values, {name: x.pre for name, x in relaxed}, {name: x.z for name, x in relaxed}

        def of(place: int) -> Boxes:
            one = [{name: (lo[[place]], hi[[place]]) for name, (lo, hi) in part.items()} for part in parts]
            return Boxes(one[0], one[1], one[2], {name: ball.of([place]) for name, ball in self.scene.balls.items()})

        return [of(place) if holds else None for place, holds in enumerate(self.holds)]

    def _around(self) -> dict[int, Boxes]:
        """What the cases before these have shown, by `id`: several at once where they are of one form."""
        groups: dict[object, dict[int, Case]] = {}
        for before in (case.before for case in self.cases):
            if before is not None:
                form = (before.before is None, tuple(step.form for step in before.steps))
                groups.setdefault(form, {})[id(before)] = before
        found: dict[int, Boxes] = {}
        for group in groups.values():
            for key, boxes in zip(group, replace(self, cases=list(group.values())).boxes(), strict=True):
                if boxes is None:
                    raise Rejected("a box is not mapped into itself, or is crossed")
                found[key] = boxes
        return found

    def _before(self, part: str, name: str) -> Interval | None:
        """What the cases before these have shown; ``None`` where none is: of one form all have one, or none has."""
        if self.cases[0].before is None:
            return None
        found = [getattr(self.known[id(case.before)], part)[name] for case in self.cases]
        return np.concatenate([lo for lo, _ in found]), np.concatenate([hi for _, hi in found])

    def _forwards(self) -> None:
        calc, cases = self.calc, self.cases
        self.known = self._around()
        claim, x = cases[0].claim, self._before("values", "input")
        balls: dict[str, Ball] = {}
        if x is None:
            x = regions([case.claim for case in cases], calc)
            if claim.norm == "l2":
                balls["input"] = start(calc, [case.claim for case in cases])
        else:
            found = [self.known[id(case.before)].balls for case in cases]
            balls = {name: joined([one[name] for one in found]) for name in found[0]}
        values = {"input": self._cut("input", x)}
        self.scene = Scene(calc, self.nodes, cases, values, {}, balls)
        self.holds = self._ordered(values["input"])
        self.proved: dict[str, Layer] = {}
        for node in self.nodes:
            v = values[node.inputs[0]]
            before = None if node.kind in ("relu", "equilibrium") else self._before("values", node.name)
            if before is not None:
                values[node.name] = before
            elif node.kind == "add":
                other = values[node.inputs[1]]
                require(v[0].shape == other[0].shape, f"{node.name}: a sum of two shapes")
                values[node.name] = calc.add(v, other)
            elif node.kind in ("relu", "equilibrium"):
                values[node.name] = self._relu(node, v)
            else:
                values[node.name] = RULES[node.kind](calc, node, v)
            if before is None and node.kind not in ("relu", "equilibrium"):
                values[node.name] = self._moved(node)
        named = {node.name for node in self.nodes if node.kind in ("relu", "equilibrium")}
        require(set(self.proved) >= {*claim.boxes, *claim.states}, "a box or a state belongs to no equilibrium")
        for case in cases:
            require({split.node for split in case.splits} <= named | {"input"}, "a split of a node that is not relaxed")
            require({step.node for step in case.tightenings} <= named, "a tightening of a node that is not relaxed")

    def _moved(self, node: Node) -> Interval:
        """The box of a value, cut by what the balls of its inputs say of it, where these have one."""
        calc, box, known = self.calc, self.scene.values[node.name], self.scene.balls
        if not set(node.inputs) <= set(known):
            return box
        inputs = [known[name] for name in node.inputs]
        moved = summed(calc, *inputs) if node.kind == "add" else MOVES[node.kind](calc, node, inputs[0])
        return box if moved is None else self._met(node, box, moved)

    def _met(self, node: Node, box: Interval, moved: Moved) -> Interval:
        """What a box and a ball have in common; a NaN says nothing."""
        self.scene.balls[node.name] = moved[0]
        lo, hi = around(self.calc, *moved)
        met = np.fmax(box[0], lo), np.fmin(box[1], hi)
        self.holds = self.holds & ~(met[0] > met[1]).reshape(len(met[0]), -1).any(1)
        return met

    # --- the parts of the ball -----------------------------------------------------------------------------------

    def _cut(self, name: str, x: Interval) -> Interval:
        """A box of every case, cut by its splits of this node."""
        lo, hi = x[0].copy(), x[1].copy()
        for case, low, high in zip(self.cases, lo.reshape(len(lo), -1), hi.reshape(len(hi), -1), strict=True):
            for split in case.splits:
                if split.node == name:
                    require(split.unit < low.size, f"{name}: a split of unit {split.unit}, and it has {low.size}")
                    at = self.calc.rational(split.at)
                    if split.above:
                        low[split.unit] = max(low[split.unit], at[0])
                    else:
                        high[split.unit] = min(high[split.unit], at[1])
        return lo, hi

    @staticmethod
    def _ordered(x: Interval) -> Array:
        whole: Array = (x[0] <= x[1]).reshape(len(x[0]), -1).all(1)
        return whole

    # --- forwards ------------------------------------------------------------------------------------------------

    def _relu(self, node: Node, v: Interval) -> Interval:
        """Relax a ReLU or an equilibrium, cut it, tighten it; returns the box of what it hands on."""
        calc, claim, layer, drift = self.calc, self.cases[0].claim, None, None
        before = self._before("z", node.name), self._before("pre", node.name)
        if node.kind == "relu":
            one = np.full((1,) * v[0].ndim, calc.one, dtype=calc.kind)
            z, pre = (np.maximum(v[0], calc.zero), np.maximum(v[1], calc.zero)), v
            divisor = one, one
        else:
            layer = self.proved[node.name] = self.layers(node, v[0].shape[1:])
            z, pre = self._box(node, layer, v) if before[0] is None else (v, v)
            divisor = layer.divisor
            if claim.tolerance:
                if layer.u is None:
                    raise Rejected(f"{node.name}: a tolerance of the deployed solver needs a gauge")
                drift = calc.multiply((layer.u, layer.u), number(calc, claim.tolerance))[1]
        z, pre = before[0] or z, before[1] or pre
        relaxation = relax(calc, self._cut(node.name, pre), z, divisor, layer, drift)
        self.scene.relaxations[node.name] = relaxation
        for place, step in enumerate(self.cases[0].tightenings):
            if step.node == node.name:
                relaxation = self._tightened(node, relaxation, place)
                self.scene.relaxations[node.name] = relaxation
        self.holds = self.holds & self._ordered(relaxation.pre) & self._ordered(relaxation.z)
        moved = self.scene.balls.get(node.name if layer is not None else node.inputs[0])
        if moved is not None:
            self.scene.balls[node.name] = rectified(calc, moved, relaxation.z)
        return relaxation.computed(calc)

    def _box(self, node: Node, layer: Layer, v: Interval) -> tuple[Interval, Interval]:
        """A box of the equilibria, and the pre-activations over it."""
        calc, claims = self.calc, [case.claim for case in self.cases]
        if layer.m is not None and node.name not in claims[0].boxes:
            state = constant(calc, calc.zero, *v[0].shape)[0]
            if node.name in claims[0].states:
                state = np.stack([claim.states[node.name] for claim in claims])
            ball = None if claims[0].tolerance else self.scene.balls.get(node.inputs[0])
            if ball is None:
                box = near(calc, layer, v, state)
            else:
                self.scene.balls[node.name], reach = settled(calc, layer, ball, state)
                lo, hi = around(calc, self.scene.balls[node.name], reach)
                box = np.maximum(lo, calc.zero), hi
            return box, layer.rows(calc, box, v)
        suggested = None
        if node.name in claims[0].boxes:
            boxes = [claim.boxes[node.name] for claim in claims]
            suggested = np.stack([lo for lo, _ in boxes]), np.stack([hi for _, hi in boxes])
        box, rows, holds = enclosed(calc, layer, v, suggested, claims[0].refinements)
        self.holds = self.holds & holds
        return box, rows

    def _tightened(self, node: Node, known: Relaxation, place: int) -> Relaxation:
        """Better pre-activations by the dual of their own rows."""
        calc, steps = self.calc, [case.steps[place] for case in self.cases]
        units = np.stack([step.units for step in steps])  # type: ignore[misc]  # a tightening has units
        below = units >= 0
        units = np.where(below, units, -1 - units)
        state, (count, rows) = known.pre[0].shape[1:], units.shape
        size = int(np.prod(state))
        require((units < size).all(), f"{node.name}: a tightening of a unit that is not there")
        chosen = np.zeros((count * rows, size))
        chosen[np.arange(count * rows), units.reshape(-1)] = np.where(below, 1.0, -1.0).reshape(-1)
        row = calc.exactly(chosen).reshape(-1, *state)
        start = {node.inputs[0]: (row, row)}
        if known.layer is not None:
            start[node.name] = known.layer.fusion.pull(calc, (row, row))
        bounds = self.scene.least(start, steps, rows)
        # p / δ, of either sign
        divisor = tuple(np.broadcast_to(side, (1, *state)).reshape(-1)[units] for side in known.divisor)
        bounds = calc.divide((bounds, bounds), (divisor[0], divisor[1]))[0]
        lo, hi = known.pre[0].copy(), known.pre[1].copy()
        flat_lo, flat_hi = lo.reshape(count, -1), hi.reshape(count, -1)
        sample = np.broadcast_to(np.arange(count)[:, None], units.shape)
        np.maximum.at(flat_lo, (sample[below], units[below]), bounds[below])
        np.minimum.at(flat_hi, (sample[~below], units[~below]), -bounds[~below])
        return relax(calc, (lo, hi), known.z, known.divisor, known.layer, known.drift)

    # --- the rows of the specification ---------------------------------------------------------------------------

    def _specification(self) -> tuple[Interval, Interval]:
        """``C``, (cases, rows, outputs), and ``-rhs``, (cases, rows): of no input for a case that is empty."""
        calc, outputs = self.calc, self.scene.values[self.nodes[-1].name][0].shape[1:]
        require(len(outputs) == 1, "the output of the model is no vector")
        rows, shifts = [], []
        known: dict[object, tuple[Array, Array]] = {}
        for case in self.cases:
            # A label's rows are the same for all; a specification is a claim's own.
            key = ("label", case.claim.label) if case.claim.linear is None else ("claim", id(case.claim))
            if key not in known:
                known[key] = specification(calc, case, outputs[0])
            C, rhs = known[key]
            chosen = slice(None) if case.rows is None else list(case.rows)
            if case.steps[-1].empty:
                C, rhs, chosen = constant(calc, calc.zero, 1, outputs[0])[0], constant(calc, calc.zero, 1)[0], slice(1)
            rows.append(C[chosen])
            shifts.append(-rhs[chosen])
        C, shift = np.stack(rows), np.stack(shifts)
        return (C, C), (shift, shift)

    def _dual(self, C: Interval, shift: Interval) -> Array:
        """The linear dual of every row; by intervals alone where no multipliers are given and that is enough."""
        calc, last, rows = self.calc, self.nodes[-1], C[0].shape[1]
        steps, q = [case.steps[-1] for case in self.cases], (C[0].reshape(-1, C[0].shape[2]),) * 2
        ends = self._elided(q, rows) if last.kind in PULLS else np.full((len(steps), rows), -np.inf)
        least = calc.add((ends, ends), shift)[0].min(1)
        plain = steps[0].slopes is None and not steps[0].multipliers
        # For a float64 it is the same whether it is at least a number or at least the next float64 above that.
        claimed: Array = np.array([calc.rational(case.claim.margin)[1] for case in self.cases], dtype=calc.kind)
        if plain and ((least > 0) & (least >= claimed)).all():
            return ends
        bounds = self.scene.least({last.name: q}, steps, rows)
        # Coefficients on early values may overflow where the values do not.
        return np.fmax(bounds, ends)

    def _elided(self, q: Interval, rows: int) -> Array:
        """Rows on the output as rows on what the last operation reads, and there over its box: (cases, rows)."""
        calc, last = self.calc, self.nodes[-1]
        x = self.scene.values[last.inputs[0]]
        q, shift = pull(calc, last, q, x[0].shape[1:])
        least: Array = calc.add(inner(calc, q, (np.repeat(x[0], rows, 0), np.repeat(x[1], rows, 0))), shift)[0]
        return least.reshape(-1, rows)

    def _quadratic(self, C: Interval) -> Array:
        """The quadratic dual of every case: the one equilibrium between affine maps."""
        calc, scene = self.calc, self.scene
        others = [node for node in self.nodes if node.kind not in PULLS]
        if len(others) != 1 or others[0].kind != "equilibrium" or self.cases[0].claim.tolerance:
            raise Rejected("the quadratic dual takes a chain of affine maps around one equilibrium, and no tolerance")
        node, nodes = others[0], list(self.nodes)
        require(self.proved[node.name].ceiling is None, f"{node.name}: the quadratic dual is for relu")
        shapes = {name: value[0].shape[1:] for name, value in scene.values.items()}
        units = int(np.prod(shapes[node.name]))
        identity = calc.exactly(np.eye(units)).reshape(units, *shapes[node.name])
        U, b = chain(calc, nodes, (identity, identity), shapes, node.inputs[0], "input")
        U = U[0].reshape(units, -1), U[1].reshape(units, -1)
        count, rows = C[0].shape[:2]
        c, shift = chain(calc, nodes, (C[0].reshape(count * rows, -1),) * 2, shapes, self.nodes[-1].name, node.name)
        c = c[0].reshape(count, rows, units), c[1].reshape(count, rows, units)
        shift = shift[0].reshape(count, rows), shift[1].reshape(count, rows)
        fixed = np.zeros((2, count, units), dtype=bool)
        for place, case in enumerate(self.cases):
            for split in case.splits:
                if split.node == node.name:
                    fixed[int(split.above), place, split.unit] = True
        x = self.scene.values["input"]
        box = x[0].reshape(count, -1), x[1].reshape(count, -1)
        layer, sides = self.proved[node.name], (fixed[0], fixed[1])
        found = quadratic(calc, layer, U, b, box, self.cases, sides, c, shapes[node.name])
        return calc.add((found, found), shift)[0]


def specification(calc: Arithmetic, case: Case, outputs: int) -> tuple[Array, Array]:
    """``C``, (rows, outputs), and ``rhs``, (rows,), of the claim that a case is of."""
    claim = case.claim
    if claim.linear is not None:
        require(claim.linear[0].shape[1] == outputs, "C has not one column an output")
        return claim.linear
    if claim.label is None:
        raise Rejected("the claim has neither label nor C")
    require(outputs >= 2 and claim.label < outputs, "the label is no class of the model")
    C = -np.eye(outputs)
    C[:, claim.label] += 1.0
    others = (claim.label + np.arange(1, outputs)) % outputs
    return calc.exactly(C[others]), constant(calc, calc.zero, outputs - 1)[0]
