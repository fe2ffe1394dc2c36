"""NEMON: non-Euclidean monotone equilibria; Jafarpour, Davydov, Proskurnikov & Bullo, "Robust implicit networks via
non-Euclidean contractions", NeurIPS 2021."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.equilibrium import Convolution, Gauge, operator_of
from verideq.errors import ParametrizationError
from verideq.parametrizations.base import (
    check_fusion,
    checked_m,
    install,
    positive,
    row_sums,
    safety,
    scaled,
    strength,
    unit_sums,
)
from verideq.parametrizations.row_gauge import RowGauge

START = -3.0
"""``softplus(START)`` is about .05: own entries start next to the largest that their rows allow."""


class NEMON(RowGauge):
    """``W = diag(u) N diag(u)⁻¹`` with ``N_ii = 1 - max(S_i / (1-m), m) - softplus(T_ii)`` and ``N_ij = T_ij`` beside
    it, ``S_i = Σ_{j≠i} |T_ij|``; ``T`` and ``u`` free.

    Rows are not cut: their own entry goes down instead, below zero and as far as it takes. Then
    ``S_i <= (1-m)(1 - N_ii)``, which says that ``u`` is a gauge of the *transformed* layer ``W̃ = (I - diag W)⁻¹
    (W - diag W)`` with rate ``1-m``; and the matrix measure ``μ_{∞,u}(W) = max_i (W_ii + Σ_{j≠i} |W_ij| u_j / u_i)`` is
    at most ``1 - m²``. (Jafarpour et al. write ``W = T - diag(|T|1) + γI``, ``γ < 1``, for ``μ_∞(W) <= γ``: over all
    ``m`` and ``γ`` the same set. Bounds contract at the rate of ``W̃``, so that is what `m` says here.)

    ``|W|`` itself may have any spectral radius. For a convolution the own entry is the tap that reads the output's
    own position; all other taps, and copies of a border pixel, count as others.

    Args:
        units: rows of ``W``.
        tap: of the kernel, (row, column), at which a pixel reads itself; () for a matrix.
        m: in (0, 1); the transformed layer contracts at the rate ``1-m`` or better. A buffer.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    def __init__(self, units: int, tap: tuple[int, ...] = (), m: float = 0.1) -> None:
        super().__init__(units, m)
        self.tap = tap

    @staticmethod
    def register(layer: nn.Module, m: float = 0.1) -> nn.Module:
        """Register on the weight of `layer`; its entries off the diagonal stay what they are.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            m: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, a kernel of which no tap reads the pixel itself, an `m` out of
                range, or a weight that is parametrized already.

        >>> fusion = NEMON.apply(nn.Linear(64, 64, bias=False), m=0.1)
        >>> W = fusion.weight.detach()
        >>> bool((W.sum(1) < 1).all()), bool(W.diagonal().max() < 0)
        (True, True)
        """
        weight = check_fusion(layer, "NEMON")
        return install(layer, NEMON(len(weight), _own_tap(layer), m))

    @staticmethod
    def adopt(layer: nn.Module) -> nn.Module:
        """Register on the weight of `layer` and keep it as ``W``, for the largest `m` that the gauge
        ``(I - |W̃|)⁻¹ 1`` of the transformed layer allows.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: as `register`; or the transformed layer has no gauge.
        """
        weight, tap = check_fusion(layer, "NEMON").detach(), _own_tap(layer)
        parametrization = NEMON(len(weight), tap)
        others, own = parametrization._parts(weight)
        room = 1 - own
        if not bool((room > 0).all()):
            raise ParametrizationError(
                f"the weight is outside NEMON for every m: a unit feeds {float(own.max()):.6g} of itself back, and "
                "less than 1 is needed; use NEMON.apply, which replaces it"
            )
        m = strength(unit_sums(scaled(others, room.reciprocal())), weight)
        parametrization.m.fill_(checked_m(min(m, float(room.min()) - 4 * safety(weight))))
        return install(layer, parametrization, keep=True)

    def gauge(self) -> Gauge:
        return Gauge(self.scale().detach(), transformed=True)

    def draw(self, weight: Tensor) -> Tensor:
        return self._join(weight, weight.new_full((len(weight),), START))

    def forward(self, T: Tensor) -> Tensor:
        others, free = self._parts(T)
        u = self.scale()
        own = self._ceiling(others) - F.softplus(free, threshold=50)
        return self._join(scaled(others, u, u.reciprocal()), own)

    def _ceiling(self, others: Tensor) -> Tensor:
        """The largest own entries, (units,), beside rows of `others`."""
        room = torch.maximum(row_sums(others) / (1 - self.m), self.m)
        # Half is enough for the few operations here; the own entry is rounded near 1 as well as near its own size.
        return 1 - (room * (1 + safety(others) / 2) + 2 * torch.finfo(others.dtype).eps)

    def inverse(self, W: Tensor) -> Tensor:
        """``T`` from ``diag(u)⁻¹ W diag(u)``: the scales as they are where they fit, else ``(I - |W̃| / (1-m))⁻¹ 1``.

        Raises:
            ParametrizationError: an own entry above ``1-m``, or ``ρ(|W̃|)`` above ``1-m``.
        """
        others, own = self._parts(W)
        m = float(self.m)
        if not float(own.max()) <= 1 - m + 8 * torch.finfo(W.dtype).eps:
            raise ParametrizationError(
                f"W is not in NEMON at m = {m:.6g}: a unit feeds {float(own.max()):.6g} of itself back, and 1 - m = "
                f"{1 - m:.6g} is the most; use a smaller m, or NEMON.apply on a fresh layer"
            )
        room = positive(1 - own)
        self._fit_scale(unit_sums(scaled(others, room.reciprocal())), W)
        u = self.scale()
        others = scaled(others, u.reciprocal(), u)
        below = (self._ceiling(others) - own).clamp(min=torch.finfo(W.dtype).eps)
        return self._join(others, below + (-torch.expm1(-below)).log())

    def _place(self, weight: Tensor) -> tuple[Tensor, ...]:
        units = torch.arange(len(weight), device=weight.device)
        return (units, units, *(torch.full_like(units, index) for index in self.tap))

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight with zeros for its own entries, and these, (units,)."""
        place = self._place(weight)
        own = weight[place]
        return weight.index_put(place, torch.zeros_like(own)), own

    def _join(self, others: Tensor, own: Tensor) -> Tensor:
        return others.index_put(self._place(others), own)


def _own_tap(layer: nn.Module) -> tuple[int, ...]:
    """The tap at which a pixel reads itself, by the padding before it."""
    operator = operator_of(layer)
    if not isinstance(operator, Convolution):
        return ()
    row, odd_row = divmod(operator.pads[2], operator.dilation[0])
    column, odd_column = divmod(operator.pads[0], operator.dilation[1])
    if odd_row or odd_column:
        raise ParametrizationError(
            f"NEMON needs a tap that reads the pixel itself; a kernel of {tuple(operator.weight.shape[2:])} with "
            f"dilation {operator.dilation} has none: use an odd kernel"
        )
    return row, column
