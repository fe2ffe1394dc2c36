"""`Verdict`: what is known about one sample, and why."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from verideq.status import Status


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sample, one radius, one answer.

    Args:
        status: see `Status`; only CERTIFIED is a claim of robustness.
        margin: a proved lower bound of the smallest margin over the region, in units of the outputs; ``None`` if none
            was computed.
        eps: the radius, exact.
        norm: ``linf`` or ``l2``.
        method: the bound method that decided.
        checked: whether the independent checker accepted a certificate in this process.
        reason: why, and for UNKNOWN what to try next.
        seconds: the sample's share of its batch.
        witness: for FALSIFIED a float64 point of the region, (*features), that provably lacks the property.
        certificate: the record that was accepted, as bytes: see ``docs/certificate.md``.
        prediction: the class of the largest output at the centre, ``None`` if there is none.
        label: the sample's label, ``None`` for a specification without one.
        attacked: whether the prediction survived the attack; ``None`` without one.
        attack: of a suite, the attack that found the worst point.
        attack_margin: the smallest margin that a suite found, as the attacked copy computes it.
        first_margin: that of its first attack, if any other was tried on the sample.
        blind: no attack of a suite met a gradient.
        steps: solver steps of the bound.
        radius: the largest radius that was certified, if that was asked for; exact.
        attacked_radius: the smallest at which an attack broke the sample: that of the nearest proved witness; exact for
            linf, for l2 rounded up.
        radius_certificate: the record of `radius` that was accepted, as bytes.
        radius_witness: the point of `attacked_radius`, (*features).
    """

    status: Status
    margin: float | None
    eps: Fraction
    norm: str
    method: str
    checked: bool
    reason: str
    seconds: float
    witness: np.ndarray | None = None
    certificate: bytes | None = None
    prediction: int | None = None
    label: int | None = None
    attacked: bool | None = None
    attack: str | None = None
    attack_margin: float | None = None
    first_margin: float | None = None
    blind: bool = False
    steps: int | None = None
    radius: Fraction | None = None
    attacked_radius: Fraction | None = None
    radius_certificate: bytes | None = None
    radius_witness: np.ndarray | None = None

    @property
    def certified(self) -> bool:
        """Whether the status is CERTIFIED."""
        return self.status is Status.CERTIFIED

    def __str__(self) -> str:
        margin = "" if self.margin is None else f", margin {self.margin:+.4g}"
        seen = "" if self.prediction is None else f", predicts {self.prediction}"
        label = "" if self.label is None else f" (label {self.label})"
        reason = f": {self.reason}" if self.reason else ""
        eps = self.eps if self.eps.denominator < 10**6 else float(self.eps)
        return f"{self.status} at {self.norm} eps {eps}{margin}{seen}{label} by {self.method}{reason}"
