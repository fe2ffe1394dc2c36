"""`Region`: what an adversary may do to an input, in pixel space and in exact numbers."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from verideq.box import TINY, Box, flushed
from verideq.errors import RegionError, UnknownName

Norm = Literal["linf", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)

Radius = int | float | str | Fraction


def parse_eps(value: Radius, what: str = "eps") -> Fraction:
    """An exact radius from ``0.1``, ``"0.1"``, ``"8/255"`` or a `Fraction`.

    A string is the rational that it spells; a float is the binary number that it is. `what` it is called in errors.

    Raises:
        RegionError: it is negative, NaN, infinite, or no number.

    >>> parse_eps("8/255")
    Fraction(8, 255)
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str):
            top, slash, bottom = value.strip().partition("/")
            eps = Fraction(Decimal(top)) / Fraction(Decimal(bottom) if slash else 1)
        else:
            eps = Fraction(value)
    except (ValueError, OverflowError, InvalidOperation, ZeroDivisionError, TypeError):
        raise RegionError(f"{what} {value!r} is not a finite number; write e.g. 0.1 or 8/255") from None
    if eps < 0:
        raise RegionError(f"{what} {value!r} is negative; a radius is 0 or more")
    return eps


def check_norm(norm: str) -> str:
    """The norm itself, or `UnknownName` with the list."""
    if norm not in NORMS:
        raise UnknownName("norm", norm, NORMS)
    return norm


def round_up(value: Fraction) -> float:
    """The smallest float64 that is not below `value` (infinity past the largest)."""
    try:
        near = float(value)
    except OverflowError:
        return math.inf
    return near if Fraction(near) >= value else math.nextafter(near, math.inf)


def round_down(value: Fraction) -> float:
    """The largest float64 that is not above `value`."""
    return -round_up(-value)


class Region:
    """A batch of balls, cut to the valid range: ``{x : ‖(x - center) / weights‖ <= eps, clip[0] <= x <= clip[1]}``.

    Args:
        center: (batch, *features). Kept in float64; every float32 is one exactly.
        eps: the radius in pixel units, kept as an exact rational; see `parse_eps`.
        norm: ``"linf"`` or ``"l2"``.
        clip: the valid range ``(low, high)``, or ``None`` for no range.
        weights: optional (*features), nonnegative: feature ``i`` may move by ``eps * weights[i]``.

    Raises:
        RegionError: NaN or infinity in the centre, a centre outside `clip`, an eps that is no radius, a bad weight.
        UnknownName: a norm other than the two.

    >>> region = Region(torch.tensor([[0.0, 0.5]]), "1/4")
    >>> region.box().upper.tolist()[0][1] >= 0.75
    True
    """

    def __init__(
        self,
        center: Tensor,
        eps: Radius,
        norm: str = "linf",
        clip: tuple[float, float] | None = (0.0, 1.0),
        *,
        weights: Tensor | None = None,
    ) -> None:
        self.eps = parse_eps(eps)
        self.norm = check_norm(norm)
        if bool(flushed(center).any()):
            raise RegionError(
                "the centre holds denormal numbers, which torch has been told to read as zero; call "
                "torch.set_flush_denormal(False), or round them to zero first"
            )
        self.center = center.detach().to(torch.float64)
        self.clip = clip
        self.weights = None if weights is None else weights.detach().to(self.center)
        check_images(self.center, clip)
        if self.weights is not None:
            if self.weights.shape != self.center.shape[1:]:
                raise RegionError(
                    f"eps weights have shape {tuple(self.weights.shape)}, the features {tuple(self.center.shape[1:])}; "
                    "give one weight a feature"
                )
            if not bool((self.weights.isfinite() & (self.weights >= 0)).all()):
                raise RegionError("eps weights must be finite and 0 or more")

    def __len__(self) -> int:
        return len(self.center)

    def __getitem__(self, index: slice | Tensor) -> Region:
        return Region(self.center[index], self.eps, self.norm, self.clip, weights=self.weights)

    def _reach(self, eps: Tensor | float, *, up: bool) -> Tensor | float:
        """How far each feature may move, rounded up or down."""
        if self.weights is None:
            return eps
        reach = self.weights * eps
        if not up:
            return reach.mul(1 - 2.0**-52).sub(TINY).clamp(min=0)
        # A feature of weight zero stays where it is, exactly.
        return torch.where(self.weights > 0, reach.mul(1 + 2.0**-52).add(TINY), reach)

    def box(self) -> Box:
        """The smallest float64 box that is sure to contain the region (for l2: the box around the ball)."""
        return self.box_of(round_up(self.eps))

    def box_of(self, eps: Tensor | float) -> Box:
        """The same around balls of other radii: one number, or a float64 tensor shaped to broadcast over the batch."""
        reach = self._reach(eps, up=True)
        infinity = torch.tensor(math.inf, dtype=torch.float64, device=self.center.device)
        lower = torch.nextafter(self.center - reach, -infinity)
        upper = torch.nextafter(self.center + reach, infinity)
        if self.clip is not None:
            lower, upper = lower.clamp(min=self.clip[0]), upper.clamp(max=self.clip[1])
        return Box(lower, upper)

    def inner_box(self) -> Box:
        """A float64 box all of whose points lie in the linf ball: where an attack may look."""
        reach = self._reach(round_down(self.eps), up=False)
        infinity = torch.tensor(math.inf, dtype=torch.float64, device=self.center.device)
        lower = torch.minimum(torch.nextafter(self.center - reach, infinity), self.center)
        upper = torch.maximum(torch.nextafter(self.center + reach, -infinity), self.center)
        if self.clip is not None:
            lower, upper = lower.clamp(min=self.clip[0]), upper.clamp(max=self.clip[1])
        return Box(lower, upper)

    def project(self, x: Tensor) -> Tensor:
        """A nearby point of the region for every sample of `x`, shape kept; for l2 radially, then the clip."""
        if self.norm == "linf":
            inner = self.inner_box()
            return torch.minimum(torch.maximum(x, inner.lower), inner.upper)
        shift = x - self.center
        scaled = shift if self.weights is None else torch.where(self.weights > 0, shift / self.weights, 0.0)
        size = scaled.flatten(1).norm(dim=1).clamp(min=TINY)
        # A relative 1e-12 inside the sphere, so that no rounding below leads out again.
        factor = (round_down(self.eps) * (1 - 1e-12) / size).clamp(max=1.0)
        back = scaled * factor.view(-1, *[1] * (x.dim() - 1))
        x = self.center + (back if self.weights is None else back * self.weights)
        return x if self.clip is None else x.clamp(*self.clip)

    def contains(self, x: Tensor) -> Tensor:
        """Whether each sample of `x` lies in the region, decided in exact rational arithmetic: bool, shape (batch,).

        Only coordinates within a rounding of the boundary are taken to rationals, so that an image costs microseconds.
        """
        x = x.detach().to(torch.float64)
        valid = x.isfinite()
        if self.clip is not None:
            valid &= (x >= self.clip[0]) & (x <= self.clip[1])
        inside = valid.flatten(1).all(1)
        for i in inside.nonzero().flatten().tolist():
            inside[i] = self._contains_exactly(x[i], self.center[i])
        return inside

    def _contains_exactly(self, x: Tensor, center: Tensor) -> bool:
        weights = torch.ones_like(center) if self.weights is None else self.weights
        if self.norm == "linf":
            surely = (x - center).abs() < weights * (round_down(self.eps) * (1 - 1e-12))
            x, center, weights = x[~surely], center[~surely], weights[~surely]
        triples = zip(x.flatten().tolist(), center.flatten().tolist(), weights.flatten().tolist(), strict=True)
        total = Fraction(0)
        for value, middle, weight in triples:
            shift = abs(Fraction(value) - Fraction(middle))
            if self.norm == "linf" or weight == 0:
                if shift > self.eps * Fraction(weight):
                    return False
            else:
                total += (shift / Fraction(weight)) ** 2
        return total <= self.eps**2


def check_images(images: Tensor, clip: tuple[float, float] | None) -> None:
    """Refuse NaN, infinity, and pixels outside the valid range; the message names the first offender.

    Raises:
        RegionError: an offending value, with its index.
    """
    if clip is not None and not (math.isfinite(clip[0]) and math.isfinite(clip[1]) and clip[0] <= clip[1]):
        raise RegionError(f"the pixel range {clip} is not an interval (low, high)")
    bad = ~images.isfinite()
    what = "is not finite"
    if clip is not None and not bool(bad.any()):
        bad = (images < clip[0]) | (images > clip[1])
        what = f"lies outside the pixel range [{clip[0]:g}, {clip[1]:g}]; scale the images, or give the right range"
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise RegionError(f"input {index[0]}, at {index[1:]}: the value {float(images[index]):g} {what}")
