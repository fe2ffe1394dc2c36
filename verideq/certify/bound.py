"""`bound`: sound bounds of a model's outputs, or of linear functions of them, over a region; one call for every
method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.box import Box, flushed, gamma, outward, peak, underflow
from verideq.certify.certificate import gauge_file
from verideq.certify.interval import Arithmetic, propagate
from verideq.checker import Checker
from verideq.equilibrium import Auto, Gauge, Solver, gauge
from verideq.errors import InputError, ModelError, NoGaugeError, RegionError, UnknownName
from verideq.graph import Graph, model_bytes, trace
from verideq.region import Region

TOLERANCE = 1e-13
"""The relative residual to which equilibria are solved for a proof: how tight it is, never whether it holds."""


@dataclass(frozen=True)
class Prepared:
    """A model made ready for proofs: its stored weights in float64, and a gauge for every equilibrium that has one.

    Args:
        graph: materialised, float64, evaluation mode.
        gauges: by node name.
        missing: why a layer has no gauge, by node name.
        file: the model file of the stored weights, as they were when the model was prepared.
    """

    graph: Graph
    gauges: Mapping[str, Gauge]
    missing: Mapping[str, NoGaugeError] = field(default_factory=dict)
    file: bytes = b""

    @cached_property
    def checker(self) -> Checker:
        """The independent checker, with this model's file and gauges in it."""
        return Checker(self.file, gauge_file(self.file, self.gauges))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((t.device for t in [*self.graph.parameters(), *self.graph.buffers()]), torch.device("cpu"))

    def require_gauges(self) -> None:
        """Nothing, if every equilibrium has a gauge.

        Raises:
            NoGaugeError: the first layer without one.
        """
        for name, error in self.missing.items():
            raise NoGaugeError(f"{name}: {error}", error.rate)


def prepare(model: nn.Module | Prepared, device: torch.device | str | None = None) -> Prepared:
    """Trace, materialise and look for gauges, once for any number of bounds.

    Args:
        model: a module of supported operations.
        device: where to bound; ``None``: where the model's first parameter is.

    Raises:
        UnsupportedOperation: a node without a rule.
        ModelError: NaN or infinite weights, or denormal ones where torch flushes these to zero.
    """
    if isinstance(model, Prepared):
        return model
    graph = trace(model).check_finite()
    for node in graph.nodes:
        for name, tensor in node.operation.state(node.module).items():
            if bool(flushed(tensor).any()):
                raise ModelError(
                    f"{node.name}.{name} holds denormal numbers, which torch has been told to read as zero; call "
                    "torch.set_flush_denormal(False) before bounding this model"
                )
    if device is None:
        device = next((t.device for t in [*graph.parameters(), *graph.buffers()]), torch.device("cpu"))
    frozen = graph.frozen(torch.float64, device)
    gauges, missing = {}, {}
    for name, layer in frozen.equilibria():
        try:
            gauges[name] = gauge(layer)
        except NoGaugeError as error:
            missing[name] = error
    return Prepared(frozen, gauges, missing, model_bytes(graph))


@dataclass(frozen=True)
class Bounds:
    """What a method returns: the box, and what it took.

    Args:
        box: (batch, rows).
        steps: (batch,) solver steps, zero without an equilibrium.
        enclosures: of the equilibria by node name, (batch, *state): what a certificate is made of.
    """

    box: Box
    steps: Tensor
    enclosures: Mapping[str, Box] = field(default_factory=dict)


Method = Callable[[Prepared, Box, Tensor | None, Solver], Bounds]


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


def run_method(prepared: Prepared, region: Region | Box, C: Tensor | None, method: str, max_steps: int) -> Bounds:
    """`bound`, with the steps that it took."""
    chosen = method_named(method)
    box = region.box() if isinstance(region, Region) else region
    if isinstance(region, Box) and bool((flushed(region.lower) | flushed(region.upper)).any()):
        raise RegionError(
            "the box of inputs holds denormal numbers, which torch has been told to read as zero; call "
            "torch.set_flush_denormal(False) before bounding"
        )
    box = Box(*(side.detach().to(prepared.device, torch.float64) for side in (box.lower, box.upper)))
    if not bool(box.sound().all()):
        raise RegionError("the box of inputs is crossed or holds NaN: lower <= upper is needed everywhere")
    prepared.graph.check_input(box.lower)
    if C is not None:
        C = _specification(C, len(box.lower)).to(prepared.device)
    # cuDNN may choose a transform whose error is not bounded entry by entry.
    with torch.backends.cudnn.flags(enabled=False):
        result = chosen(prepared, box, C, Auto(tol=TOLERANCE, max_steps=max_steps))
    # Whatever is not an ordered pair of numbers is no bound.
    unknown = ~(result.box.lower <= result.box.upper)
    lower = torch.where(unknown, -torch.inf, result.box.lower)
    return replace(result, box=Box(lower, torch.where(unknown, torch.inf, result.box.upper)))


def _specification(C: Tensor, batch: int) -> Tensor:
    C = C.detach().to(torch.float64)
    C = C.expand(batch, *C.shape) if C.dim() == 2 else C
    if C.dim() != 3 or len(C) != batch or not bool(C.isfinite().all()):
        raise InputError(
            f"C has to be finite, of shape (batch, rows, outputs) with batch {batch}; got {tuple(C.shape)}"
        )
    return C


@torch.no_grad()
def interval(prepared: Prepared, box: Box, C: Tensor | None, solver: Solver) -> Bounds:
    """Interval bound propagation; a last linear layer and ``C`` are one linear map (elision)."""
    prepared.require_gauges()
    arithmetic = Arithmetic(prepared.gauges, solver)
    last = prepared.graph.nodes[-1]
    if C is None:
        result = propagate(prepared.graph, box, arithmetic)
    elif isinstance(last.module, nn.Linear):
        features = propagate(prepared.graph, box, arithmetic, until=last)
        result = elide(features, C, last.module.weight, last.module.bias)
    else:
        outputs = propagate(prepared.graph, box, arithmetic)
        result = elide(outputs, C, None, None)
    steps = arithmetic.steps
    return Bounds(result, torch.zeros(len(box.lower), dtype=torch.long) if steps is None else steps, arithmetic.boxes)


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


METHODS: dict[str, Method] = {"interval": interval}
"""Every bound method by name."""


def method_named(method: str) -> Method:
    """The method, or `UnknownName` with the list; ``auto`` is the best that there is."""
    if method == "auto":
        return METHODS["interval"]
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
