"""`ConvNet`: the plain convolutional network of the shape of an `EPNet`, to be compared with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from verideq.errors import InputError, UnknownName
from verideq.graph import Normalize

POOLS = ("max", "average", "stride", "none")


class ConvNet(nn.Sequential):
    """Convolutions with pooling, then dense layers: the BP-CNN of Mansingh et al., and their AdvCNN.

    Of supported operations throughout, so that it has a model file and can be bounded too.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        channels: of the convolutions, each with batch normalisation, pooling and ReLU after it.
        hidden: units of the dense layers before the last one.
        kernel: of the convolutions.
        paddings: one a convolution; empty: ``kernel // 2`` each.
        pool: 2×2 after every convolution: ``max``, ``average``, ``stride`` (a stride of 2 instead) or ``none``.
        batch_norm: after every convolution.
        mean: normalisation by channel; empty for none.
        std: likewise.

    Raises:
        InputError: sizes that do not fit.
        UnknownName: another pool.

    >>> sum(p.numel() for p in ConvNet((1, 28, 28), 10).parameters())
    50378
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        *,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (),
        kernel: int = 3,
        paddings: Sequence[int] = (),
        pool: str = "max",
        batch_norm: bool = True,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        if pool not in POOLS:
            raise UnknownName("pool", pool, POOLS)
        paddings = tuple(paddings) or (kernel // 2,) * len(channels)
        if len(input_shape) != 3 or not channels or len(paddings) != len(channels):
            raise InputError(
                "a ConvNet takes images (channels, height, width), a convolution or more, and as many paddings or "
                f"none; got {tuple(input_shape)}, {tuple(channels)} and {paddings}"
            )
        inputs, *side = input_shape
        layers: list[nn.Module] = [Normalize(list(mean), list(std))] if len(mean) else []
        for count, padding in zip(channels, paddings, strict=True):
            layers.append(nn.Conv2d(inputs, count, kernel, 2 if pool == "stride" else 1, padding))
            layers += [nn.BatchNorm2d(count)] if batch_norm else []
            if pool in ("max", "average"):
                layers.append(nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2))
            layers.append(nn.ReLU())
            side = [n + 2 * padding - kernel + 1 for n in side]
            side = side if pool == "none" else [(n + 1) // 2 if pool == "stride" else n // 2 for n in side]
            inputs = count
            if min(side) < 1:
                raise InputError(f"{len(channels)} convolutions shrink {tuple(input_shape)} to nothing")
        layers.append(nn.Flatten())
        units = inputs * side[0] * side[1]
        for wide in hidden:
            layers += [nn.Linear(units, wide), nn.ReLU()]
            units = wide
        layers.append(nn.Linear(units, classes))
        super().__init__(*layers)
        # Max pooling on a CPU is much faster so.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        self.input_shape, self.pixel_range = tuple(input_shape), (0.0, 1.0)
