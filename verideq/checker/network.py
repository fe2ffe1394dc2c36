"""The inclusion rule of every operation of a model, and of an equilibrium with a gauge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Interval, Rejected, constant, require
from verideq.checker.files import Blob

Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Node:
    """One operation: its name, kind, inputs, arguments and stored arrays (in the arithmetic's numbers).

    `kept` is what has been worked out of these, once; a node with other arrays starts anew.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    arguments: Mapping[str, Any]
    tensors: Tensors
    kept: dict[str, Array] = field(default_factory=dict, init=False, compare=False, repr=False)


def read_nodes(model: Blob, arithmetic: Arithmetic) -> list[Node]:
    """The operations of a model file, each array used exactly once, each input defined before it is read."""
    known, nodes, left = {"input"}, [], set(model.arrays)
    require(model.head.get("format") == 1, "the format of the model file is not known")
    listed = model.head.get("nodes")
    require(isinstance(listed, list) and listed, "the model has no nodes")
    for entry in listed:  # type: ignore[union-attr]  # a list, or it was rejected
        try:
            name, kind, inputs = entry["name"], entry["operation"], tuple(entry["inputs"])
            keys = [f"{name}/{tensor}" for tensor in entry["tensors"]]
            arguments = dict(entry["attributes"])
        except (KeyError, TypeError, ValueError) as error:
            raise Rejected("a node of the model is not described") from error
        require(kind in TENSORS, f"{name}: the operation {kind!r} is not known")
        require(name not in known and set(inputs) <= known, f"{name}: its inputs are not defined before it")
        require(len(inputs) == (2 if kind == "add" else 1), f"{name}: a wrong number of inputs")
        require(left.issuperset(keys), f"{name}: a tensor is missing")
        left -= set(keys)
        known.add(name)
        require(set(entry["tensors"]) <= TENSORS[kind] | coupled(kind, arguments), f"{name}: a tensor has no meaning")
        tensors = {tensor: arithmetic.exactly(model.arrays[f"{name}/{tensor}"]) for tensor in entry["tensors"]}
        nodes.append(Node(name, kind, inputs, arguments, tensors))
    require(not left, "the model holds tensors that no node uses")
    return nodes


def coupled(kind: str, arguments: Mapping[str, Any]) -> set[str]:
    """The weights of the couplings of an equilibrium whose blocks are coupled; none for any other operation."""
    fusion = arguments.get("fusion") if kind == "equilibrium" else None
    inside = fusion.get("attributes") if isinstance(fusion, dict) and fusion.get("operation") == "feedback" else None
    couplings = inside.get("couplings") if isinstance(inside, dict) else None
    return {f"fusion.couplings.{place}.weight" for place in range(len(couplings or []))}


def tensor(node: Node, name: str, *shape: int | None) -> Array:
    """A stored array with exactly this shape: nothing is broadcast on trust."""
    array = node.tensors.get(name)
    if array is None:
        raise Rejected(f"{node.name}: {name} is missing")
    fits = array.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, array.shape, strict=True))
    require(fits, f"{node.name}: {name} has shape {array.shape}, expected {shape}")
    return array


def optional(node: Node, name: str, size: int, default: Any) -> Array:
    """A stored vector, or `default` where the operation has none."""
    return tensor(node, name, size) if name in node.tensors else np.array([default] * size)


def pair(node: Node, name: str, default: int | None = None) -> tuple[int, int]:
    """An argument that is one nonnegative integer or two."""
    value = node.arguments.get(name, default)
    values = [value, value] if isinstance(value, int) else value
    whole = isinstance(values, list) and len(values) == 2 and all(type(v) is int and 0 <= v < 2**16 for v in values)
    require(whole, f"{node.name}: the argument {name} = {value!r} makes no sense")
    return int(values[0]), int(values[1])


def pads_of(node: Node, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows above and below, columns left and right."""
    if node.arguments.get("padding") == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2
    if node.arguments.get("padding") == "valid":
        return 0, 0, 0, 0
    rows, columns = pair(node, "padding", 0)
    return rows, rows, columns, columns


MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def padded(x: Array, pads: tuple[int, int, int, int], mode: str, fill: Any) -> Array:
    """The image with its border; `fill` for zero padding."""
    width = ((0, 0), (0, 0), pads[:2], pads[2:])
    if mode == "constant":
        return np.pad(x, width, constant_values=fill) if any(pads) else x
    return np.pad(x, width, mode=mode)  # type: ignore[call-overload]  # one of MODES


def windows(x: Array, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Array:
    """(batch, channels, out rows, out columns, kernel rows, kernel columns): what each output reads."""
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    require(x.shape[2] >= spans[0] and x.shape[3] >= spans[1] and min(stride) > 0, "a window is larger than its image")
    view = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(2, 3))
    return view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def _linear(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    rows, columns = (node.arguments.get(key) for key in ("out_features", "in_features"))
    weight = tensor(node, "weight", rows, columns)
    require(x[0].ndim == 2 and x[0].shape[1] == columns, f"{node.name}: its input is no vector of {columns}")
    bias = optional(node, "bias", weight.shape[0], arithmetic.zero)
    return arithmetic.affine(x, weight.T, (bias, bias))


def _conv2d(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    outputs, inputs = (int(node.arguments[key]) for key in ("out_channels", "in_channels"))
    kernel, stride, dilation = pair(node, "kernel_size"), pair(node, "stride", 1), pair(node, "dilation", 1)
    groups = pair(node, "groups", 1)[0]
    require(groups > 0 and inputs % groups == 0 and outputs % groups == 0, f"{node.name}: a wrong number of groups")
    weight = tensor(node, "weight", outputs, inputs // groups, *kernel)
    require(x[0].ndim == 4 and x[0].shape[1] == inputs, f"{node.name}: its input has not {inputs} channels")
    mode = MODES.get(node.arguments.get("padding_mode", "zeros"))
    require(mode is not None, f"{node.name}: an unknown padding mode")
    pads = pads_of(node, kernel, dilation)

    matrix = weight.reshape(groups, outputs // groups, -1)

    def apply(matrix: Array, x: Array) -> Array:
        seen = windows(padded(x, pads, str(mode), arithmetic.zero), kernel, stride, dilation)
        height, width = seen.shape[2:4]
        # The pixels last, so that runs of them are copied, and not of a kernel's few columns.
        columns = np.moveaxis(seen, (4, 5), (2, 3)).reshape(len(x), groups, matrix.shape[2], height * width)
        return (matrix @ columns).reshape(len(x), outputs, height, width)

    bias = optional(node, "bias", outputs, arithmetic.zero).reshape(outputs, 1, 1)
    pixels = (x[0].shape[2] + sum(pads[:2])) * (x[0].shape[3] + sum(pads[2:])) // (stride[0] * stride[1] or 1)
    room = groups * matrix.shape[2] * pixels
    return arithmetic.bilinear(apply, matrix, x, (bias, bias), matrix.shape[2], room)


@dataclass(frozen=True)
class Scaling:
    """``(x - mean) * scale + shift`` by channel (axis 1)."""

    mean: Array
    scale: Interval
    shift: Array


def scaling(arithmetic: Arithmetic, node: Node, size: int) -> Scaling:
    """What a normalisation or a batch norm of `size` channels does in evaluation."""
    if node.kind == "normalize":
        mean, std = node.tensors.get("mean"), node.tensors.get("std")
        if mean is None or std is None or mean.shape != std.shape or mean.shape not in ((1,), (size,)):
            raise Rejected(f"{node.name}: mean and std have wrong shapes")
        mean, std = np.broadcast_to(mean, (size,)), np.broadcast_to(std, (size,))
        one = np.array([arithmetic.one] * size)
        return Scaling(mean, arithmetic.divide((one, one), (std, std)), np.array([arithmetic.zero] * size))
    mean, variance = tensor(node, "running_mean", size), tensor(node, "running_var", size)
    weight = optional(node, "weight", size, arithmetic.one)
    shift = optional(node, "bias", size, arithmetic.zero)
    eps: Any = node.arguments.get("eps")
    if type(eps) not in (int, float) or not 0 <= eps < np.inf:
        raise Rejected(f"{node.name}: eps = {eps!r} makes no sense")
    stored = arithmetic.exactly(np.full(size, float(eps)))
    deviation = arithmetic.root(arithmetic.add((variance, variance), (stored, stored)))
    return Scaling(mean, arithmetic.divide((weight, weight), deviation), shift)


def by_channel(values: Array, axes: int) -> Array:
    """(channels,) as (1, channels, 1, ...) with so many axes."""
    return values.reshape(1, -1, *[1] * (axes - 2))


def _scale(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    axes = x[0].ndim
    how = scaling(arithmetic, node, x[0].shape[1])
    mean, shift = by_channel(how.mean, axes), by_channel(how.shift, axes)
    scale = by_channel(how.scale[0], axes), by_channel(how.scale[1], axes)
    return arithmetic.add(arithmetic.multiply(arithmetic.subtract(x, (mean, mean)), scale), (shift, shift))


def _flatten(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    return x[0].reshape(len(x[0]), -1), x[1].reshape(len(x[1]), -1)


def _embed(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    rest = tensor(node, "rest", None)
    flat = _flatten(arithmetic, node, x)
    lo, hi = (np.concatenate((side, np.broadcast_to(rest, (len(side), len(rest)))), 1) for side in flat)
    return lo, hi


@dataclass(frozen=True)
class Pool:
    """The windows of a pooling operation over an image of a given size, border and overhang included.

    Args:
        kernel, stride, dilation: by axis.
        pads: rows above and below, columns left and right; below and right with the overhang of ``ceil_mode``.
        inside: (rows, columns) of the padded image: 1 where a cell counts for an average, 0 where it does not.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    inside: Array

    def over(self, x: Array, fill: Any) -> Array:
        """(batch, channels, out rows, out columns, kernel rows, kernel columns), `fill` outside the image."""
        return windows(padded(x, self.pads, "constant", fill), self.kernel, self.stride, self.dilation)


def _pool(node: Node, size: tuple[int, ...]) -> Pool:
    kernel, dilation, padding = pair(node, "kernel_size"), pair(node, "dilation", 1), pair(node, "padding", 0)
    stride = pair(node, "stride") if node.arguments.get("stride") is not None else kernel
    require(min(kernel) > 0 and min(stride) > 0 and min(dilation) > 0, f"{node.name}: an empty window")
    overhang = [0, 0]
    if node.arguments.get("ceil_mode"):
        for axis in (0, 1):
            length, span = size[axis] + 2 * padding[axis], dilation[axis] * (kernel[axis] - 1) + 1
            outputs = -((span - length) // stride[axis]) + 1
            if (outputs - 1) * stride[axis] >= size[axis] + padding[axis]:
                outputs -= 1  # a window that starts beyond the image and its left border does not count
            overhang[axis] = max(0, (outputs - 1) * stride[axis] + span - length)
    inside = np.ones(size)
    border = ((padding[0],) * 2, (padding[1],) * 2)
    inside = np.pad(inside, border, constant_values=1.0 if node.arguments.get("count_include_pad", True) else 0.0)
    inside = np.pad(inside, ((0, overhang[0]), (0, overhang[1])))
    pads = (padding[0], padding[0] + overhang[0], padding[1], padding[1] + overhang[1])
    return Pool(kernel, stride, dilation, pads, inside)


def _max_pool(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    require(x[0].ndim == 4, f"{node.name}: its input is no image")
    pool = _pool(node, x[0].shape[2:])
    lo, hi = (pool.over(side, -np.inf).max((4, 5)) for side in x)
    return lo, hi


@dataclass(frozen=True)
class Average:
    """Sums over windows of rows and columns, divided: both average poolings.

    Args:
        rows, columns: (size, outputs), 1 where a window covers a line of the image.
        counts: (rows of windows, columns of windows), what each sum is divided by.
        sign: -1 for a negative divisor.
    """

    rows: Array
    columns: Array
    counts: Array
    sign: int = 1

    def divide(self, arithmetic: Arithmetic, x: Interval) -> Interval:
        """Every window's sum by its count."""
        lo, hi = arithmetic.divide(x, (self.counts, self.counts))
        return (lo, hi) if self.sign > 0 else (-hi, -lo)


def average(arithmetic: Arithmetic, node: Node, size: tuple[int, ...]) -> Average:
    """The windows of an average pooling over images of this size, (rows, columns)."""
    if node.kind == "avg_pool2d":
        pool = _pool(node, size)
        counts = windows(pool.inside[None, None], pool.kernel, pool.stride, pool.dilation).sum((4, 5))[0, 0]
        override, sign = node.arguments.get("divisor_override"), 1
        if override is not None:
            require(type(override) is int and 0 < abs(override) < 2**31, f"{node.name}: a wrong divisor")
            counts, sign = np.full_like(counts, abs(override)), 1 if override > 0 else -1
        lines = []
        for axis in (0, 1):
            starts = np.arange(counts.shape[axis]) * pool.stride[axis] - pool.pads[2 * axis]
            place = np.arange(size[axis])[:, None]
            lines.append(((starts <= place) & (place < starts + pool.kernel[axis])).astype(np.float64))
    else:
        asked = node.arguments.get("output_size")
        asked = asked if isinstance(asked, list) else [asked, asked]
        require(len(asked) == 2, f"{node.name}: it has no two axes")
        lines, sign = [_cells(length, count) for length, count in zip(size, asked, strict=True)], 1
        counts = np.outer(lines[0].sum(0), lines[1].sum(0))
    return Average(arithmetic.exactly(lines[0]), arithmetic.exactly(lines[1]), arithmetic.exactly(counts), sign)


def lines(arithmetic: Arithmetic, x: Interval, rows: Array, columns: Array) -> Interval:
    """A matrix on the rows of each image and one on its columns: (..., h, w) with (h, h') and (w, w')."""
    zero = constant(arithmetic, arithmetic.zero, 1)
    lo, hi = arithmetic.affine(x, columns, zero)
    lo, hi = arithmetic.affine((np.swapaxes(lo, -1, -2), np.swapaxes(hi, -1, -2)), rows, zero)
    return np.swapaxes(lo, -1, -2), np.swapaxes(hi, -1, -2)


def _average(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    require(x[0].ndim == 4, f"{node.name}: its input is no image")
    how = average(arithmetic, node, x[0].shape[2:])
    return how.divide(arithmetic, lines(arithmetic, x, how.rows, how.columns))


def _cells(size: int, count: int | None) -> Array:
    """The intervals that an adaptive pooling cuts an axis into, (size, cells); ``None``: one for every pixel."""
    count = size if count is None else count
    require(type(count) is int and 0 < count <= 2**12, "an adaptive pooling without cells")
    place, cell = np.arange(size)[:, None], np.arange(count)
    return ((cell * size // count <= place) & (place < -(-(cell + 1) * size // count))).astype(np.float64)


_BATCH_NORM = {"weight", "bias", "running_mean", "running_var"}
TENSORS: dict[str, set[str]] = {
    "normalize": {"mean", "std"},
    "linear": {"weight", "bias"},
    "conv2d": {"weight", "bias"},
    "batch_norm1d": _BATCH_NORM,
    "batch_norm2d": _BATCH_NORM,
    "relu": set(),
    "avg_pool2d": set(),
    "adaptive_avg_pool2d": set(),
    "max_pool2d": set(),
    "flatten": set(),
    "embed": {"rest"},
    "add": set(),
    "equilibrium": {"fusion.weight", "fusion.A", "fusion.B"},
}
"""What each operation may store; an equilibrium of coupled blocks has a weight a coupling (`layers`)."""

Rule = Callable[[Arithmetic, Node, Interval], Interval]

RULES: dict[str, Rule] = {
    "normalize": _scale,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm1d": _scale,
    "batch_norm2d": _scale,
    "avg_pool2d": _average,
    "adaptive_avg_pool2d": _average,
    "max_pool2d": _max_pool,
    "flatten": _flatten,
    "embed": _embed,
}
"""The rule of every operation of one input; a sum, a ReLU and an equilibrium are written out in `proof`."""
