"""How monotone a stored dense ``W`` is, proved: a lower bound of the smallest eigenvalue of ``I - sym W``.

For any ``c`` and any matrix ``L``, with ``A = I - sym W``: ``A ⪰ (c - ‖A - c I - L Lᵀ‖_∞) I``, because ``L Lᵀ ⪰ 0``
and no eigenvalue of a symmetric matrix exceeds its largest absolute row sum. ``L`` comes from a Cholesky factorisation,
which is not believed: only the residual counts, and every rounding of it is charged (docs/theory.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from verideq.box import TINY, gamma
from verideq.errors import ModelError


@torch.no_grad()
def proved_m(W: Tensor) -> tuple[float, float]:
    """A proved ``m`` with ``I - sym W ⪰ m I`` for the stored numbers, and the measured eigenvalue beside it.

    Args:
        W: (units, units), float32 or float64.

    Returns:
        the bound, negative where nothing positive can be proved, ``-inf`` where nothing can; and the estimate of the
        smallest eigenvalue of ``I - sym W``.

    Raises:
        ModelError: `W` is not square, or holds NaN or infinity.
    """
    if W.dim() != 2 or W.shape[0] != W.shape[1]:
        raise ModelError(f"W maps a state to a state, but its shape is {tuple(W.shape)}; make it square")
    W = W.detach().to("cpu", torch.float64)
    if not bool(W.isfinite().all()):
        raise ModelError("W holds NaN or infinity")
    identity = torch.eye(len(W), dtype=torch.float64)
    A = identity - (W + W.T) / 2
    measured = float(torch.linalg.eigvalsh(A)[0])
    size = float(A.abs().sum(1).max())
    best = -float("inf")
    # Close below the measured value the factorisation may fail; where it succeeds the residual is as small as rounding.
    for room in (0.0, 1.0, 8.0, 64.0, 512.0):
        c = measured - room * len(W) * 2.0**-52 * size
        L, failed = torch.linalg.cholesky_ex(A - c * identity)
        if not bool(failed):
            best = max(best, _bound(W, A, c, L.tril()))
    return best, measured


def _bound(W: Tensor, A: Tensor, c: float, L: Tensor) -> float:
    """``c - ‖A - c I - L Lᵀ‖_∞``, rounded down; `A` is ``I - sym W`` as computed."""
    residual = A - L @ L.T
    residual.diagonal().sub_(c)
    # Three roundings in A, those of the product, three in the residual; each at most of the size of what is summed.
    charged = torch.eye(len(W), dtype=torch.float64) * (1 + abs(c)) + W.abs() + W.T.abs() + L.abs() @ L.T.abs()
    terms = len(W) + 8
    sums = (residual.abs() + gamma(terms) * charged).sum(1).max()
    worst = float(sums) * (1 + gamma(terms)) + 8 * terms**2 * TINY * (1 + float(L.abs().max()))
    return c - worst - (abs(c) + worst) * 2.0**-51
