"""How far a sample is safe: the largest certified radius, and beside it the smallest at which an attack breaks it.

Both are found by bisection, for a batch at once: every sample has a bracket of its own, and its ball a radius of its
own. With ``auto`` intervals find where to begin; then the attack says where there is nothing left to certify, and every
tighter bound goes on from where the one before it stopped. A radius is reported when the independent checker has
accepted a record of it. A witness counts when it is proved, as for FALSIFIED, and at the radius at which it lies, which
is exact. So the certified radius lies below the attacked one; the true one is between them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from verideq.attacks import attack_named
from verideq.certify.bound import run_method
from verideq.certify.budget import Budget
from verideq.certify.footprint import Footprint
from verideq.certify.method import Prepared
from verideq.certify.proposal import margins_of, written
from verideq.certify.summary import REJECTED
from verideq.certify.task import Task
from verideq.certify.verdict import Verdict
from verideq.certify.witness import Found, examined, followed, inconsistency, target
from verideq.checker import STOPPED
from verideq.clock import Accounts
from verideq.errors import InconsistencyError, NoGaugeError, NotEnoughMemory
from verideq.region import round_up
from verideq.status import Status

CLOSE, NEAR = Fraction(1, 1024), Fraction(1, 256)
"""A bracket is narrow enough when its ends differ by this share: by intervals, and by what takes more time."""
LEAST = Fraction(1, 2**24)
"""The smallest radius that is tried, as a share of the largest."""
MOST = 1024
"""The largest where there is no valid range, in units of the largest eps asked for."""
LARGEST = Fraction(2) ** 1000
"""No larger radius is looked at: sums of such numbers are no float64."""
SHARE = 0.5
"""Of the time that is left, what one look at a radius may take."""
RESERVE = 0.85
"""The share of the limit after which nothing new is begun: a checker has to read what was found."""


@dataclass(frozen=True)
class Reach:
    """What is known of one sample.

    Args:
        radius: certified; ``None``: not even the input itself is.
        attacked: the radius of the nearest proved witness; ``None``: none was found.
        certificate: the record of `radius` that the checker accepted.
        witness: at `attacked`, float64, (*features).
        reason: what went wrong, or nothing.
    """

    radius: Fraction | None = None
    attacked: Fraction | None = None
    certificate: bytes | None = None
    witness: np.ndarray | None = None
    reason: str = ""

    def told(self, verdict: Verdict) -> Verdict:
        """A verdict on the sample, with this in it."""
        reason = "; ".join(filter(None, (verdict.reason, self.reason)))
        return replace(
            verdict, radius=self.radius, attacked_radius=self.attacked, radius_certificate=self.certificate,
            radius_witness=self.witness, reason=reason,
        )  # fmt: skip


def reaches(
    prepared: Prepared, task: Task, budget: Budget, original: nn.Module | None, decided: Sequence[Sequence[Verdict]]
) -> list[Reach]:
    """The radii of every sample of a batch; an exception costs only the samples that raise it.

    Args:
        task: its own radii do not matter.
        original: the user's own model: a witness has to break it as well.
        decided: verdicts on the same samples, a list an eps: where the search begins.

    Raises:
        InconsistencyError: a proved witness lies in a certified ball.
    """
    try:
        return _Search(prepared, task.to(prepared.device), budget, original, decided).run()
    except InconsistencyError:
        raise
    except Exception as error:  # whatever broke: the other samples get their radii, and this one says what happened
        if len(task) > 1:
            halves = (slice(0, len(task) // 2), slice(len(task) // 2, None))
            return [
                reach
                for half in halves
                for reach in reaches(prepared, task[half], budget, original, [line[half] for line in decided])
            ]
        return [Reach(reason=f"the search for the radius ended with {type(error).__name__}: {error}")]


Held = Callable[[list[int], Task, float, dict[int, float]], list[bool]]


class Proposal(NamedTuple):
    """A radius, the record of it unless no checker is asked, and whether the bound was estimated."""

    radius: Fraction
    record: bytes | None
    estimated: bool


class _Search:
    """The brackets of a batch; lists hold an entry a sample.

    `low` is proved, by `certificate`, and `high` is broken, by `witness`; `end` is where a search ends at the latest,
    `given` at which eps all bounds have failed, `safe` at which the attack has.
    """

    def __init__(
        self,
        prepared: Prepared,
        task: Task,
        budget: Budget,
        original: nn.Module | None,
        decided: Sequence[Sequence[Verdict]],
    ) -> None:
        self.prepared, self.task, self.budget, self.original = prepared, task, budget, original
        self.samples = len(task)
        self.shape = Footprint.of(prepared, task.region.center, task.rhs.shape[1])
        self.accounts = Accounts(self.samples, budget.timeout)
        self.first = list(decided[0])
        self.low: list[Fraction | None] = [None] * self.samples
        self.high: list[Fraction | None] = [None] * self.samples
        self.certificate: list[bytes | None] = [None] * self.samples
        self.witness: list[Tensor | None] = [None] * self.samples
        self.reason = [""] * self.samples
        self.note = [""] * self.samples
        largest = max((line[0].eps for line in decided), default=Fraction(0)) or Fraction(1)
        self.end = list(task.region.covering() or [MOST * largest] * self.samples)
        self.given = list(self.end)
        self.safe = [Fraction(0)] * self.samples
        lost = Status.MISCLASSIFIED, Status.ERROR
        self.live = [
            i for i in range(self.samples) if not any(v[i].status in lost or REJECTED in v[i].reason for v in decided)
        ]
        for line in decided:
            for i in self.live:
                self._begin(i, line[i])

    def _begin(self, i: int, verdict: Verdict) -> None:
        """What a verdict says."""
        low = self.low[i]
        if verdict.certified and (low is None or verdict.eps > low):
            self.low[i], self.certificate[i] = verdict.eps, verdict.certificate
        if verdict.status is Status.UNKNOWN:
            self.given[i] = min(self.given[i], verdict.eps)
        if verdict.attacked:
            self.safe[i] = max(self.safe[i], verdict.eps)
        if verdict.witness is not None:
            self._broken(i, torch.as_tensor(verdict.witness).to(self.task.region.center))

    def run(self) -> list[Reach]:
        """Search, and say what was found."""
        for i in self.live:
            self._consistent(i)
        if not self.prepared.missing:
            methods = self.budget.methods(self.prepared)
            # Intervals take next to nothing; the attack narrows what is left for whatever takes more.
            count = 1 if self.budget.method == "auto" else 0
            for method in methods[:count]:
                self._certify(method)
            self._attack()
            for method in methods[count:]:
                self._certify(method)
            self._certify(methods[0], only_centre=True)
            self._attack(only_certified=True)
        for i in self.live:
            self._consistent(i)
        return [self._reach(i) for i in range(self.samples)]

    def _reach(self, i: int) -> Reach:
        witness = self.witness[i]
        array = None if witness is None else witness.cpu().numpy()
        return Reach(self.low[i], self.high[i], self.certificate[i], array, self.reason[i] or self.note[i])

    def _look(
        self,
        places: Sequence[int],
        brackets: list[Bracket],
        held: Held,
        at_once: int,
    ) -> None:
        """Narrow brackets, those of all samples at once.

        Args:
            places: the samples.
            brackets: of every sample of the batch.
            held: whether some samples have the property, at the radii of a part; it may lower tops as well. It is told
                its deadline, and writes down what it did for single ones.
            at_once: samples that fit into memory.
        """
        while True:
            active = [i for i in places if not self.accounts.late(i, RESERVE) and brackets[i].wide]
            if not active:
                return
            for start in range(0, len(active), at_once):
                some = active[start : start + at_once]
                radii = [brackets[i].next() for i in some]
                paid: dict[int, float] = {}
                with self.accounts.charged(some, SHARE, paid) as deadline:
                    found = held(some, self._part(some, radii), deadline, paid)
                for i, radius, good in zip(some, radii, found, strict=True):
                    brackets[i].seen(radius, good)

    def _part(self, places: Sequence[int], radii: Sequence[Fraction]) -> Task:
        """Some samples, at these radii."""
        whole = self.task[torch.tensor(places)]
        return replace(whole, region=whole.region.with_eps(radii))

    def _certify(self, method: str, *, only_centre: bool = False) -> None:
        """Raise the certified radii by one method, at most to where an attack succeeds; or try the centres alone."""
        attack = attack_named(self.budget.attack)
        places = [i for i in self.live if not self.reason[i]]
        close = CLOSE if method == "interval" else NEAR
        brackets = [
            Bracket(low or Fraction(0), given if high is None else min(given, high), LEAST * end, close)
            for low, high, given, end in zip(self.low, self.high, self.given, self.end, strict=True)
        ]
        proposed: dict[int, Proposal] = {}

        def held(active: list[int], part: Task, deadline: float, paid: dict[int, float]) -> list[bool]:
            bounds = run_method(
                self.prepared, part.region, part.C, method, self.budget.max_steps, rhs=part.rhs,
                tolerance=round_up(self.budget.tolerance), upper=False, deadline=deadline, unproved=self.budget.check,
                paid=paid,
            )  # fmt: skip
            lower = margins_of(bounds, part)
            for k, (i, margin) in enumerate(zip(active, lower, strict=True)):
                if 0 < margin < math.inf:
                    check, tolerance = self.budget.check, self.budget.tolerance
                    proof = written(self.prepared, part, k, bounds, margin, tolerance) if check else None
                    proposed[i] = Proposal(part.region.radii[k], proof, bounds.estimated)
            left = [k for k, margin in enumerate(lower) if not margin > 0]
            if attack is not None and left and (bounds.witnesses or bounds.points is not None):
                late = functools.partial(_past, deadline)
                found = followed(self.prepared, part, self.original, attack, bounds, left, late)
                self._judge([active[k] for k in left], brackets, found)
            return [0 < margin < math.inf for margin in lower]

        try:
            if only_centre:
                places = [i for i in places if self.low[i] is None and not self.accounts.late(i, RESERVE)]
                if places:
                    with self.accounts.charged(places, SHARE) as deadline:
                        held(places, self._part(places, [Fraction(0)] * len(places)), deadline, {})
            else:
                self._look(places, brackets, held, self.shape.samples_at_once(method))
        except NoGaugeError:
            return
        except NotEnoughMemory as error:
            for i in places:
                self.note[i] = f"its radius by {method}: {error}"
            return
        self._check(proposed)

    def _check(self, proposed: dict[int, Proposal]) -> None:
        """Believe what the checker accepts."""
        for i, (radius, proof, estimated) in proposed.items():
            accepted, why = True, ""
            if proof is not None:
                with self.accounts.charged([i]) as deadline:
                    stop = functools.partial(_past, deadline)
                    ((accepted, why, _),) = self.prepared.checker.decide([proof], stop)
            if accepted:
                self.low[i], self.certificate[i] = radius, None if proof is None else self.budget.kept(proof)
            elif not estimated and why != STOPPED:
                # No better bound behind it may hide that: what was accepted before is what stands.
                self.reason[i] = (
                    f"{REJECTED} a proposed certificate of the radius {float(radius):.6g} ({why}): a bug in verideq; "
                    "please report it"
                )

    def _attack(self, *, only_certified: bool = False) -> None:
        """Lower the attacked radii; or attack what was certified, as at an eps."""
        attack = attack_named(self.budget.attack)
        if attack is None:
            return
        model = target(self.prepared)
        brackets = [
            Bracket(max(low or Fraction(0), safe), end if high is None else high, LEAST * end, NEAR)
            for low, safe, high, end in zip(self.low, self.safe, self.high, self.end, strict=True)
        ]

        def held(active: list[int], part: Task, deadline: float, paid: dict[int, float]) -> list[bool]:
            points, margins = attack(
                model, part.region, part.C, part.rhs, indices=part.indices, seed=self.budget.seed,
                stop=functools.partial(_past, deadline),
            )  # fmt: skip
            found = examined(self.prepared, part, self.original, points, margins)
            return [not broken for broken in self._judge(active, brackets, found)]

        if not only_certified:
            self._look(self.live, brackets, held, self.shape.attacks_at_once())
            return
        certified = [(i, low) for i, low in enumerate(self.low) if low is not None]
        for start in range(0, len(certified), self.shape.attacks_at_once()):
            some = [i for i, _ in certified[start : start + self.shape.attacks_at_once()]]
            if not all(self.accounts.late(i, RESERVE) for i in some):
                with self.accounts.charged(some, SHARE) as deadline:
                    held(some, self._part(some, [low for i, low in certified if i in some]), deadline, {})

    def _judge(self, active: Sequence[int], brackets: list[Bracket], found: Found) -> list[bool]:
        """Lower the attacked radii, and tops, by what an attack has found; returns which samples it broke."""
        broken: list[bool] = (found.proved & found.deployed).tolist()
        for k, i in enumerate(active):
            if bool(found.proved[k]):
                self._contradicts(i, found.points[k])
            if broken[k]:
                self._broken(i, found.points[k])
                brackets[i].top = min(brackets[i].top, self.high[i] or Fraction(0))
        return broken

    def _broken(self, i: int, point: Tensor) -> None:
        """A proved witness: it lies at the radius at which it lies, however large the ball was that it was found in."""
        (distance,) = self.task.region[torch.tensor([i])].distances(point[None])
        high = self.high[i]
        if isinstance(distance, Fraction) and (high is None or distance < high):
            self.high[i], self.witness[i] = distance, point

    def _consistent(self, i: int) -> None:
        """Hold what was broken against what was certified."""
        witness, low, high = self.witness[i], self.low[i], self.high[i]
        if witness is not None:
            self._contradicts(i, witness)
            if low is not None and high is not None and not low < high:
                raise inconsistency(self._verdict(i, low), witness, int(self.task.indices[i]))

    def _contradicts(self, i: int, point: Tensor) -> None:
        low = self.low[i]
        if low is not None and bool(self.task.region[torch.tensor([i])].with_eps(low).contains(point[None])):
            raise inconsistency(self._verdict(i, low), point, int(self.task.indices[i]))

    def _verdict(self, i: int, radius: Fraction) -> Verdict:
        """What is claimed at the certified radius."""
        return replace(
            self.first[i], status=Status.CERTIFIED, eps=radius, margin=None, certificate=self.certificate[i],
            checked=self.budget.check, reason="",
        )  # fmt: skip


@dataclass
class Bracket:
    """Where a property is lost that larger balls do not have: it held at `bottom`, and is not expected at `top`.

    Args:
        bottom, top: the ends.
        least: a top below it is not worth the search.
        close: the share by which the ends may differ afterwards.
        fresh: nothing was looked at yet.
    """

    bottom: Fraction
    top: Fraction
    least: Fraction
    close: Fraction
    fresh: bool = True

    @property
    def wide(self) -> bool:
        """Whether the ends are further apart than anybody asks for."""
        return self.top - self.bottom > self.close * self.top and self.top > self.least

    def next(self) -> Fraction:
        """The radius to look at, strictly between the ends, of few digits."""
        if not self.bottom:
            return _short(self.top / 4)
        # First just above the bottom: often there is nothing to be had. Then halving the ratio.
        near = _short(self.bottom * (1 + self.close)) if self.fresh else _short(self.bottom * self.top, root=2)
        return near if self.bottom < near < self.top else (self.bottom + self.top) / 2

    def seen(self, radius: Fraction, held: bool) -> None:
        """What was found at a radius between the ends."""
        self.fresh = False
        if held:
            self.bottom = max(self.bottom, radius)
        else:
            self.top = min(self.top, radius)


def _past(deadline: float) -> bool:
    return time.monotonic() > deadline


def _short(value: Fraction, root: int = 1) -> Fraction:
    """About the number, or its square root, to 16 binary digits: no float64 holds the smallest and largest radii."""
    exponent = (value.numerator.bit_length() - value.denominator.bit_length()) // root - 16
    whole = value / Fraction(2) ** (root * exponent)
    return Fraction(math.isqrt(int(whole)) if root == 2 else round(whole)) * Fraction(2) ** exponent
