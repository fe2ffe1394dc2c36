"""Architectures and parametrizations by name, for recipes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from verideq.equilibrium import Equilibrium
from verideq.errors import UnknownName
from verideq.parametrizations import (
    LBEN,
    NEMON,
    CerDEQ,
    IBPMonDEQ,
    MonDEQ,
    Parametrization,
    RowGauge,
    SpectralNorm,
    WeightNorm,
)

Parametrize = Callable[[nn.Module], nn.Module]
"""Takes a fresh fusion, and gives one whose ``W`` is well-posed."""


def linear_deq(
    input_shape: tuple[int, ...], classes: int, parametrize: Parametrize = IBPMonDEQ.apply, *, width: int = 128
) -> nn.Sequential:
    """Flatten, one dense equilibrium of `width` units, a linear classifier."""
    fusion = parametrize(nn.Linear(width, width, bias=False))
    return nn.Sequential(
        nn.Flatten(), Equilibrium(fusion, nn.Linear(math.prod(input_shape), width)), nn.Linear(width, classes)
    )


def conv_deq(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    width: int = 32,
    stride: int = 2,
    pool: int = 1,
) -> nn.Sequential:
    """One convolutional equilibrium of `width` channels, as DEQ-3 of Wei & Kolter.

    Batch norm on the injection and on the equilibrium, average pooling, a linear classifier.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        parametrize: of the equilibrium's ``W``.
        width: channels of the equilibrium.
        stride: of the injection.
        pool: kernel of the average pooling, 1 for none.
    """
    channels, rows, columns = input_shape
    fusion = parametrize(nn.Conv2d(width, width, 3, padding=1, bias=False))
    injection = nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width)
    )
    rows, columns = ((size + stride - 1) // stride // pool for size in (rows, columns))
    return nn.Sequential(
        Equilibrium(fusion, injection),
        nn.BatchNorm2d(width),
        nn.AvgPool2d(pool),
        nn.Flatten(),
        nn.Linear(width * rows * columns, classes),
    )


ARCHITECTURES: dict[str, Callable[..., nn.Sequential]] = {"linear-deq": linear_deq, "conv-deq": conv_deq}
"""Every architecture by name."""
PARAMETRIZATIONS: dict[str, type[Parametrization]] = {
    "ibp-mondeq": IBPMonDEQ,
    "lben": LBEN,
    "row-gauge": RowGauge,
    "cerdeq": CerDEQ,
    "nemon": NEMON,
    "spectral-norm": SpectralNorm,
    "weight-norm": WeightNorm,
    "mondeq": MonDEQ,
}
"""Every parametrization by name."""


def architecture_named(name: str) -> Callable[..., nn.Sequential]:
    """The builder, or `UnknownName` with the list."""
    if name not in ARCHITECTURES:
        raise UnknownName("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def parametrization_named(name: str) -> type[Parametrization]:
    """The class, or `UnknownName` with the list."""
    if name not in PARAMETRIZATIONS:
        raise UnknownName("parametrization", name, PARAMETRIZATIONS)
    return PARAMETRIZATIONS[name]


def ibp_initialise(model: nn.Module) -> None:
    """Draw weights whose interval bounds keep their width from layer to layer (Shi et al., NeurIPS 2021).

    Every linear and convolutional weight that is not parametrized from ``N(0, 2π / fan_in²)``; biases zero.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not is_parametrized(module):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 * math.pi) / fan_in)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
