"""The inclusion rule of every operation of a model, and of an equilibrium with a gauge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Interval, Rejected, require
from verideq.checker.files import Blob

Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Node:
    """One operation: its name, kind, inputs, arguments and stored arrays (in the arithmetic's numbers)."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    arguments: Mapping[str, Any]
    tensors: Tensors


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
        require(kind in RULES, f"{name}: the operation {kind!r} is not known")
        require(name not in known and set(inputs) <= known, f"{name}: its inputs are not defined before it")
        require(len(inputs) == (2 if kind == "add" else 1), f"{name}: a wrong number of inputs")
        require(left.issuperset(keys), f"{name}: a tensor is missing")
        left -= set(keys)
        known.add(name)
        require(set(entry["tensors"]) <= TENSORS[kind], f"{name}: a tensor has no meaning")
        tensors = {tensor: arithmetic.exactly(model.arrays[f"{name}/{tensor}"]) for tensor in entry["tensors"]}
        nodes.append(Node(name, kind, inputs, arguments, tensors))
    require(not left, "the model holds tensors that no node uses")
    return nodes


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
    sides = []
    for side in x:
        seen = windows(padded(side, pads, str(mode), arithmetic.zero), kernel, stride, dilation)
        batch, _, height, width = seen.shape[:4]
        grouped = seen.reshape(batch, groups, -1, height, width, *kernel)
        sides.append(np.moveaxis(grouped, 2, 4).reshape(batch, groups, height * width, -1))
    matrix = np.swapaxes(weight.reshape(groups, outputs // groups, -1), 1, 2)
    bias = optional(node, "bias", outputs, arithmetic.zero).reshape(groups, 1, outputs // groups)
    lo, hi = arithmetic.affine((sides[0], sides[1]), matrix, (bias, bias))
    shape = (batch, groups, height, width, outputs // groups)
    lo, hi = (np.moveaxis(side.reshape(shape), 4, 2).reshape(batch, outputs, height, width) for side in (lo, hi))
    return lo, hi


def _scaled(arithmetic: Arithmetic, x: Interval, mean: Array, scale: Interval, shift: Array) -> Interval:
    """``(x - mean) * scale + shift`` by channel (axis 1)."""
    shape = (1, -1, *[1] * (x[0].ndim - 2))
    mean, shift = mean.reshape(shape), shift.reshape(shape)
    centred = arithmetic.subtract(x, (mean, mean))
    return arithmetic.add(
        arithmetic.multiply(centred, (scale[0].reshape(shape), scale[1].reshape(shape))), (shift, shift)
    )


def _normalize(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    size = x[0].shape[1]
    mean, std = node.tensors.get("mean"), node.tensors.get("std")
    require(
        mean is not None and std is not None and mean.shape == std.shape, f"{node.name}: mean and std differ in shape"
    )
    require(mean.shape in ((1,), (size,)), f"{node.name}: mean has shape {mean.shape}")  # type: ignore[union-attr]  # above
    mean, std = np.broadcast_to(mean, (size,)), np.broadcast_to(std, (size,))  # type: ignore[arg-type]  # likewise
    one = np.array([arithmetic.one] * size)
    return _scaled(arithmetic, x, mean, arithmetic.divide((one, one), (std, std)), np.array([arithmetic.zero] * size))


def _batch_norm(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    size = x[0].shape[1]
    mean, variance = tensor(node, "running_mean", size), tensor(node, "running_var", size)
    weight = optional(node, "weight", size, arithmetic.one)
    shift = optional(node, "bias", size, arithmetic.zero)
    eps: Any = node.arguments.get("eps")
    if type(eps) not in (int, float) or not 0 <= eps < np.inf:
        raise Rejected(f"{node.name}: eps = {eps!r} makes no sense")
    stored = arithmetic.exactly(np.full(size, float(eps)))
    deviation = arithmetic.root(arithmetic.add((variance, variance), (stored, stored)))
    return _scaled(arithmetic, x, mean, arithmetic.divide((weight, weight), deviation), shift)


def _relu(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    return np.maximum(x[0], arithmetic.zero), np.maximum(x[1], arithmetic.zero)


def _flatten(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    return x[0].reshape(len(x[0]), -1), x[1].reshape(len(x[1]), -1)


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


def _pool(node: Node, x: Interval) -> Pool:
    require(x[0].ndim == 4, f"{node.name}: its input is no image")
    kernel, dilation, padding = pair(node, "kernel_size"), pair(node, "dilation", 1), pair(node, "padding", 0)
    stride = pair(node, "stride") if node.arguments.get("stride") is not None else kernel
    require(min(kernel) > 0 and min(stride) > 0 and min(dilation) > 0, f"{node.name}: an empty window")
    overhang = [0, 0]
    if node.arguments.get("ceil_mode"):
        for axis in (0, 1):
            size, span = x[0].shape[2 + axis] + 2 * padding[axis], dilation[axis] * (kernel[axis] - 1) + 1
            outputs = -((span - size) // stride[axis]) + 1
            if (outputs - 1) * stride[axis] >= x[0].shape[2 + axis] + padding[axis]:
                outputs -= 1  # a window that starts beyond the image and its left border does not count
            overhang[axis] = max(0, (outputs - 1) * stride[axis] + span - size)
    inside = np.ones(x[0].shape[2:])
    border = ((padding[0],) * 2, (padding[1],) * 2)
    inside = np.pad(inside, border, constant_values=1.0 if node.arguments.get("count_include_pad", True) else 0.0)
    inside = np.pad(inside, ((0, overhang[0]), (0, overhang[1])))
    pads = (padding[0], padding[0] + overhang[0], padding[1], padding[1] + overhang[1])
    return Pool(kernel, stride, dilation, pads, inside)


def _max_pool(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    pool = _pool(node, x)
    lo, hi = (pool.over(side, -np.inf).max((4, 5)) for side in x)
    return lo, hi


def _avg_pool(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    pool = _pool(node, x)
    counts = windows(pool.inside[None, None], pool.kernel, pool.stride, pool.dilation).sum((4, 5))
    override = node.arguments.get("divisor_override")
    if override is not None:
        require(type(override) is int and 0 < abs(override) < 2**31, f"{node.name}: a wrong divisor")
        counts = np.full_like(counts, abs(override))
    lo, hi = (pool.over(side, arithmetic.zero) for side in x)
    lo, hi = _mean(arithmetic, (lo, hi), arithmetic.exactly(counts))
    return (-hi, -lo) if override is not None and override < 0 else (lo, hi)


def _mean(arithmetic: Arithmetic, x: Interval, counts: Array) -> Interval:
    """The sum over the last two axes, divided by `counts`."""
    flat = (x[0].reshape(*x[0].shape[:4], -1), x[1].reshape(*x[1].shape[:4], -1))
    zero, ones = np.array([arithmetic.zero]), arithmetic.exactly(np.ones((flat[0].shape[4], 1)))
    lo, hi = arithmetic.affine(flat, ones, (zero, zero))
    return arithmetic.divide((lo[..., 0], hi[..., 0]), (counts, counts))


def _adaptive(arithmetic: Arithmetic, node: Node, x: Interval) -> Interval:
    require(x[0].ndim == 4, f"{node.name}: its input is no image")
    asked = node.arguments.get("output_size")
    asked = asked if isinstance(asked, list) else [asked, asked]
    require(len(asked) == 2, f"{node.name}: it has no two axes")
    rows, columns = (_cells(size, count) for size, count in zip(x[0].shape[2:], asked, strict=True))
    cells = []
    for top, bottom in rows:
        for left, right in columns:
            lo, hi = (side[:, :, None, None, top:bottom, left:right] for side in x)
            count = arithmetic.exactly(np.array([float((bottom - top) * (right - left))]))
            cells.append(_mean(arithmetic, (lo, hi), count))
    shape = (*x[0].shape[:2], len(rows), len(columns))
    lo, hi = (np.stack([cell[side] for cell in cells], 2).reshape(shape) for side in (0, 1))
    return lo, hi


def _cells(size: int, count: int | None) -> list[tuple[int, int]]:
    """The intervals that an adaptive pooling cuts an axis into; ``None``: one for every pixel."""
    count = size if count is None else count
    require(type(count) is int and 0 < count <= 2**12, "an adaptive pooling without cells")
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


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
    "add": set(),
    "equilibrium": {"fusion.weight"},
}
"""What each operation may store."""

Rule = Callable[[Arithmetic, Node, Interval], Interval]

RULES: dict[str, Rule | None] = {
    "normalize": _normalize,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm1d": _batch_norm,
    "batch_norm2d": _batch_norm,
    "relu": _relu,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive,
    "max_pool2d": _max_pool,
    "flatten": _flatten,
    "add": None,
    "equilibrium": None,
}
"""The rule of every operation of one input; a sum and an equilibrium are written out in `proof`."""
