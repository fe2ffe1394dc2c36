"""Hypothesis strategies for small models and regions, biased to where bounds break.

Numbers are drawn as small integers and scaled by powers of two, so that a failing example shrinks to one that a person can
read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from verideq.equilibrium import Equilibrium
from verideq.region import Region, parse_eps
from verideq.testing.exact import exact, select

PADDINGS = ("zeros", "circular", "reflect", "replicate")
ROWS = (0.5, 0.9, 0.99, 0.999999, 1 - 2.0**-20)
"""Absolute row sums of ``W``: its contraction rate."""
SCALES = (1.0, 1.0, 1.0, 2.0**60, 2.0**-60, 1e-30, 1e-310)
"""Of what is injected."""
EPS: tuple[str | float, ...] = (0, "1/255", 0.1, 0.5)


@dataclass(frozen=True)
class Case:
    """A model, its inputs and a specification.

    Args:
        model: `Equilibrium`, (flatten,) a last `Linear`; float32 or float64.
        region: around one to three centres.
        points: for every centre, points of its region: fractions, (*features).
        C: (rows, outputs).
    """

    model: nn.Sequential
    region: Region
    points: list[list[np.ndarray]]
    C: Tensor


def _integers(draw: st.DrawFn, *shape: int, low: int = -8) -> Tensor:
    """A float64 tensor of integers from `low` to 8, small ones and zero often."""
    size = int(np.prod(shape))
    values = draw(st.lists(st.integers(low, 8), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).view(shape)


@st.composite
def fusions(draw: st.DrawFn, *shape: int) -> Tensor:
    """A ``W`` with a gauge of ``W`` or of ``W̃``, in float64: (units, units) or (channels, channels, k, k).

    Signed or nonnegative, rows of zeros, one of `ROWS` as row sum in a gauge of powers of two, or a diagonal of -10 that only
    the transformed layer has a gauge for.
    """
    units = shape[0]
    weight = _integers(draw, *shape, low=draw(st.sampled_from((-8, 0))))
    sums = weight.abs().flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (len(shape) - 1))
    rate = torch.tensor(draw(st.lists(st.sampled_from(ROWS), min_size=units, max_size=units)), dtype=torch.float64)
    weight = weight / sums * rate.view_as(sums)
    gauge = torch.tensor([2.0**k for k in draw(st.lists(st.integers(-6, 6), min_size=units, max_size=units))]).double()
    columns = gauge.view(1, -1, *[1] * (len(shape) - 2))
    weight = weight * gauge.view_as(sums) / columns
    if draw(st.integers(0, 3)) == 0:
        middle = [(size - 1) // 2 for size in shape[2:]]
        for unit in range(units):
            weight[(unit, unit, *middle)] = -10.0
    return weight


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Region, list[list[np.ndarray]]]:
    """A region around one to three centres, with exact points of it: the centre, corners, and one within."""
    batch = draw(st.integers(1, 3))
    clip = draw(st.sampled_from(((0.0, 1.0), None)))
    # Corners of the pixel range twice as often as the rest.
    size = batch * int(np.prod(shape))
    values = draw(st.lists(st.sampled_from((0.0, 1.0, 0.0, 1.0, 0.5, 0.1, 1 / 3)), min_size=size, max_size=size))
    center = torch.tensor(values, dtype=torch.float64).view(batch, *shape).to(dtype)
    eps = draw(st.sampled_from(EPS))
    which = draw(st.integers(0, 2**size - 1))
    corners = [points_of(middle, parse_eps(eps), clip, which) for middle in center]
    return Region(center, eps, clip=clip), corners


def points_of(center: Tensor, eps: Fraction, clip: tuple[float, float] | None, which: int) -> list[np.ndarray]:
    """The centre, the two opposite corners of the ball that the bits of `which` choose, and a point within."""
    middle = exact(center)
    bits = np.array([which >> k & 1 for k in range(middle.size)], dtype=bool).reshape(middle.shape)
    steps = [select(bits, eps, -eps), select(bits, -eps, eps), select(bits, eps / 3, -eps / 7)]
    points = [middle] + [middle + step for step in steps if eps]
    if clip is not None:
        low, high = Fraction(clip[0]), Fraction(clip[1])
        points = [select(p < low, low, select(p > high, high, p)) for p in points]
    return points


def corners_of(center: Tensor, eps: Fraction, clip: tuple[float, float] | None) -> list[np.ndarray]:
    """Every corner of the clipped ball."""
    return [points_of(center, eps, clip, which)[min(1, len(center))] for which in range(2 ** center.numel())]


@st.composite
def linear_cases(draw: st.DrawFn) -> Case:
    """`Equilibrium` with 1 to 5 units on 1 to 3 inputs, and a last linear layer."""
    units, inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layer = Equilibrium(nn.Linear(units, units, bias=False), nn.Linear(inputs, units))
    model = nn.Sequential(layer, nn.Linear(units, outputs))
    return _finish(draw, model, draw(fusions(units, units)), (inputs,))


@st.composite
def convolution_cases(draw: st.DrawFn) -> Case:
    """`Equilibrium` with 1 or 2 channels on images of 2x2 to 3x3, every padding, kernels of 1 to 3."""
    channels, size, inputs = draw(st.integers(1, 2)), draw(st.integers(2, 3)), draw(st.integers(1, 2))
    height = draw(st.integers(2, size))
    kernel, reach = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3)))
    padding, mode = draw(st.sampled_from(PADDINGS)), draw(st.sampled_from(PADDINGS))
    fusion = nn.Conv2d(channels, channels, kernel, padding="same", padding_mode=padding, bias=False)
    injection = nn.Conv2d(inputs, channels, reach, padding="same", padding_mode=mode)
    outputs = draw(st.integers(1, 2))
    model = nn.Sequential(Equilibrium(fusion, injection), nn.Flatten(), nn.Linear(channels * height * size, outputs))
    return _finish(draw, model, draw(fusions(channels, channels, kernel, kernel)), (inputs, height, size))


def _finish(draw: st.DrawFn, model: nn.Sequential, fusion: Tensor, shape: tuple[int, ...]) -> Case:
    """Weights of every scale into a model, and a region for it."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    scale = draw(st.sampled_from(SCALES))
    if dtype is torch.float32:
        scale = max(scale, 1e-40)  # a denormal of its own
    model.to(dtype)
    layer, last = model[0], model[-1]
    with torch.no_grad():
        layer.fusion.weight.copy_(fusion)
        _fill(draw, layer.injection, scale)
        _fill(draw, last, 1.0)
    region, points = draw(regions(shape, dtype))
    return Case(model, region, points, _integers(draw, draw(st.integers(1, 2)), last.out_features))


def _fill(draw: st.DrawFn, module: nn.Linear | nn.Conv2d, scale: float) -> None:
    # Few distinct numbers are drawn and repeated with other signs: drawing is what takes time.
    pool = _integers(draw, min(module.weight.numel(), 6))
    repeats = module.weight.numel() // len(pool) + 1
    signs = torch.tensor([(-1.0) ** (k // 3) for k in range(len(pool) * repeats)], dtype=torch.float64)
    values = (pool.repeat(repeats) * signs)[: module.weight.numel()]
    module.weight.copy_((values * (scale / 8)).view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(_integers(draw, len(module.bias)) * (scale / 8))


def cases() -> st.SearchStrategy[Case]:
    """Both kinds, the linear one more often: it takes a third of the time."""
    return st.one_of(linear_cases(), linear_cases(), convolution_cases())
