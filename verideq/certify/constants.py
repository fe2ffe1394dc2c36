"""Global Lipschitz constants of rows of outputs, proved.

Two ways, and the smaller number of each row: for one equilibrium between affine maps the semidefinite bound, as the
checker's quadratic dual gives it for the layer without its bias around 0 (`verideq.certify.lipschitz`); for every
network how far a value can move, entry by entry (``|A| r``, along a gauge ``(I - |W|)⁻¹ r``) and as a whole (norms, and
``1 / m``).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from verideq.box import Box, gamma, underflow
from verideq.certify.balls import FLOOR, UP, Ball, Balls
from verideq.certify.interval import RULES, Arithmetic
from verideq.certify.lipschitz import LARGEST, slopes_of, unit, usable
from verideq.certify.method import Prepared, prepare, strength
from verideq.certify.quadratic import Point, form_of, quadratic_steps
from verideq.checker.arithmetic import Float, Rejected, guarded
from verideq.checker.claim import Bounding, Case, Claim
from verideq.checker.quadratic import chain, quadratic
from verideq.equilibrium import Dense, Equilibrium, Gauge
from verideq.equilibrium.gauge import slack
from verideq.errors import InputError, NoGaugeError
from verideq.graph import INPUT, Node
from verideq.region import check_norm

STEPS = 200
"""Of the search for what a gauge layer passes on; any number of them is sound."""


@torch.no_grad()
def lipschitz_constants(
    model: nn.Module | Prepared, C: Tensor | None = None, *, norm: str = "l2", shape: tuple[int, ...] | None = None
) -> Tensor:
    """``L`` with ``|C_k·(f(x) - f(x'))| <= L_k ‖x - x'‖`` for all inputs, in or out of the pixel range.

    Args:
        model: a module of supported operations, or what `prepare` made of it.
        C: (rows, outputs); ``None``: the outputs themselves.
        norm: of inputs, ``l2`` or ``linf``.
        shape: of one input, (*features), if the model does not say.

    Returns:
        (rows,) float64, rounded up; infinite where nothing is proved.

    Raises:
        NoGaugeError: an equilibrium about which nothing is known.
        InputError: `C` has another number of columns than the model has outputs, or the shape of inputs is not known.

    >>> net = nn.Linear(2, 1)
    >>> constant = lipschitz_constants(net, shape=(2,))
    >>> bool(constant >= net.weight.double().norm() * (1 - 1e-15))
    True
    """
    check_norm(norm)
    prepared = prepare(model)
    prepared.require_gauges()
    shape = shape if shape is not None else prepared.graph.input_shape
    if shape is None:
        raise InputError("the model does not say what its inputs look like; give shape=(*features)")
    x = torch.zeros((1, *shape), dtype=torch.float64, device=prepared.device)
    outputs = prepared.graph.check_input(x)
    if len(outputs) != 1:
        raise InputError(f"the model gives outputs of shape {outputs}; a constant needs a vector")
    C = torch.eye(outputs[0], dtype=torch.float64) if C is None else C.detach().to("cpu", torch.float64)
    if C.dim() != 2 or C.shape[1] != outputs[0] or not bool(C.isfinite().all()):
        raise InputError(f"C has shape {tuple(C.shape)}; expected finite (rows, {outputs[0]})")
    found = _stepwise(prepared, x, C.to(prepared.device), ball=norm == "l2").cpu()
    return torch.minimum(found, _semidefinite(prepared, x, C, ball=norm == "l2"))


# --- one equilibrium between affine maps ------------------------------------------------------------------------------


def _semidefinite(prepared: Prepared, x: Tensor, C: Tensor, *, ball: bool) -> Tensor:
    """The constants by the checker's quadratic dual; infinite for other networks, and for large ones."""
    nothing = torch.full((len(C),), torch.inf, dtype=torch.float64)
    shapes = prepared.graph.shapes(x)
    if any(math.prod(shapes[name]) > LARGEST for name, _ in prepared.graph.equilibria()):
        return nothing
    try:
        form = form_of(prepared, x, monotone=False)
    except NoGaugeError:
        return nothing
    problem = unit(form, C.to(form.C) @ form.C, ball)
    slopes = slopes_of(prepared, problem, torch.ones(len(C), dtype=torch.bool), math.inf)
    slopes = slopes.scaled(slopes.curved(problem))
    # λ = ν = 0 and τ >= 0: then the inequality is one of differences, and its bound at 0 one of all inputs.
    zero = torch.zeros_like(slopes.tau)
    point, one = Point(zero, zero, slopes.tau.clamp(min=0), slopes.s.log()), form.U.new_ones(1, 1)
    rows = usable(problem, point, one)
    steps = quadratic_steps(problem.select(rows), point.select(rows), one, 1)[0] if len(rows) else []
    calc, checker, nodes = Float(), prepared.checker, prepared.checker.nodes
    (node,) = (node for node in nodes if node.kind == "equilibrium")
    state, units = shapes[node.name], math.prod(shapes[node.name])
    with guarded():
        layer, identity = checker.layer(node, state), np.eye(units).reshape(units, *state)
        U, _ = chain(calc, nodes, (identity, identity), shapes, node.inputs[0], INPUT)
        c, _ = chain(calc, nodes, (C.numpy(), C.numpy()), shapes, nodes[-1].name, node.name)
    U, c = (U[0].reshape(units, -1), U[1].reshape(units, -1)), (c[0].reshape(-1, units), c[1].reshape(-1, units))
    center, zero_bias = np.zeros(U[0].shape[1]), (np.zeros(units), np.zeros(units))
    none = np.zeros((1, units), dtype=bool)
    unit_ball = Claim(
        center=(center, center), eps=Fraction(1), norm="l2" if ball else "linf", weights=None, clip=None, label=None,
        linear=None, margin=Fraction(0), tolerance=Fraction(0), boxes={}, states={}, refinements=0, trees=(), steps=(),
    )  # fmt: skip
    region = center[None] - 1, center[None] + 1
    for k, step in zip(rows.tolist(), steps, strict=True):
        own = {name: calc.exactly(array) for name, array in step.quadratic.items()}
        if not (own["tau"] >= 0).all() or own["lambda"].any() or own["nu"].any():
            continue
        case, row = Case(unit_ball, (), None, (Bounding(None, None, 0, False, None, {}, own),)), slice(k, k + 1)
        try:
            with guarded():
                least = quadratic(
                    calc, layer, U, zero_bias, region, [case], (none, none), (c[0][None, row], c[1][None, row]), state
                )
        except Rejected:
            continue
        nothing[k] = math.inf if math.isnan(least[0, 0]) else max(0.0, -float(least[0, 0]))
    return nothing


# --- step by step -----------------------------------------------------------------------------------------------------


def _stepwise(prepared: Prepared, x: Tensor, C: Tensor, *, ball: bool) -> Tensor:
    """The constants by how far every value can move: entry by entry, and as a whole."""
    one = torch.ones_like(x)
    length = 1.0 if ball else math.sqrt(x.numel()) * UP
    arithmetic = Arithmetic(prepared.gauges)
    balls = Balls(lambda node, boxes: _still(arithmetic, node, boxes), prepared.norms)
    balls.known[INPUT] = Ball(Box(0 * x, 0 * x), one, one.new_full((1,), length))
    reach = {INPUT: one}
    last = prepared.graph.nodes[-1]
    elided = isinstance(last.module, nn.Linear)
    for node in prepared.graph.nodes[:-1] if elided else prepared.graph.nodes:
        before = [reach[name] for name in node.inputs]
        known: Ball | None
        if isinstance(node.module, Equilibrium):
            reach[node.name], known = _equilibrium(
                prepared, node.name, node.module, before[0], balls.known[node.inputs[0]]
            )
        else:
            moved = RULES[node.operation.kind](arithmetic, node, [Box(0 * r, 2 * r) for r in before])
            entries = (moved.width / 2) * UP + FLOOR
            # Of inputs that are anywhere, and around a centre of zeros.
            cut = balls.meet(node, Box(torch.full_like(entries, -torch.inf), torch.full_like(entries, torch.inf)))
            reach[node.name] = torch.minimum(entries, cut.upper)
            known = balls.known.get(node.name)
        whole = _whole(reach[node.name])
        # The shorter of what norms say and of the length of all entries together.
        if known is None or float(_length(known)) > float(whole.length):
            known = whole
        balls.known[node.name] = known
        reach[node.name] = torch.minimum(reach[node.name], known.reach)
    name = last.inputs[0] if elided else last.name
    rows, off = C, torch.zeros_like(C)
    if elided:
        weight: Tensor = last.module.weight  # type: ignore[assignment]  # of a linear layer
        rows, size, terms = C @ weight, C.abs() @ weight.abs(), C.shape[1] + 2
        off = gamma(terms) * size + underflow(terms, C, size, weight)
    by_entry = (rows.abs() + off) @ reach[name].flatten() * (1 + 4 * gamma(rows.shape[1])) + FLOOR
    together = -balls.known[name].lowest(rows[None], off[None])[0]
    return torch.fmin(by_entry, together).nan_to_num(nan=torch.inf)


def _still(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    """A centre of the right shape: only distances from it count."""
    moved = RULES[node.operation.kind](arithmetic, node, boxes)
    return Box(torch.zeros_like(moved.lower), torch.zeros_like(moved.upper))


def _whole(reach: Tensor) -> Ball:
    """A ball that holds a box."""
    size = reach.amax().clamp(min=FLOOR)
    length = (reach / size).square().sum().sqrt() * size * (1 + gamma(reach.numel() + 8))
    return Ball(Box(0 * reach, 0 * reach), torch.ones_like(reach), length.view(1))


def _length(ball: Ball) -> Tensor:
    return ball.length * ball.scale.amax()


def _equilibrium(prepared: Prepared, name: str, layer: Equilibrium, reach: Tensor, ball: Ball) -> tuple[Tensor, Ball]:
    """How far equilibria move with their injections."""
    m, entries, factor = prepared.monotone.get(name, 0.0), torch.full_like(reach, torch.inf), math.inf
    if name in prepared.gauges:
        entries = _passed(layer, prepared.gauges[name], reach)
        factor, m = _through(layer), strength(layer)
    factor = min(factor, 1 / m * UP if m > 0 else math.inf)
    length = _length(ball) * factor * UP + FLOOR
    found = Ball(Box(0 * reach, 0 * reach), torch.ones_like(reach), length.view(1))
    return torch.minimum(entries, found.reach), found


def _passed(layer: Equilibrium, gauge: Gauge, reach: Tensor) -> Tensor:
    """``(I - |W̃|)⁻¹ r / (1 - diag W)``, from above: any ``x`` with ``x >= |W̃| x + r`` is."""
    operator, factor = layer.operator().solved()
    absolute, g = operator.absolute(), gamma(operator.terms + 8)
    u = operator.spread_units(gauge.u.to(reach))
    room = operator.spread_units(slack(operator, gauge.u.to(reach)))
    r = reach * factor * UP + FLOOR
    x = r
    for _ in range(STEPS):
        x = absolute.apply(x) + r
    # Moved out along the gauge by what is missing.
    missing = (absolute.apply(x) * (1 + g) + r * (1 + g) + FLOOR - x * (1 - 2.0**-50)).clamp(min=0)
    found: Tensor = (x + (missing / room).amax() * UP * u) * UP
    return found if bool(found.isfinite().all()) else torch.full_like(found, torch.inf)


def _through(layer: Equilibrium) -> float:
    """A bound of ``‖(I - |W̃|)⁻¹ (I - diag W)⁻¹‖₂`` of a dense layer by its sums of rows and of columns."""
    operator, factor = layer.operator().solved()
    if not isinstance(operator, Dense):
        return math.inf
    bounds = []
    for side in (operator, Dense(operator.weight.T.contiguous())):
        sums = side.absolute_units()
        ones = torch.ones(len(sums), dtype=sums.dtype, device=sums.device)
        u = torch.linalg.solve(torch.eye(len(sums), dtype=sums.dtype, device=sums.device) - sums, ones)
        room = slack(side, u)
        if not bool((room > 0).all()):
            return math.inf
        bounds.append(float(u.max() / room.min()) * UP)
    return math.sqrt(bounds[0] * bounds[1]) * float(factor.amax()) * UP
