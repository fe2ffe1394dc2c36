"""The quadratic bound: complementarity kept whole, for monotone equilibria without a gauge.

For an equilibrium ``z = relu(p)``, ``p = W z + U x + b``, between affine maps, and any ``λ, ν >= 0``, ``s > 0``, ``τ``,

    c·z  >=  min over all z, x of   c·z + λ·(p - z) - ν·z + τ·(z∘(z - p)) + Σ s_j ((x_j - x_cj)² - r_j²),

a concave quadratic in ``x``'s multipliers and a convex one in ``z`` where

    Q = ½(T(I - W) + (I - W)ᵀT) - ¼ T U S⁻¹ Uᵀ T  ≻  0

(docs/theory.md). It is maximised by Adam over all rows of all samples at once. ``Q`` is kept positive by a direction
along which it always grows: with ``(z_c, p_c)`` the equilibrium at the centre, ``d = (λ, ν, τ, s) = (z_c, z_c - p_c, 1,
σ)`` has ``Q(d) ⪰ m/2`` for a ``σ`` that is found once, and ``Q(θ + κ d) ⪰ Q(θ) + κ Q(d)``, because ``X S⁻¹ Xᵀ`` is
jointly convex. What comes out is a suggestion: the bound is what the independent checker makes of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.backward import PULLS
from verideq.certify.certificate import Proof, Step, record
from verideq.certify.enclosure import settled
from verideq.certify.footprint import Footprint
from verideq.certify.method import Bounds, Prepared, Query, states_of, strength
from verideq.clock import OutOfTime
from verideq.equilibrium import RELU
from verideq.errors import NoGaugeError
from verideq.graph import INPUT, Graph
from verideq.region import HEAVIEST, Region

STEPS = 200
RATE = 0.1
STALL = 20
"""Steps without a better bound after which a row goes back to its best point, at half the rate."""
ELEMENTS = 2**24
"""Coefficients of inputs that are worked on at a time, if memory allows."""
CONVEX = 5e-5
"""How positive `Q` is kept, relative to ``m`` of the solved layer."""


@dataclass(frozen=True)
class Form:
    """One equilibrium between affine maps, every row solved for its own unknown: ``z = relu(W z + U x + b)``.

    Args:
        name: of the equilibrium.
        W: (units, units), without a diagonal.
        U: (units, inputs).
        b: (units,).
        divisor: (units,) what the rows were divided by.
        C, shift: outputs are ``C z + shift``, (outputs, units) and (outputs,).
        m: of ``I - W`` before the rows were divided; not positive where it is not monotone.
    """

    name: str
    W: Tensor
    U: Tensor
    b: Tensor
    divisor: Tensor
    C: Tensor
    shift: Tensor
    m: float


def form_of(prepared: Prepared, x: Tensor, *, monotone: bool = True) -> Form:
    """The network as one equilibrium between affine maps.

    Args:
        x: inputs, (batch, *features), for their shape.
        monotone: refuse a layer whose ``I - sym W`` is not positive.

    Raises:
        NoGaugeError: it is another network, or such a layer.
    """
    graph, shapes = prepared.graph, prepared.graph.shapes(x)
    others = [node for node in graph.nodes if node.operation.kind not in PULLS]
    layers = dict(graph.equilibria())
    if len(others) != 1 or len(layers) != 1:
        kinds = ", ".join(f"{node.name} ({node.operation.kind})" for node in others) or "no equilibrium"
        raise NoGaugeError(f"the quadratic bound takes one equilibrium between affine maps; here: {kinds}", math.nan)
    node, last = others[0], graph.nodes[-1].name
    layer = layers[node.name]
    if layer.activation != RELU:
        raise NoGaugeError(
            f"{node.name}: the quadratic bound is for ReLU equilibria; this one is {layer.activation.name}", math.nan
        )
    m = prepared.monotone.get(node.name) or strength(layer)
    if monotone and not m > 0:
        raise NoGaugeError(f"{node.name}: the quadratic bound needs I - sym W to be positive definite", math.nan)

    def identity(name: str) -> Tensor:
        size = math.prod(shapes[name])
        return torch.eye(size, dtype=torch.float64, device=prepared.device).view(size, *shapes[name])

    W = layer.operator().apply(identity(node.name)).flatten(1).T
    U, b = _chain(graph, shapes, identity(node.name), node.inputs[0], INPUT)
    C, shift = _chain(graph, shapes, identity(last), last, node.name)
    divisor = 1 - W.diagonal()
    solved = (W - W.diagonal().diag()) / divisor[:, None]
    return Form(node.name, solved, U / divisor[:, None], b / divisor, divisor, C, shift, m)


def _chain(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]], rows: Tensor, start: str, stop: str
) -> tuple[Tensor, Tensor]:
    """Rows on one value as rows on an earlier one: (rows, features) and (rows,)."""
    nodes, total = {node.name: node for node in graph.nodes}, rows.new_zeros(len(rows))
    while start != stop:
        node = nodes[start]
        pulled = PULLS[node.operation.kind](node.module, rows, shapes[node.inputs[0]])
        for q, constants in pulled.gained:
            total = total + (q * constants).flatten(1).sum(1)
        rows, start = pulled.rows, node.inputs[0]
    return rows.flatten(1), total


@dataclass
class Problem:
    """Rows of many samples to bound, (rows, ...): what differs by sample is gathered by `sample`.

    Args:
        form: the network.
        c: (rows, units) and `shift`: (rows,): ``c·z + shift`` is to be bounded.
        sample: (rows,) the sample of each row.
        U: (samples, units, inputs) scaled by the radii; (samples, units, inputs) with one length for an l2 ball.
        bias: (samples, units) the injection at the centre.
        z: (samples, units) the equilibrium there.
        ball: one ``s`` for all inputs, instead of one each.
        above, below: (rows, units) where a split fixes the sign of ``p``.
    """

    form: Form
    c: Tensor
    shift: Tensor
    sample: Tensor
    U: Tensor
    bias: Tensor
    z: Tensor
    ball: bool
    above: Tensor
    below: Tensor

    def select(self, rows: Tensor) -> Problem:
        return replace(
            self, c=self.c[rows], shift=self.shift[rows], sample=self.sample[rows], above=self.above[rows],
            below=self.below[rows],
        )  # fmt: skip


@dataclass
class Point:
    """Multipliers of rows: ``λ``, ``ν``, ``τ`` (rows, units), ``log s`` (rows, inputs) or (rows, 1)."""

    lam: Tensor
    nu: Tensor
    tau: Tensor
    log_s: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.lam, self.nu, self.tau, self.log_s

    def select(self, rows: Tensor) -> Point:
        return Point(*(t[rows] for t in self.tensors()))

    def put(self, rows: Tensor, other: Point) -> None:
        for own, new in zip(self.tensors(), other.tensors(), strict=True):
            own[rows] = new


@dataclass
class Value:
    """The dual at a point: its value, its gradient, the minimiser and how convex it is there."""

    value: Tensor
    gradient: Point
    z: Tensor
    p: Tensor
    x: Tensor
    Q: Tensor


def start(problem: Problem) -> Point:
    """The active set of the centre: the multipliers that are exact if no unit changes sign."""
    form = problem.form
    z = problem.z[problem.sample]
    on = (z > 0).to(z)
    q = torch.linalg.solve(
        torch.eye(len(form.W), dtype=z.dtype, device=z.device) - form.W.T * on[:, None, :], problem.c
    )
    lam = q * on
    w = torch.einsum("rh,rhn->rn", lam, problem.U[problem.sample])
    # Never so small that the curvature that an input takes from Q outgrows what the start puts into it.
    taken = 0.25 * TAU * problem.U.square().sum(1)[problem.sample]
    if problem.ball:
        s = w.norm(dim=1, keepdim=True) / 2 + taken.sum(1, keepdim=True)
    else:
        s = 0.5 * (w.square() + w.abs().mean(1, keepdim=True).square()).sqrt() + taken
    log_s = s.clamp(min=1e-12).log()
    tau = torch.full_like(lam, TAU)
    return Point((lam + tau * z).clamp(min=0), torch.zeros_like(lam), tau, log_s)


TAU = 0.6
"""Of every unit at the start, in units of the solved rows."""


def evaluate(problem: Problem, point: Point, Q: Tensor | None = None) -> Value:
    """The dual's value (rows,), by the minimiser of its quadratic; `Q`: where it is known already."""
    W, lam, nu, tau, s = problem.form.W, point.lam, point.nu, point.tau, point.log_s.exp()
    kept = (~problem.below).to(lam)
    tau = tau * kept
    U, bias, z0 = (t[problem.sample] for t in (problem.U, problem.bias, problem.z))
    z0 = z0 * kept
    Q = _curvature(problem, tau, s, kept) if Q is None else Q
    k = lam - tau * z0
    w0 = torch.einsum("rh,rhn->rn", k, U)
    residual = z0 - z0 @ W.T - bias
    q = problem.c - lam - nu + lam @ W
    value = problem.shift + (lam * bias).sum(1) + (q * z0).sum(1) + (tau * z0 * residual).sum(1)
    value = value - 0.25 * (w0 * w0 / s).sum(1) - s.sum(1)
    t = tau * z0
    slope = (q + tau * residual + t - t @ W + 0.5 * tau * torch.einsum("rhn,rn->rh", U, w0 / s)) * kept
    factor, failed = torch.linalg.cholesky_ex(Q)
    y = -0.5 * torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0] * kept
    value = value + 0.5 * (slope * y).sum(1)
    value = torch.where(failed == 0, value, -torch.inf)
    z = z0 + y
    x = -0.5 * torch.einsum("rh,rhn->rn", lam - tau * z, U) / s
    p = z @ W.T + torch.einsum("rhn,rn->rh", U, x) + bias
    square = x.square().sum(1, keepdim=True) if problem.ball else x.square()
    gradient = Point(p - z, -z * kept, z * (z - p) * kept, (square - 1) * s)
    return Value(value, gradient, z, p, x, Q)


def _curvature(problem: Problem, tau: Tensor, s: Tensor, kept: Tensor) -> Tensor:
    """``Q``; a unit that a split has put to zero is left out of it (its row is that of the identity)."""
    W, U = problem.form.W, problem.U[problem.sample]
    TN = tau[:, :, None] * (torch.eye(len(W), dtype=W.dtype, device=W.device) - W)
    B = U * (0.5 * s.rsqrt())[:, None, :]
    Q = 0.5 * (TN + TN.mT) - tau[:, :, None] * (B @ B.mT) * tau[:, None, :]
    Q = Q * kept[:, :, None] * kept[:, None, :]
    return Q + torch.diag_embed(1 - kept)


class Repair:
    """The direction along which ``Q`` grows, of every sample."""

    def __init__(self, problem: Problem) -> None:
        form, U = problem.form, problem.U
        divisor = form.divisor
        # In the units of the solved rows the direction is the divisor times (z, z - p, 1).
        scaled = divisor[:, None] * U
        norms = scaled.norm(dim=1).clamp(min=1e-12)
        if problem.ball:
            largest = torch.linalg.eigvalsh(scaled @ scaled.mT)[:, -1:]
            self.sigma = largest / (2 * form.m)
        else:
            gram = (scaled / norms[:, None, :]) @ scaled.mT
            self.sigma = norms * torch.linalg.eigvalsh(gram)[:, -1:] / (2 * form.m)
        p = problem.z @ form.W.T + problem.bias
        self.z, self.divisor = problem.z, divisor
        self.nu = (divisor * (problem.z - p)).clamp(min=0)
        self.m = form.m

    def __call__(self, problem: Problem, point: Point) -> tuple[Point, Tensor, Tilt | None]:
        """The point, moved along the direction where its ``Q`` is not positive enough.

        Returns:
            that; its ``Q``, (rows, units, units); and what the move did to slopes.
        """
        kept = (~problem.below).to(point.tau)
        Q = _curvature(problem, point.tau * kept, point.log_s.exp(), kept)
        identity = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
        failed = torch.linalg.cholesky_ex(Q - CONVEX * self.m * identity).info > 0
        rows = failed.nonzero().flatten()
        if not len(rows):
            return point, Q, None
        values, vectors = torch.linalg.eigh(Q[rows])
        kappa = ((2 * CONVEX * self.m - values[:, 0]) * 2 / self.m).clamp(min=0)[:, None]
        place = problem.sample[rows]
        moved = Point(*(t.clone() for t in point.tensors()))
        moved.lam[rows] += kappa * self.divisor * self.z[place]
        moved.nu[rows] += kappa * self.nu[place]
        moved.tau[rows] += kappa * self.divisor
        moved.log_s[rows] = (point.log_s[rows].exp() + kappa * self.sigma[place]).log()
        own, kept = moved.select(rows), kept[rows]
        Q[rows] = _curvature(problem.select(rows), own.tau * kept, own.log_s.exp(), kept)
        return moved, Q, Tilt(self, rows, vectors[:, :, 0] * kept)


@dataclass
class Tilt:
    """The chain rule through a repair: how far a row had to move depends on its least eigenvector."""

    repair: Repair
    rows: Tensor
    vector: Tensor

    def __call__(self, problem: Problem, before: Point, after: Point, gradient: Point) -> Point:
        """The gradient at the point before the repair, from the one after it."""
        rows, v = self.rows, self.vector
        place = problem.sample[rows]
        s, scale = before.log_s[rows].exp(), after.log_s[rows].exp()
        along = (gradient.lam[rows] * self.repair.divisor * self.repair.z[place]).sum(1)
        along = along + (gradient.nu[rows] * self.repair.nu[place]).sum(1)
        along = along + (gradient.tau[rows] * self.repair.divisor).sum(1)
        along = along + (gradient.log_s[rows] / scale * self.repair.sigma[place]).sum(1)
        steep = (-2 / self.repair.m * along)[:, None]
        U = problem.U[place]
        x = 0.5 * torch.einsum("rh,rhn->rn", before.tau[rows] * v, U) / s
        bend = v * (v - v @ problem.form.W.T - torch.einsum("rhn,rn->rh", U, x))
        # The repaired s is s + κ σ, and its logarithm is what is moved.
        own = gradient.log_s[rows] * s / scale
        square = x.square().sum(1, keepdim=True) if problem.ball else x.square()
        gradient.tau[rows] = gradient.tau[rows] + steep * bend
        gradient.log_s[rows] = own + steep * square * s
        return gradient


def ascend(
    problem: Problem,
    point: Point,
    steps: int,
    target: float,
    deadline: float = math.inf,
    spent: Tensor | None = None,
) -> tuple[Tensor, Point]:
    """Adam on all rows at once; a row whose value passes `target` is left where it is.

    Args:
        spent: (samples,) seconds, to which is added what each took: a step is for those whose rows are open. Their
            deadline together is that of each alone.

    Returns:
        the best value of every row, (rows,), and the point that has it.
    """
    repair = Repair(problem)
    best = torch.full_like(problem.shift, -torch.inf)
    found = Point(*(t.clone() for t in point.tensors()))
    live = torch.arange(len(best), device=best.device)
    own, now = problem, Point(*(t.clone() for t in point.tensors()))
    first = [torch.zeros_like(t) for t in now.tensors()]
    second = [torch.zeros_like(t) for t in now.tensors()]
    stalled = torch.zeros_like(live)
    rate = torch.full_like(best, RATE)
    began = time.monotonic()
    limit = math.inf if spent is None else (deadline - began) / len(spent)
    for step in range(steps):
        working = own.sample
        safe, Q, tilt = repair(own, now)
        seen = evaluate(own, safe, Q)
        better = seen.value > best[live] + 1e-9 * best[live].abs().nan_to_num(posinf=0.0)
        rows = better.nonzero().flatten()
        best[live[rows]] = seen.value[rows]
        found.put(live[rows], safe.select(rows))
        stalled = torch.where(better, 0, stalled + 1)
        open_ = best[live] <= target
        if spent is not None:
            open_ &= spent[own.sample] < limit
        if not bool(open_.any()) or time.monotonic() > deadline:
            break
        gradient = seen.gradient if tilt is None else tilt(own, now, safe, seen.gradient)
        back = (stalled >= STALL) & open_
        if bool(back.any()):
            again = back.nonzero().flatten()
            now.put(again, found.select(live[again]))
            rate[again] *= 0.5
            stalled[again] = 0
            for moment in (*first, *second):
                moment[again] = 0
            gradient.put(again, Point(*(torch.zeros_like(t[again]) for t in gradient.tensors())))
        if not bool(open_.all()):
            keep = open_.nonzero().flatten()
            live, own, now, gradient = live[keep], own.select(keep), now.select(keep), gradient.select(keep)
            first, second = [t[keep] for t in first], [t[keep] for t in second]
            stalled, rate = stalled[keep], rate[keep]
        _adam(own, now, gradient, first, second, rate * (1 - step / steps + 0.05), step + 1)
        if spent is not None:
            began, before = time.monotonic(), began
            spent += torch.bincount(working, minlength=len(spent)) * ((began - before) / len(working))
    return best, found


def _adam(
    problem: Problem, point: Point, gradient: Point, first: list[Tensor], second: list[Tensor], rate: Tensor, count: int
) -> None:
    """One step of Adam in place, back onto what is allowed."""
    for t, g, m, v in zip(point.tensors(), gradient.tensors(), first, second, strict=True):
        g = g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.98).addcmul_(g, g, value=0.02)
        t.add_(rate[:, None] * (m / (1 - 0.9**count)) / ((v / (1 - 0.98**count)).sqrt() + 1e-12))
    point.lam.copy_(torch.where(problem.above, point.lam, point.lam.clamp(min=0)))
    point.nu.clamp_(min=0)


@torch.no_grad()
def quadratic(prepared: Prepared, query: Query) -> Bounds:
    """The quadratic bound of every row, as the independent checker evaluates it, or as measured if that will do.

    Raises:
        NoGaugeError: a network that is not one monotone equilibrium between affine maps, or a deployed tolerance.
    """
    return Bounds.joined([root.bounds() for root in roots(prepared, query)])


@dataclass(frozen=True)
class Root:
    """The rows of some samples, and the best multipliers for each.

    Args:
        prepared: the model.
        query: about these samples.
        C: (samples, rows, outputs), the negatives behind them if upper bounds are wanted.
        problem: the rows, each less what it has to exceed.
        goal: that, (samples, rows).
        reach: see `pose`.
        state: see `pose`.
        values: of the dual, (samples * rows,).
        point: the multipliers.
    """

    prepared: Prepared
    query: Query
    C: Tensor
    problem: Problem
    goal: Tensor
    reach: Tensor
    state: dict[str, Tensor]
    values: Tensor
    point: Point

    def bounds(self) -> Bounds:
        """As a method hands it back."""
        query, C = self.query, self.C
        count = C.shape[1] // 2 if query.upper else C.shape[1]
        steps, seen = quadratic_steps(self.problem, self.point, self.reach, C.shape[1])
        proofs = [Proof(states=states_of(self.state, i), cases=((step,),)) for i, step in enumerate(steps)]
        if query.unproved:
            lower = seen.value.view_as(self.goal) + self.goal - spare(self.goal) / 2
        else:
            lower = checked_rows(self.prepared, query, C, proofs)
        negative = -lower[:, count:] if query.upper else torch.full_like(lower, math.inf)
        points = inputs(self.problem, seen.x.nan_to_num(), query, self.reach)
        points = points.view(len(query), -1, *query.box.lower.shape[1:])
        taken = torch.zeros(len(query), dtype=torch.long)
        box = Box(lower[:, :count], negative)
        return Bounds(box, taken, lambda i: proofs[i], points=points, estimated=query.unproved)

    def select(self, i: int) -> Root:
        """One of the samples."""
        part, rows = torch.tensor([i]), (self.problem.sample == i).nonzero().flatten()
        problem = self.problem.select(rows)
        U, bias, z = (t[part] for t in (problem.U, problem.bias, problem.z))
        problem = replace(problem, sample=torch.zeros_like(rows), U=U, bias=bias, z=z)
        state = {name: t[part] for name, t in self.state.items()}
        return replace(
            self, query=self.query.select(part), C=self.C[part], problem=problem, goal=self.goal[part],
            reach=self.reach[part], state=state, values=self.values[rows], point=self.point.select(rows),
        )  # fmt: skip


def roots(prepared: Prepared, query: Query) -> Iterator[Root]:
    """As many samples at a time as fit.

    Raises:
        NoGaugeError: see `quadratic`.
    """
    if query.tolerance:
        raise NoGaugeError("the quadratic bound charges no tolerance of the deployed solver", math.nan)
    if query.region is not None and query.region.norm == "l2" and query.region.weights is not None:
        raise NoGaugeError("the quadratic bound takes l2 balls without weights", math.nan)
    form = form_of(prepared, query.box.lower)
    rows = query.C.shape[1] if query.C is not None else len(form.C)
    fitting = Footprint.of(prepared, query.box.lower, 2 * rows if query.upper else rows).samples_at_once("quadratic")
    size = max(1, min(ELEMENTS // (form.U.numel() * rows), fitting))
    began = False
    for _, own in query.parts(torch.arange(len(query)), size):
        began = True
        yield _root(prepared, own, form)
    if not began:
        raise OutOfTime


def _root(prepared: Prepared, query: Query, form: Form) -> Root:
    C = query.C
    if C is None:
        identity = torch.eye(len(form.C), dtype=form.C.dtype, device=form.C.device)
        C = identity.expand(len(query), *identity.shape)
    C = torch.cat((C, -C), 1) if query.upper else C
    problem, reach, state = pose(prepared, query, form, C)
    goal, target = torch.zeros_like(C[:, :, 0]), math.inf
    if query.rhs is not None and not query.upper:
        goal, target = query.rhs + spare(query.rhs), 0.0
    problem = replace(problem, shift=problem.shift - goal.flatten())
    spent = torch.zeros_like(problem.z[:, 0])
    values, point = ascend(problem, start(problem), STEPS, target, query.deadline, spent)
    query.pay(spent.tolist())
    return Root(prepared, query, C, problem, goal, reach, state, values, point)


def spare(rhs: Tensor) -> Tensor:
    """By how much a row has to be above its threshold: a checker rounds in its own way."""
    return 1e-6 * (1 + rhs.abs()).nan_to_num(posinf=0.0)


def inputs(problem: Problem, x: Tensor, query: Query, reach: Tensor) -> Tensor:
    """Points, (rows, inputs) in units of their reach, as inputs in the region or nearly so: (rows, *features)."""
    repeats = len(x) // len(query)
    lower, upper = (side.flatten(1).repeat_interleave(repeats, 0) for side in (query.box.lower, query.box.upper))
    center, reach = (lower + upper) / 2, reach.repeat_interleave(repeats, 0)
    if problem.ball and query.region is not None:
        center = query.region.center.to(x).flatten(1).repeat_interleave(repeats, 0)
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1)
    points = torch.minimum(torch.maximum(center + x * reach, lower), upper)
    return points.view(-1, *query.box.lower.shape[1:])


def pose(prepared: Prepared, query: Query, form: Form, C: Tensor) -> tuple[Problem, Tensor, dict[str, Tensor]]:
    """The rows ``C`` of every sample, how far its inputs may move, and the equilibrium at its centre.

    Returns:
        the problem; (samples, inputs) radii, or (samples, 1) the length of an l2 ball; states by node.
    """
    region, samples = query.region, len(query)
    ball = region is not None and region.norm == "l2"
    if region is not None and ball:
        center = region.center.to(form.U).flatten(1)
        reach = region.radii_up().to(center)[:, None]
    else:
        center, reach = (side.flatten(1) for side in query.box.ball())
    reach = torch.maximum(reach, reach.amax(1, keepdim=True) * 1e-6 + 1e-30)
    bias = center @ form.U.T + form.b
    layer = prepared.layer(form.name)
    shape = prepared.graph.shapes(query.box.lower)[form.name]
    state = settled(layer, (bias * form.divisor).view(samples, *shape), query.solver)[0]
    none = torch.zeros(C.shape[0] * C.shape[1], len(form.W), dtype=torch.bool, device=C.device)
    problem = Problem(
        form, (C @ form.C).flatten(0, 1), (C @ form.shift).flatten(),
        torch.arange(samples, device=C.device).repeat_interleave(C.shape[1]), form.U * reach[:, None, :], bias,
        state.flatten(1), ball, none, none,
    )  # fmt: skip
    return problem, reach, {} if form.name in prepared.gauges else {form.name: state}


def _stored(problem: Problem, point: Point, reach: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``λ``, ``ν``, ``τ`` and ``s`` of the layer itself, in float32."""
    divisor, square = problem.form.divisor, reach[problem.sample].square()
    s = (point.log_s.exp() / square).clamp(1e-30, 1e30).float()
    return (point.lam / divisor).float(), point.nu.float(), (point.tau / divisor).float(), s


def rounded(problem: Problem, point: Point, reach: Tensor) -> Point:
    """The point that multipliers in float32 stand for."""
    divisor, square = problem.form.divisor, reach[problem.sample].square()
    lam, nu, tau, s = (t.to(divisor) for t in _stored(problem, point, reach))
    return Point(lam * divisor, nu, tau * divisor, (s * square).log())


def quadratic_steps(problem: Problem, point: Point, reach: Tensor, rows: int) -> tuple[list[Step], Value]:
    """Multipliers as a certificate holds them, a step a sample: of the layer itself, rounded to float32.

    Returns:
        these, and what the dual is with them.
    """
    lam, nu, tau, s = _stored(problem, point, reach)
    seen = evaluate(problem, rounded(problem, point, reach))
    z = seen.z.nan_to_num(posinf=0.0, neginf=0.0)
    eta = 0.5 * torch.linalg.eigvalsh(seen.Q)[:, :1]
    arrays = {"lambda": lam, "nu": nu, "tau": tau, "s": s, "z": z, "eta": eta[:, 0]}
    split = {name: array.view(-1, rows, *array.shape[1:]).cpu().numpy() for name, array in arrays.items()}
    count = len(lam) // rows
    return [Step(quadratic={name: array[i] for name, array in split.items()}) for i in range(count)], seen


def checked_rows(prepared: Prepared, query: Query, C: Tensor, proofs: list[Proof]) -> Tensor:
    """What the checker makes of proofs: a lower bound of every row, (samples, rows); ``-inf`` for nothing."""
    found = []
    for i, proof in enumerate(proofs):
        region, place, rows = query.region, i, C[i].cpu().numpy()
        if region is None:
            center, radius = (side[i : i + 1] for side in query.box.ball())
            # Where a radius is too small for a weight the region is wider, and nothing is said of one that is too wide.
            weights = torch.where(radius[0] > 0, radius[0].clamp(min=1 / HEAVIEST), 0.0)
            if not bool((weights <= HEAVIEST).all()):
                found.append(np.full(len(rows), -np.inf))
                continue
            region, place = Region(center, 1, clip=None, weights=weights), 0
        payload = record(
            prepared.checker.hash, 0, region, place, proof, label=None, C=rows, rhs=np.zeros(len(rows)), margin=0.0
        )
        found.append(prepared.checker.rows(payload))
    return torch.as_tensor(np.stack(found)).to(C)
