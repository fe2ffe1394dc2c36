"""The IBP-MonDEQ parametrization of Wei & Kolter, "Certified robustness for deep equilibrium models via interval bound
propagation", ICLR 2022, Theorem 3.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verideq.errors import ParametrizationError
from verideq.parametrizations.base import (
    Contraction,
    check_fusion,
    install,
    positive,
    scaled,
    tolerance,
    unit_sums,
)


class IBPMonDEQ(Contraction):
    """``W = D^-½ M D^-½`` with ``D = diag((|M|1 + |M|ᵀ1) / (2 (1-m)))`` and a free ``M``.

    **Theorem 3.1.** For ``0 < m < 1`` the largest eigenvalue of ``(|W| + |W|ᵀ)/2`` is at most ``1-m`` (here exactly,
    because ``D`` is taken as small as the theorem allows), so that ``ρ(|W|) <= 1-m``: the layer has a gauge, its
    equilibrium is unique, and interval bounds are a second equilibrium of the same kind. ``√diag(D)`` is a gauge only
    for a symmetric ``|M|``, so `gauge` names none.

    ``D`` has one entry a unit; for a convolution one a channel, from the absolute sums over the taps of an interior
    pixel. Then ``ρ(|W|) <= 1-m`` under every padding; the symmetric part is bounded for zero and circular padding only.
    A unit whose row and column are both zero takes ``D = 1``, which leaves them zero.

    Args:
        m: the strength of monotonicity, in (0, 1). A buffer: a schedule may assign it.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    def __init__(self, m: float = 0.1) -> None:
        super().__init__(m)

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
        check_fusion(layer, "IBPMonDEQ")
        return install(layer, IBPMonDEQ(m))

    def forward(self, M: Tensor) -> Tensor:
        sums = unit_sums(M)
        both = (sums.sum(1, dtype=torch.float64) + sums.sum(0, dtype=torch.float64)).to(M.dtype)
        # A D larger than the theorem's is as good: 1 for a unit of zeros, or of numbers next to underflow.
        scale = positive(both / (2 * self.rate(M))).rsqrt()
        return scaled(M, scale, scale)

    def inverse(self, W: Tensor) -> Tensor:
        """The ``M`` with ``forward(M) = W``, unique up to a factor for every connected block of units.

        ``M = D^½ W D^½`` needs ``√D`` to be a positive eigenvector of ``(|W| + |W|ᵀ)/2`` for the eigenvalue ``1-m``.

        Raises:
            ParametrizationError: `W` has another largest eigenvalue; the message says which `m` would fit.
        """
        sums = unit_sums(W.detach()).to(torch.float64)
        symmetric, target = (sums + sums.T) / 2, 1 - float(self.m)
        if not bool(symmetric.isfinite().all()):
            raise ParametrizationError("W holds NaN or infinity")
        vector = torch.ones(len(sums), dtype=torch.float64, device=W.device)
        for block in _components(symmetric):
            if len(block) == 1 and symmetric[block[0], block[0]] == 0:
                continue  # a unit without connections: any scale serves
            values, vectors = torch.linalg.eigh(symmetric[block][:, block])
            largest = float(values[-1])
            if not abs(largest - target) <= tolerance(W):
                fitting = f"use m = {1 - largest:.6g}, or " if 0 < largest < 1 else "no m in (0, 1) fits: use "
                raise ParametrizationError(
                    f"W is not of the form D^-1/2 M D^-1/2 at m = {float(self.m):.6g}: the largest eigenvalue of the "
                    f"symmetric part of |W| is {largest:.6g} in one block of units, and has to be "
                    f"1 - m = {target:.6g}; {fitting}IBPMonDEQ.apply on a fresh layer"
                )
            vector[block] = vectors[:, -1].abs()
        scale = vector.to(W.dtype)
        return scaled(W, scale, scale)


def largest_eigenvalue(sums: Tensor) -> float:
    """The largest eigenvalue of ``(K + Kᵀ)/2``, in float64."""
    sums = sums.to(torch.float64)
    return float(torch.linalg.eigvalsh((sums + sums.T) / 2)[-1])


def _components(symmetric: Tensor) -> list[Tensor]:
    """The connected blocks of a symmetric nonnegative matrix, as index tensors."""
    from scipy.sparse.csgraph import connected_components

    count, labels = connected_components((symmetric > 0).cpu().numpy(), directed=False)
    membership = torch.as_tensor(labels, device=symmetric.device)
    return [(membership == block).nonzero().flatten() for block in range(count)]
