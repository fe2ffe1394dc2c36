"""Hypothesis strategies for small models and regions, biased to where bounds break.

Numbers are drawn as small integers and scaled by powers of two, so that a failing example shrinks to one that a person
can read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from verideq.equilibrium import HARD_SIGMOID, Equilibrium, FeedbackFusion
from verideq.graph import INPUT, Embed, Graph, Node
from verideq.region import Region, parse_eps
from verideq.testing.exact import exact, select

PADDINGS: tuple[Literal["zeros", "circular", "reflect", "replicate"], ...] = (
    "zeros",
    "circular",
    "reflect",
    "replicate",
)
ROWS = (0.5, 0.9, 0.99, 0.999999, 1 - 2.0**-20)
"""Absolute row sums of ``W``: its contraction rate."""
SCALES = (1.0, 1.0, 1.0, 2.0**60, 2.0**-60, 1e-30, 1e-310)
"""Of what is injected."""
EPS: tuple[str | float, ...] = (0, "1/255", 0.1, 0.5)


@dataclass(frozen=True)
class Case:
    """A model, its inputs and a specification.

    Args:
        model: an equilibrium, (flatten,) a last linear layer; float32 or float64.
        region: around one to three centres.
        points: for every centre, points of its region: fractions, (*features).
        C: (rows, outputs).
    """

    model: Graph
    region: Region
    points: list[list[np.ndarray]]
    C: Tensor


def _integers(draw: st.DrawFn, *shape: int, low: int = -8) -> Tensor:
    """A float64 tensor of integers from `low` to 8, drawn as bytes: one draw, and it shrinks towards zero."""
    size = int(np.prod(shape))
    drawn = draw(st.binary(min_size=size, max_size=size))
    return torch.tensor([(byte - low) % (9 - low) + low for byte in drawn], dtype=torch.float64).view(shape)


def _choices(draw: st.DrawFn, values: tuple[float, ...], *shape: int) -> Tensor:
    """A float64 tensor of some of `values`, the first of them when shrunk."""
    size = int(np.prod(shape))
    drawn = draw(st.binary(min_size=size, max_size=size))
    return torch.tensor([values[byte % len(values)] for byte in drawn], dtype=torch.float64).view(shape)


@st.composite
def fusions(draw: st.DrawFn, *shape: int) -> Tensor:
    """A ``W`` with a gauge of ``W`` or of ``W̃``, in float64: (units, units) or (channels, channels, k, k).

    Signed or nonnegative, rows of zeros, one of `ROWS` as row sum in a gauge of powers of two, or a diagonal of -10,
    which only the transformed layer has a gauge for.
    """
    units = shape[0]
    weight = _integers(draw, *shape, low=draw(st.sampled_from((-8, 0))))
    sums = weight.abs().flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (len(shape) - 1))
    weight = weight / sums * (_choices(draw, ROWS, units) * _choices(draw, (1, 1, 1, 0), units)).view_as(sums)
    gauge = 2 ** _integers(draw, units)
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
    center = _choices(draw, (0.0, 1.0, 0.0, 1.0, 0.5, 0.1, 1 / 3), batch, *shape).to(dtype)
    eps = draw(st.sampled_from(EPS))
    which = draw(st.integers(0, 2 ** center[0].numel() - 1))
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
    """An equilibrium of 1 to 5 units on 1 to 3 inputs, and a last linear layer."""
    units, inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    fusion = nn.Linear(units, units, bias=False)
    last = nn.Linear(units, outputs)
    return _finish(draw, fusion, nn.Linear(inputs, units), last, draw(fusions(units, units)), (inputs,))


@st.composite
def convolution_cases(draw: st.DrawFn) -> Case:
    """An equilibrium of 1 or 2 channels on images of 2x2 to 3x3, every padding, kernels of 1 to 3; flatten; linear."""
    channels, inputs, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    height, width = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    kernel, reach = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3)))
    mode = draw(st.sampled_from(PADDINGS))
    fusion = nn.Conv2d(channels, channels, kernel, padding="same", padding_mode=mode, bias=False)
    mode = draw(st.sampled_from(PADDINGS))
    injection = nn.Conv2d(inputs, channels, reach, padding="same", padding_mode=mode)
    last = nn.Linear(channels * height * width, outputs)
    weight = draw(fusions(channels, channels, kernel, kernel))
    return _finish(draw, fusion, injection, last, weight, (inputs, height, width))


def cases() -> st.SearchStrategy[Case]:
    """Both kinds."""
    return st.one_of(linear_cases(), convolution_cases())


BLOCKS: tuple[tuple[tuple[tuple[int, ...], ...], tuple[Callable[[], nn.Module], ...]], ...] = (
    (((2,), (3,)), (lambda: nn.Linear(2, 3, bias=False),)),
    (((1, 2, 2), (2,)), (lambda: nn.Linear(4, 2, bias=False),)),
    (
        ((1, 3, 2), (2, 2, 1), (2,)),
        (lambda: nn.Conv2d(1, 2, (2, 3), 2, 1, bias=False), lambda: nn.Linear(4, 2, bias=False)),
    ),
    (((2, 3, 1), (1, 1, 1)), (lambda: nn.Conv2d(2, 1, (2, 1), (3, 1), bias=False),)),
)
"""Blocks and what couples them: strides that divide nothing, padding, taps that are stepped over."""


@st.composite
def coupled_cases(draw: st.DrawFn) -> Case:
    """A hard sigmoid of blocks that are coupled to each other, the first of which is injected; a last linear layer.

    Its gauge is that of its channels, of a rate of up to ``1 - 2⁻²⁰``.
    """
    shapes, make = draw(st.sampled_from(BLOCKS))
    fusion = FeedbackFusion(shapes, [build() for build in make]).double()
    with torch.no_grad():
        for raw in fusion.raw():
            raw.weight.copy_(_integers(draw, *raw.weight.shape))
        sums = fusion.operator().absolute_units()
        rate = draw(st.sampled_from([rate for rate in ROWS if rate < 1]))
        for raw in fusion.raw():
            raw.weight.mul_(rate / sums.sum(1).max().clamp(min=1))
    first = int(np.prod(shapes[0]))
    shape = (1, *shapes[0][1:]) if len(shapes[0]) == 3 else (2,)
    injection = nn.Conv2d(1, shapes[0][0], 1) if len(shape) == 3 else nn.Linear(2, first)
    region, points = draw(regions(shape, torch.float64))
    scale = draw(st.sampled_from((1.0, 4.0, 16.0)))
    rest = Embed(_integers(draw, sum(int(np.prod(s)) for s in shapes[1:])) * scale / 8)
    last = nn.Linear(first + len(rest.rest), draw(st.integers(1, 2)))
    nodes = [
        Node("injection", injection, (INPUT,)),
        Node("embed", rest, ("injection",)),
        Node("equilibrium", Equilibrium(fusion, nn.Identity(), "hard-sigmoid"), ("embed",)),
        Node("last", last, ("equilibrium",)),
    ]
    graph = Graph(nodes, input_shape=shape, pixel_range=region.clip).to(torch.float64)
    with torch.no_grad():
        _fill(draw, injection, scale)
        _fill(draw, last, 1.0)
    return Case(graph, region, points, _integers(draw, draw(st.integers(1, 2)), last.out_features))


@st.composite
def bounded_cases(draw: st.DrawFn) -> Case:
    """Equilibria of the hard sigmoid: those of `cases`, and coupled blocks."""
    if draw(st.booleans()):
        return draw(coupled_cases())
    case = draw(cases())
    for _, layer in case.model.equilibria():
        layer.activation = HARD_SIGMOID
    return case


def _finish(
    draw: st.DrawFn,
    fusion: nn.Linear | nn.Conv2d,
    injection: nn.Linear | nn.Conv2d,
    last: nn.Linear,
    weight: Tensor,
    shape: tuple[int, ...],
) -> Case:
    """Weights of every scale, the layers as a graph, and a region for it."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    scale = draw(st.sampled_from(SCALES))
    if dtype is torch.float32:
        scale = max(scale, 1e-40)  # a denormal of its own
    region, points = draw(regions(shape, dtype))
    layer = Equilibrium(fusion, nn.Identity())
    nodes = [Node("injection", injection, (INPUT,)), Node("equilibrium", layer, ("injection",))]
    if len(shape) == 3:
        nodes.append(Node("flatten", nn.Flatten(), ("equilibrium",)))
    nodes.append(Node("last", last, (nodes[-1].name,)))
    graph = Graph(nodes, input_shape=shape, pixel_range=region.clip).to(dtype)
    with torch.no_grad():
        fusion.weight.copy_(weight)
        _fill(draw, injection, scale)
        _fill(draw, last, 1.0)
    return Case(graph, region, points, _integers(draw, draw(st.integers(1, 2)), last.out_features))


def _fill(draw: st.DrawFn, module: nn.Linear | nn.Conv2d, scale: float) -> None:
    # Few distinct numbers are drawn, and repeated with other signs: drawing is what takes time.
    pool, size = _integers(draw, min(module.weight.numel(), 6)), module.weight.numel()
    repeats = size // len(pool) + 1
    signs = torch.tensor([(-1.0) ** (k // 3) for k in range(len(pool) * repeats)], dtype=torch.float64)
    module.weight.copy_(((pool.repeat(repeats) * signs)[:size] * (scale / 8)).view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(_integers(draw, len(module.bias)) * (scale / 8))
