"""Lipschitz bounds: how fast a row of outputs can change, whatever the input, and what follows for a ball.

**One equilibrium between affine maps.** For two inputs let ``d = z - z'`` be the difference of the equilibria and ``e =
x - x'``. A ReLU moves with its input and no further, ``d_i (d_i - (W d + U e)_i) <= 0``; so for ``τ >= 0``, ``s > 0``

    c·d  >=  min over all d and e of   c·d + τ·(d∘(d - W d - U e)) + Σ s_j (e_j² - r_j²)      where |e| <= r.

That is the quadratic dual (`verideq.certify.quadratic`) of the layer without its bias, around 0, with ``λ = ν = 0``;
around an equilibrium ``z_c, p_c`` it is the one with ``λ = τ∘z_c`` and ``ν = τ∘(z_c - p_c)``. The best ``τ`` and ``s``
are a semidefinite program (`verideq.certify.semidefinite`). Two choices are known, in units of the solved rows:

* by a gauge ``y = (I - |W|ᵀ)⁻¹ |c|``, ``a = |U|ᵀ y``, ``w = (I - |W|)⁻¹ |U| e`` with ``e`` along ``a`` (for linf: of
  ones), ``τ = y / w``, ``s = a / 2e``. It gives ``‖a‖₂`` or ``‖a‖₁``, as ``|d| <= (I - |W|)⁻¹ |U| |e|`` does;
* by ``I - sym W ⪰ m I``, ``τ = 2 m s / ‖U‖²``. It gives ``‖c‖ ‖U‖ / m`` (Pabbaraju et al. 2021), or less.

None is believed: the bound is what `verideq.checker.quadratic` makes of them. **Other networks** have the interval
bound, in which values move as a whole too (`verideq.certify.balls`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.adjoint import Best, rows_of, scene_of
from verideq.certify.certificate import Proof, Step
from verideq.certify.method import Bounds, Prepared, Query, boxes_of, states_of
from verideq.certify.quadratic import (
    ELEMENTS,
    Form,
    Point,
    Problem,
    checked_rows,
    evaluate,
    form_of,
    pose,
    quadratic_steps,
)
from verideq.certify.semidefinite import UNITS, proposed, seconds
from verideq.errors import NoGaugeError

ROOM = 2.0**-20
"""How far closed forms are kept from where their quadratic stops being convex."""
LIMIT = 1e30
"""Larger multipliers are not written down."""
LARGEST = 256
"""The most units for which the quadratic dual of a Lipschitz bound is looked at: it costs their cube, row by row."""


@dataclass(frozen=True)
class Slopes:
    """``τ >= 0``, (rows, units), and ``s``, (rows, inputs) or (rows, 1): of the solved rows, for unit radii."""

    tau: Tensor
    s: Tensor

    def or_better(self, problem: Problem, other: Slopes) -> Slopes:
        """Row by row those that give the smaller constant."""
        better = (other.constants(problem) < self.constants(problem))[:, None]
        return Slopes(torch.where(better, other.tau, self.tau), torch.where(better, other.s, self.s))

    def constants(self, problem: Problem) -> Tensor:
        """About how far the rows can move, (rows,); infinite where the quadratic is not convex."""
        return 2 * (self.curved(problem) * self.s.sum(1)).sqrt()

    def curved(self, problem: Problem) -> Tensor:
        """``¼ cᵀ Q⁻¹ c``, (rows,), of a problem without a bias, around 0."""
        seen = evaluate(problem, Point(0 * self.tau, 0 * self.tau, self.tau, self.s.log()))
        # The minimiser is -Q⁻¹ c / 2.
        found = torch.where(seen.value.isfinite(), -0.5 * (problem.c * seen.z).sum(1), torch.inf)
        return found.nan_to_num(nan=math.inf).clamp(min=0)

    def scaled(self, curved: Tensor) -> Slopes:
        """At the length at which the two halves of the bound are the same: there it is best."""
        ratio = (curved / self.s.sum(1)).sqrt()[:, None]
        # A row of zeros moves nowhere, whatever its multipliers.
        ratio = torch.where((ratio > 1e-100) & ratio.isfinite(), ratio, 1.0)
        return Slopes(self.tau * ratio, self.s * ratio)


def unit(form: Form, c: Tensor, ball: bool) -> Problem:
    """Rows, (rows, units), of the layer without a bias, around 0, for inputs of unit radii."""
    zero = torch.zeros_like(c)
    sample = torch.zeros(len(c), dtype=torch.long, device=c.device)
    none = zero > 0
    return Problem(form, c, zero[:, 0], sample, form.U[None], zero[:1], zero[:1], ball, none, none)


def closed(problem: Problem) -> Slopes:
    """The better of the closed forms that the layer has, row by row."""
    radius = torch.linalg.eigvals(problem.form.W.abs()).abs().max()
    if not float(radius) < 1:
        return _by_strength(problem)
    best = _by_gauge(problem)
    return best.or_better(problem, _by_strength(problem)) if problem.form.m > 0 else best


def _by_gauge(problem: Problem) -> Slopes:
    W, U = problem.form.W.abs(), problem.U[0].abs()
    identity = torch.eye(len(W), dtype=W.dtype, device=W.device)
    c = problem.c.abs()
    # Nothing is zero: then the quadratic is strictly convex.
    c = c + ROOM * c.amax(1, keepdim=True) + 1e-200
    y = torch.linalg.solve(identity - W.T, c.T).T
    a = y @ U + 1e-200
    length = a.norm(dim=1, keepdim=True)
    pushed = (a / length if problem.ball else torch.ones_like(a)) @ U.T
    w = torch.linalg.solve(identity - W, (pushed + ROOM * pushed.amax(1, keepdim=True) + 1e-200).T).T
    return Slopes(y / w, (length if problem.ball else a) / 2 * (1 + ROOM))


def _by_strength(problem: Problem) -> Slopes:
    form = problem.form
    U = form.divisor[:, None] * problem.U[0]
    norms = U.norm(dim=0)[None].clamp(min=1e-200)
    s = torch.ones_like(norms[:, :1]) if problem.ball else norms
    largest = torch.linalg.eigvalsh((U / s) @ U.T)[-1].clamp(min=1e-200)
    tau = (form.divisor * (2 * form.m / largest))[None]
    return Slopes(tau.expand(len(problem.c), -1), s.expand(len(problem.c), -1) * (1 + ROOM))


def slopes_of(prepared: Prepared, problem: Problem, wanted: Tensor, deadline: float) -> Slopes:
    """The best that is known of rows; of small layers, where `wanted`, (rows,), by the solver, asked once a row."""
    best = closed(problem)
    if len(problem.form.W) > UNITS:
        return best
    tau, s = best.tau.clone(), best.s.clone()
    expected = seconds(len(problem.form.W), s.shape[1])
    for row in wanted.nonzero().flatten().tolist():
        c = problem.c[row]
        # A row and its negative have the same answer.
        first = c[c != 0][:1]
        name = (problem.ball, (c * first.sign() if len(first) else c).cpu().numpy().tobytes())
        if name not in prepared.slopes:
            started = time.monotonic()
            if started + expected > deadline:  # a solver that has begun does not stop
                break
            prepared.slopes[name] = proposed(problem.form.W, problem.form.U, c, best.tau[row], best.s[row])
            expected = time.monotonic() - started
        tau[row], s[row] = (x.to(tau) for x in prepared.slopes[name])
    return best.or_better(problem, Slopes(tau, s))


# --- the method -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def lipschitz(prepared: Prepared, query: Query) -> Bounds:
    """The value at the centre less what a row can change, and the interval bound where that is better.

    Raises:
        NoGaugeError: an equilibrium about which nothing is known.
    """
    scene, arithmetic = scene_of(prepared, query)
    C = rows_of(query, scene)
    plain = Best.interval(scene, C).lower
    count = plain.shape[1] // (2 if query.upper else 1)
    form, lower = _form(prepared, query), plain
    steps: dict[tuple[int, int], Step] = {}
    if form is not None:
        left = (~query.closed(plain)).nonzero().flatten()
        for part, own in query.parts(left, max(1, ELEMENTS // (form.U.numel() * C.shape[1]))):
            found, made = _around(prepared, own, form, C[part], plain[part])
            lower = lower.index_copy(0, part, torch.maximum(found, plain[part]))
            steps |= {(int(part[i]), row): step for (i, row), step in made.items()}
    better = lower > plain

    def proof(i: int) -> Proof:
        known = boxes_of(arithmetic.boxes, i), states_of(arithmetic.states, i)
        rows = [row for row in range(count) if bool(better[i, row])]
        rest = [row for row in range(count) if row not in rows]
        if not rows:
            return Proof(*known)
        arrays = [steps[i, row].quadratic for row in rows]
        curved = Step(quadratic={name: np.concatenate([own[name] for own in arrays]) for name in arrays[0]})
        if not rest:
            return Proof(*known, cases=((curved,),))
        return Proof(*known, cases=((Step(),), (curved,)), trees=((tuple(rest), 0), (tuple(rows), 1)))

    upper = -lower[:, count:] if query.upper else torch.full_like(lower, torch.inf)
    taken = arithmetic.steps
    taken = torch.zeros(len(query), dtype=torch.long) if taken is None else taken
    return Bounds(Box(lower[:, :count], upper), taken, proof)


def _form(prepared: Prepared, query: Query) -> Form | None:
    """The network as one equilibrium between affine maps, if it is a small one and the question allows it."""
    weighted = query.region is not None and query.region.norm == "l2" and query.region.weights is not None
    if query.tolerance or weighted or len(list(prepared.graph.equilibria())) != 1:
        return None
    ((name, _),) = prepared.graph.equilibria()
    if math.prod(prepared.graph.shapes(query.box.lower)[name]) > LARGEST:
        return None
    try:
        return form_of(prepared, query.box.lower, monotone=False)
    except NoGaugeError:
        return None


def _around(
    prepared: Prepared, query: Query, form: Form, C: Tensor, plain: Tensor
) -> tuple[Tensor, dict[tuple[int, int], Step]]:
    """What the checker makes of rows around the centres, (samples, rows), and the multipliers by sample and row."""
    problem, reach, enclosure = pose(prepared, query, form, C)
    moving = unit(form, problem.c, problem.ball)
    wanted = torch.ones(len(problem.c), dtype=torch.bool, device=C.device)
    if query.rhs is not None and not query.upper:
        first = _point(problem, closed(moving), reach, moving)
        wanted = torch.maximum(evaluate(problem, first).value.view_as(plain), plain).flatten() <= query.rhs.flatten()
    point = _point(problem, slopes_of(prepared, moving, wanted, query.deadline), reach, moving)
    rows = usable(problem, point, reach)
    steps = quadratic_steps(problem.select(rows), point.select(rows), reach, 1)[0] if len(rows) else []
    sample = problem.sample[rows]
    proofs = [
        Proof(states=states_of(enclosure, i), cases=((step,),)) for i, step in zip(sample.tolist(), steps, strict=True)
    ]
    found = torch.full_like(plain, -torch.inf).flatten()
    if len(rows):
        # Row by row: what is wrong with one costs no other its bound.
        own = C.flatten(0, 1)[rows][:, None]
        found[rows] = checked_rows(prepared, query.select(sample), own, proofs)[:, 0]
    count = C.shape[1]
    return found.view_as(plain), {(k // count, k % count): s for k, s in zip(rows.tolist(), steps, strict=True)}


def usable(problem: Problem, point: Point, reach: Tensor) -> Tensor:
    """The places of rows whose multipliers are numbers that a float32 holds, and whose quadratic is convex."""
    value = evaluate(problem, point)
    fits = value.value.isfinite() & value.Q.isfinite().flatten(1).all(1)
    for tensor in (point.lam, point.nu, point.tau, point.log_s.exp() / reach[problem.sample].square()):
        fits &= (tensor.abs() < LIMIT).all(1)
    return fits.nonzero().flatten()


def _point(problem: Problem, slopes: Slopes, reach: Tensor, moving: Problem) -> Point:
    """Multipliers of the quadratic dual around the centres of samples, in units of their reach."""
    s = slopes.s * reach[problem.sample].square()
    found = Slopes(slopes.tau, s).scaled(slopes.curved(moving))
    z = problem.z[problem.sample]
    rest = (problem.z - problem.z @ problem.form.W.T - problem.bias)[problem.sample]
    return Point(found.tau * z, found.tau * rest.clamp(min=0), found.tau, found.s.clamp(min=1e-250).log())
