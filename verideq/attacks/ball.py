"""Balls around inputs in the model's own dtype: where adversaries of training, and defences, move them.

What an attack claims is decided by `verideq.region`, exactly; here a rounding is as good as another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.region import check_norm


@dataclass(frozen=True)
class Ball:
    """All within a radius of an input, in pixel units.

    Args:
        radius: 0 or more.
        norm: ``linf`` or ``l2``.
        clip: the pixel range, or ``None``.
    """

    radius: float
    norm: str = "linf"
    clip: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest of length 1 in the norm: the signs, or the gradient over its length; (batch, *features)."""
        return gradient.sign() if self.norm == "linf" else gradient / _length(gradient)

    def project(self, x: Tensor, center: Tensor) -> Tensor:
        """Points of the balls around `center`, near to `x`, both (batch, *features)."""
        if self.norm == "linf":
            x = torch.minimum(torch.maximum(x, center - self.radius), center + self.radius)
        else:
            shift = x - center
            x = center + shift * (self.radius / _length(shift)).clamp(max=1)
        return x if self.clip is None else x.clamp(*self.clip)  # towards the center: it stays in the ball


def _length(x: Tensor) -> Tensor:
    """The Euclidean norm of every sample, (batch, 1, ...), never zero."""
    size: Tensor = x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return size.view(-1, *[1] * (x.dim() - 1))
