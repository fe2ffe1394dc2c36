"""Natural corruptions of images in [0, 1]: nineteen of four families, at five severities.

They are verideq's own, written after the families of Hendrycks & Dietterich (ICLR 2019): the strengths follow theirs
for small images where those grow with the severity, the textures are procedural, and the numbers are not those of the
files known as CIFAR-10-C. Lengths are in pixels; beyond a side of 32 they grow with the image.

What is drawn depends on the seed, the sample's index and the corruption's name, and on nothing else: neither on the
batch nor on its order. All severities of a sample share one draw, so that curves against severity show strength alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from verideq.errors import InputError, UnknownName

Pixels = NDArray[np.float64]
"""One image, (channels, height, width)."""
Plane = NDArray[np.float64]
"""(height, width)."""
Transform = Callable[..., Pixels]
"""From an image, a generator and the numbers of a severity to an image, not yet cut to [0, 1]."""

FAMILIES = ("noise", "blur", "weather", "digital")
SEVERITIES = (1, 2, 3, 4, 5)
LUMA = (0.299, 0.587, 0.114)
"""Brightness of red, green and blue (ITU-R BT.601)."""
WATER = (0.69, 0.93, 0.93)


@dataclass(frozen=True)
class Corruption:
    """One corruption.

    Args:
        name: on the command line and in reports.
        family: one of `FAMILIES`.
        levels: the numbers of every severity, mildest first.
        transform: what is done with them.
        coloured: it leaves images of one channel as they are, and is left out there.
    """

    name: str
    family: str
    levels: tuple[tuple[float, ...], ...]
    transform: Transform
    coloured: bool = False


def corrupt(images: Tensor, name: str, severity: int, *, indices: Sequence[int] | Tensor, seed: int = 0) -> Tensor:
    """A batch of images, corrupted.

    Args:
        images: (batch, channels, height, width), in [0, 1]. Three channels are red, green and blue.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        indices: (batch,) of the samples in their data set: with `seed` and `name` they fix what is drawn.
        seed: of the run.

    Returns:
        New images of the same shape, dtype and device, in [0, 1].

    Raises:
        UnknownName: another corruption.
        InputError: another shape, a value outside [0, 1] or NaN, a severity that does not exist, or indices that are
            not one an image.

    >>> x = torch.full((2, 1, 8, 8), 0.5)
    >>> [round(float(v), 2) for v in corrupt(x, "brightness", 3, indices=[0, 7]).unique()]
    [0.65]
    """
    chosen = corruption_named(name)
    if severity not in SEVERITIES:
        raise InputError(f"severity {severity}: give a whole number from 1 to 5")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise InputError(f"corruptions are of images (batch, channels, height, width); got {tuple(images.shape)}")
    numbers = [int(i) for i in indices]
    if len(numbers) != len(images) or min(numbers, default=0) < 0:
        raise InputError(f"{len(images)} images need as many indices, 0 or more; got {len(numbers)}: {numbers[:3]}...")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError(f"{name}: corruptions are of images in [0, 1]; scale the images, and see that none is NaN")
    arrays = images.detach().cpu().to(torch.float64).numpy()
    level, tag = chosen.levels[severity - 1], crc32(name.encode())
    results = [
        chosen.transform(array, np.random.default_rng([seed & (2**64 - 1), tag, index]), *level)
        for array, index in zip(arrays, numbers, strict=True)
    ]
    stacked = np.stack(results).clip(0, 1) if results else arrays
    return torch.from_numpy(stacked).to(images)


def corruption_named(name: str) -> Corruption:
    """The corruption, or `UnknownName` with the list."""
    if name not in CORRUPTIONS:
        raise UnknownName("corruption", name, CORRUPTIONS)
    return CORRUPTIONS[name]


def parse_corruptions(text: str, input_shape: Sequence[int]) -> list[str]:
    """Names from ``all``, families and single names with commas between, each once, in the order of `CORRUPTIONS`.

    Args:
        text: as on the command line.
        input_shape: (channels, height, width); with one channel the coloured ones fall out of families and ``all``.

    Raises:
        UnknownName: a word that is none of these.
        InputError: the samples are no images, or nothing is left.

    >>> parse_corruptions("noise,fog", (1, 28, 28))
    ['gaussian-noise', 'shot-noise', 'impulse-noise', 'speckle-noise', 'fog']
    """
    if len(input_shape) != 3:
        raise InputError(f"corruptions are of images (channels, height, width); the samples are {tuple(input_shape)}")
    wanted: set[str] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        own = [c.name for c in CORRUPTIONS.values() if word in ("all", c.family, c.name)]
        if not own:
            raise UnknownName("corruption", word, ("all", *FAMILIES, *CORRUPTIONS))
        wanted.update(own)
    names = [c.name for c in CORRUPTIONS.values() if c.name in wanted and not (c.coloured and input_shape[0] != 3)]
    if not names:
        raise InputError(f"{text!r} names no corruption of images with {input_shape[0]} channels")
    return names


# Noise


def _gaussian_noise(x: Pixels, draw: Generator, deviation: float) -> Pixels:
    return x + deviation * draw.standard_normal(x.shape)


def _shot_noise(x: Pixels, draw: Generator, photons: float) -> Pixels:
    return np.asarray(draw.poisson(x * photons) / photons, dtype=np.float64)


def _impulse_noise(x: Pixels, draw: Generator, share: float) -> Pixels:
    u = draw.random(x.shape)
    return np.where(u < share / 2, 0.0, np.where(u > 1 - share / 2, 1.0, x))


def _speckle_noise(x: Pixels, draw: Generator, deviation: float) -> Pixels:
    return x * (1 + deviation * draw.standard_normal(x.shape))


# Blur


def _unit(x: Pixels) -> float:
    """What a length of 1 is in pixels."""
    return max(1.0, float(min(x.shape[1:])) / 32)


def _smooth(x: Pixels, deviation: float) -> Pixels:
    """A Gaussian blur of every channel, in pixels."""
    return np.asarray(ndimage.gaussian_filter(x, (0, deviation, deviation), mode="nearest"), dtype=np.float64)


def _filtered(x: Pixels, kernel: Plane) -> Pixels:
    result = ndimage.convolve(x, (kernel / kernel.sum())[None], mode="nearest")
    return np.asarray(result, dtype=np.float64)


def _gaussian_blur(x: Pixels, draw: Generator, deviation: float) -> Pixels:
    return _smooth(x, deviation * _unit(x))


def _defocus_blur(x: Pixels, draw: Generator, radius: float, deviation: float) -> Pixels:
    """The disc of a lens out of focus: every weight is the covered share of its pixel."""
    radius, fine = radius * _unit(x), 8
    reach = int(np.ceil(radius))
    at = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float64)
    kernel = inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean((1, 3))
    return _smooth(_filtered(x, kernel), deviation * _unit(x))


def _glass_blur(x: Pixels, draw: Generator, deviation: float, share: float) -> Pixels:
    """A share of the pixels show one of their neighbours, twice over, between two blurs."""
    reach = round(_unit(x))
    height, width = x.shape[1:]
    x = _smooth(x, deviation * _unit(x))
    for _ in range(2):
        moves = draw.random((height, width)) < share
        at = moves * draw.integers(-reach, reach + 1, (2, height, width)) + np.indices((height, width))
        x = x[:, at[0].clip(0, height - 1), at[1].clip(0, width - 1)]
    return _smooth(x, deviation * _unit(x))


def _streak(angle: float, length: float, deviation: float) -> Plane:
    """A line from the middle outwards that fades like half a Gaussian, every point shared by the pixels around it."""
    reach = int(np.ceil(length)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for distance in np.arange(0.0, length + 0.5, 0.5):
        row, column = reach + distance * np.sin(angle), reach + distance * np.cos(angle)
        top, left = int(row), int(column)
        for i, down in ((top, 1 - (row - top)), (top + 1, row - top)):
            for j, across in ((left, 1 - (column - left)), (left + 1, column - left)):
                if i <= 2 * reach and j <= 2 * reach:
                    kernel[i, j] += down * across * np.exp(-(distance**2) / (2 * deviation**2))
    return kernel


def _motion_blur(x: Pixels, draw: Generator, length: float, deviation: float) -> Pixels:
    angle = np.deg2rad(draw.uniform(-45, 45))
    return _filtered(x, _streak(angle, length * _unit(x), deviation * _unit(x)))


def _zoomed(x: Pixels, factor: float) -> Pixels:
    """Enlarged about the middle, cut to the same size."""
    middle = (np.array(x.shape[1:]) - 1) / 2
    offset = (0, *(middle * (1 - 1 / factor)))
    return np.asarray(ndimage.affine_transform(x, (1, 1 / factor, 1 / factor), offset, order=1, mode="nearest"))


def _zoom_blur(x: Pixels, draw: Generator, largest: float) -> Pixels:
    factors = np.arange(1, largest + 0.005, 0.01)
    zooms: Pixels = np.mean([x, *(_zoomed(x, float(factor)) for factor in factors)], axis=0)
    return zooms


# Weather


def _grey(x: Pixels) -> Plane:
    """The brightness of every pixel."""
    return np.asarray(np.tensordot(LUMA, x, 1) if len(x) == 3 else x.mean(0))


def _plasma(draw: Generator, size: tuple[int, ...], decay: float) -> Plane:
    """Clouds in [0, 1]: random grids, each twice as fine as the one before and `decay` times fainter."""
    rows, columns = (np.linspace(0, 1, side) for side in size)
    total, grain, weight = np.zeros(size), 1, 1.0
    while grain <= max(size):
        nodes = draw.random((grain + 1, grain + 1))
        at = np.meshgrid(rows * grain, columns * grain, indexing="ij")
        total += weight * ndimage.map_coordinates(nodes, at, order=1, mode="nearest")
        grain, weight = 2 * grain, weight / decay
    low, high = total.min(), total.max()
    return (total - low) / (high - low) if high > low else total * 0


def _snow(
    x: Pixels, draw: Generator, mean: float, spread: float, zoom: float, least: float, length: float,
    deviation: float, kept: float,
) -> Pixels:  # fmt: skip
    """Flakes drawn out by their fall, from both sides, over an image that pales."""
    flakes = _zoomed(mean + spread * draw.standard_normal((1, *x.shape[1:])), zoom)
    flakes = np.where(flakes < least, 0.0, flakes).clip(0, 1)
    angle = np.deg2rad(draw.uniform(45, 135))
    flakes = _filtered(flakes, _streak(angle, length * _unit(x), deviation * _unit(x)))
    pale = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return kept * x + (1 - kept) * pale + flakes + flakes[:, ::-1, ::-1]


def _frost(x: Pixels, draw: Generator, kept: float, weight: float) -> Pixels:
    """Crystals: the ridges of clouds, denser towards the edges of the pane."""
    size = x.shape[1:]
    ridges = (1 - np.abs(2 * _plasma(draw, size, 1.5) - 1)) ** 2
    rows, columns = (np.abs(np.linspace(-1, 1, side)) for side in size)
    edge = np.maximum(rows[:, None], columns)
    return np.asarray(kept * x + weight * ridges * (0.5 + 0.5 * edge))


def _fog(x: Pixels, draw: Generator, amount: float, decay: float) -> Pixels:
    white = max(float(x.max()), 1e-6)
    return np.asarray((x + amount * _plasma(draw, x.shape[1:], decay)) * white / (white + amount))


def _brightness(x: Pixels, draw: Generator, amount: float) -> Pixels:
    """The value of hue, saturation and value goes up: black becomes grey, everything else keeps its tint."""
    value = x.max(0)
    higher = (value + amount).clip(0, 1)
    return np.asarray(np.where(value > 0, x * (higher / np.where(value > 0, value, 1)), higher))


def _spatter(x: Pixels, draw: Generator, share: float, size: float, strength: float) -> Pixels:
    """Drops of water over a share of the image."""
    field = _smooth(draw.standard_normal((1, *x.shape[1:])), size * _unit(x))[0]
    ranks = field.ravel().argsort().argsort().reshape(field.shape) / field.size
    drops = strength * ((ranks - (1 - share)) / share).clip(0, 1) ** 0.5
    colour = np.array(WATER) if len(x) == 3 else np.full(len(x), np.dot(LUMA, WATER))
    return np.asarray(x * (1 - drops) + drops * colour[:, None, None])


# Digital


def _contrast(x: Pixels, draw: Generator, factor: float) -> Pixels:
    mean = x.mean((1, 2), keepdims=True)
    return np.asarray(mean + factor * (x - mean))


def _elastic(x: Pixels, draw: Generator, shift: float, smooth: float, affine: float) -> Pixels:
    """A random affine map near the identity, then smooth displacements of a root mean square of `shift` sides."""
    size = np.array(x.shape[1:])
    jitter = affine * draw.uniform(-1, 1, (2, 3))
    field = _smooth(draw.uniform(-1, 1, (2, *size)), smooth * min(size))
    field *= shift * min(size) / max(float(np.sqrt(np.square(field).mean())), 1e-12)
    middle = ((size - 1) / 2)[:, None, None]
    at = np.indices(tuple(size)) - middle
    at = at + np.tensordot(jitter[:, :2], at, 1) + (jitter[:, 2] * size / 2)[:, None, None] + middle + field
    return np.asarray([ndimage.map_coordinates(plane, at, order=1, mode="nearest") for plane in x])


def _pixelate(x: Pixels, draw: Generator, share: float) -> Pixels:
    """The mean of every cell of a coarser grid, shown as blocks."""
    (down, rows), (across, columns) = (_cells(side, max(1, int(side * share))) for side in x.shape[1:])
    means = down @ x @ across.T
    return np.asarray(means[:, rows[:, None], columns])


def _cells(side: int, cells: int) -> tuple[Plane, NDArray[np.intp]]:
    """The share that every pixel has in the mean of a cell, (cells, side); and the cell of every pixel's middle."""
    ends, size = np.arange(side), side / cells
    first = np.arange(cells)[:, None] * size
    shares = (np.minimum(ends + 1, first + size) - np.maximum(ends, first)).clip(0) / size
    return shares, ((ends + 0.5) / size).astype(np.intp)


def _jpeg(x: Pixels, draw: Generator, quality: float) -> Pixels:
    """Through a JPEG file and back; channels that are no colours one by one."""
    bytes_ = np.round(x * 255).astype(np.uint8)
    if len(x) == 3:
        return _through_file(bytes_.transpose(1, 2, 0), int(quality)).transpose(2, 0, 1)
    return np.stack([_through_file(plane, int(quality)) for plane in bytes_])


def _through_file(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.float64]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as image:
        return np.asarray(image, dtype=np.float64) / 255


def _saturate(x: Pixels, draw: Generator, factor: float, shift: float) -> Pixels:
    """The saturation of hue, saturation and value goes up; grey stays grey."""
    if len(x) != 3:
        return x
    value = x.max(0)
    away = value - x
    saturation = away.max(0) / np.where(value > 0, value, 1)
    wanted = np.where(saturation > 0, (factor * saturation + shift).clip(0, 1), 0)
    return np.asarray(value - away * (wanted / np.where(saturation > 0, saturation, 1)))


def _levels(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


_ALL = (
    Corruption("gaussian-noise", "noise", _levels(0.04, 0.06, 0.08, 0.09, 0.10), _gaussian_noise),
    Corruption("shot-noise", "noise", _levels(500, 250, 100, 75, 50), _shot_noise),
    Corruption("impulse-noise", "noise", _levels(0.01, 0.02, 0.03, 0.05, 0.07), _impulse_noise),
    Corruption("speckle-noise", "noise", _levels(0.06, 0.10, 0.12, 0.16, 0.20), _speckle_noise),
    Corruption(
        "defocus-blur", "blur", ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.5), (1.5, 0.5)), _defocus_blur,
    ),
    Corruption(
        "glass-blur", "blur", ((0.1, 0.2), (0.25, 0.3), (0.4, 0.4), (0.4, 0.65), (0.4, 1)), _glass_blur,
    ),
    Corruption("motion-blur", "blur", ((6, 1), (6, 1.5), (6, 2), (8, 2.5), (9, 3)), _motion_blur),
    Corruption("zoom-blur", "blur", _levels(1.06, 1.11, 1.15, 1.20, 1.25), _zoom_blur),
    Corruption("gaussian-blur", "blur", _levels(0.4, 0.6, 0.7, 0.8, 1.0), _gaussian_blur),
    Corruption(
        "snow", "weather",
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.5, 0.5, 10, 4, 0.9),
         (0.25, 0.3, 2, 0.55, 12, 6, 0.85), (0.3, 0.3, 2, 0.55, 14, 10, 0.8)),
        _snow,
    ),
    Corruption("frost", "weather", ((1, 0.2), (1, 0.3), (0.95, 0.4), (0.9, 0.5), (0.85, 0.6)), _frost),
    Corruption("fog", "weather", ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), _fog),
    Corruption("brightness", "weather", _levels(0.05, 0.10, 0.15, 0.20, 0.30), _brightness),
    Corruption(
        "spatter", "weather", ((0.05, 0.8, 0.6), (0.1, 0.8, 0.6), (0.15, 0.8, 0.7), (0.2, 0.8, 0.8), (0.3, 0.8, 0.8)),
        _spatter,
    ),
    Corruption("contrast", "digital", _levels(0.75, 0.5, 0.4, 0.3, 0.15), _contrast),
    Corruption(
        "elastic", "digital", tuple((0.01 * k, 0.08, 0.02 + 0.01 * k) for k in SEVERITIES), _elastic,
    ),
    Corruption("pixelate", "digital", _levels(0.8, 0.65, 0.5, 0.4, 0.3), _pixelate),
    Corruption("jpeg", "digital", _levels(80, 65, 58, 50, 40), _jpeg),
    Corruption(
        "saturate", "digital", ((1.3, 0), (1.6, 0), (2, 0.05), (2.5, 0.1), (3, 0.2)), _saturate, coloured=True,
    ),
)  # fmt: skip
CORRUPTIONS: dict[str, Corruption] = {corruption.name: corruption for corruption in _ALL}
"""Every corruption by name, family by family."""
