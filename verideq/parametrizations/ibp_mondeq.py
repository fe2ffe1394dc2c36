"""The IBP-MonDEQ parametrization of Wei & Kolter, "Certified robustness for deep equilibrium models via interval bound
propagation", ICLR 2022, Theorem 3.1."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from verideq.equilibrium import operator_of
from verideq.errors import ParametrizationError
from verideq.parametrizations.base import Parametrization


class IBPMonDEQ(Parametrization):
    """``W = D^-½ M D^-½`` with ``D = diag((|M|1 + |M|ᵀ1) / (2 (1-m)))`` and a free ``M``.

    **Theorem 3.1.** For ``0 < m < 1`` the largest eigenvalue of ``(|W| + |W|ᵀ)/2`` is at most ``1-m`` (here exactly,
    because ``D`` is taken as small as the theorem allows), so that ``ρ(|W|) <= 1-m``: the layer has a gauge, its
    equilibrium is unique, and interval bounds are a second equilibrium of the same kind.

    ``D`` has one entry a unit; for a convolution one a channel, from the absolute sums over the taps of an interior
    pixel. Then ``ρ(|W|) <= 1-m`` under every padding; the symmetric part is bounded for zero and circular padding only.
    A unit whose row and column are both zero takes ``D = 1``, which leaves them zero.

    Args:
        m: the strength of monotonicity, in (0, 1). A buffer: a schedule may assign it.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    m: Tensor

    def __init__(self, m: float = 0.1) -> None:
        super().__init__()
        if not 0 < m < 1:
            raise ParametrizationError(f"m = {m} is outside (0, 1), where Theorem 3.1 holds")
        self.register_buffer("m", torch.tensor(float(m)))
        self._drawn = False

    @staticmethod
    def register(layer: nn.Module, m: float = 0.1) -> nn.Module:
        """Register the parametrization on the weight of `layer`; the weight that it has becomes the free ``M``.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            m: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, an `m` out of range, or a weight that is parametrized already.

        >>> fusion = IBPMonDEQ.apply(nn.Linear(4, 4, bias=False), m=0.1)
        >>> W = fusion.weight.detach().abs()
        >>> bool(torch.linalg.eigvalsh((W + W.T) / 2).max() <= 0.9 + 1e-6)
        True
        """
        operator_of(layer)
        if getattr(layer, "groups", 1) != 1:
            raise ParametrizationError(f"IBPMonDEQ needs groups=1; the convolution has {layer.groups}")
        if parametrize.is_parametrized(layer, "weight"):
            raise ParametrizationError("the weight is parametrized already; remove that parametrization first")
        parametrization = IBPMonDEQ(m)
        parametrization.to(cast(Tensor, layer.weight))
        parametrization._drawn = True  # registration assigns the drawn weight: here it is M and not W
        parametrize.register_parametrization(layer, "weight", parametrization)
        parametrization._drawn = False
        return layer

    def forward(self, M: Tensor) -> Tensor:
        scale = self._diagonal(_unit_sums(M)).rsqrt()
        return _scale(M, scale, scale)

    def _diagonal(self, sums: Tensor) -> Tensor:
        """The diagonal of ``D``, (units,), from the absolute sums (units, units)."""
        d = (sums.sum(1) + sums.sum(0)) / (2 * (1 - self.m))
        return torch.where(d > 0, d, torch.ones_like(d))

    def right_inverse(self, W: Tensor) -> Tensor:
        """The ``M`` with ``forward(M) = W``, unique up to a factor for every connected block of units.

        ``M = D^½ W D^½`` needs ``√D`` to be a positive eigenvector of ``(|W| + |W|ᵀ)/2`` for the eigenvalue ``1-m``.

        Raises:
            ParametrizationError: `W` has another spectral radius, or no positive eigenvector; the message says which
            `m`
                would fit.
        """
        if self._drawn:
            return W
        sums = _unit_sums(W.detach()).to(torch.float64)
        symmetric, target = (sums + sums.T) / 2, 1 - float(self.m)
        vector = torch.ones(len(sums), dtype=torch.float64, device=W.device)
        tolerance = 64 * torch.finfo(W.dtype).eps * len(sums) ** 0.5
        for block in _components(symmetric):
            if len(block) == 1 and symmetric[block[0], block[0]] == 0:
                continue  # a unit without connections: any scale serves
            values, vectors = torch.linalg.eigh(symmetric[block][:, block])
            largest = float(values[-1])
            if not abs(largest - target) <= tolerance:
                fitting = f"use m = {1 - largest:.6g}, or " if 0 < largest < 1 else "no m in (0, 1) fits: use "
                raise ParametrizationError(
                    f"W is not of the form D^-1/2 M D^-1/2 at m = {float(self.m):.6g}: the largest eigenvalue of the "
                    f"symmetric part of |W| is {largest:.6g} in one block of units, and has to be "
                    f"1 - m = {target:.6g}; {fitting}IBPMonDEQ.apply on a fresh layer"
                )
            vector[block] = vectors[:, -1].abs()
        scale = vector.to(W.dtype)
        return _scale(W, scale, scale)


def _unit_sums(weight: Tensor) -> Tensor:
    """``|M|`` summed over the taps of a kernel: (units, units)."""
    return weight.abs().flatten(2).sum(2) if weight.dim() > 2 else weight.abs()


def _scale(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    taps = [1] * (weight.dim() - 2)
    return weight * rows.view(-1, 1, *taps) * columns.view(1, -1, *taps)


def _components(symmetric: Tensor) -> list[Tensor]:
    """The connected blocks of a symmetric nonnegative matrix, as index tensors."""
    from scipy.sparse.csgraph import connected_components

    count, labels = connected_components((symmetric > 0).cpu().numpy(), directed=False)
    membership = torch.as_tensor(labels, device=symmetric.device)
    return [(membership == block).nonzero().flatten() for block in range(count)]
