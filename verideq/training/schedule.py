"""The radius and the learning rate over a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCHEDULES = ("steps", "cosine", "linear")


def eps_at(step: int, *, natural: int, ramp: int, final: float) -> float:
    """The radius at a step: 0, then a smooth start and a straight line up to `final`.

    With ``T`` ramp steps and ``p = T / 4``: ``a s⁴`` for the first ``p`` steps, then linear; value and slope agree
    where the two meet (the "smoothed" schedule of auto_LiRPA, which Shi et al. and Wei & Kolter train with).

    Args:
        step: from 0.
        natural: steps at radius 0.
        ramp: ``T``.
        final: the radius from step ``natural + ramp`` on.

    >>> [round(eps_at(s, natural=1, ramp=8, final=1.0), 3) for s in (0, 1, 3, 9)]
    [0.0, 0.0, 0.077, 1.0]
    """
    s = step - natural
    if s >= ramp:
        return final
    if s <= 0:
        return 0.0
    p = ramp / 4
    a = final / (p**3 * (4 * (ramp - p) + p))
    if s < p:
        return a * s**4
    start = a * p**4
    return start + (final - start) * (s - p) / (ramp - p)


def rate_at(
    epoch: float, *, schedule: str, peak: float, epochs: int, warmup: float, decay_epochs: Sequence[int], factor: float
) -> float:
    """The learning rate at a moment of the run.

    Args:
        epoch: epochs since the start, a fraction within one.
        schedule: ``steps``: times `factor` after each of `decay_epochs`; ``cosine``, ``linear``: from the end of the
            warm-up down to 0 at the end of the run.
        peak: the largest.
        epochs: of the whole run.
        warmup: epochs of a linear rise, before.

    >>> [rate_at(e, schedule="linear", peak=1.0, epochs=4, warmup=2, decay_epochs=(), factor=1) for e in (1, 2, 3)]
    [0.5, 1.0, 0.5]
    """
    if epoch < warmup:
        return peak * epoch / warmup
    if schedule == "steps":
        return peak * factor ** sum(epoch >= e for e in decay_epochs)
    left = 1 - (epoch - warmup) / (epochs - warmup)
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
