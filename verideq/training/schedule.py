"""The radius over a training run."""

from __future__ import annotations


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
