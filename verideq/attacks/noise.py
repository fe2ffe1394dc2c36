"""Noise that depends on the seed, the sample and the radius alone: not on the batch, its order or the device."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]


def _mix(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform_noise(seed: int, indices: Tensor, radii: Sequence[Fraction], stream: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [-1, 1], float64 on the CPU.

    Args:
        seed: of the run.
        indices: (batch,) the samples' indices in their data set.
        radii: (batch,) of the samples.
        stream: number of the restart.
        shape: (*features).

    Returns:
        (batch, *shape).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    ends = ([eps.numerator for eps in radii], [eps.denominator for eps in radii])
    state: Words = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for words in ([seed], [stream], *ends):
            state = _mix((state ^ np.array([word & (2**64 - 1) for word in words], dtype=np.uint64)) + golden)
        samples = _mix((state ^ indices.cpu().numpy().astype(np.uint64)) + golden)
        counters = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * golden
        bits = _mix(samples[:, None] + counters[None])
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).view(-1, *shape)
