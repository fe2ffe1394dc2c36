"""Models in exact rational arithmetic: the truth that bounds are held against.

Arrays are NumPy arrays of `fractions.Fraction`, one sample at a time, without a batch axis. Every stored weight is a
rational; nothing here rounds. For models of a few units only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from verideq.equilibrium.operators import Convolution, Dense, Operator
from verideq.errors import InputError
from verideq.graph import INPUT, Graph

ZERO = Fraction(0)
ENUMERATED = 8
"""The most units for which all active sets are tried."""


def exact(tensor: Tensor) -> np.ndarray:
    """The stored numbers of a tensor as fractions, its shape kept."""
    flat = np.empty(tensor.numel(), dtype=object)
    flat[:] = [Fraction(value) for value in tensor.detach().reshape(-1).tolist()]
    return flat.reshape(tensor.shape)


def zeros(*shape: int) -> np.ndarray:
    """An array of fractions, all zero."""
    return np.full(shape, ZERO, dtype=object)


def relu(x: np.ndarray) -> np.ndarray:
    """``max(x, 0)``."""
    return np.where(x > 0, x, ZERO)


def _source(index: int, size: int, mode: str) -> int | None:
    """Where a padded image of `size` pixels reads its pixel `index`, counted from the first real one."""
    if 0 <= index < size:
        return index
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    return None


def _taps(size: int, kernel: int, before: int, after: int, stride: int, dilation: int) -> Iterator[tuple[int, int, int]]:
    """``(output, tap, input)`` along one axis; an input outside the image is a padded one."""
    count = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    for output, tap in product(range(count), range(kernel)):
        yield output, tap, output * stride - before + tap * dilation


def convolution(
    weight: np.ndarray,
    x: np.ndarray,
    pads: tuple[int, int, int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    mode: str = "zeros",
) -> np.ndarray:
    """A convolution of (in, height, width), by index arithmetic.

    Args:
        weight: (out, in / groups, kernel height, kernel width).
        pads: (left, right, top, bottom).
    """
    rows = list(_taps(x.shape[1], weight.shape[2], pads[2], pads[3], stride[0], dilation[0]))
    columns = list(_taps(x.shape[2], weight.shape[3], pads[0], pads[1], stride[1], dilation[1]))
    result = zeros(len(weight), rows[-1][0] + 1, columns[-1][0] + 1)
    outputs, inputs = len(weight) // groups, weight.shape[1]
    for (y, k, i), (x_, l, j) in product(rows, columns):
        row, column = _source(i, x.shape[1], mode), _source(j, x.shape[2], mode)
        if row is None or column is None:
            continue
        for group in range(groups):
            mine = slice(group * outputs, (group + 1) * outputs)
            result[mine, y, x_] += weight[mine, :, k, l] @ x[group * inputs : (group + 1) * inputs, row, column]
    return result


def matrix(operator: Operator, shape: tuple[int, ...]) -> np.ndarray:
    """``W`` as a matrix over the flattened features of `shape`; padded copies of a pixel add up.

    Raises:
        InputError: an operator of another kind.
    """
    if isinstance(operator, Dense):
        return exact(operator.weight)
    if not isinstance(operator, Convolution):
        raise InputError(f"no exact matrix is known for {type(operator).__name__}")
    weight, size = exact(operator.weight), int(np.prod(shape))
    result = zeros(size, size)
    for column in range(size):
        unit = zeros(size)
        unit[column] = Fraction(1)
        image = convolution(
            weight, unit.reshape(shape), operator.pads, (1, 1), operator.dilation, operator.groups, operator.mode
        )
        result[:, column] = image.reshape(-1)
    return result


def solve_linear(matrix: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """``matrix⁻¹ right`` by fraction-free elimination (Bareiss) on integers; ``None`` for a singular matrix."""
    size = len(matrix)
    rows = []
    for row, value in zip(matrix, right, strict=True):
        scale = lcm(*(entry.denominator for entry in [*row, value]))
        rows.append([int(entry * scale) for entry in [*row, value]])
    last = 1
    for k in range(size):
        pivot = next((i for i in range(k, size) if rows[i][k]), None)
        if pivot is None:
            return None
        rows[k], rows[pivot] = rows[pivot], rows[k]
        top = rows[k]
        for i in range(k + 1, size):
            factor = rows[i][k]
            rows[i] = [0] * (k + 1) + [
                (top[k] * a - factor * b) // last for a, b in zip(rows[i][k + 1 :], top[k + 1 :], strict=True)
            ]
        last = top[k]
    solution = zeros(size)
    for k in reversed(range(size)):
        known = sum((Fraction(a) * z for a, z in zip(rows[k][k + 1 : size], solution[k + 1 :], strict=True)), start=ZERO)
        solution[k] = (rows[k][size] - known) / rows[k][k]
    return solution


def is_equilibrium(W: np.ndarray, v: np.ndarray, z: np.ndarray) -> bool:
    """Whether ``z = relu(W z + v)``, exactly."""
    return bool((z == relu(W @ z + v)).all())


def _candidates(W: np.ndarray, v: np.ndarray) -> Iterator[tuple[bool, ...]]:
    """Active sets worth trying: a float64 iterate's, then what each exact attempt suggests, then all of them."""
    guess = _float_guess(W, v)
    for _ in range(2 * len(v)):
        yield guess
        z = _with_active(W, v, guess)
        if z is None:
            break
        after = tuple((W @ z + v > 0).tolist())
        if after == guess:
            break
        guess = after
    if len(v) <= ENUMERATED:
        yield from product((False, True), repeat=len(v))


def _float_guess(W: np.ndarray, v: np.ndarray) -> tuple[bool, ...]:
    """The active set after Picard steps, the rows solved for their own unknowns, and a few Newton steps."""
    scale = max((abs(value) for value in v), default=ZERO) or Fraction(1)
    matrix, right = W.astype(float), (v / scale).astype(float)
    factor = 1 / np.where(np.diag(matrix) < 1, 1 - np.diag(matrix), 1)
    off = (matrix - np.diag(np.diag(matrix))) * factor[:, None]
    z = np.zeros(len(v))
    for _ in range(50):
        z = np.maximum(off @ z + right * factor, 0)
    for _ in range(20):
        active = matrix @ z + right > 0
        system = np.eye(len(v)) - matrix * active[:, None]
        try:
            z = np.linalg.solve(system, right * active)
        except np.linalg.LinAlgError:
            break
    return tuple((matrix @ z + right > 0).tolist())


def _with_active(W: np.ndarray, v: np.ndarray, active: tuple[bool, ...]) -> np.ndarray | None:
    """The solution of ``z = W z + v`` on the active units, zero elsewhere."""
    units = [i for i, on in enumerate(active) if on]
    z = zeros(len(v))
    if not units:
        return z
    identity = np.where(np.eye(len(units), dtype=bool), Fraction(1), ZERO)
    part = solve_linear(identity - W[np.ix_(units, units)], v[units])
    if part is None:
        return None
    z[units] = part
    return z


def equilibrium(W: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The exact ``z = relu(W z + v)``; where a gauge exists it is the only one.

    Args:
        W: (units, units).
        v: (units,).

    Raises:
        InputError: none was found.
    """
    for active in _candidates(W, v):
        z = _with_active(W, v, active)
        if z is not None and is_equilibrium(W, v, z):
            return z
    raise InputError(f"no exact equilibrium was found among the active sets of {len(v)} units")


def evaluate(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    """Every value of a model at one input, exactly, by node name.

    Args:
        graph: of linear, conv2d, normalize, relu, pooling, flatten, add and equilibrium operations. A batch normalisation
            has a square root, and so no rational value.
        x: (*features) of fractions.

    Raises:
        InputError: an operation without an exact value.
    """
    values = {INPUT: x}
    for node in graph.nodes:
        kind = node.operation.kind
        if kind not in _RULES:
            raise InputError(f"{node.name}: {kind} has no exact value")
        values[node.name] = _RULES[kind](node.module, *(values[name] for name in node.inputs))
    return values


def _linear(module: Any, x: np.ndarray) -> np.ndarray:
    y: np.ndarray = x @ exact(module.weight).T
    return y if module.bias is None else y + exact(module.bias)


def _conv2d(module: Any, x: np.ndarray) -> np.ndarray:
    # torch keeps the padding of either spelling as (left, right, top, bottom).
    pads = module._reversed_padding_repeated_twice
    y = convolution(
        exact(module.weight), x, tuple(pads), module.stride, module.dilation, module.groups, module.padding_mode
    )
    return y if module.bias is None else y + exact(module.bias)[:, None, None]


def _normalize(module: Any, x: np.ndarray) -> np.ndarray:
    shape = (-1, *[1] * (x.ndim - 1))
    y: np.ndarray = (x - exact(module.mean).reshape(shape)) / exact(module.std).reshape(shape)
    return y


def _avg_pool(module: Any, x: np.ndarray) -> np.ndarray:
    """By torch on unit images: its weights are the reciprocals of whole numbers, so that rounding them is exact."""
    size, divisor = x[0].size, 10**6
    units = torch.eye(size, dtype=torch.float64).view(size, 1, *x.shape[1:])
    weights = module(units)
    fractions = np.vectorize(lambda w: Fraction(w).limit_denominator(divisor), otypes=[object])(weights.numpy())
    y: np.ndarray = np.tensordot(x.reshape(len(x), -1), fractions[:, 0], axes=(1, 0))
    return y


def _max_pool(module: Any, x: np.ndarray) -> np.ndarray:
    """By torch on the ranks of the values."""
    order = sorted(set(x.reshape(-1)))
    ranks = np.vectorize(order.index, otypes=[float])(x)
    pooled = module(torch.from_numpy(ranks)[None])[0]
    y: np.ndarray = np.vectorize(lambda rank: order[int(rank)], otypes=[object])(pooled.numpy())
    return y


def _equilibrium(module: Any, v: np.ndarray) -> np.ndarray:
    return equilibrium(matrix(module.operator(), v.shape), v.reshape(-1)).reshape(v.shape)


_RULES: dict[str, Callable[..., np.ndarray]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "normalize": _normalize,
    "relu": lambda module, x: relu(x),
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _avg_pool,
    "max_pool2d": _max_pool,
    "flatten": lambda module, x: x.reshape(-1),
    "add": lambda module, a, b: a + b,
    "equilibrium": _equilibrium,
}


def outside(value: np.ndarray, lower: Tensor, upper: Tensor) -> list[tuple[int, ...]]:
    """The indices at which an exact value leaves a box of floats; NaN holds nothing, infinity everything on its side.

    Args:
        value: (*features).
        lower: (*features), as `upper`: one sample's box.
    """
    return [
        index
        for index in np.ndindex(value.shape)
        if not (lower[index].item() <= value[index] <= upper[index].item())
    ]
