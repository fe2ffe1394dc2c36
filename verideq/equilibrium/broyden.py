"""Broyden's method on every sample of a batch: the forward solver of general DEQs, its inverse made available.

For ``g(z) = f(z) - z``, from ``z_0`` and ``B_0 = -I`` (Yang et al., NeurIPS 2022, equations 7 and 8, ``α = 1``)::

    z_{n+1} = z_n - B_n g(z_n)
    B_{n+1} = B_n + (Δz - B_n Δg) Δzᵀ B_n / (Δzᵀ B_n Δg)

``B`` is kept as ``-I`` and one pair of vectors a step. From zero the first iterate is ``f(0)``. No sample sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class Inverse:
    """``B = -I + Σ_k p_k q_kᵀ``, the estimate of the inverse Jacobian of ``g``, by sample."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def apply(self, x: Tensor) -> Tensor:
        """``B x`` for (batch, features)."""
        return _times(self.left, self.right, x)

    def transpose(self, x: Tensor) -> Tensor:
        """``Bᵀ x`` for (batch, features)."""
        return _times(self.right, self.left, x)

    def update(self, moved: Tensor, changed: Tensor, at: Tensor) -> None:
        """The rank-one update by ``Δz`` and ``Δg`` at ``z``, all (batch, features).

        A sample that has stopped but for rounding keeps its ``B``: the quotient of two roundings is any number.
        """
        row, image = self.transpose(moved), self.apply(changed)
        scale, step = (moved * image).sum(1, keepdim=True), moved.norm(dim=1, keepdim=True)
        eps = torch.finfo(scale.dtype).eps
        usable = (step > 100 * eps * at.norm(dim=1, keepdim=True)) & (
            scale.abs() > 100 * eps * step * image.norm(dim=1, keepdim=True)
        )
        row = torch.where(usable, row, 0.0)
        column = torch.where(usable, (moved - image) / torch.where(usable, scale, 1.0), 0.0)
        self.left.append(column.nan_to_num(0.0, 0.0, 0.0))
        self.right.append(row.nan_to_num(0.0, 0.0, 0.0))


def _times(left: list[Tensor], right: list[Tensor], x: Tensor) -> Tensor:
    result = -x
    for p, q in zip(left, right, strict=True):
        result = torch.addcmul(result, p, (q * x).sum(1, keepdim=True))
    return result


@dataclass(frozen=True)
class Iterate:
    """One step of Broyden's method.

    Args:
        value: ``z_n``, in the shape of the start.
        change: ``g(z_n)``, likewise.
        inverse: ``B_n``; the next step updates it in place.
    """

    value: Tensor
    change: Tensor
    inverse: Inverse


def iterates(step: Callable[[Tensor], Tensor], start: Tensor) -> Iterator[Iterate]:
    """The iterates ``z_0, z_1, ...``, without end: each costs one application of the map, when it is asked for.

    Differentiable, its inverse included, where gradients are asked for.

    Args:
        step: ``f``, on (batch, *features).
        start: ``z_0``.
    """
    inverse, value = Inverse(), start
    change = step(value) - value
    while True:
        yield Iterate(value, change, inverse)
        moved = -inverse.apply(change.flatten(1)).view_as(value)
        value = value + moved
        fresh = step(value) - value
        inverse.update(moved.flatten(1), (fresh - change).flatten(1), value.flatten(1))
        change = fresh


broyden = torch.no_grad()(iterates)
"""The same without gradients."""
