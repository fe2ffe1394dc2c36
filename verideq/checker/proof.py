"""What a record claims, and whether it holds.

**Theorem** (gauge). Let ``z = relu(W z + v)``, and ``u > 0`` with ``|W| u < u``. If an ordered, finite box is mapped
into itself by the interval extension of the layer, for a box of ``v``, then it holds the one equilibrium of every
``v`` of that box. The same is true after every row is solved for its own unknown: ``z_i = relu((Σ_{j≠i} W_ij z_j +
v_i) / (1 - W_ii))`` with ``W_ii < 1`` and ``Σ_{j≠i} |W_ij| u_j < (1 - W_ii) u_i``; that is the form checked here, and
a gauge of ``W`` is one of it.

Of what a record says only the input, the radius, the label and the claimed margin are *statements*. The gauge and the
boxes are *suggestions*: they are checked, and none is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Float, Interval, Rejected, require
from verideq.checker.files import Blob
from verideq.checker.network import RULES, Node, pads_of, pair, tensor

VERSION = 1
REFINEMENTS = 500
"""The most refinements of a recomputed box that a record may ask for."""


@dataclass(frozen=True)
class Claim:
    """The statement of a record: on the ball every row of ``C f - rhs`` is above zero, and not below `margin`.

    Args:
        center: the input, (features), as numbers of the arithmetic below and above it.
        eps: the radius, times `weights` by feature.
        clip: the valid range.
        label: the class whose output exceeds every other one; ``None`` for a linear specification.
        linear: ``C``, (rows, outputs), and ``rhs``, (rows,); ``None`` for a label.
        margin: what is claimed.
        suggestions: boxes by node name.
        refinements: of the boxes that are not suggested.
    """

    center: Interval
    eps: Fraction
    weights: Array | None
    clip: tuple[Fraction, Fraction] | None
    label: int | None
    linear: tuple[Array, Array] | None
    margin: Fraction
    suggestions: Mapping[str, tuple[Array, Array]]
    refinements: int


def read_claim(record: Blob, model: str, pixels: tuple[Fraction, Fraction] | None, arithmetic: Arithmetic) -> Claim:
    """The claim of a record, every field of the right type and for the model with this hash and pixel range."""
    head = dict(record.head)
    expected = {
        "version",
        "model",
        "index",
        "label",
        "eps",
        "norm",
        "clip",
        "scale",
        "specification",
        "margin",
        "refinements",
    }
    require(set(head) == expected, f"the record has the fields {sorted(head)}")
    require(head["version"] == VERSION, f"version {head['version']!r} is not known")
    require(head["model"] == model, "the record is about another model")
    require(head["norm"] in ("linf", "l2"), f"the norm {head['norm']!r} is not known")
    require(head["specification"] in ("label", "linear"), "the specification is not known")
    by_label = head["specification"] == "label"
    require(
        (type(head["label"]) is int and head["label"] >= 0) if by_label else head["label"] is None, "the label is wrong"
    )
    require(type(head["refinements"]) is int and 0 <= head["refinements"] <= REFINEMENTS, "too many refinements")
    require(type(head["index"]) is int and head["index"] >= 0, "the index is wrong")
    eps, margin = rational(head["eps"], "eps"), rational(head["margin"], "margin")
    require(eps >= 0, "eps is negative")
    require(margin >= 0, "the claimed margin is negative")
    clip = head["clip"]
    if clip is not None:
        require(isinstance(clip, list) and len(clip) == 2, "the clip is no range")
        clip = (rational(clip[0], "clip"), rational(clip[1], "clip"))
        require(clip[0] <= clip[1], "the clip is no range")
        # A narrower clip would claim less than it seems to; none at all claims more.
        whole = pixels is not None and clip[0] <= pixels[0] and pixels[1] <= clip[1]
        require(whole, "the clip cuts off pixels that the model allows")
    arrays = dict(record.arrays)
    center = _center(arrays.pop("input", None), head["scale"], arithmetic)
    weights = arrays.pop("weights", None)
    if weights is not None:
        require(weights.dtype == np.float64 and weights.shape == center[0].shape, "the weights do not fit the input")
        require((weights >= 0).all(), "a weight is negative")
        weights = arithmetic.exactly(weights)
    linear = None if by_label else _linear(arrays.pop("C", None), arrays.pop("rhs", None), arithmetic)
    suggestions = _suggestions(arrays, arithmetic)
    return Claim(center, eps, weights, clip, head["label"], linear, margin, suggestions, head["refinements"])


def rational(text: Any, what: str) -> Fraction:
    """A fraction from ``"8/255"``: digits, one slash, nothing else."""
    require(isinstance(text, str) and len(text) <= 2000, f"{what} is no fraction")
    top, _, bottom = text.partition("/")
    digits = top.removeprefix("-").isascii() and top.removeprefix("-").isdigit()
    require(digits and (not _ or (bottom.isascii() and bottom.isdigit() and int(bottom) > 0)), f"{what} is no fraction")
    return Fraction(int(top), int(bottom or 1))


def _center(stored: Array | None, scale: Any, arithmetic: Arithmetic) -> Interval:
    require(stored is not None and stored.ndim >= 1, "the record has no input")
    array: Array = stored
    if scale is None:
        require(array.dtype == np.float64, "an input without a scale is float64")
        exact = arithmetic.exactly(array)
        return exact, exact
    require(array.dtype == np.uint8, "an input with a scale is uint8")
    unit = rational(scale, "scale")
    table = [arithmetic.rational(value * unit) for value in range(256)]
    kind = np.float64 if isinstance(arithmetic, Float) else object
    low, high = (np.array([entry[side] for entry in table], dtype=kind) for side in (0, 1))
    return low[array], high[array]


def _linear(C: Array | None, rhs: Array | None, arithmetic: Arithmetic) -> tuple[Array, Array]:
    if C is None or rhs is None:
        raise Rejected("the record has no C, or no rhs")
    require(
        C.dtype == rhs.dtype == np.float64 and C.ndim == 2 and len(C) > 0 and rhs.shape == C.shape[:1],
        "C and rhs differ",
    )
    return arithmetic.exactly(C), arithmetic.exactly(rhs)


def _suggestions(arrays: dict[str, Array], arithmetic: Arithmetic) -> dict[str, tuple[Array, Array]]:
    found: dict[str, tuple[Array, Array]] = {}
    for name in sorted(arrays):
        kind, _, rest = name.partition("/")
        node, _, side = rest.rpartition("/")
        require(kind == "box" and side in ("lower", "upper"), f"the array {name} has no meaning")
        require(
            f"box/{node}/lower" in arrays and f"box/{node}/upper" in arrays, f"half of the box of {node} is missing"
        )
        lower, upper = arrays[f"box/{node}/lower"], arrays[f"box/{node}/upper"]
        require(
            lower.dtype == upper.dtype == np.float64 and lower.shape == upper.shape, f"the box of {node} has two shapes"
        )
        found[node] = arithmetic.exactly(lower), arithmetic.exactly(upper)
    return found


def region(claim: Claim, arithmetic: Arithmetic) -> Interval:
    """The smallest interval of inputs that is sure to hold the ball, cut to the clip."""
    eps = arithmetic.rational(claim.eps)
    shape = claim.center[0].shape
    reach = tuple(np.full(shape, side, dtype=claim.center[0].dtype) for side in eps)
    if claim.weights is not None:
        reach = arithmetic.multiply((reach[0], reach[1]), (claim.weights, claim.weights))
    lo = arithmetic.subtract(claim.center, (reach[1], reach[1]))[0]
    hi = arithmetic.add(claim.center, (reach[1], reach[1]))[1]
    if claim.clip is not None:
        low, high = arithmetic.rational(claim.clip[0]), arithmetic.rational(claim.clip[1])
        inside = (claim.center[1] >= low[0]).all() and (claim.center[0] <= high[1]).all()
        require(inside, "the input lies outside the clip")
        lo, hi = np.maximum(lo, low[0]), np.minimum(hi, high[1])
    return lo, hi


@dataclass(frozen=True)
class Contraction:
    """An equilibrium with a gauge that has been checked: the rows of ``W`` without their own entries, and ``1 - W_ii``.

    Args:
        node: of the model.
        off: the fusion without its own entries.
        divisor: ``1 - W_ii``, an interval, shaped to broadcast over states.
        u: the gauge, shaped likewise, (1, *state).
        room: a lower bound of ``(1 - W_ii) u_i - Σ |W_ij| u_j``, (1, *state).
    """

    node: Node
    off: Node
    divisor: Interval
    u: Array
    room: Array

    def image(self, arithmetic: Arithmetic, box: Interval, v: Interval) -> Interval:
        """The interval extension of the layer."""
        rows = arithmetic.divide(arithmetic.add(apply(arithmetic, self.off, box), v), self.divisor)
        return np.maximum(rows[0], arithmetic.zero), np.maximum(rows[1], arithmetic.zero)


def apply(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    """A rule of one input."""
    rule = RULES[node.kind]
    if rule is None:
        raise Rejected(f"{node.name}: {node.kind} is no operation of one input")
    return rule(arithmetic, node, x)


def contraction(arithmetic: Arithmetic, node: Node, u: Array, state: tuple[int, ...]) -> Contraction:
    """Check a gauge of an equilibrium for states of this shape.

    Args:
        u: (units,) for one number a unit or channel, or the shape of a state.
    """
    fusion = node.arguments.get("fusion")
    require(
        node.arguments.get("activation") == "relu" and isinstance(fusion, dict),
        f"{node.name}: it is no relu equilibrium",
    )
    kind, arguments = fusion.get("operation"), fusion.get("attributes")  # type: ignore[union-attr]  # a dict
    require(kind in ("linear", "conv2d") and isinstance(arguments, dict), f"{node.name}: its fusion is not known")
    require("fusion.weight" in node.tensors, f"{node.name}: fusion.weight is missing")
    weight = node.tensors["fusion.weight"].copy()
    fused = Node(node.name, str(kind), (), arguments, {"weight": weight})
    own = _take_own(fused, weight, arithmetic)
    require((own < arithmetic.one).all(), f"{node.name}: a row has W_ii >= 1")
    shape = (1, -1, *[1] * (len(state) - 1))
    one = np.full(own.shape, arithmetic.one, dtype=own.dtype)
    divisor = arithmetic.subtract((one, one), (own, own))
    require(u.shape in ((state[0],), state), f"{node.name}: a gauge of shape {u.shape} for states of shape {state}")
    require((u > arithmetic.zero).all(), f"{node.name}: the gauge is not positive")
    full = np.broadcast_to(u.reshape(shape) if u.ndim == 1 else u[None], (1, *state))
    absolute = replace(fused, tensors={"weight": np.abs(weight)})
    pushed = apply(arithmetic, absolute, (full, full))
    require(pushed[1].shape == full.shape, f"{node.name}: W does not keep the shape {state}")
    divisor = divisor[0].reshape(shape), divisor[1].reshape(shape)
    room = arithmetic.subtract(arithmetic.multiply((full, full), divisor), pushed)[0]
    require((room > arithmetic.zero).all(), f"{node.name}: the slack of the gauge is not positive")
    return Contraction(node, fused, divisor, full, room)


def _take_own(fused: Node, weight: Array, arithmetic: Arithmetic) -> Array:
    """Cut the entries ``W_ii`` out of the weight, in place, and return them, (units,)."""
    units = np.arange(len(weight))
    if fused.kind == "linear":
        require(weight.ndim == 2 and weight.shape[0] == weight.shape[1], f"{fused.name}: W is not square")
        place: tuple[Any, ...] = (units, units)
    else:
        tensor(fused, "weight", None, None, None, None)
        require(pair(fused, "stride", 1) == (1, 1), f"{fused.name}: W has a stride, so it is no map of states")
        dilation = pair(fused, "dilation", 1)
        pads = pads_of(fused, (weight.shape[2], weight.shape[3]), dilation)
        if pads[0] % dilation[0] or pads[2] % dilation[1]:
            return np.full(len(weight), arithmetic.zero, dtype=weight.dtype)  # no tap reads its own position
        place = (units, units % weight.shape[1], pads[0] // dilation[0], pads[2] // dilation[1])
    own = weight[place].copy()
    weight[place] = arithmetic.zero
    return own


def equilibrium(
    arithmetic: Arithmetic, layer: Contraction, v: Interval, suggested: Interval | None, refinements: int
) -> tuple[Interval, Array]:
    """A box that holds every equilibrium (suggested, or from the gauge alone), and for which samples it does."""
    if suggested is not None:
        lo, hi = suggested
        require(
            lo.shape == v[0].shape, f"{layer.node.name}: the box has shape {lo.shape[1:]}, the state {v[0].shape[1:]}"
        )
        image = layer.image(arithmetic, suggested, v)
        inside = (lo <= hi) & (lo <= image[0]) & (image[1] <= hi)
        return suggested, inside.reshape(len(lo), -1).all(1)
    # [0, t u] maps into itself for t s >= max(v, 0), and so does all that is cut from it by its own image.
    top = np.maximum(v[1], arithmetic.zero)
    reach = arithmetic.divide((top, top), (layer.room, layer.room))[1]
    t = reach.reshape(len(reach), -1).max(1).reshape(-1, *[1] * (top.ndim - 1))
    hi = arithmetic.multiply((t, t), (layer.u, layer.u))[1]
    lo = np.zeros_like(hi) if hi.dtype != object else np.full(hi.shape, arithmetic.zero, dtype=object)
    for _ in range(refinements):
        image = layer.image(arithmetic, (lo, hi), v)
        lo, hi = np.maximum(lo, image[0]), np.minimum(hi, image[1])
    return (lo, hi), (lo <= hi).reshape(len(lo), -1).all(1)
