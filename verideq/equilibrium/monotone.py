"""The factored monotone operator of Winston & Kolter, "Monotone operator equilibrium networks", NeurIPS 2020.

``W = (1-m) I - AᵀA + B - Bᵀ`` has ``I - sym W = m I + AᵀA ⪰ m I``, whatever ``A`` and ``B`` hold: the equilibrium
exists and is unique, by algebra and not by the size of ``W``. A ``W`` that is multiplied out in float32 has no such
property, and that of a convolution has a kernel of ``(2k-1)²`` taps; so the factors are what is stored, and every
snapshot is taken from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from verideq.equilibrium.operators import Convolution, Dense, FactoredFusion
from verideq.errors import ModelError

Map = Callable[[Tensor], Tensor]

SMALL = 1024
"""Up to how many numbers the state of a zero-padded convolution may have for its ``W`` to be inverted as a matrix."""
SHARE = 2.0**-16
"""The part of the factors' magnitudes by which `RoundedDense` enlarges ``|W|``."""


class MonotoneFusion(FactoredFusion):
    """``z -> (1-m) z - AᵀA z + B z - Bᵀ z`` as the fusion of an `Equilibrium`, with free ``A`` and ``B``.

    Args:
        A: (rows, units) for a dense ``W``; (channels, channels, k, k), k odd, for a "same" convolution of stride 1.
        B: (units, units), or the shape of the kernel ``A``.
        m: the strength of monotonicity, positive. A buffer: a schedule may assign it.
        padding_mode: of convolutions, ``zeros`` or ``circular``.

    Raises:
        ModelError: shapes that do not fit, another padding, or an `m` that is not positive and finite.
    """

    m: Tensor

    def __init__(self, A: Tensor, B: Tensor, m: float, padding_mode: str = "zeros") -> None:
        super().__init__()
        if not 0 < m < math.inf:
            raise ModelError(f"m = {m} is no strength of monotonicity; give a positive number")
        shape = tuple(A.shape)
        if len(shape) == 2:
            fits = tuple(B.shape) == (shape[1], shape[1]) and shape[0] > 0
            wanted = "A of shape (rows, units) and B of shape (units, units)"
        else:
            square = len(shape) == 4 and shape[0] == shape[1] and shape[2] % 2 == shape[3] % 2 == 1
            fits = square and tuple(B.shape) == shape
            wanted = "kernels A and B of one shape (channels, channels, k, k), k odd"
        if not fits:
            raise ModelError(f"a factored W takes {wanted}; got A {shape} and B {tuple(B.shape)}")
        if A.dtype != B.dtype or not A.is_floating_point():
            raise ModelError(f"the factors of W have one floating-point dtype; got A {A.dtype} and B {B.dtype}")
        if padding_mode not in ("zeros", "circular"):
            raise ModelError(f"a factored convolution pads with zeros or circular; got {padding_mode!r}")
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.padding_mode = padding_mode
        # On the CPU even where a model is built without memory (torch's meta device): it is a setting, not a weight.
        self.register_buffer("m", torch.tensor(float(m), dtype=torch.float64, device="cpu"))

    def operator(self) -> MonotoneDense | MonotoneConvolution:
        if self.A.dim() == 2:
            return MonotoneDense(self.A, self.B, float(self.m))
        return MonotoneConvolution(self.A, self.B, float(self.m), self.padding_mode)

    def extra_repr(self) -> str:
        mode = f", padding_mode={self.padding_mode}" if self.A.dim() > 2 else ""
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, m={float(self.m):g}{mode}"


@dataclass(frozen=True)
class RoundedDense(Dense):
    """A matrix that stands for another one, from which rounding has moved it by at most ``γ(inner) magnitudes``.

    Rounding-error bounds charge ``γ(terms) |W|``. Here ``|W|`` is enlarged by a small share of the magnitudes, and
    `terms` in the same measure, so that what they charge covers the matrix's own rounding as well.

    Args:
        weight: (units, units), in the dtype in which it was computed.
        magnitudes: (units, units): the same sums of the same products, of absolute values.
        inner: the number of terms in them.
    """

    magnitudes: Tensor
    inner: int

    @property
    def terms(self) -> int:
        return int((self.weight.shape[1] + self.inner) / SHARE)

    def absolute(self) -> Dense:
        return Dense(self.absolute_units())

    def transpose(self) -> RoundedDense:
        return RoundedDense(self.weight.T, self.magnitudes.T, self.inner)

    def map(self, change: Callable[[Tensor], Tensor]) -> RoundedDense:
        return RoundedDense(change(self.weight), change(self.magnitudes), self.inner)

    def solved(self) -> tuple[RoundedDense, Tensor]:
        # What the computed diagonal lacks of the true one stays in W̃, within the magnitudes.
        rest, factor = super().solved()
        return RoundedDense(rest.weight, self.magnitudes * factor[:, None], self.inner), factor

    def absolute_units(self) -> Tensor:
        return self.weight.abs() + SHARE * self.magnitudes


@dataclass(frozen=True)
class MonotoneDense:
    """A dense ``W = (1-m) I - AᵀA + B - Bᵀ``, multiplied out once a snapshot in the dtype of its factors.

    Args:
        A: (rows, units).
        B: (units, units).
        m: positive.
    """

    A: Tensor
    B: Tensor
    m: float

    @cached_property
    def weight(self) -> Tensor:
        """``W``, (units, units), rounded."""
        identity = torch.eye(len(self.B), dtype=self.dtype, device=self.B.device)
        with torch.enable_grad():  # kept for the snapshot's life, whoever asks for it first
            return torch.addmm((1 - self.m) * identity + (self.B - self.B.T), self.A.T, self.A, alpha=-1)

    @cached_property
    def _rounded(self) -> RoundedDense:
        a, b = self.A.detach().abs(), self.B.detach().abs()
        identity = torch.eye(len(b), dtype=self.dtype, device=b.device)
        magnitudes = torch.addmm(abs(1 - self.m) * identity + (b + b.T), a.T, a)
        return RoundedDense(self.weight, magnitudes, len(a) + 6)

    @property
    def terms(self) -> int:
        return self._rounded.terms

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (len(self.B),)

    def apply(self, z: Tensor) -> Tensor:
        return Dense(self.weight).apply(z)

    def absolute(self) -> Dense:
        return self._rounded.absolute()

    def transpose(self) -> MonotoneDense:
        return MonotoneDense(self.A, self.B.T, self.m)

    def diagonal(self) -> Tensor:
        return self.weight.diagonal()

    def map(self, change: Callable[[Tensor], Tensor]) -> MonotoneDense:
        return MonotoneDense(change(self.A), change(self.B), self.m)

    def solved(self) -> tuple[RoundedDense, Tensor]:
        return self._rounded.solved()

    def absolute_units(self) -> Tensor:
        return self._rounded.absolute_units()

    def spread_units(self, u: Tensor) -> Tensor:
        return u

    @torch.no_grad()
    def norms(self) -> tuple[float, float]:
        """The norms of the symmetric part of ``I - W`` and of the skew one."""
        return self.m + _norm(self.A) ** 2, _norm(self.B - self.B.T)

    def damping(self) -> float:
        """A damping under which the forward-backward step contracts."""
        return _contracting(self.m, *self.norms())

    @torch.no_grad()
    def inverse(self, alpha: float, shape: tuple[int, ...]) -> tuple[Map, Map]:
        """``x -> ((1+α) I - α W)⁻¹ x`` and its adjoint, factorised once, for states of this shape."""
        return dense_inverse(self.weight, alpha)


def _norm(matrix: Tensor) -> float:
    """The spectral norm; NaN of what is not finite."""
    gram = matrix.T @ matrix
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))) if bool(gram.isfinite().all()) else math.nan


def _contracting(m: float, symmetric: float, skew: float) -> float:
    """A damping in (0, 1] under which the forward-backward step contracts.

    With ``S`` the symmetric and ``K`` the skew part of ``I - W``, ``‖x - α (S + K) x‖²`` is at most
    ``‖x‖² - 2α x·Sx + 2α² (‖S‖ x·Sx + ‖K‖² ‖x‖²)``, at most ``(1 - α m / 2) ‖x‖²`` for the first step below. The
    second is half of the limit ``2m / (‖S‖ + ‖K‖)²``.
    """
    first = min(0.5 / symmetric, 0.25 * m / skew**2 if skew else math.inf)
    return min(1.0, max(first, m / (symmetric + skew) ** 2))


def dense_inverse(weight: Tensor, alpha: float) -> tuple[Map, Map]:
    """``x -> ((1+α) I - α W)⁻¹ x`` and its adjoint for a matrix ``W``, on (batch, units)."""
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    inverse = torch.linalg.inv_ex((1 + alpha) * identity - alpha * weight)[0]
    return lambda x: x @ inverse.T, lambda x: x @ inverse


@dataclass(frozen=True)
class MonotoneConvolution:
    """A convolutional ``W = (1-m) I - AᵀA + B - Bᵀ``, applied factor by factor.

    With zero padding ``Aᵀ`` is the adjoint of the padded convolution, so that ``I - sym W ⪰ m I`` holds at the border
    too. There is no kernel of ``W`` to take absolute values of: `absolute` is the bound
    ``|1-m| I + |A|ᵀ|A| + |B - Bᵀ|``, and the rows are not solved for their own unknowns.

    Args:
        A: (channels, channels, k, k), as `B`.
        m: positive.
        mode: ``zeros`` or ``circular``.
    """

    A: Tensor
    B: Tensor
    m: float
    mode: str = "zeros"

    def _convolution(self, kernel: Tensor) -> Convolution:
        rows, columns = (size // 2 for size in kernel.shape[2:])
        return Convolution(kernel, (columns, columns, rows, rows), mode=self.mode)

    @cached_property
    def _factors(self) -> tuple[Convolution, Convolution, Convolution]:
        """``A``, ``Aᵀ`` and ``B - Bᵀ``, which has the taps of ``B``."""
        with torch.enable_grad():
            kernels = self.A, _adjoint(self.A), self.B - _adjoint(self.B)
        a, adjoint, skew = (self._convolution(kernel) for kernel in kernels)
        return a, adjoint, skew

    @property
    def terms(self) -> int:
        return sum(factor.terms for factor in self._factors) + 4

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (len(self.A), None, None)

    def apply(self, z: Tensor) -> Tensor:
        a, adjoint, skew = self._factors
        return (1 - self.m) * z - adjoint.apply(a.apply(z)) + skew.apply(z)

    def absolute(self) -> Magnitudes:
        a, adjoint, skew = (factor.absolute() for factor in self._factors)
        return Magnitudes(abs(1 - self.m), a, adjoint, skew)

    def transpose(self) -> MonotoneConvolution:
        return MonotoneConvolution(self.A, _adjoint(self.B), self.m, self.mode)

    def diagonal(self) -> Tensor:
        return self.A.new_zeros(len(self.A), 1, 1)

    def map(self, change: Callable[[Tensor], Tensor]) -> MonotoneConvolution:
        return MonotoneConvolution(change(self.A), change(self.B), self.m, self.mode)

    def solved(self) -> tuple[MonotoneConvolution, Tensor]:
        return self, self.A.new_ones(len(self.A), 1, 1)

    def absolute_units(self) -> Tensor:
        return self.absolute().absolute_units()

    def spread_units(self, u: Tensor) -> Tensor:
        return u[:, None, None]

    @torch.no_grad()
    def norms(self) -> tuple[float, float]:
        """Bounds of the norms of the symmetric part of ``I - W`` and of the skew one."""
        a, _, skew = self._factors
        return self.m + _symbol_norm(a.weight) ** 2, _symbol_norm(skew.weight)

    def damping(self) -> float:
        """A damping under which the forward-backward step contracts."""
        return _contracting(self.m, *self.norms())

    @torch.no_grad()
    def inverse(self, alpha: float, shape: tuple[int, ...]) -> tuple[Map, Map] | None:
        """``x -> ((1+α) I - α W)⁻¹ x`` and its adjoint for images of this shape, computed once.

        ``None`` with zero padding on images of more than `SMALL` numbers, which have no cheap inverse.
        """
        if self.mode != "circular":
            count = math.prod(shape)
            if count > SMALL:
                return None
            identity = torch.eye(count, dtype=self.dtype, device=self.A.device)
            there, back = dense_inverse(self.apply(identity.view(count, *shape)).flatten(1).T, alpha)
            return lambda x: there(x.flatten(1)).view_as(x), lambda x: back(x.flatten(1)).view_as(x)
        # A circular convolution is one matrix a frequency: the transform of its answers to unit impulses.
        channels, *size = shape
        impulses = self.A.new_zeros(channels, channels, *size)
        impulses[:, :, 0, 0] = torch.eye(channels, dtype=self.dtype, device=self.A.device)
        answers = torch.fft.rfft2((1 + alpha) * impulses - alpha * self.apply(impulses))
        inverse = torch.linalg.inv_ex(answers.permute(2, 3, 1, 0))[0]  # (frequencies, outputs, inputs)

        def through(matrices: Tensor) -> Map:
            def apply(x: Tensor) -> Tensor:
                seen = torch.fft.rfft2(x).permute(2, 3, 1, 0)
                back: Tensor = torch.fft.irfft2((matrices @ seen).permute(3, 2, 0, 1), s=tuple(x.shape[2:]))
                return back

            return apply

        return through(inverse), through(inverse.mH)


def _symbol_norm(kernel: Tensor) -> float:
    """A bound of the norm of a convolution with this kernel, for zero and circular padding and images of every size.

    The norm is at most the largest one of the matrix ``Â(ω)`` over all frequencies. Entry by entry that is a
    trigonometric polynomial of degree ``d = k // 2`` in each direction, whose maximum is at most ``1 / cos(π d / N)``
    times the largest value on ``N > 2d`` equidistant points (Ehlich & Zeller, Math. Z. 1964).
    """
    degrees = [size // 2 for size in kernel.shape[2:]]
    points = [8 * degree or 1 for degree in degrees]
    matrices = torch.fft.fft2(kernel.detach(), s=points).permute(2, 3, 0, 1)
    gram = matrices @ matrices.mH
    if not bool(gram.isfinite().all()):
        return math.nan
    between = math.prod(math.cos(math.pi * degree / count) for degree, count in zip(degrees, points, strict=True))
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram).max()))) / between


def _adjoint(kernel: Tensor) -> Tensor:
    """The kernel of the transposed convolution."""
    return kernel.transpose(0, 1).flip(2, 3)


@dataclass(frozen=True)
class Magnitudes:
    """``shift I + A' A + S``, all of them nonnegative convolutions: a bound of ``|W|`` of a `MonotoneConvolution`."""

    shift: float
    a: Convolution
    adjoint: Convolution
    skew: Convolution

    @property
    def terms(self) -> int:
        return self.a.terms + self.adjoint.terms + self.skew.terms + 4

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.a.shape

    def apply(self, z: Tensor) -> Tensor:
        return self.shift * z + self.adjoint.apply(self.a.apply(z)) + self.skew.apply(z)

    def absolute(self) -> Magnitudes:
        return self

    def transpose(self) -> Magnitudes:
        return replace(self, skew=replace(self.skew, weight=_adjoint(self.skew.weight)))

    def diagonal(self) -> Tensor:
        return self.a.weight.new_zeros(len(self.a.weight), 1, 1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Magnitudes:
        return Magnitudes(self.shift, self.a.map(change), self.adjoint.map(change), self.skew.map(change))

    def solved(self) -> tuple[Magnitudes, Tensor]:
        return self, self.a.weight.new_ones(len(self.a.weight), 1, 1)

    def absolute_units(self) -> Tensor:
        identity = torch.eye(len(self.a.weight), dtype=self.dtype, device=self.a.weight.device)
        symmetric = self.adjoint.absolute_units() @ self.a.absolute_units()
        return self.shift * identity + symmetric + self.skew.absolute_units()

    def spread_units(self, u: Tensor) -> Tensor:
        return u[:, None, None]


Monotone = MonotoneDense | MonotoneConvolution
"""Operators with ``I - sym W ⪰ m I`` by construction."""
