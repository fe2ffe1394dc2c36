"""The linear part ``W`` of an equilibrium layer as an operator: a snapshot of the stored weights, taken once a call.

Solver, gradients, bounds and gauge all read the same snapshot, so that a parametrization is evaluated once and nothing
can change in between. A new kind of ``W`` (factored, block, scaled) is one more class with these methods, and one more
line in `operator_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.utils.parametrize import type_before_parametrizations

from verideq.errors import ModelError


class Operator(Protocol):
    """A square linear map on tensors of shape (batch, *features)."""

    @property
    def terms(self) -> int:
        """The number of products summed for one output: what rounding-error bounds need."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights."""

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape of a state without the batch, ``None`` where any size will do."""

    def apply(self, z: Tensor) -> Tensor:
        """``W z``; (batch, *features) in and out."""

    def absolute(self) -> Operator:
        """The operator of ``|W|``, entrywise; of a bound of it where ``W`` is not stored entry by entry."""

    def transpose(self) -> Operator:
        """The operator of ``Wᵀ``: ``<W z, y> = <z, Wᵀ y>`` for all ``z`` and ``y``, at every border."""

    def diagonal(self) -> Tensor:
        """The own entries ``W_ii`` as `solved` takes them, shaped to broadcast over (batch, *features)."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Operator:
        """The same operator with every stored tensor changed: another dtype or device, or cut off from autograd."""

    def solved(self) -> tuple[Operator, Tensor]:
        """Every row solved for its own unknown (docs/theory.md, the transformed layer).

        ``z_i = σ(W_ii z_i + rest_i)`` and ``z_i = σ(rest_i / (1 - W_ii))`` have the same solutions for
        ``W_ii < 1``. Returns ``W̃ = (I - diag W)⁻¹ offdiag W`` and the row factor ``1 / (1 - diag W)``, shaped to
        multiply an injection. Rows with ``W_ii >= 1`` are left as they are (factor 1).
        """

    def absolute_units(self) -> Tensor:
        """``|W|`` summed over the positions of a unit: (units, units); ``u`` with ``K u < u`` is a gauge."""

    def spread_units(self, u: Tensor) -> Tensor:
        """One number a unit, (units,), shaped to broadcast over (batch, *features)."""


def _own(weight: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The weight without its own entries, rows divided by ``1 - own``; and the factors."""
    # Beyond 2^1000 the factor itself could be flushed to zero; such a row is left as it is, and has no gauge.
    solvable = (own < 1) & (own > -(2.0**1000))
    factor = torch.where(solvable, 1 - own, torch.ones_like(own)).reciprocal()
    return torch.where(solvable, torch.zeros_like(own), own), factor


@dataclass(frozen=True)
class Dense:
    """``W`` as a matrix of shape (units, units), acting on (batch, units)."""

    weight: Tensor

    @property
    def terms(self) -> int:
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.weight.shape[1],)

    def apply(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight)

    def absolute(self) -> Dense:
        return Dense(self.weight.abs())

    def transpose(self) -> Dense:
        return Dense(self.weight.T)

    def diagonal(self) -> Tensor:
        return self.weight.diagonal()

    def map(self, change: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(change(self.weight))

    def weight_gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """The gradient of ``<y, W z>`` for the stored weight, without working out ``W z``."""
        return y.T @ z

    def solved(self) -> tuple[Dense, Tensor]:
        kept, factor = _own(self.weight, self.weight.diagonal())
        weight = self.weight * factor[:, None]
        return Dense(weight.diagonal_scatter(kept * factor)), factor

    def absolute_units(self) -> Tensor:
        return self.weight.abs()

    def spread_units(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class Convolution:
    """``W`` as a stride-1 "same" convolution, acting on (batch, channels, height, width).

    Args:
        weight: (channels, channels / groups, kernel height, kernel width).
        pads: rows and columns added around the image, as `torch.nn.functional.pad` takes them:
            (left, right, top, bottom).
        mode: ``zeros``, ``circular``, ``reflect`` or ``replicate``, as in `torch.nn.Conv2d`.
    """

    weight: Tensor
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mode: str = "zeros"

    @property
    def terms(self) -> int:
        return self.weight[0].numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.weight.shape[0], None, None)

    @property
    def _symmetric(self) -> tuple[int, int] | None:
        """The padding as one number an axis, where the convolution itself can pad."""
        left, right, top, bottom = self.pads
        return (top, left) if self.mode == "zeros" and left == right and top == bottom else None

    def _pad(self, z: Tensor) -> Tensor:
        return F.pad(z, self.pads, "constant" if self.mode == "zeros" else self.mode)

    def _with(self, weight: Tensor) -> Convolution:
        return Convolution(weight, self.pads, self.dilation, self.groups, self.mode)

    def apply(self, z: Tensor) -> Tensor:
        padding = self._symmetric
        if padding is None:
            z, padding = self._pad(z), (0, 0)
        return F.conv2d(z, self.weight, None, 1, padding, self.dilation, self.groups)

    def absolute(self) -> Convolution:
        return self._with(self.weight.abs())

    def transpose(self) -> Convolution | FoldedConvolution:
        if self.mode not in ("zeros", "circular"):
            return FoldedConvolution(self)
        channels, per_group, *kernel = self.weight.shape
        blocks = self.weight.reshape(self.groups, channels // self.groups, per_group, *kernel).transpose(1, 2)
        left, right, top, bottom = self.pads
        flipped = blocks.reshape(channels, per_group, *kernel).flip(2, 3)
        return Convolution(flipped, (right, left, bottom, top), self.dilation, self.groups, self.mode)

    def diagonal(self) -> Tensor:
        place = self._own_tap()
        return self.weight.new_zeros(len(self.weight), 1, 1) if place is None else self.weight[place][:, None, None]

    def _own_tap(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Where in the kernel each channel reads its own position; ``None`` where no tap does."""
        row, odd_row = divmod(self.pads[2], self.dilation[0])
        column, odd_column = divmod(self.pads[0], self.dilation[1])
        if odd_row or odd_column:
            return None
        outputs = torch.arange(len(self.weight), device=self.weight.device)
        taps = torch.full_like(outputs, row), torch.full_like(outputs, column)
        return outputs, outputs % self.weight.shape[1], *taps

    def map(self, change: Callable[[Tensor], Tensor]) -> Convolution:
        return self._with(change(self.weight))

    def weight_gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """The gradient of ``<y, W z>`` for the stored weight, without working out ``W z``."""
        padding = self._symmetric
        if padding is None:
            z, padding = self._pad(z), (0, 0)
        gradient: Tensor = conv2d_weight(z, self.weight.shape, y, 1, padding, self.dilation, self.groups)  # type: ignore[no-untyped-call]  # torch's
        return gradient

    def solved(self) -> tuple[Convolution, Tensor]:
        # At a border a padded copy of a pixel may be read as well as the pixel itself; that share stays in W̃, which is
        # just as valid: any part of the diagonal may be moved to the left.
        place = self._own_tap()
        if place is None:
            return self, self.weight.new_ones(len(self.weight), 1, 1)
        kept, factor = _own(self.weight, self.weight[place])
        weight = self.weight.index_put(place, kept) * factor[:, None, None, None]
        return self._with(weight), factor[:, None, None]

    def absolute_units(self) -> Tensor:
        channels, per_group = self.weight.shape[:2]
        sums = self.weight.abs().sum((2, 3))
        if self.groups == 1:
            return sums
        # Each group connects its own channels only: its sums are a block on the diagonal.
        group = torch.arange(channels, device=sums.device) // per_group
        same = group[:, None] == group
        return torch.where(same, sums.repeat(1, self.groups), 0.0)

    def spread_units(self, u: Tensor) -> Tensor:
        return u[:, None, None]


@dataclass(frozen=True)
class FoldedConvolution:
    """``Wᵀ`` of a convolution with ``reflect`` or ``replicate`` padding, which is no convolution near the border.

    ``W`` pads and then convolves, so ``Wᵀ`` convolves with the transposed kernel and then folds: every position of the
    padding is added to the pixel that it copies.
    """

    convolution: Convolution

    @property
    def terms(self) -> int:
        left, right, top, bottom = self.convolution.pads
        return self.convolution.terms * (1 + left + right) * (1 + top + bottom)

    @property
    def dtype(self) -> torch.dtype:
        return self.convolution.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.convolution.shape

    def apply(self, z: Tensor) -> Tensor:
        conv = self.convolution
        padded = F.conv_transpose2d(z, conv.weight, None, groups=conv.groups, dilation=conv.dilation)
        for axis, pads in ((-2, conv.pads[2:]), (-1, conv.pads[:2])):
            size = z.shape[axis]
            copied = F.pad(torch.arange(size, dtype=torch.float64, device=z.device)[None], pads, conv.mode)[0].long()
            folded = padded.new_zeros(*(size if d == padded.dim() + axis else n for d, n in enumerate(padded.shape)))
            padded = folded.index_add(axis, copied, padded)
        return padded

    def absolute(self) -> FoldedConvolution:
        return FoldedConvolution(self.convolution.absolute())

    def transpose(self) -> Convolution:
        return self.convolution

    def diagonal(self) -> Tensor:
        return self.convolution.diagonal()

    def map(self, change: Callable[[Tensor], Tensor]) -> FoldedConvolution:
        return FoldedConvolution(self.convolution.map(change))

    def solved(self) -> tuple[Operator, Tensor]:
        raise ModelError(
            f"a transposed {self.convolution.mode} convolution has no solved rows; solve before transposing"
        )

    def absolute_units(self) -> Tensor:
        raise ModelError(
            f"the sums of a transposed {self.convolution.mode} convolution differ by pixel near the border; take those "
            "of the convolution itself"
        )

    def spread_units(self, u: Tensor) -> Tensor:
        return self.convolution.spread_units(u)


class FactoredFusion(nn.Module):
    """A fusion whose ``W`` is not the weight of one layer: it brings its own operator."""

    def operator(self) -> Operator:
        """A snapshot of ``W``."""
        raise NotImplementedError  # abstract: a torch module has no metaclass to say so

    def forward(self, z: Tensor) -> Tensor:
        """``W z``; (batch, *features) in and out."""
        return self.operator().apply(z)


def operator_of(fusion: nn.Module, place: str = "fusion") -> Operator:
    """The operator of a `Linear`, `Conv2d` or `FactoredFusion`, its weight read (its parametrization evaluated) once.

    Raises:
        ModelError: the module is none of them, has a bias, or does not map its input shape to itself.
    """
    if isinstance(fusion, FactoredFusion):
        return fusion.operator()
    kind = type_before_parametrizations(fusion)
    if getattr(fusion, "bias", None) is not None:
        raise ModelError(f"{place}: the fusion of an equilibrium has no bias (bias=False); put it into the injection")
    if kind is nn.Linear:
        weight: Tensor = fusion.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
        if weight.shape[0] != weight.shape[1]:
            raise ModelError(
                f"{place}: W maps a state to a state, but its weight is {tuple(weight.shape)}; make it square"
            )
        return Dense(weight)
    if kind is nn.Conv2d:
        return _convolution_of(fusion, place)  # type: ignore[arg-type]  # the type test above is on the original class
    raise ModelError(
        f"{place}: a fusion is a Linear or a Conv2d without bias, whose weight may be parametrized, or a factored one "
        f"(verideq.parametrizations.MonDEQ, verideq.equilibrium.FeedbackFusion); got {kind.__name__}"
    )


def _convolution_of(fusion: nn.Conv2d, place: str) -> Convolution:
    weight, dilation = fusion.weight, (fusion.dilation[0], fusion.dilation[1])
    reach = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if fusion.padding == "same":
        top, left = reach[0] // 2, reach[1] // 2
        pads = (left, reach[1] - left, top, reach[0] - top)
    elif isinstance(fusion.padding, str):  # "valid"
        pads = (0, 0, 0, 0)
    else:
        pads = (fusion.padding[1],) * 2 + (fusion.padding[0],) * 2
    same = (pads[2] + pads[3], pads[0] + pads[1]) == reach and set(fusion.stride) == {1}
    if not same or fusion.in_channels != fusion.out_channels:
        raise ModelError(
            f'{place}: W maps a state to a state, so its convolution needs stride 1, padding="same" and as many output '
            f"as input channels; got stride {fusion.stride}, padding {fusion.padding}, kernel {fusion.kernel_size}, "
            f"dilation {fusion.dilation}, channels {fusion.in_channels} -> {fusion.out_channels}"
        )
    return Convolution(weight, pads, dilation, fusion.groups, fusion.padding_mode)


def exactly(weights: Tensor) -> Tensor:
    """The stored numbers in float64, cut off from autograd: for `Operator.map`."""
    return weights.detach().to(torch.float64)
