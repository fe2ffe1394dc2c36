"""The transposed rule of every affine operation: linear bounds travel backwards through these.

For ``y = A x + b`` and rows ``q`` of coefficients on ``y``, ``q · y = (Aᵀ q) · x + q · b``. `PULLS` holds ``q -> (Aᵀ q,
q · b)`` by kind, rounded outward, `q` an interval of shape (rows, *shape of y). Operations that are not affine are
not here: `verideq.checker.dual` relaxes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Interval, constant, require
from verideq.checker.network import MODES, Node, average, by_channel, lines, optional, pads_of, pair, scaling

Pull = Callable[[Arithmetic, Node, Interval, tuple[int, ...]], tuple[Interval, Interval]]
"""``(arithmetic, node, q, shape of x) -> (Aᵀ q, q · b)``, (rows, *shape of x) and (rows,)."""


def inner(calc: Arithmetic, q: Interval, x: Interval) -> Interval:
    """``q · x`` over all axes but the first, `x` broadcastable: (rows,)."""
    shape = q[0].shape
    wide = [np.broadcast_to(side, shape) if side.shape != shape else side for side in x]
    flat = [side.reshape(len(side), -1) for side in (*q, *wide)]
    return calc.inner((flat[0], flat[1]), (flat[2], flat[3]))


def _none(calc: Arithmetic, q: Interval) -> Interval:
    return constant(calc, calc.zero, len(q[0]))


def _linear(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    weight = node.tensors["weight"]
    pulled = calc.affine(q, weight, constant(calc, calc.zero, 1))
    if "bias" not in node.tensors:
        return pulled, _none(calc, q)
    lo, hi = calc.affine(q, node.tensors["bias"][:, None], constant(calc, calc.zero, 1))
    return pulled, (lo[:, 0], hi[:, 0])


def _conv2d(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    stride, dilation, groups = pair(node, "stride", 1), pair(node, "dilation", 1), pair(node, "groups", 1)[0]
    weight, size = node.tensors["weight"], shape[1:]
    outputs, per_group = weight.shape[:2]
    kernel = weight.shape[2:]
    pads = pads_of(node, (kernel[0], kernel[1]), dilation)

    height, width = size[0] + sum(pads[:2]), size[1] + sum(pads[2:])
    pixels, taps = q[0].shape[2:], [range(0, d * k, d) for d, k in zip(dilation, kernel, strict=True)]
    ends = [tap[-1] + s * (n - 1) for tap, s, n in zip(taps, stride, pixels, strict=True)]
    require(ends[0] < height and ends[1] < width, f"{node.name}: rows of the shape {q[0].shape[1:]} on {shape}")

    def apply(matrix: Array, q: Array) -> Array:
        columns = matrix @ q.reshape(len(q), groups, outputs // groups, -1)
        columns = columns.reshape(len(q), groups * per_group, *kernel, *pixels)
        image = np.full((len(q), groups * per_group, height, width), calc.zero, dtype=q.dtype)
        for i, top in enumerate(taps[0]):
            for j, left in enumerate(taps[1]):
                rows = slice(top, top + stride[0] * (pixels[0] - 1) + 1, stride[0])
                image[:, :, rows, left : left + stride[1] * (pixels[1] - 1) + 1 : stride[1]] += columns[:, :, i, j]
        return image

    # An output adds to every input that it read, through the tap by which it read it.
    matrix = np.swapaxes(weight.reshape(groups, outputs // groups, -1), 1, 2)
    terms = outputs // groups * kernel[0] * kernel[1]
    room = groups * matrix.shape[1] * pixels[0] * pixels[1]
    wide = calc.bilinear(apply, matrix, q, constant(calc, calc.zero, 1), terms, room)
    folded = _folded(calc, node, wide, pads)
    bias = optional(node, "bias", outputs, calc.zero).reshape(1, -1, 1, 1)
    return folded, inner(calc, q, (bias, bias)) if "bias" in node.tensors else _none(calc, q)


def _folded(calc: Arithmetic, node: Node, q: Interval, pads: tuple[int, int, int, int]) -> Interval:
    """Coefficients on a padded image as coefficients on the image: each pixel takes those of its copies."""
    mode = MODES[node.arguments.get("padding_mode", "zeros")]
    height, width = q[0].shape[2] - sum(pads[:2]), q[0].shape[3] - sum(pads[2:])
    if mode == "constant":
        lo, hi = (side[:, :, pads[0] : pads[0] + height, pads[2] : pads[2] + width] for side in q)
        return lo, hi
    copies = []
    for count, border in ((height, pads[:2]), (width, pads[2:])):
        places = np.pad(np.arange(count), border, mode=mode)  # type: ignore[call-overload]  # one of MODES
        copies.append(calc.exactly((places[:, None] == np.arange(count)).astype(np.float64)))
    return lines(calc, q, copies[0], copies[1])


def _scale(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    how, axes = scaling(calc, node, shape[0]), len(shape) + 1
    pulled = calc.multiply(q, (by_channel(how.scale[0], axes), by_channel(how.scale[1], axes)))
    mean, shift = by_channel(how.mean, axes), by_channel(how.shift, axes)
    return pulled, calc.subtract(inner(calc, q, (shift, shift)), inner(calc, pulled, (mean, mean)))


def _average(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    how = average(calc, node, shape[1:])
    return lines(calc, how.divide(calc, q), how.rows.T, how.columns.T), _none(calc, q)


def _flatten(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    return (q[0].reshape(-1, *shape), q[1].reshape(-1, *shape)), _none(calc, q)


def _embed(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    rest = node.tensors["rest"]
    units = q[0].shape[1] - len(rest)
    on_rest = q[0][:, units:], q[1][:, units:]
    return (q[0][:, :units].reshape(-1, *shape), q[1][:, :units].reshape(-1, *shape)), inner(
        calc, on_rest, (rest, rest)
    )


PULLS: dict[str, Pull] = {
    "normalize": _scale,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm1d": _scale,
    "batch_norm2d": _scale,
    "avg_pool2d": _average,
    "adaptive_avg_pool2d": _average,
    "flatten": _flatten,
    "embed": _embed,
}
"""Every affine operation of one input."""


def pull(calc: Arithmetic, node: Node, q: Interval, shape: tuple[int, ...]) -> tuple[Interval, Interval]:
    """``(Aᵀ q, q · b)`` of an affine node whose input has this shape."""
    return PULLS[node.kind](calc, node, q, shape)
