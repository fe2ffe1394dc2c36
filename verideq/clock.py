"""Time limits: a deadline that loops look at, and accounts that say what each sample has used."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar


class OutOfTime(Exception):
    """The deadline has passed. Whoever has something to hand back catches it; it never reaches a user."""


_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Let `tick` raise once `time.monotonic` has passed the deadline, or an earlier one that is set already."""
    token = _deadline.set(min(deadline, _deadline.get()))
    try:
        yield
    finally:
        _deadline.reset(token)


def tick() -> None:
    """Called by loops.

    Raises:
        OutOfTime: the deadline of `until` has passed.
    """
    if time.monotonic() > _deadline.get():
        raise OutOfTime


def share(deadline: float, left: int) -> float:
    """When the first of `left` tasks has to end, so that each has as much time."""
    if deadline == math.inf:
        return deadline
    now = time.monotonic()
    return now + max(0.0, deadline - now) / left


class Accounts:
    """What each sample of a batch has used of its time: work is charged to those for whom it is done, in equal parts.

    Args:
        samples: in the batch.
        limit: seconds a sample; ``None`` for no limit.
    """

    def __init__(self, samples: int, limit: float | None) -> None:
        self.limit = math.inf if limit is None else limit
        self.spent = [0.0] * samples

    def left(self, places: Sequence[int]) -> float:
        """Seconds that some samples have together."""
        return sum(max(0.0, self.limit - self.spent[i]) for i in set(places))

    def late(self, i: int, share: float = 1.0) -> bool:
        """Whether a sample has used this share of its time."""
        return self.spent[i] >= share * self.limit

    @contextmanager
    def charged(
        self, places: Sequence[int], share: float = 1.0, paid: Mapping[int, float] | None = None
    ) -> Iterator[float]:
        """Charge the time of the block to some samples; gives its deadline, after a `share` of what they have left.

        Args:
            places: of the samples; one that is named twice is charged twice.
            share: see above.
            paid: what is known at the end to be a sample's own, by its place in `places`; the rest is everyone's.
        """
        started = time.monotonic()
        try:
            yield started + share * self.left(places)
        finally:
            own = paid or {}
            each = (time.monotonic() - started - sum(own.values())) / max(1, len(places))
            for k, i in enumerate(places):
                self.spent[i] += each + own.get(k, 0.0)
