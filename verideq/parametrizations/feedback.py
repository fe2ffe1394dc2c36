"""Energy-based networks that contract by construction: one scale a channel, the same forwards and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from verideq.equilibrium.feedback import Coupling, FeedbackFusion
from verideq.errors import ParametrizationError
from verideq.parametrizations.base import Contraction, checked_m, safety, scaled

LEAST = 1e-60
"""Sums of absolute values below this are taken for it: a channel without any weights."""


def couplings_of(
    kernels: Sequence[Tensor], shapes: Sequence[Sequence[int]], strides: Sequence[int | tuple[int, int]]
) -> tuple[Coupling, ...]:
    """Kernels as the couplings of blocks; the padding, which no sum depends on, is left out."""
    wide = [tuple(shape) for shape in shapes]
    steps = [(stride, stride) if isinstance(stride, int) else (stride[0], stride[1]) for stride in strides]
    return tuple(
        Coupling(kernel, below, above, stride)
        for kernel, (below, above), stride in zip(kernels, pairwise(wide), steps, strict=True)
    )


def totals(couplings: Sequence[Coupling]) -> list[Tensor]:
    """``D̃``: what every channel of every block reads, in absolute value and at most; float64, (channels,) a block."""
    sums = [replace(coupling, weight=coupling.weight.to(torch.float64)).sums() for coupling in couplings]
    nothing = sums[0][0].new_zeros(())
    up = [nothing, *(above.sum(1) for above, _ in sums)]
    down = [*(below.sum(1) for _, below in sums), nothing]
    return [(a + b).clamp(min=LEAST) for a, b in zip(up, down, strict=True)]


def scaled_couplings(
    kernels: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    strides: Sequence[int | tuple[int, int]],
    m: float | Tensor,
) -> list[Tensor]:
    """``(1-m) K_n[o, i] / √(D̃_{n,o} D̃_{n-1,i})``: the kernels of a ``W`` with ``|W| u <= (1-m) u``, ``u = √D̃``.

    ``D̃`` are sums of the absolute raw kernels, forwards and back, by channel: the worst pixel's (`totals`). For a row
    of channel ``c`` the scaled sums are at most ``(1-m) / √D̃_c · Σ |K| √D̃ / √D̃ <= (1-m) √D̃_c``. Symmetric, as one scale
    serves both directions; differentiable in the kernels; unchanged where all kernels are multiplied by one number.

    **Rounding.** Scales are worked out in float64 for a rate below ``1-m`` by more than the rounding of what is stored.

    Args:
        kernels: from each block to the next, (outputs, inputs, rows, columns) of a convolution; (units, units) of a
            matrix, which flattens its block.
        shapes: of the blocks, one more than kernels, each (units,) or (channels, rows, columns).
        strides: of the convolutions; 1 for a matrix.
        m: in (0, 1).

    Returns:
        kernels of the same shapes and dtypes.

    Raises:
        ParametrizationError: `m` outside (0, 1).

    >>> (kernel,) = scaled_couplings([torch.ones(2, 3)], [(3,), (2,)], [1], 0.1)
    >>> kernel.sum(1) * 2**0.5 / 3**0.5  # |W| u / u of the upper block: D̃ is 3 there, and 2 in the lower one
    tensor([0.9000, 0.9000])

    Source: `IBPMonDEQ`'s scaling, of Wei & Kolter, "Certified robustness for deep equilibrium models via interval bound
    propagation", ICLR 2022, Theorem 3.1, for a symmetric ``M``.
    """
    return [c.weight for c in _scaled(couplings_of(kernels, shapes, strides), m)]


def _scaled(couplings: Sequence[Coupling], m: float | Tensor) -> tuple[Coupling, ...]:
    checked_m(float(m))
    scales = [total.rsqrt() for total in totals(couplings)]
    return tuple(
        replace(c, weight=_rescaled(c, above, below, m))
        for c, (below, above) in zip(couplings, pairwise(scales), strict=True)
    )


def _rescaled(coupling: Coupling, above: Tensor, below: Tensor, m: float | Tensor) -> Tensor:
    weight = coupling.weight
    # Two sums, forwards and back.
    rate = (1 - m) * (1 - safety(weight) - safety(weight.transpose(0, 1)))
    rows, columns = rate * above, below
    if weight.dim() == 2:  # every pixel of a channel has the channel's scale
        rows = rows.repeat_interleave(len(weight) // len(above))
        columns = columns.repeat_interleave(weight.shape[1] // len(below))
    return scaled(weight.to(torch.float64), rows, columns).to(weight.dtype)


class FeedbackGauge(Contraction):
    """All couplings of a `FeedbackFusion` scaled together: ``|W| u <= (1-m) u`` for ``u = √D̃`` (`scaled_couplings`).

    One weight alone cannot be scaled, as a block reads two of them; so this stands beside the couplings, and not on
    each one's weight.

    Args:
        m: in (0, 1); the gauge contracts at the rate ``1-m`` or better. A buffer: a schedule may assign it.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    @staticmethod
    def register(fusion: FeedbackFusion, m: float = 0.1) -> FeedbackFusion:
        """Scale the couplings of `fusion` from now on; their own weights are free.

        Returns:
            the fusion itself.

        Raises:
            ParametrizationError: no `FeedbackFusion`, one that is scaled already, or an `m` out of range.
        """
        if not isinstance(fusion, FeedbackFusion) or fusion.scaling is not None:
            raise ParametrizationError(f"FeedbackGauge scales a FeedbackFusion that is not scaled yet; got {fusion!r}")
        fusion.scaling = FeedbackGauge(m).to(fusion.raw()[0].weight.device)
        return fusion

    def forward(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        return _scaled(couplings, self.m)
