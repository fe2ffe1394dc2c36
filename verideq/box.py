"""Boxes, and the centre-radius arithmetic that every interval bound is made of.

A `Box` is the set ``{x : lower <= x <= upper}``. Moving one through an affine map costs two products in centre-radius
form, ``A c`` and ``|A| r``, where the four-product form costs twice that. In floating point the computed centre is off
by rounding. *Rigorous* arithmetic adds that error to the radius before the second product, so that it costs no third
one::

    |A x + b - fl(A c + b)|  <=  |A| r + γ (|A||c| + |b|) + underflow,     γ = γ(n), n terms in a row

valid for any order of summation and with fused multiply-add (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., sections 3.1 and 4.2). Rigorous bounds are float64 only: training uses the plain form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.errors import RegionError

TINY = 2.0**-1022
"""The smallest normal float64: no underflow, flushed to zero or not, loses more than this."""


@dataclass(frozen=True, slots=True)
class Box:
    """A batch of boxes.

    Args:
        lower: tensor of any shape; the first axis is the batch.
        upper: tensor of the same shape, dtype and device.

    Raises:
        RegionError: the two differ in shape or dtype.
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape or self.lower.dtype != self.upper.dtype:
            raise RegionError(
                "a box needs two tensors of one shape and dtype; "
                f"lower is {tuple(self.lower.shape)} {self.lower.dtype}, "
                f"upper is {tuple(self.upper.shape)} {self.upper.dtype}"
            )

    @property
    def center(self) -> Tensor:
        """The midpoint, rounded to nearest."""
        return self.lower.add(self.upper).mul_(0.5)

    @property
    def radius(self) -> Tensor:
        """Half the width, rounded to nearest. For a proof use `ball`."""
        return self.upper.sub(self.lower).mul_(0.5)

    @property
    def width(self) -> Tensor:
        """``upper - lower``."""
        return self.upper - self.lower

    def ball(self) -> tuple[Tensor, Tensor]:
        """Centre and radius whose exact ball contains the box, in float64."""
        center = self.center
        radius = torch.maximum(self.upper - center, center - self.lower)
        # Where denormals are flushed to zero, the ends may be TINY short of what they stand for, and each step below
        # too.
        return center, radius.mul_(1 + 2.0**-51).add_(8 * TINY).clamp_(min=0)

    def contains(self, x: Tensor) -> Tensor:
        """Whether each sample lies in its box: bool, shape (batch,). NaN lies nowhere."""
        return ((x >= self.lower) & (x <= self.upper)).flatten(1).all(1)

    def select(self, part: Tensor) -> Box:
        """Some of the boxes, by their places in the batch."""
        return Box(self.lower[part], self.upper[part])

    def sound(self) -> Tensor:
        """Whether each box is ordered and free of NaN: bool, shape (batch,)."""
        return (self.lower <= self.upper).flatten(1).all(1)

    def intersect(self, other: Box) -> Box:
        """The common part. Two enclosures of one set always overlap; a crossing result is the caller's error to see."""
        return Box(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper))


def gamma(terms: int) -> float:
    """A relative error that covers `terms` roundings in a row, the rounding of the radius itself, and a factor to
    spare.

    ``4 (n + 8) 2⁻⁵³``, where ``γ_{n+4} ≈ (n + 4) 2⁻⁵³`` would do for the centre alone.
    """
    value = (terms + 8) * 2.0**-51
    if value > 2.0**-20:
        raise RegionError(f"a sum of {terms} terms is too long for float64 error bounds")
    return value


def outward(center: Tensor, radius: Tensor) -> Box:
    """The box ``center ± radius``, its ends rounded outward (float64); NaN where the centre has overflowed.

    A sum that overflowed on its way says nothing, not even the sign of what was to be summed.
    """
    center = torch.where(center.isfinite(), center, torch.nan)
    infinity = torch.full((), math.inf, dtype=center.dtype, device=center.device)
    return Box(torch.nextafter(center - radius, -infinity), torch.nextafter(center + radius, infinity))


def spread(center: Tensor, radius: Tensor, terms: int) -> Tensor:
    """The radius to push through ``|A|`` so that the rounding of ``A c`` is covered: ``r + γ (r + |c|)``."""
    g = gamma(terms)
    return radius * (1 + g) + g * center.abs()


def flushed(x: Tensor) -> Tensor:
    """Which entries this process reads as zero although they are not: denormals, where it flushes them.

    A flushed float64 loses less than `TINY`, which every bound allows for; a float32 may lose ``2⁻¹²⁶``.
    """
    if not x.is_floating_point():
        return torch.zeros_like(x, dtype=torch.bool)
    bits = x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return (x == 0) & (bits << 1 != 0)


def peak(x: Tensor) -> Tensor:
    """The largest magnitude of each sample, shaped to broadcast over (batch, *features)."""
    return x.abs().flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1))


def underflow(terms: int, center: Tensor, radius: Tensor, *factors: Tensor) -> Tensor:
    """What `terms` products can lose to underflow, flush-to-zero of inputs included: one number a sample.

    A flushed input of magnitude below ``2⁻¹⁰²²`` loses at most ``2⁻¹⁰²²`` times its partner, so each of the `terms`
    products loses at most ``2⁻¹⁰²² (1 + |a| + |b|)``. A sample's huge values charge the sample alone.

    Args:
        center: (batch, *features), as `radius`: what is multiplied.
        factors: what it is multiplied with, the same for all samples.

    Returns:
        shaped to broadcast over (batch, *features).
    """
    largest = sum((f.abs().amax() for f in factors if f.numel()), start=1 + peak(center) + peak(radius))
    return largest * (4.0 * TINY * (terms + 4))
