"""General DEQs, without a gauge: multiscale ones (Bai, Koltun & Kolter, NeurIPS 2020), and a small dense one.

For adversarial training and attacks: their equilibria are not guaranteed, and nothing of them can be certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from verideq.equilibrium import DEQ, Broyden, Gradient, Phantom, Solver
from verideq.equilibrium.dynamics import Injected
from verideq.errors import InputError, UnknownName
from verideq.graph import Normalize

_SOLVER, _GRADIENT = Broyden(), Phantom()


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)


class Block(nn.Module):
    """One scale's step: a wide residual block, group norms, the injection before the second of them."""

    def __init__(self, channels: int, expansion: int, groups: int) -> None:
        super().__init__()
        wide = expansion * channels
        self.first, self.second = weight_norm(_conv(channels, wide)), weight_norm(_conv(wide, channels))
        self.wide_norm, self.norm = nn.GroupNorm(groups, wide), nn.GroupNorm(groups, channels)
        self.last_norm = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, injected: Tensor, mask: Tensor | None) -> Tensor:
        inner = self.second(F.relu(self.wide_norm(self.first(z))))
        inner = inner if mask is None else inner * mask
        result: Tensor = self.last_norm(F.relu(self.norm(inner + injected) + z))
        return result


def _fusion(source: int, target: int, channels: Sequence[int], groups: int) -> nn.Module:
    """From one scale to another: 1×1 and up, or a chain of stride 2, the last of which changes the channels."""
    if source > target:
        up = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
        return nn.Sequential(_conv(channels[source], channels[target], 1), nn.GroupNorm(groups, channels[target]), up)
    layers: list[nn.Module] = []
    for step in range(source, target):
        last = step == target - 1
        out = channels[target if last else source]
        layers += [_conv(channels[source], out, 3, 2), nn.GroupNorm(groups, out)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class Cell(nn.Module):
    """One step of all scales: a block each, then every scale fused into every other.

    Args:
        channels: by scale, finest first; each scale has half the side of the one before.
        expansion: of the blocks.
        groups: of the group norms.
    """

    def __init__(self, channels: Sequence[int], expansion: int, groups: int) -> None:
        super().__init__()
        scales = range(len(channels))
        self.blocks = nn.ModuleList(Block(c, expansion, groups) for c in channels)
        self.fusions = nn.ModuleList(
            nn.ModuleList(nn.Identity() if i == j else _fusion(j, i, channels, groups) for j in scales) for i in scales
        )
        self.post = nn.ModuleList(
            nn.Sequential(nn.ReLU(), weight_norm(_conv(c, c, 1)), nn.GroupNorm(4, c, affine=False)) for c in channels
        )

    def forward(self, states: list[Tensor], v: Tensor, masks: Sequence[Tensor | None]) -> list[Tensor]:
        blocks = [
            block(z, v if i == 0 else torch.zeros_like(z), mask)
            for i, (block, z, mask) in enumerate(zip(self.blocks, states, masks, strict=True))
        ]
        results: list[Tensor] = []
        for row, post in zip(self.fusions, self.post, strict=True):
            total = torch.zeros_like(blocks[len(results)])
            for fusion, z in zip(row.children(), blocks, strict=True):
                total = total + fusion(z)
            results.append(post(total))
        return results


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 to four times the channels, with a projected shortcut."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        outputs = 4 * channels
        sizes = ((inputs, channels, 1), (channels, channels, 3), (channels, outputs, 1))
        layers = [m for a, b, k in sizes for m in (_conv(a, b, k), nn.BatchNorm2d(b, affine=False), nn.ReLU())]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(_conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Head(nn.Module):
    """A bottleneck a scale, the finer ones summed into the coarser, pooled, and read by a linear layer."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int], final: int, classes: int) -> None:
        super().__init__()
        self.bottlenecks = nn.ModuleList(Bottleneck(c, w) for c, w in zip(channels, widths, strict=True))
        self.down = nn.ModuleList(
            nn.Sequential(_conv(4 * a, 4 * b, 3, 2, bias=True), nn.BatchNorm2d(4 * b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.final = nn.Sequential(_conv(4 * widths[-1], final, 1, bias=True), nn.BatchNorm2d(final), nn.ReLU())
        self.classifier = nn.Linear(final, classes)

    def forward(self, states: list[Tensor]) -> Tensor:
        y = self.bottlenecks[0](states[0])
        for down, bottleneck, z in zip(self.down, list(self.bottlenecks)[1:], states[1:], strict=True):
            y = bottleneck(z) + down(y)
        result: Tensor = self.classifier(self.final(y).mean((2, 3)))
        return result


class MDEQ(DEQ):
    """A multiscale DEQ for images; its state is all scales in one vector.

    Args:
        input_shape: (channels, height, width), divisible by two as often as there are scales less one.
        classes: outputs.
        channels: by scale, finest first.
        heads: of the head's bottlenecks, by scale.
        final: features before the classifier.
        expansion: of the blocks.
        groups: of the group norms.
        stem_stride: of the first convolution.
        dropout: share of channels that are dropped in training, one mask for all steps of a forward pass.
        mean, std: normalisation by channel; empty for none.
        solver, gradient: see `DEQ`.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        *,
        channels: Sequence[int],
        heads: Sequence[int],
        final: int,
        expansion: int = 5,
        groups: int = 8,
        stem_stride: int = 1,
        dropout: float = 0.0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        solver: Solver = _SOLVER,
        gradient: Gradient = _GRADIENT,
    ) -> None:
        inputs, rows, columns = input_shape
        sides = [(-(-rows // stem_stride) >> i, -(-columns // stem_stride) >> i) for i in range(len(channels))]
        if any(a % 2 or b % 2 for a, b in sides[:-1]) or len(heads) != len(channels):
            raise InputError(
                f"{len(channels)} scales halve the image that often: {input_shape} with a stem of stride {stem_stride} "
                f"does not divide, or {len(heads)} heads are not one a scale"
            )
        first = channels[0]
        stem: list[nn.Module] = [Normalize(list(mean), list(std))] if mean else []
        stem += [_conv(inputs, first, 3, stem_stride), nn.BatchNorm2d(first), nn.ReLU()]
        stem += [_conv(first, first), nn.BatchNorm2d(first), nn.ReLU()]
        if len(channels) > 2:
            stem += [_conv(first, first, 1), nn.BatchNorm2d(first), nn.ReLU()]
        cell = Cell(channels, expansion, groups)
        for module in [*stem, *cell.modules()]:
            if isinstance(module, nn.Conv2d) and not hasattr(module, "parametrizations"):
                nn.init.normal_(module.weight, 0.0, 0.01)
        super().__init__(
            nn.Sequential(*stem),
            lambda z, v: z,
            Head(channels, heads, final, classes),
            solver=solver,
            gradient=gradient,
        )
        self.cell = cell
        self.dropout = dropout
        self.input_shape, self.pixel_range = tuple(input_shape), (0.0, 1.0)
        self.shapes = [(c, *side) for c, side in zip(channels, sides, strict=True)]

    @property
    def size(self) -> int:
        """Units of the state."""
        return sum(math.prod(shape) for shape in self.shapes)

    def inject(self, x: Tensor) -> Injected:
        v = self.stem(x)
        injected = {"v": v}
        if self.training and self.dropout:
            for i, (c, *_) in enumerate(self.shapes):
                injected[f"mask{i}"] = F.dropout(v.new_ones(len(v), c, 1, 1), self.dropout)
        return injected

    def start(self, injected: Injected) -> Tensor:
        v = injected["v"]
        return v.new_zeros(len(v), self.size)

    def step(self, z: Tensor, injected: Injected) -> Tensor:
        masks = [injected.get(f"mask{i}") for i in range(len(self.shapes))]
        return torch.cat([s.flatten(1) for s in self.cell(self._split(z), injected["v"], masks)], 1)  # type: ignore[call-arg, arg-type]  # its own cell takes scales

    def head(self, z: Tensor, injected: Injected) -> Tensor:
        outputs: Tensor = self.classifier(self._split(z))
        return outputs

    def _split(self, z: Tensor) -> list[Tensor]:
        parts = torch.split(z, [math.prod(shape) for shape in self.shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class DenseCell(nn.Module):
    """``relu(GN(W_2 relu(GN(W_1 z)) + v) + z)`` and a group norm: the block of an MDEQ for vectors."""

    def __init__(self, units: int, expansion: int = 2, groups: int = 8) -> None:
        super().__init__()
        wide = expansion * units
        if units % groups or units < 2 * groups:
            raise InputError(
                f"{units} units: group norms of {groups} groups need a multiple of that, two units a group"
            )
        self.first, self.second = nn.Linear(units, wide, bias=False), nn.Linear(wide, units, bias=False)
        self.wide_norm, self.norm = nn.GroupNorm(groups, wide), nn.GroupNorm(groups, units)
        self.last_norm = nn.GroupNorm(groups, units)

    def forward(self, z: Tensor, v: Tensor) -> Tensor:
        inner = self.second(F.relu(self.wide_norm(self.first(z))))
        result: Tensor = self.last_norm(F.relu(self.norm(inner + v) + z))
        return result


def dense(
    input_shape: tuple[int, ...] = (1, 28, 28),
    classes: int = 10,
    *,
    units: int = 64,
    expansion: int = 2,
    solver: Solver = _SOLVER,
    gradient: Gradient = _GRADIENT,
) -> DEQ:
    """A small general DEQ of vectors, for MNIST."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), units))
    return DEQ(stem, DenseCell(units, expansion), nn.Linear(units, classes), solver=solver, gradient=gradient)


class TanhCell(nn.Module):
    """``tanh(W z + v)``, nothing normalised: it contracts where ``‖W‖₂ < 1``, and need not converge elsewhere.

    Args:
        units: of the state.
        scale: of the orthogonal ``W`` that training begins with.
    """

    def __init__(self, units: int, scale: float) -> None:
        super().__init__()
        self.fusion = nn.Linear(units, units, bias=False)
        nn.init.orthogonal_(self.fusion.weight, scale)

    def forward(self, z: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(self.fusion(z) + v)


def tanh(
    input_shape: tuple[int, ...] = (1, 28, 28),
    classes: int = 10,
    *,
    units: int = 64,
    scale: float = 0.9,
    solver: Solver = _SOLVER,
    gradient: Gradient = _GRADIENT,
) -> DEQ:
    """The simplest general DEQ; with a `scale` far above 1, one whose solver stops before an equilibrium."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), units))
    return DEQ(stem, TanhCell(units, scale), nn.Linear(units, classes), solver=solver, gradient=gradient)


DENSE: dict[str, Callable[..., DEQ]] = {"dense-deq": dense, "tanh-deq": tanh}
"""Models of vectors by name."""
SIZES: dict[str, dict[str, object]] = {
    "mdeq-two-scales": {"channels": (16, 32), "heads": (8, 16), "final": 64, "expansion": 2, "stem_stride": 2},
    "mdeq-tiny": {"channels": (24, 24), "heads": (8, 16), "final": 200, "dropout": 0.25},
    "mdeq-large": {
        "channels": (32, 64, 128, 256), "heads": (14, 28, 56, 112), "final": 1680, "dropout": 0.22,
    },
    "mdeq-xl": {
        "channels": (72, 144, 288, 576), "heads": (20, 40, 80, 160), "final": 1800, "dropout": 0.22,
    },
}  # fmt: skip
"""Multiscale models by name; `mdeq-tiny`, `-large` and `-xl` have the sizes of the papers."""


def general_named(name: str, input_shape: tuple[int, ...], classes: int, **options: object) -> DEQ:
    """A general DEQ by name: of `DENSE`, or one of `SIZES`.

    Raises:
        UnknownName: another name.
    """
    if name in DENSE:
        return DENSE[name](input_shape, classes, **options)
    if name not in SIZES:
        raise UnknownName("general DEQ", name, (*DENSE, *SIZES))
    return MDEQ(input_shape, classes, **{**SIZES[name], **options})  # type: ignore[arg-type]  # a recipe's options


def mnist_dense() -> DEQ:
    """The model of ``recipes/adversarial/mnist.toml``, for ``verideq attack verideq.models.mdeq:mnist_dense``."""
    return dense()


def cifar_two_scales() -> DEQ:
    """The model of ``recipes/adversarial/cifar10.toml``, likewise."""
    return general_named("mdeq-two-scales", (3, 32, 32), 10)
