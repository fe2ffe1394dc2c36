"""The monotone parametrization of Winston & Kolter, "Monotone operator equilibrium networks", NeurIPS 2020."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from verideq.equilibrium import Convolution, MonotoneDense, MonotoneFusion, operator_of
from verideq.errors import ParametrizationError
from verideq.parametrizations.base import Parametrization


class MonDEQ(Parametrization):
    """``W = (1-m) I - AᵀA + B - Bᵀ`` with free ``A`` and ``B``.

    **Proposition 1.** For ``m > 0`` these are the ``W`` with ``I - sym W ⪰ m I``: the equilibrium exists and is unique.
    ``ρ(|W|)`` may be anything, so that most members have no gauge, and Picard iteration need not converge.

    ``W`` is never stored. ``apply`` gives a fusion that holds the factors, a
    :class:`~verideq.equilibrium.MonotoneFusion`, and not a weight that is computed from them: rounding in float32 would
    take a ``W`` that was trained at a large rate out of the class, and a convolution's has ``(2k-1)²`` taps.

    Args:
        m: the strength of monotonicity, positive; the paper's experiments have 1, and verifiers' benchmarks 20.

    Raises:
        ParametrizationError: `m` is not positive and finite.
    """

    def __init__(self, m: float = 1.0) -> None:
        super().__init__()
        if not 0 < m < math.inf:
            raise ParametrizationError(f"m = {m} is outside (0, inf), where Proposition 1 holds")
        self.m = float(m)

    @staticmethod
    def register(layer: nn.Module, m: float = 1.0) -> MonotoneFusion:
        """A fusion of the size of `layer` with freshly drawn factors; the layer's own weight becomes ``A``.

        ``B`` is drawn as torch draws weights. As in the paper, both kernels of a convolution have Frobenius norm 1.

        Args:
            layer: a square `Linear`, or a stride-1 "same" `Conv2d` of an odd kernel (groups 1, no dilation, zero or
                circular padding), without bias.
            m: see the class.

        Returns:
            a new module, in the layer's dtype and on its device.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a weight that is parametrized already, another convolution, or an `m` out of range.

        >>> fusion = MonDEQ.apply(nn.Linear(4, 4, bias=False), m=1.0)
        >>> W = fusion.operator().weight.detach()
        >>> bool(torch.linalg.eigvalsh((W + W.T) / 2).max() <= 0 + 1e-5)
        True
        """
        operator = operator_of(layer)
        m = MonDEQ(m).m
        if isinstance(layer, MonotoneFusion) or is_parametrized(layer, "weight"):
            raise ParametrizationError("the weight is parametrized already; apply MonDEQ to a fresh layer")
        A = cast(Tensor, layer.weight).detach().clone()
        B = torch.empty_like(A)
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        if not isinstance(operator, Convolution):
            return MonDEQ.from_weights(A, B, m)
        left, right, top, bottom = operator.pads
        if operator.groups != 1 or operator.dilation != (1, 1) or (left, top) != (right, bottom):
            raise ParametrizationError(
                "MonDEQ needs groups 1, dilation 1 and an odd kernel; the convolution has groups "
                f"{operator.groups}, dilation {operator.dilation}, kernel {tuple(A.shape[2:])}"
            )
        if operator.mode not in ("zeros", "circular"):
            raise ParametrizationError(f"MonDEQ needs zero or circular padding; the convolution has {operator.mode}")
        return MonDEQ.from_weights(A / A.norm(), B / B.norm(), m, operator.mode)

    @staticmethod
    def from_weights(A: Tensor, B: Tensor, m: float, padding_mode: str = "circular") -> MonotoneFusion:
        """The fusion with given factors.

        Args:
            A: (rows, units), or a kernel (channels, channels, k, k) with k odd.
            B: (units, units), or a kernel of the same shape.
            m: positive.
            padding_mode: of a convolution: ``circular`` or ``zeros``.

        Raises:
            ModelError: shapes that do not fit, another padding, or an `m` that is not positive and finite.
        """
        return MonotoneFusion(A.detach().clone(), B.detach().clone(), m, padding_mode)

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        """The dense ``W`` of dense factors, (units, units)."""
        return MonotoneDense(A, B, self.m).weight

    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Factors with ``forward(A, B) = W`` up to rounding: ``AᵀA = (1-m) I - sym W`` and ``B`` half the skew part.

        ``A`` is the symmetric root; it is what a dense `W` becomes, and stored factors are not recovered.

        Raises:
            ParametrizationError: `W` is a kernel, is not square, or the smallest eigenvalue of ``I - sym W`` is below
                `m` by more than rounding; the message says which it is.
        """
        if W.dim() != 2 or W.shape[0] != W.shape[1]:
            raise ParametrizationError(
                f"MonDEQ factors a square dense W; got {tuple(W.shape)}. Build a convolution with MonDEQ.from_weights"
            )
        wide = W.detach().to(torch.float64)
        if not bool(wide.isfinite().all()):
            raise ParametrizationError("W holds NaN or infinity; MonDEQ factors finite matrices")
        values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
        least = 1 - float(values[-1])
        if least < self.m - 64 * torch.finfo(W.dtype).eps * (1 + float(values.abs().max())):
            fitting = (
                f"use an m of at most {least:.6g}" if least > 0 else "no m > 0 fits: apply MonDEQ to a fresh layer"
            )
            raise ParametrizationError(
                f"W is not of the form (1-m) I - A'A + B - B' at m = {self.m:.6g}: the smallest eigenvalue of "
                f"I - sym W is {least:.6g}; {fitting}"
            )
        A = (vectors * (1 - self.m - values).clamp(min=0).sqrt()) @ vectors.T
        return A.to(W.dtype), ((wide - wide.T) / 4).to(W.dtype)
