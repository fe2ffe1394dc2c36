"""CerDEQ: orthogonalised weights; Li, Wang & Lin, "CerDEQ: certifiable deep equilibrium model", ICML 2022."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from verideq.equilibrium import Gauge
from verideq.errors import ModelError, ParametrizationError
from verideq.parametrizations.base import Contraction, check_fusion, install, positive, row_sums, scaled

START = 2.2
"""``sigmoid(START)`` is about .9: the channel scale imitates that of a batch norm, which starts at 1."""


class CerDEQ(Contraction):
    """``W = diag(c) O / √n``: ``O`` the free ``V`` as an (out, n) matrix, orthogonalised; ``c = (1-m) sigmoid(β)``.

    ``n`` is the number of columns: ``in · kernel height · kernel width`` for a convolution. ``O`` is what `iterations`
    steps of Björck's method of order 2, ``A <- 15/8 A - 5/4 AAᵀA + 3/8 (AAᵀ)²A``, make of ``V / (√(out n) max|V|)``,
    whose singular values are at most 1; they stay there, so that rows of ``O`` have norm at most 1.

    **What it gives.** ``Σ_j |W_ij| <= √n ‖W_i‖₂ <= c_i < 1`` (Cauchy, Schwarz): ``u = 1`` is a gauge, for the
    convolution as well. ``c`` has to stay below 1: with ``c = 1`` a Hadamard matrix, or a 3×3 kernel of 1/9, reaches
    the norm 1, and interval bounds diverge; ``√out`` in place of ``√n`` (Proposition 3.4 speaks of the reshaped kernel)
    leaves convolutions of a norm up to the kernel's size.

    **Mind.** Five steps from this scale do not orthogonalise: see `singular_values`. Different ``V`` have the same
    ``W``, and no formula leads back: an assigned weight is refused.

    Args:
        units: rows of ``W``.
        iterations: of Björck's method.
        m: the margin: the channel scale stays below ``1-m``. In (0, 1); a buffer.

    Raises:
        ParametrizationError: `m` outside (0, 1), or `iterations` below 0.
    """

    def __init__(self, units: int, iterations: int = 5, m: float = 0.01) -> None:
        super().__init__(m)
        if iterations < 0:
            raise ParametrizationError(f"iterations = {iterations}: give 0 or more")
        self.iterations = iterations
        self.beta = nn.Parameter(torch.full((units,), START))

    @staticmethod
    def register(layer: nn.Module, iterations: int = 5, m: float = 0.01) -> nn.Module:
        """Register on the weight of `layer`, which becomes the free ``V``.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            iterations: see the class.
            m: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, a number out of range, or a weight that is parametrized
                already.

        >>> fusion = CerDEQ.apply(nn.Conv2d(4, 4, 3, padding=1, bias=False))
        >>> bool((fusion.weight.abs().sum((1, 2, 3)) < 0.99).all())
        True
        """
        weight = check_fusion(layer, "CerDEQ")
        return install(layer, CerDEQ(len(weight), iterations, m))

    def gauge(self) -> Gauge:
        return Gauge(torch.ones_like(self.beta.detach()))

    def forward(self, V: Tensor) -> Tensor:
        A = V.flatten(1)
        A = A / positive(A.abs().amax()) / math.sqrt(A.numel())
        for _ in range(self.iterations):
            gram = A @ A.T
            step = gram @ A
            A = 15 / 8 * A - 5 / 4 * step + 3 / 8 * (gram @ step)
        rows = A.view_as(V) / math.sqrt(A.shape[1])
        # In exact arithmetic no row exceeds 1; what rounding adds is taken off again.
        return scaled(rows, self.rate(V) * torch.sigmoid(self.beta) / row_sums(rows).clamp(min=1))

    def singular_values(self, W: Tensor) -> Tensor:
        """Those of the ``O`` in a weight that `forward` gave: 1 where it is orthogonal, less after few iterations.

        Args:
            W: the layer's weight.

        Returns:
            (out,), descending, in float64.

        >>> fusion = CerDEQ.apply(nn.Linear(2, 2, bias=False), iterations=40)
        >>> values = fusion.parametrizations.weight[0].singular_values(fusion.weight)
        >>> bool((values - 1).abs().max() < 1e-2)
        True
        """
        scale = (self.rate(W) * torch.sigmoid(self.beta)).detach().to(torch.float64)
        matrix = W.detach().to(torch.float64).flatten(1)
        values: Tensor = torch.linalg.svdvals(matrix * math.sqrt(matrix.shape[1]) / scale[:, None])
        return values

    def inverse(self, W: Tensor) -> Tensor:
        """None.

        Raises:
            ParametrizationError: always.
        """
        raise ParametrizationError(
            "CerDEQ takes no assigned weight: nothing leads from W back to the free tensor; load a state dict, or use "
            "RowGauge.adopt, which keeps every W that has a gauge"
        )


def initialise_extractor(injection: nn.Module) -> None:
    """Draw the weights of an injection from ``N(0, σ²)``, ``σ = √(π/2) / n_u``, ``n_u`` the fan-in; biases zero.

    CerDEQ, section 3.4: ``n_u E|U| = n_u σ √(2/π) = 1``, so that by Proposition 3.5 the layer does not widen its bounds
    in the mean. (Printed as ``√π / √(2 n_u)``; ``√π / (√2 n_u)`` is what the proposition needs.)

    Raises:
        ModelError: there is no linear or convolutional layer to draw.
    """
    layers = [layer for layer in injection.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    layers = [layer for layer in layers if not is_parametrized(layer)]
    if not layers:
        raise ModelError(f"{type(injection).__name__} has no linear or convolutional layer to initialise")
    for layer in layers:
        nn.init.normal_(layer.weight, 0.0, math.sqrt(math.pi / 2) / layer.weight[0].numel())
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
