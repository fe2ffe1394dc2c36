"""The search for a counterexample, and the same search for a broken statement.

A *claim* is a function from a case to a bool. `holds` runs it on `CASES` generated cases and needs it true on
each. `rejects` runs a broken twin of it on the very same cases and needs it false on one: what the search can
not tell from the broken statement, it has not checked. Examples are the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

CASES = 200
"""The cases of a search, those that a claim sets aside by `hypothesis.assume` not counted."""

Case = TypeVar("Case")

# The order of a sum, and so its last bit, depends on the number of threads.
torch.set_num_threads(1)


class Violation(AssertionError):
    """A case for which the claim is false; any other exception is a bug of the check."""


def _search(claim: Callable[[Case], bool], cases: SearchStrategy[Case], count: int, phases: tuple[Phase, ...]) -> int:
    seen = 0

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases)
    def search(case: Case) -> None:
        nonlocal seen
        if not claim(case):
            raise Violation(f"false for {case}")
        seen += 1

    search()
    return seen


def holds(claim: Callable[[Case], bool], cases: SearchStrategy[Case], count: int = CASES) -> None:
    """Fail if the claim is false for one of `count` cases, or if fewer could be made."""
    seen = _search(claim, cases, count, (Phase.generate, Phase.shrink))
    assert seen >= count, f"only {seen} cases were checked"


def rejects(twin: Callable[[Case], bool], cases: SearchStrategy[Case], count: int = CASES) -> None:
    """Fail unless the search finds a case for which the twin is false."""
    with pytest.raises(Violation):
        _search(twin, cases, count, (Phase.generate,))
