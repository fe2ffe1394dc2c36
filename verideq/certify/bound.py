"""`bound`: sound bounds of a model's outputs, or of linear functions of them, over a region; one call for every
method."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.box import Box, flushed, gamma, outward, peak, underflow
from verideq.certify.adjoint import adjoint, adjoint_refined
from verideq.certify.ascent import adjoint_ascent
from verideq.certify.balls import Ball
from verideq.certify.certificate import Proof
from verideq.certify.exact import branched, exact
from verideq.certify.footprint import Footprint
from verideq.certify.interval import propagate
from verideq.certify.lipschitz import lipschitz
from verideq.certify.method import TOLERANCE, Bounds, Method, Prepared, Query, boxes_of, prepare, states_of
from verideq.certify.quadratic import quadratic
from verideq.clock import OutOfTime, until
from verideq.equilibrium import Auto
from verideq.errors import InputError, RegionError, UnknownName
from verideq.region import Region


def bound(
    model: nn.Module | Prepared,
    region: Region | Box,
    *,
    C: Tensor | None = None,
    method: str = "interval",
    max_steps: int = 1000,
) -> Box:
    """Bounds of ``C @ model(x)`` that hold for every ``x`` of the region, rounding included.

    Args:
        model: a module of supported operations, or what `prepare` made of it.
        region: a `Region`, or a `Box` of inputs, (batch, *features).
        C: (batch, rows, outputs) or (rows, outputs); ``None``: the outputs themselves.
        method: one of `METHODS`, or ``"auto"``.
        max_steps: of the equilibrium solver; fewer give wider bounds that are just as sound.

    Returns:
        a float64 `Box`, (batch, rows). A sample about which nothing is known has infinite bounds, never NaN.

    Raises:
        NoGaugeError: an equilibrium without a gauge, which this method needs.
        UnsupportedOperation: a node without a rule.
        InputError: shapes that do not fit, or NaN.

    >>> net = nn.Linear(2, 1)
    >>> box = bound(net, Region(torch.full((1, 2), 0.5), 0.1))
    >>> bool(box.lower <= net(torch.full((1, 2), 0.55)))
    True
    """
    return run_method(prepare(model), region, C, method, max_steps).box


def run_method(
    prepared: Prepared,
    region: Region | Box,
    C: Tensor | None,
    method: str,
    max_steps: int = 1000,
    *,
    rhs: Tensor | None = None,
    tolerance: float = 0.0,
    upper: bool = True,
    deadline: float = math.inf,
    unproved: bool = False,
    paid: dict[int, float] | None = None,
) -> Bounds:
    """`bound`, with the steps that it took and a proof; see `Query`."""
    method_named(method)
    if method != "auto":
        prepared.require_method(method)
    box = region.box() if isinstance(region, Region) else region
    if isinstance(region, Box) and bool((flushed(region.lower) | flushed(region.upper)).any()):
        raise RegionError(
            "the box of inputs holds denormal numbers, which torch has been told to read as zero; call "
            "torch.set_flush_denormal(False) before bounding"
        )
    box = Box(*(side.detach().to(prepared.device, torch.float64) for side in (box.lower, box.upper)))
    if not bool(box.sound().all()):
        raise RegionError("the box of inputs is crossed or holds NaN: lower <= upper is needed everywhere")
    outputs = prepared.graph.check_input(box.lower)
    if C is not None:
        C = _specification(C, len(box.lower), outputs).to(prepared.device)
    balls = region if isinstance(region, Region) else None
    solver = Auto(tol=TOLERANCE, max_steps=max_steps)
    rhs = None if rhs is None else rhs.to(box.lower)
    query = Query(box, balls, C, rhs, solver, tolerance, upper, deadline, unproved, {} if paid is None else paid)
    # cuDNN may choose a transform whose error is not bounded entry by entry.
    try:
        with torch.backends.cudnn.flags(enabled=False), until(deadline):
            result = _cut(method, prepared, query)
    except OutOfTime:
        rows = math.prod(outputs) if C is None else C.shape[1]
        nothing = torch.full((len(query), rows), torch.inf, dtype=torch.float64, device=prepared.device)
        return Bounds(Box(-nothing, nothing), torch.zeros(len(query), dtype=torch.long))
    # Whatever is not an ordered pair of numbers is no bound.
    unknown = ~(result.box.lower <= result.box.upper)
    lower = torch.where(unknown, -torch.inf, result.box.lower)
    return replace(result, box=Box(lower, torch.where(unknown, torch.inf, result.box.upper)))


def _cut(name: str, prepared: Prepared, query: Query) -> Bounds:
    """A method, applied to as many samples, or rows of one sample, as fit into memory at a time."""
    method = method_named(name)
    C = query.C
    if C is None:
        outputs = math.prod(prepared.graph.shapes(query.box.lower)[prepared.graph.nodes[-1].name])
        C = torch.eye(outputs, dtype=torch.float64, device=prepared.device).expand(len(query), outputs, outputs)
    sides = 2 if query.upper else 1
    shape = Footprint.of(prepared, query.box.lower, sides * C.shape[1])
    some, size = shape.rows_at_once(name) // sides, shape.samples_at_once(name)
    if some >= C.shape[1]:
        if len(query) <= size:
            return method(prepared, query)
        found = [method(prepared, own) for _, own in query.parts(torch.arange(len(query)), size)]
    else:
        found = []
        for part, own in query.parts(torch.arange(len(query)), 1):
            rows = torch.split(torch.arange(C.shape[1]), max(1, some))
            asked = [replace(own, C=C[part][:, k], rhs=None if own.rhs is None else own.rhs[:, k]) for k in rows]
            found.append(Bounds.beside([method(prepared, q) for q in asked]))
    if not found:
        raise OutOfTime
    return Bounds.joined(found)


def _specification(C: Tensor, batch: int, outputs: tuple[int, ...]) -> Tensor:
    C = C.detach().to(torch.float64)
    C = C.expand(batch, *C.shape) if C.dim() == 2 else C
    if C.dim() != 3 or len(C) != batch or not bool(C.isfinite().all()):
        raise InputError(
            f"C has to be finite, of shape (batch, rows, outputs) with batch {batch}; got {tuple(C.shape)}"
        )
    if (C.shape[2],) != outputs:
        raise InputError(f"C has {C.shape[2]} columns; the model has outputs of shape {outputs}")
    return C


@torch.no_grad()
def interval(prepared: Prepared, query: Query) -> Bounds:
    """Interval bound propagation; a last linear layer and ``C`` are one linear map (elision)."""
    prepared.require_gauges()
    box, C = query.box, query.C
    arithmetic = prepared.arithmetic(query)
    last = prepared.graph.nodes[-1]
    if C is None:
        result = propagate(prepared.graph, box, arithmetic)
    elif isinstance(last.module, nn.Linear):
        features = propagate(prepared.graph, box, arithmetic, until=last)
        result = elide(features, C, last.module.weight, last.module.bias)
        ball = arithmetic.balls.known.get(last.inputs[0])
        result = result if ball is None else result.intersect(_over(ball, C, last.module))
    else:
        outputs = propagate(prepared.graph, box, arithmetic)
        result = elide(outputs, C, None, None)
    steps = arithmetic.steps
    boxes, states = arithmetic.boxes, arithmetic.states
    steps = torch.zeros(len(box.lower), dtype=torch.long) if steps is None else steps
    return Bounds(result, steps, lambda i: Proof(boxes_of(boxes, i), states_of(states, i)))


def _over(ball: Ball, C: Tensor, last: nn.Linear) -> Box:
    """``C (V z + b)`` for every ``z`` of a ball; an infinite box where that says nothing."""
    weight, terms = last.weight, C.shape[2] + 2
    rows, size = C @ weight, C.abs() @ weight.abs()
    off = gamma(terms) * size + underflow(terms, C, size, weight)
    shift = torch.zeros_like(C[:, :, 0]) if last.bias is None else C @ last.bias
    lost = torch.zeros_like(shift) if last.bias is None else gamma(terms) * (C.abs() @ last.bias.abs())
    low, negative = ball.lowest(rows, off), ball.lowest(-rows, off)
    lower = low + shift - lost - (low.abs() + shift.abs() + lost) * 2.0**-50
    upper = shift - negative + lost + (negative.abs() + shift.abs() + lost) * 2.0**-50
    return Box(lower.nan_to_num(-torch.inf, torch.inf, -torch.inf), upper.nan_to_num(torch.inf, torch.inf, -torch.inf))


def elide(features: Box, C: Tensor, weight: Tensor | None, bias: Tensor | None) -> Box:
    """``C (V z + b)`` for every ``z`` of a box: rows ``M = C V``, (batch, rows, features).

    ``M`` itself is rounded: with ``k`` outputs its entries are within ``γ_k |C||V|``, and that is what moves the
    radius.
    """
    outputs = C.shape[2]
    expected = features.lower.shape[1] if weight is None else len(weight)
    if features.lower.dim() != 2 or outputs != expected:
        raise InputError(f"C has {outputs} columns; the model has outputs of shape {tuple(features.lower.shape[1:])}")
    rows, size = C, C.abs()
    shift = constants = torch.zeros_like(C[:, :, 0])
    if weight is not None:
        rows, size = C @ weight, C.abs() @ weight.abs()
    if bias is not None:
        shift, constants = C @ bias, C.abs() @ bias.abs()
    center, radius = features.ball()
    terms = outputs + rows.shape[2] + 2
    g = gamma(terms)

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix @ vector[:, :, None])[:, :, 0]

    moved = times(rows.abs(), radius) * (1 + g) + g * (times(size, center.abs() + radius) + constants)
    lost = underflow(terms, center, radius) * (1 + peak(rows)[:, 0])
    if weight is not None:  # every entry of the products with C may have lost something, and most are multiplied again
        factors = (weight,) if bias is None else (weight, bias)
        scale = (1 + peak(center) + peak(radius)) * rows.shape[2]
        lost = lost + underflow(terms, C, size, *factors)[:, 0] * scale
    return outward(times(rows, center) + shift, moved + lost)


METHODS: dict[str, Method] = {
    "interval": interval,
    "adjoint": adjoint,
    "adjoint-refined": adjoint_refined,
    "adjoint-ascent": adjoint_ascent,
    "quadratic": quadratic,
    "branch-and-bound": branched,
    "exact": exact,
    "lipschitz": lipschitz,
}
"""Every bound method by name."""


def _auto(prepared: Prepared, query: Query) -> Bounds:
    return METHODS["quadratic" if prepared.monotone and prepared.rectified else "adjoint-refined"](prepared, query)


def method_named(method: str) -> Method:
    """The method, or `UnknownName` with the list; ``auto`` is the best that takes one pass."""
    if method == "auto":
        return _auto
    if method not in METHODS:
        raise UnknownName("method", method, ("auto", *METHODS))
    return METHODS[method]


def margin_rows(labels: Tensor, classes: int) -> Tensor:
    """The rows ``e_y - e_j``, ``j != y``: (batch, classes - 1, classes), float64.

    Args:
        labels: (batch,) integers.
        classes: two or more.

    Raises:
        InputError: a label outside the classes, with its index; fewer than two classes.
    """
    if classes < 2:
        raise InputError(f"a margin needs two classes or more; the model has {classes} outputs")
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise InputError(
            f"label {int(labels[index])} of sample {index} is outside the model's classes 0 to {classes - 1}"
        )
    identity = torch.eye(classes, dtype=torch.float64, device=labels.device)
    others = (torch.arange(classes - 1, device=labels.device)[None] + labels[:, None] + 1) % classes
    return F.one_hot(labels, classes).to(torch.float64)[:, None] - identity[others]
