"""What auto_LiRPA hands a node: coefficients in one of four forms, and bounds that may be the centre of a ball.

Its classes are told by name and by their fields, so that nothing is imported and both of its versions fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from verideq.errors import UnsupportedOperation

AFFINE = ("BoundLinear", "BoundConv")
"""Nodes that take a ball itself, and not its box."""
RESHAPING = ("BoundReshape", "BoundFlatten")
"""Nodes that hand a ball on."""


def dense(A: Any, state: tuple[int, ...]) -> Tensor | None:
    """Coefficients on a state as a tensor (rows, batch, *state).

    Args:
        A: a tensor of that shape; ``eyeC`` or ``OneHotC`` of auto_LiRPA; its ``Patches``; or ``None``, as is.
        state: the shape of the state without the batch.

    Raises:
        UnsupportedOperation: patches that have no matrix in auto_LiRPA.
    """
    if A is None or isinstance(A, Tensor):
        return A
    kind, size = type(A).__name__, math.prod(state)
    if kind == "eyeC":
        return torch.eye(size, device=A.device).view(size, 1, *state).expand(size, A.shape[1], *state)
    if kind == "OneHotC":
        index = A.index.to(A.device)
        index = index.expand(len(index), A.shape[1])
        ones = torch.ones_like(index, dtype=torch.get_default_dtype()) if A.coeffs is None else A.coeffs
        empty = torch.zeros(*index.shape, size, dtype=ones.dtype, device=A.device)
        return empty.scatter(2, index[:, :, None], ones[:, :, None]).view(*index.shape, *state)
    if kind == "Patches" and _plain(A):
        batch = A.patches.shape[1]
        matrix: Tensor = A.to_matrix((batch, *state))
        return matrix.transpose(0, 1)
    raise UnsupportedOperation(
        f"auto_LiRPA hands {kind} to an equilibrium in a form that has no matrix; make the BoundedModule with "
        "bound_opts={'conv_mode': 'matrix'}"
    )


def _plain(patches: Any) -> bool:
    """Whether auto_LiRPA can make a matrix of its patches."""
    padded = torch.as_tensor(patches.output_padding).any()
    return patches.patches is not None and isinstance(patches.stride, int) and not patches.inserted_zeros and not padded


def refuse_balls(v: Any, *, interval: bool) -> None:
    """Nothing, unless bounds come from the centre of an l2 (or l1, ...) ball where the ball was meant.

    auto_LiRPA keeps a ball that is not l_inf as its centre with the norm beside it, which only linear and convolutional
    layers look at. What reads it otherwise is bounded at the centre: by intervals every other operation, by linear
    bounds those that need to know the box of what they read.

    Args:
        v: the node whose bounds an equilibrium is about to use.
        interval: they were found by intervals.

    Raises:
        UnsupportedOperation: with the remedy.
    """
    for node in (v, *before(v)):
        kind = type(node).__name__
        blind = kind not in AFFINE if interval else bool(getattr(node, "requires_input_bounds", ()))
        reads = blind and not _is_ball(node) and any(_is_ball(read) for read in node.inputs)
        if reads or (node is v and _is_ball(v)):
            raise UnsupportedOperation(
                "auto_LiRPA takes the centre of this ball for the ball where the input is read by anything but a "
                f"Linear or Conv2d, and here it reaches an equilibrium (by {kind}): use method 'CROWN', let the model "
                "begin with a Linear or Conv2d (an identity will do), or take an l_inf ball"
            )


def before(node: Any) -> Iterator[Any]:
    """The nodes that a node depends on, each once."""
    open_, seen = [*node.inputs], set()
    while open_:
        node = open_.pop()
        if id(node) not in seen:
            seen.add(id(node))
            open_.extend(node.inputs)
            yield node


def _is_ball(node: Any) -> bool:
    """Whether the bounds of a node are the centre of a ball with the norm beside it."""
    while type(node).__name__ in RESHAPING:
        node = node.inputs[0]
    ball = getattr(node, "perturbation", None)
    norm = 0 if type(ball).__name__ == "PerturbationL0Norm" else getattr(ball, "norm", math.inf)
    return norm < math.inf and bool(torch.as_tensor(getattr(ball, "eps", 0)).any())
