"""Architectures and parametrizations by name, for recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from verideq.equilibrium import Equilibrium
from verideq.errors import UnknownName
from verideq.graph import Normalize
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
from verideq.parametrizations.cerdeq import initialise_extractor

Parametrize = Callable[[nn.Module], nn.Module]
"""Takes a fresh fusion, and gives one whose ``W`` is well-posed."""


def layer(
    extract: Sequence[nn.Module],
    fusion: nn.Module,
    parametrize: Parametrize,
    after: Sequence[nn.Module] = (),
    *,
    explicit: bool = False,
    bias: int = 0,
) -> list[nn.Module]:
    """An equilibrium, or its explicit twin: ``relu(W z + v)`` at its fixed point, or ``relu(W relu(v))`` once.

    Args:
        extract: from the input to ``v``.
        fusion: a fresh layer without bias.
        parametrize: makes its ``W``.
        after: what follows the equilibrium; in the twin it comes before the ReLU, as in a feed-forward network.
        explicit: build the twin.
        bias: channels of a free bias that is added to ``v``, or in the twin to ``W relu(v)``; 0 for none.
    """
    shift = [_bias(bias)] if bias else []
    if not explicit:
        injection = [*extract, *shift]
        return [
            Equilibrium(parametrize(fusion), injection[0] if len(injection) == 1 else nn.Sequential(*injection)),
            *after,
        ]
    rectified = [] if isinstance(extract[-1], nn.ReLU) else [nn.ReLU()]
    return [*extract, *rectified, parametrize(fusion), *shift, *after, nn.ReLU()]


def _bias(channels: int) -> Normalize:
    """``x + b`` by channel with a free ``b``: a normalisation by a free mean and the deviation 1."""
    module = Normalize(torch.zeros(channels), torch.ones(channels))
    del module.mean
    module.mean = nn.Parameter(torch.zeros(channels))
    return module


def _convolution(inputs: int, outputs: int, stride: int = 1, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _halved(size: int, stride: int) -> int:
    """A side of an image after a 3×3 convolution of that stride, padded by 1."""
    return (size + stride - 1) // stride


def linear_deq(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    explicit: bool = False,
    width: int = 128,
) -> nn.Sequential:
    """Flatten, one dense equilibrium of `width` units, a linear classifier."""
    fusion = nn.Linear(width, width, bias=False)
    injection = nn.Linear(math.prod(input_shape), width)
    return nn.Sequential(
        nn.Flatten(), *layer([injection], fusion, parametrize, explicit=explicit), nn.Linear(width, classes)
    )


def conv_deq(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    explicit: bool = False,
    width: int = 32,
    kernel: int = 3,
    stride: int = 2,
    stem: int = 0,
    pool: int = 1,
    units: int = 0,
) -> nn.Sequential:
    """One convolutional equilibrium of `width` channels, in the manner of DEQ-3 of Wei & Kolter.

    Batch norm on the injection and on the equilibrium, average pooling, a linear classifier; before it a convolution of
    stride 2 and after it a dense layer, each with batch norm and ReLU, where they are asked for.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        parametrize: of the equilibrium's ``W``.
        explicit: the feed-forward twin.
        width: channels of the equilibrium.
        kernel: of the injection, and of the convolution before it.
        stride: of the injection.
        stem: channels of the convolution before the equilibrium, 0 for none.
        pool: kernel of the average pooling, 1 for none.
        units: of the dense layer after it, 0 for none.
    """
    channels, rows, columns = input_shape
    padding = (kernel - 1) // 2

    def shrunk(size: int, stride: int) -> int:
        return (size + 2 * padding - kernel) // stride + 1

    parts: list[nn.Module] = []
    if stem:
        parts += [nn.Conv2d(channels, stem, kernel, 2, padding, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
        channels, rows, columns = stem, shrunk(rows, 2), shrunk(columns, 2)
    extract = [nn.Conv2d(channels, width, kernel, stride, padding, bias=False), nn.BatchNorm2d(width)]
    fusion = _convolution(width, width, bias=False)
    parts += layer(extract, fusion, parametrize, [nn.BatchNorm2d(width)], explicit=explicit)
    features = width * (shrunk(rows, stride) // pool) * (shrunk(columns, stride) // pool)
    parts += [*([nn.AvgPool2d(pool)] if pool > 1 else []), nn.Flatten()]
    if units:
        parts += [nn.Linear(features, units, bias=False), nn.BatchNorm1d(units), nn.ReLU()]
        features = units
    return nn.Sequential(*parts, nn.Linear(features, classes))


def deq_3(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    explicit: bool = False,
    width: int = 128,
    pool: int = 4,
) -> nn.Sequential:
    """DEQ-3 of Wei & Kolter (ICLR 2022, Table 1) as their code has it: ``v = relu(BN(U x + a)) + c``, batch norm on the
    equilibrium, 4×4 average pooling, a linear classifier.

    Its explicit twin is their 3Layer, batch norm after each of its two convolutions.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        parametrize: of the equilibrium's ``W``.
        explicit: the feed-forward twin.
        width: channels.
        pool: kernel of the average pooling.
    """
    rows, columns = (size // pool for size in input_shape[1:])
    return nn.Sequential(
        *_extracted(input_shape[0], width, parametrize, explicit=explicit),
        nn.AvgPool2d(pool),
        nn.Flatten(),
        nn.Linear(width * rows * columns, classes),
    )


def deq_7(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    explicit: bool = False,
    width: int = 64,
    units: int = 512,
) -> nn.Sequential:
    """DEQ-7 of Wei & Kolter (ICLR 2022, Table 1): the equilibrium of DEQ-3 with `width` channels, three convolutions of
    twice as many, the first of stride 2, and a dense layer, each with batch norm and ReLU; a linear classifier.

    Its explicit twin is their 7Layer, the CNN-7 of Shi et al. (NeurIPS 2021).

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        parametrize: of the equilibrium's ``W``.
        explicit: the feed-forward twin.
        width: channels of the equilibrium.
        units: of the dense layer.
    """
    rows, columns = (_halved(size, 2) for size in input_shape[1:])
    parts = _extracted(input_shape[0], width, parametrize, explicit=explicit)
    for inputs, stride in ((width, 2), (2 * width, 1), (2 * width, 1)):
        parts += [_convolution(inputs, 2 * width, stride), nn.BatchNorm2d(2 * width), nn.ReLU()]
    parts += [nn.Flatten(), nn.Linear(2 * width * rows * columns, units), nn.BatchNorm1d(units), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(units, classes))


def _extracted(channels: int, width: int, parametrize: Parametrize, *, explicit: bool) -> list[nn.Module]:
    """The equilibrium that DEQ-3 and DEQ-7 begin with, or its twin."""
    extract = [_convolution(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
    fusion = _convolution(width, width, bias=False)
    return layer(extract, fusion, parametrize, [nn.BatchNorm2d(width)], explicit=explicit, bias=width)


def three_layer(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    explicit: bool = True,
    width: int = 128,
    pool: int = 4,
) -> nn.Sequential:
    """3Layer of Wei & Kolter: the explicit twin of `deq_3`, its weights free whatever the parametrization."""
    return deq_3(input_shape, classes, _free, explicit=True, width=width, pool=pool)


def seven_layer(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = IBPMonDEQ.apply,
    *,
    explicit: bool = True,
    width: int = 64,
    units: int = 512,
) -> nn.Sequential:
    """7Layer of Wei & Kolter, CNN-7 of Shi et al.: the twin of `deq_7`, its weights free as in `three_layer`."""
    return deq_7(input_shape, classes, _free, explicit=True, width=width, units=units)


def _free(fusion: nn.Module) -> nn.Module:
    return fusion


def cerdeq(
    input_shape: tuple[int, ...],
    classes: int,
    parametrize: Parametrize = CerDEQ.apply,
    *,
    explicit: bool = False,
    width: int = 128,
    stages: int = 2,
    units: int = 932,
) -> nn.Sequential:
    """CerDEQ (Li, Wang & Lin, ICML 2022): `stages` convolutional equilibria that halve the image, a dense one, a linear
    classifier; ``z = relu(W z + BN(U x) + b)``.

    The paper leaves widths, kernels and strides open. With three 3×3 stages of stride 2 as here, twice the channels in
    each, the defaults have 17,190,070 parameters on CIFAR-10, 0.015 % fewer than CNN-7.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        parametrize: of every ``W``.
        explicit: the feed-forward twin.
        width: channels of the first equilibrium.
        stages: convolutional equilibria.
        units: of the dense equilibrium.
    """
    inputs, rows, columns = input_shape
    parts: list[nn.Module] = []
    for stage in range(stages):
        channels = width * 2**stage
        extract = [_convolution(inputs, channels, 2), nn.BatchNorm2d(channels)]
        fusion = _convolution(channels, channels, bias=False)
        parts += layer(extract, fusion, parametrize, explicit=explicit, bias=channels)
        inputs, rows, columns = channels, _halved(rows, 2), _halved(columns, 2)
    extract = [nn.Linear(inputs * rows * columns, units), nn.BatchNorm1d(units)]
    parts += [nn.Flatten()]
    parts += layer(extract, nn.Linear(units, units, bias=False), parametrize, explicit=explicit, bias=units)
    return nn.Sequential(*parts, nn.Linear(units, classes))


ARCHITECTURES: dict[str, Callable[..., nn.Sequential]] = {
    "linear-deq": linear_deq,
    "conv-deq": conv_deq,
    "deq-3": deq_3,
    "deq-7": deq_7,
    "3layer": three_layer,
    "7layer": seven_layer,
    "cerdeq": cerdeq,
}
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


def initialise(model: nn.Module, kind: str) -> None:
    """Draw the weights that no parametrization draws.

    Args:
        kind: ``ibp``: every linear and convolutional weight from ``N(0, 2π / fan_in²)``, biases zero, so that interval
            bounds keep their width from layer to layer (Shi et al., NeurIPS 2021); ``cerdeq``: those of every injection
            from ``N(0, π / (2 fan_in²))`` (`verideq.parametrizations.cerdeq.initialise_extractor`), the others as torch
            has drawn them; ``torch``: all as they are.
    """
    if kind == "cerdeq":
        for module in model.modules():
            if isinstance(module, Equilibrium):
                initialise_extractor(module.injection)
    if kind == "ibp":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not is_parametrized(module):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 * math.pi) / module.weight[0].numel())
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
