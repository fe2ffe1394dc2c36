"""The symmetric block-tridiagonal ``W`` of an energy-based network: blocks of units, coupled to the next one and back.

Block ``n`` of the state reads ``A_n s_{n-1}`` from below and ``A_{n+1}ᵀ s_{n+1}`` from above, which is the gradient of
``Φ(s) = Σ_n <A_n s_{n-1}, s_n>`` (Scellier & Bengio, "Equilibrium propagation", 2017; Laborieux et al., 2021). ``A_n``
is a convolution, strided and padded with zeros, or a matrix. The state is flat, one block after another.

**Sums by channel.** The gauge of a convolution has one number a channel. Forwards, an interior pixel reads every tap of
the kernel once, and no pixel reads more. Backwards, ``(A_nᵀ y)_p = Σ K[o, i, t] y_{o, q}`` over the ``q`` with ``p +
padding = stride q + t``: a pixel reads the taps ``t`` that are congruent to ``p + padding`` modulo the stride, each at
most once. These *phases* differ, and the largest sum over one phase bounds them all. Of a matrix between images
every pixel is a phase of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from verideq.equilibrium.operators import FactoredFusion
from verideq.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Coupling:
    """``A``, from one block to the next, and ``Aᵀ`` back.

    Args:
        weight: (above channels, below channels, rows, columns) of a convolution; (above units, below units).
        below: the shape of the lower block, (units,) or (channels, rows, columns).
        above: of the upper one.
        stride: of a convolution.
        padding: likewise, with zeros.
    """

    weight: Tensor
    below: Shape
    above: Shape
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def up(self, s: Tensor) -> Tensor:
        """``A s``, flat: (batch, below units) to (batch, above units)."""
        if self.weight.dim() == 2:
            return F.linear(s, self.weight)
        return F.conv2d(s.view(-1, *self.below), self.weight, None, self.stride, self.padding).flatten(1)

    def down(self, y: Tensor) -> Tensor:
        """``Aᵀ y``, flat."""
        if self.weight.dim() == 2:
            return y @ self.weight
        # Rows and columns that no window reaches, because the stride steps over them.
        rest = [
            size + 2 * pad - taps - stride * (count - 1)
            for size, pad, taps, stride, count in zip(
                self.below[1:], self.padding, self.weight.shape[2:], self.stride, self.above[1:], strict=True
            )
        ]
        y = y.view(-1, *self.above)
        return F.conv_transpose2d(y, self.weight, None, self.stride, self.padding, (rest[0], rest[1])).flatten(1)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Bounds of ``|A|`` and ``|Aᵀ|`` summed over the positions of a channel, (above, below) and (below, above).

        The largest sum over the positions that a unit reads, whichever pixel of its channel it is (see above).
        """
        size, channels = self.weight.abs(), (self.above[0], self.below[0])
        if size.dim() == 2:
            pixels = size.view(channels[0], -1, channels[1], math.prod(self.below[1:]))
            return pixels.sum(3).amax(1), pixels.sum(1).amax(2).T
        (rows, columns), (down, right) = size.shape[2:], self.stride
        phases = F.pad(size, (0, -columns % right, 0, -rows % down))
        phases = phases.view(*channels, -1, down, -(-columns // right), right).sum((2, 4))
        return size.sum((2, 3)), phases.amax((2, 3)).T


@dataclass(frozen=True)
class Feedback:
    """``W`` on flat states, (batch, units): symmetric, its diagonal zero.

    Args:
        couplings: from the first block upwards, each beginning where the last one ended.
    """

    couplings: tuple[Coupling, ...]

    @property
    def blocks(self) -> tuple[Shape, ...]:
        """The shape of every block."""
        return (self.couplings[0].below, *(coupling.above for coupling in self.couplings))

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.blocks]

    @property
    def _weight(self) -> Tensor:
        return self.couplings[0].weight

    @property
    def terms(self) -> int:
        # What a unit reads from below, and at most from above.
        up = [0, *(coupling.weight[0].numel() for coupling in self.couplings)]
        down = [*(coupling.weight[:, 0].numel() for coupling in self.couplings), 0]
        return max(a + b for a, b in zip(up, down, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (sum(self._sizes),)

    def apply(self, z: Tensor) -> Tensor:
        states, nothing = torch.split(z, self._sizes, 1), z.new_zeros(())
        from_below = [nothing, *(c.up(s) for c, s in zip(self.couplings, states, strict=False))]
        from_above = [*(c.down(s) for c, s in zip(self.couplings, states[1:], strict=True)), nothing]
        return torch.cat([a + b for a, b in zip(from_below, from_above, strict=True)], 1)

    def absolute(self) -> Feedback:
        return self.map(Tensor.abs)

    def transpose(self) -> Feedback:
        return self

    def diagonal(self) -> Tensor:
        return self._weight.new_zeros(1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Feedback:
        return Feedback(tuple(replace(c, weight=change(c.weight)) for c in self.couplings))

    def solved(self) -> tuple[Feedback, Tensor]:
        return self, self._weight.new_ones(1)

    def absolute_units(self) -> Tensor:
        """By channel of every block; an upper bound, see `Coupling.sums`."""
        places, total = self._channels()
        sums = self._weight.new_zeros(total, total)
        for coupling, (lower, upper) in zip(self.couplings, pairwise(places), strict=True):
            sums[upper, lower], sums[lower, upper] = coupling.sums()
        return sums

    def spread_units(self, u: Tensor) -> Tensor:
        places, _ = self._channels()
        return torch.cat(
            [u[own].repeat_interleave(math.prod(shape[1:])) for own, shape in zip(places, self.blocks, strict=True)]
        )

    def _channels(self) -> tuple[list[slice], int]:
        """Where each block's channels are among all of them, and how many these are."""
        ends = [0]
        for shape in self.blocks:
            ends.append(ends[-1] + shape[0])
        return [slice(begin, end) for begin, end in pairwise(ends)], ends[-1]


class FeedbackFusion(FactoredFusion):
    """``W`` of blocks that are coupled to the next one and back, as the fusion of an `Equilibrium` of flat states.

    Args:
        shapes: of the blocks from the lowest, each (units,) or (channels, rows, columns).
        couplings: from each block to the next: a `Conv2d` (any stride, zero padding, groups 1, no dilation) or a
            `Linear`, which flattens; without bias. Their weights may be parametrized.
        scaling: all couplings to those that ``W`` is made of: a `verideq.parametrizations.FeedbackGauge`; ``None``:
            they are used as they are.

    Raises:
        ModelError: couplings that do not fit their blocks, or another kind of them.

    >>> fusion = FeedbackFusion([(2, 4, 4), (3,)], [nn.Linear(32, 3, bias=False)])
    >>> fusion(torch.zeros(5, 35)).shape
    torch.Size([5, 35])
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], couplings: Sequence[nn.Module], scaling: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.shapes: tuple[Shape, ...] = tuple(tuple(int(size) for size in shape) for shape in shapes)
        if len(self.shapes) != len(couplings) + 1 or not couplings:
            raise ModelError(
                f"{len(couplings)} couplings lead from each of {len(couplings) + 1} blocks to the next, two or more; "
                f"got the shapes {list(self.shapes)}"
            )
        self.couplings, self.scaling = nn.ModuleList(couplings), scaling
        for place, (module, (below, above)) in enumerate(zip(couplings, pairwise(self.shapes), strict=True)):
            _check(module, below, above, f"coupling {place}")

    def raw(self) -> tuple[Coupling, ...]:
        """The couplings as the modules hold them."""
        return tuple(
            _coupling(module, below, above)
            for module, (below, above) in zip(self.couplings, pairwise(self.shapes), strict=True)
        )

    def operator(self) -> Feedback:
        raw = self.raw()
        return Feedback(raw if self.scaling is None else tuple(self.scaling(raw)))

    def extra_repr(self) -> str:
        return f"shapes={list(self.shapes)}"


def _coupling(module: nn.Module, below: Shape, above: Shape) -> Coupling:
    weight: Tensor = module.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
    if isinstance(module, nn.Conv2d):
        rows, columns = _padding(module)
        return Coupling(weight, below, above, (module.stride[0], module.stride[1]), (rows, columns))
    return Coupling(weight, below, above)


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":  # an odd kernel, or it is refused
        return module.kernel_size[0] // 2, module.kernel_size[1] // 2
    return int(module.padding[0]), int(module.padding[1])


def _check(module: nn.Module, below: Shape, above: Shape, place: str) -> None:
    """Refuse a coupling that is no map from one block to the other."""
    kind = type_before_parametrizations(module)
    if kind not in (nn.Linear, nn.Conv2d) or getattr(module, "bias", None) is not None:
        raise ModelError(
            f"{place}: blocks are coupled by a Linear or a Conv2d without bias (bias=False, the biases are injected); "
            f"got {module!r}"
        )
    for shape in (below, above):
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ModelError(f"{place}: a block has a shape (units,) or (channels, rows, columns); got {shape}")
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or set(module.dilation) != {1} or module.padding_mode != "zeros":
            raise ModelError(f"{place}: a convolution has groups 1, no dilation and zero padding; got {module!r}")
        if module.padding == "same" and not all(size % 2 for size in module.kernel_size):
            raise ModelError(f'{place}: padding="same" needs an odd kernel; give the padding as numbers: {module!r}')
        sizes = [
            (size + 2 * pad - taps) // stride + 1
            for size, pad, taps, stride in zip(
                below[1:], _padding(module), module.kernel_size, module.stride, strict=False
            )
        ]
        fits = len(below) == 3 and below[0] == module.in_channels and above == (module.out_channels, *sizes)
    else:
        features: Tensor = module.weight  # type: ignore[assignment]  # a Linear's
        fits = tuple(features.shape) == (math.prod(above), math.prod(below))
    if not fits:
        raise ModelError(f"{place}: {module!r} does not map a block of shape {below} to one of shape {above}")
