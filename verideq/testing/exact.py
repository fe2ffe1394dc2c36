"""Models in exact rational arithmetic: the truth that bounds are held against.

Arrays are NumPy arrays of `fractions.Fraction`, one sample at a time, without a batch axis. Every stored weight is a
rational; nothing here rounds. For models of a few units only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verideq.equilibrium.feedback import Feedback
from verideq.equilibrium.monotone import Monotone, MonotoneDense
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


def select(mask: np.ndarray, yes: np.ndarray | Fraction, no: np.ndarray | Fraction) -> np.ndarray:
    """`numpy.where` for fractions."""
    return np.where(mask, np.asarray(yes, dtype=object), np.asarray(no, dtype=object))


def relu(x: np.ndarray) -> np.ndarray:
    """``max(x, 0)``."""
    return select(x > 0, x, ZERO)


def clip(x: np.ndarray, ceiling: Fraction | None) -> np.ndarray:
    """``min(max(x, 0), ceiling)``; ``None`` for no ceiling."""
    return relu(x) if ceiling is None else select(x < ceiling, relu(x), ceiling)


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


def _taps(
    size: int, kernel: int, before: int, after: int, stride: int, dilation: int
) -> Iterator[tuple[int, int, int]]:
    """``(output, tap, input)`` along one axis; an input outside the image is a padded one."""
    count = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    for output, tap in product(range(count), range(kernel)):
        yield output, tap, output * stride - before + tap * dilation


def convolution_matrix(
    weight: np.ndarray,
    shape: tuple[int, ...],
    pads: tuple[int, int, int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    mode: str = "zeros",
) -> np.ndarray:
    """A convolution as an array (out, out height, out width, *shape), by index arithmetic; padded copies add up.

    Args:
        weight: (out, in / groups, kernel height, kernel width).
        shape: (in, height, width).
        pads: (left, right, top, bottom).
    """
    rows = list(_taps(shape[1], weight.shape[2], pads[2], pads[3], stride[0], dilation[0]))
    columns = list(_taps(shape[2], weight.shape[3], pads[0], pads[1], stride[1], dilation[1]))
    result = zeros(len(weight), rows[-1][0] + 1, columns[-1][0] + 1, *shape)
    outputs, inputs = len(weight) // groups, weight.shape[1]
    for (y, k, i), (x, m, j) in product(rows, columns):
        row, column = _source(i, shape[1], mode), _source(j, shape[2], mode)
        if row is None or column is None:
            continue
        for group in range(groups):
            mine, read = slice(group * outputs, (group + 1) * outputs), slice(group * inputs, (group + 1) * inputs)
            result[mine, y, x, read, row, column] += weight[mine, :, k, m]
    return result


def matrix(operator: Operator, shape: tuple[int, ...]) -> np.ndarray:
    """``W`` as a matrix over the flattened features of `shape`.

    Raises:
        InputError: an operator of another kind.
    """
    if isinstance(operator, Monotone):
        a, b = (_factor(operator, factor, shape) for factor in (operator.A, operator.B))
        monotone: np.ndarray = exact(torch.eye(a.shape[1])) * (1 - Fraction(operator.m)) - a.T @ a + b - b.T
        return monotone
    if type(operator) is Dense:
        return exact(operator.weight)
    if isinstance(operator, Feedback):
        return _coupled(operator)
    if not isinstance(operator, Convolution):
        raise InputError(f"no exact matrix is known for {type(operator).__name__}")
    full = convolution_matrix(
        exact(operator.weight), shape, operator.pads, (1, 1), operator.dilation, operator.groups, operator.mode
    )
    size = int(np.prod(shape))
    return full.reshape(size, size)


def _coupled(operator: Feedback) -> np.ndarray:
    """Every coupling as a matrix below the diagonal, and its transpose above it."""
    sizes = [int(np.prod(shape)) for shape in operator.blocks]
    ends = np.cumsum([0, *sizes])
    full = zeros(ends[-1], ends[-1])
    for place, coupling in enumerate(operator.couplings):
        weight = exact(coupling.weight)
        if weight.ndim == 4:
            (rows, columns), (down, right) = coupling.padding, coupling.stride
            pads = (columns, columns, rows, rows)
            weight = convolution_matrix(weight, coupling.below, pads, (down, right))
        below, above = slice(*ends[place : place + 2]), slice(*ends[place + 1 : place + 3])
        full[above, below] = weight.reshape(sizes[place + 1], sizes[place])
        full[below, above] = full[above, below].T
    return full


def _factor(operator: Monotone, factor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The matrix of ``A`` or ``B``."""
    if isinstance(operator, MonotoneDense):
        return exact(factor)
    rows, columns = (size // 2 for size in factor.shape[2:])
    return matrix(Convolution(factor, (columns, columns, rows, rows), mode=operator.mode), shape)


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
        known = sum(
            (Fraction(a) * z for a, z in zip(rows[k][k + 1 : size], solution[k + 1 :], strict=True)), start=ZERO
        )
        solution[k] = (rows[k][size] - known) / rows[k][k]
    return solution


OFF, INSIDE, FULL = 0, 1, 2
"""Where a unit is: at zero, between the ends, at the ceiling."""


def is_equilibrium(W: np.ndarray, v: np.ndarray, z: np.ndarray, ceiling: Fraction | None = None) -> bool:
    """Whether ``z = min(max(W z + v, 0), ceiling)``, exactly."""
    return bool((z == clip(W @ z + v, ceiling)).all())


def _states(p: np.ndarray, ceiling: Fraction | float | None) -> tuple[int, ...]:
    """Where units with these pre-activations are."""
    above = np.zeros(len(p), dtype=bool) if ceiling is None else p >= ceiling
    return tuple((np.array(p > 0, dtype=int) + np.array(above, dtype=int)).tolist())


def _candidates(W: np.ndarray, v: np.ndarray, ceiling: Fraction | None) -> Iterator[tuple[int, ...]]:
    """States worth trying: a float64 iterate's, then what each exact attempt suggests, then all of them."""
    guess = _float_guess(W, v, ceiling)
    for _ in range(2 * len(v)):
        yield guess
        z = _with_states(W, v, guess, ceiling)
        if z is None:
            break
        after = _states(W @ z + v, ceiling)
        if after == guess:
            break
        guess = after
    if len(v) <= ENUMERATED:
        yield from product((OFF, INSIDE) if ceiling is None else (OFF, INSIDE, FULL), repeat=len(v))


def _float_guess(W: np.ndarray, v: np.ndarray, ceiling: Fraction | None) -> tuple[int, ...]:
    """The states after Picard steps, the rows solved for their own unknowns, and a few Newton steps."""
    scale = max((abs(value) for value in v), default=ZERO) or Fraction(1)
    scale = scale if ceiling is None else max(scale, ceiling)  # a tiny v is far below its ceiling
    top = None if ceiling is None else float(ceiling / scale)
    matrix, right = W.astype(float), (v / scale).astype(float)
    factor = 1 / np.where(np.diag(matrix) < 1, 1 - np.diag(matrix), 1)
    off = (matrix - np.diag(np.diag(matrix))) * factor[:, None]
    z = np.zeros(len(v))
    for _ in range(10 if ceiling is None else 200):
        z = np.clip(off @ z + right * factor, 0, top)
    identity, states = np.eye(len(v)), _states(matrix @ z + right, top)
    for _ in range(20):
        last, inside, full = states, np.array(states) == INSIDE, np.array(states) == FULL
        try:
            z = np.linalg.solve(identity - matrix * inside[:, None], right * inside + (top or 0.0) * full)
        except np.linalg.LinAlgError:
            break
        states = _states(matrix @ z + right, top)
        if states == last:
            break
    return states


def _with_states(W: np.ndarray, v: np.ndarray, states: tuple[int, ...], ceiling: Fraction | None) -> np.ndarray | None:
    """The solution of ``z = W z + v`` on the units that are inside, with the others at their ends."""
    units = [i for i, state in enumerate(states) if state == INSIDE]
    z = select(np.array(states) == FULL, ceiling or ZERO, zeros(len(v)))
    if not units:
        return z
    identity = select(np.eye(len(units), dtype=bool), Fraction(1), ZERO)
    part = solve_linear(identity - W[np.ix_(units, units)], (v + W @ z)[units])
    if part is None:
        return None
    z[units] = part
    return z


def equilibrium(W: np.ndarray, v: np.ndarray, ceiling: Fraction | None = None) -> np.ndarray:
    """The exact ``z = min(max(W z + v, 0), ceiling)``; where a gauge exists it is the only one.

    Args:
        W: (units, units).
        v: (units,).
        ceiling: ``None`` for a ReLU.

    Raises:
        InputError: none was found.
    """
    for states in _candidates(W, v, ceiling):
        z = _with_states(W, v, states, ceiling)
        if z is not None and is_equilibrium(W, v, z, ceiling):
            return z
    raise InputError(f"no exact equilibrium was found among the active sets of {len(v)} units")


class ExactModel:
    """A model in exact arithmetic.

    Args:
        graph: of linear, conv2d, normalize, relu, pooling, flatten, embed, add and equilibrium operations. A
            batch normalisation has a square root, and so no rational value.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._matrices: dict[str, np.ndarray] = {}

    def values(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Every value at one input, (*features), by node name.

        Raises:
            InputError: an operation without an exact value.
        """
        values = {INPUT: x}
        for node in self.graph.nodes:
            kind, arguments = node.operation.kind, [values[name] for name in node.inputs]
            if kind in _LINEAR:
                if node.name not in self._matrices:
                    self._matrices[node.name] = _LINEAR[kind](node.module, arguments[0].shape)
                values[node.name] = _apply(kind, node.module, self._matrices[node.name], arguments[0])
            elif kind in _RULES:
                values[node.name] = _RULES[kind](node.module, *arguments)
            else:
                raise InputError(f"{node.name}: {kind} has no exact value")
        return values

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The output at one input."""
        return self.values(x)[self.graph.nodes[-1].name]


def _conv2d_matrix(module: Any, shape: tuple[int, ...]) -> np.ndarray:
    # torch keeps the padding of either spelling as (left, right, top, bottom).
    pads = tuple(module._reversed_padding_repeated_twice)
    weight = exact(module.weight)
    return convolution_matrix(weight, shape, pads, module.stride, module.dilation, module.groups, module.padding_mode)


_LINEAR: dict[str, Callable[[Any, tuple[int, ...]], np.ndarray]] = {
    "linear": lambda module, shape: exact(module.weight),
    "conv2d": _conv2d_matrix,
    "equilibrium": lambda module, shape: matrix(module.operator(), shape),
}
"""Operations with a matrix, which is built once a model."""


def _apply(kind: str, module: Any, matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    if kind == "equilibrium":
        ceiling = None if module.activation.ceiling == math.inf else Fraction(module.activation.ceiling)
        z: np.ndarray = equilibrium(matrix, x.reshape(-1), ceiling).reshape(x.shape)
        return z
    y: np.ndarray = np.tensordot(matrix, x, axes=x.ndim)
    if module.bias is None:
        return y
    y = y + exact(module.bias).reshape(-1, *[1] * (y.ndim - 1))
    return y


def _normalize(module: Any, x: np.ndarray) -> np.ndarray:
    shape = (-1, *[1] * (x.ndim - 1))
    y: np.ndarray = (x - exact(module.mean).reshape(shape)) / exact(module.std).reshape(shape)
    return y


def _average(module: Any, x: np.ndarray) -> np.ndarray:
    """By torch on unit images: its weights are reciprocals of small whole numbers, which a float64 tells apart."""
    size = x[0].size
    units = torch.eye(size, dtype=torch.float64).view(size, 1, *x.shape[1:])
    fractions = np.vectorize(lambda w: Fraction(w).limit_denominator(10**6), otypes=[object])(module(units).numpy())
    y: np.ndarray = np.tensordot(x.reshape(len(x), -1), fractions[:, 0], axes=1)
    return y


def _maximum(module: Any, x: np.ndarray) -> np.ndarray:
    """By torch on the ranks of the values."""
    order = sorted(set(x.reshape(-1)))
    ranks = np.vectorize(order.index, otypes=[float])(x)
    pooled = module(torch.from_numpy(ranks)[None])[0].numpy()
    y: np.ndarray = np.vectorize(lambda rank: order[int(rank)], otypes=[object])(pooled)
    return y


_RULES: dict[str, Callable[..., np.ndarray]] = {
    "normalize": _normalize,
    "relu": lambda module, x: relu(x),
    "avg_pool2d": _average,
    "adaptive_avg_pool2d": _average,
    "max_pool2d": _maximum,
    "flatten": lambda module, x: np.ravel(x),
    "embed": lambda module, x: np.concatenate((np.ravel(x), exact(module.rest))),
    "add": lambda module, a, b: a + b,
}


def outside(value: np.ndarray, lower: Tensor, upper: Tensor) -> list[tuple[int, ...]]:
    """The indices at which an exact value leaves a box of floats; NaN holds nothing, infinity everything on its side.

    Args:
        value: (*features).
        lower: (*features), as `upper`: one sample's box.
    """
    return [
        index for index in np.ndindex(value.shape) if not (lower[index].item() <= value[index] <= upper[index].item())
    ]
