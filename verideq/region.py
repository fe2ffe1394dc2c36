"""`Region`: what an adversary may do to an input, in pixel space and in exact numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from verideq.box import TINY, Box, flushed
from verideq.errors import RegionError, UnknownName

Norm = Literal["linf", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)
HEAVIEST = 2.0**300
"""The largest weight of a feature, and its reciprocal the smallest but 0."""

Radius = int | float | str | Fraction


def parse_eps(value: Radius, what: str = "eps") -> Fraction:
    """An exact radius from ``0.1``, ``"0.1"``, ``"8/255"`` or a `Fraction`.

    A string is the rational that it spells; a float is the binary number that it is. `what` it is called in errors.

    Raises:
        RegionError: it is negative, NaN, infinite, too large for float64, or no number.

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
    if eps > Fraction(torch.finfo(torch.float64).max):
        raise RegionError(f"{what} {value!r} is larger than any float64")
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
        eps: the radius in pixel units, kept as an exact rational (see `parse_eps`); or one radius a sample.
        norm: ``"linf"`` or ``"l2"``.
        clip: the valid range ``(low, high)``, or ``None`` for no range.
        weights: optional (*features), 0 or more: feature ``i`` may move by ``eps * weights[i]``.

    Raises:
        RegionError: NaN or infinity in the centre, a centre outside `clip`, an eps that is no radius, not one radius a
            sample, a bad weight.
        UnknownName: a norm other than the two.

    >>> region = Region(torch.tensor([[0.0, 0.5]]), "1/4")
    >>> region.box().upper.tolist()[0][1] >= 0.75
    True
    """

    def __init__(
        self,
        center: Tensor,
        eps: Radius | Sequence[Radius],
        norm: str = "linf",
        clip: tuple[float, float] | None = (0.0, 1.0),
        *,
        weights: Tensor | None = None,
    ) -> None:
        self._eps = _radii(eps, len(center))
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
            usable = (self.weights >= 1 / HEAVIEST) & (self.weights <= HEAVIEST)
            if not bool((usable | (self.weights == 0)).all()):
                raise RegionError(
                    f"eps weights must be 0, or between {1 / HEAVIEST:.3g} and {HEAVIEST:.3g}: beyond it a product "
                    "with them is lost in float64"
                )

    def __len__(self) -> int:
        return len(self.center)

    def __getitem__(self, index: slice | Tensor) -> Region:
        if isinstance(self._eps, Fraction):
            return self._like(self.center[index], self._eps)
        places = torch.arange(len(self))[index if isinstance(index, slice) else index.cpu()].tolist()
        return self._like(self.center[index], tuple(self._eps[i] for i in places))

    def with_eps(self, eps: Radius | Sequence[Radius]) -> Region:
        """Balls of other radii around the same centres."""
        return self._like(self.center, _radii(eps, len(self)))

    def to(self, device: torch.device) -> Region:
        """The same balls on another device."""
        moved = self._like(self.center.to(device), self._eps)
        moved.weights = None if self.weights is None else self.weights.to(device)
        return moved

    def _like(self, center: Tensor, eps: Fraction | tuple[Fraction, ...]) -> Region:
        other = copy(self)
        other.center, other._eps = center, eps
        return other

    @property
    def radii(self) -> tuple[Fraction, ...]:
        """The radius of every sample."""
        return (self._eps,) * len(self) if isinstance(self._eps, Fraction) else self._eps

    @property
    def eps(self) -> Fraction:
        """The radius of all samples.

        Raises:
            RegionError: they have several.
        """
        if isinstance(self._eps, Fraction):
            return self._eps
        if len(set(self._eps)) == 1:
            return self._eps[0]
        raise RegionError(f"the {len(self)} samples of this region have radii of their own; see Region.radii")

    def radii_up(self) -> Tensor:
        """Float64 numbers not below the radii, (batch,)."""
        return self._column(round_up)

    def radii_down(self) -> Tensor:
        """Float64 numbers not above the radii, (batch,)."""
        return self._column(round_down)

    def _column(self, rounded: Callable[[Fraction], float]) -> Tensor:
        if isinstance(self._eps, Fraction):
            return self.center.new_full((len(self),), rounded(self._eps))
        return self.center.new_tensor([rounded(eps) for eps in self._eps])

    def spread(self, column: Tensor) -> Tensor:
        """A number a sample, (batch,), shaped to broadcast over the features."""
        return column.view(-1, *[1] * (self.center.dim() - 1))

    def _reach(self, eps: Tensor, *, up: bool) -> Tensor:
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
        reach = self._reach(self.spread(self.radii_up()), up=True)
        infinity = torch.tensor(math.inf, dtype=torch.float64, device=self.center.device)
        lower = torch.nextafter(self.center - reach, -infinity)
        upper = torch.nextafter(self.center + reach, infinity)
        if self.clip is not None:
            lower, upper = lower.clamp(min=self.clip[0]), upper.clamp(max=self.clip[1])
        return Box(lower, upper)

    def inner_box(self) -> Box:
        """A float64 box all of whose points lie in the linf ball: where an attack may look."""
        reach = self._reach(self.spread(self.radii_down()), up=False)
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
        factor = (self.radii_down() * (1 - 1e-12) / size).clamp(max=1.0)
        back = scaled * self.spread(factor)
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
        radii = self.radii
        for i in inside.nonzero().flatten().tolist():
            inside[i] = self._contains_exactly(x[i], self.center[i], radii[i])
        return inside

    def _contains_exactly(self, x: Tensor, center: Tensor, eps: Fraction) -> bool:
        if self.norm == "linf":
            weights = torch.ones_like(center) if self.weights is None else self.weights
            far = ~((x - center).abs() < weights * (round_down(eps) * (1 - 1e-12)))
            return self._square(x, center, far) <= eps**2
        return self._square(x, center) <= eps**2

    def _square(self, x: Tensor, center: Tensor, part: Tensor | None = None) -> Fraction | float:
        """The square of the distance of one point, exact; of some features only where `part` says so.

        Infinite where a feature of weight 0 has moved.
        """
        weights = torch.ones_like(center) if self.weights is None else self.weights
        if part is not None:
            x, center, weights = x[part], center[part], weights[part]
        total = Fraction(0)
        for value, middle, weight in zip(*(t.flatten().tolist() for t in (x, center, weights)), strict=True):
            shift = abs(Fraction(value) - Fraction(middle))
            if not shift:
                continue
            if weight == 0:
                return math.inf
            square = (shift / Fraction(weight)) ** 2
            total = max(total, square) if self.norm == "linf" else total + square
        return total

    def distances(self, x: Tensor) -> tuple[Fraction | float, ...]:
        """The smallest radius of a ball around each centre that holds `x`, shape (batch, *features).

        Exact for linf; for l2 the square root is rounded up, by 2⁻⁵² of itself at most. Infinite where a feature of
        weight 0 has moved.
        """
        x = x.detach().to(torch.float64)
        weights = torch.ones_like(self.center[:1]) if self.weights is None else self.weights[None]
        far = torch.ones_like(x, dtype=torch.bool)
        if self.norm == "linf":  # what is clearly nearer than the farthest feature needs no rational
            moved = (x - self.center).abs()
            scaled = torch.where(moved == 0, 0.0, moved / weights)
            far = scaled >= self.spread(scaled.flatten(1).amax(1)) * (1 - 1e-12)
        return tuple(_root(self._square(*one)) for one in zip(x, self.center, far, strict=True))

    def covering(self) -> tuple[Fraction, ...] | None:
        """A radius of every sample at which its ball holds the whole valid range; ``None`` without a range."""
        if self.clip is None:
            return None
        low, high = self.clip
        far = torch.where(self.center - low > high - self.center, low, high).to(self.center)
        far = far if self.weights is None else torch.where(self.weights > 0, far, self.center)
        return tuple(Fraction(distance) for distance in self.distances(far))


def _radii(eps: Radius | Sequence[Radius], count: int) -> Fraction | tuple[Fraction, ...]:
    if isinstance(eps, str) or not isinstance(eps, Sequence):
        return parse_eps(eps)
    if len(eps) != count:
        raise RegionError(f"{len(eps)} radii for {count} samples; give one radius, or one a sample")
    return tuple(map(parse_eps, eps))


def _root(square: Fraction | float) -> Fraction | float:
    """The square root: exact where it is rational, otherwise rounded up."""
    if not isinstance(square, Fraction):
        return square
    ends = math.isqrt(square.numerator), math.isqrt(square.denominator)
    exact = Fraction(*ends)
    if exact * exact == square:
        return exact
    # √(n/d) = √(n d)/d; one more bit than a float64 holds.
    shift = max(0, 108 - (square.numerator * square.denominator).bit_length()) // 2 + 1
    top = math.isqrt((square.numerator * square.denominator) << (2 * shift)) + 1
    return Fraction(round_up(Fraction(top, square.denominator << shift)))


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
