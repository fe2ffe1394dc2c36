"""Branch and bound over the quadratic bound: complete on small monotone networks, and its trees are checked."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from test_quadratic import monotone
from torch import Tensor

from verideq import Status
from verideq.certify import certify, margin_rows, prepare
from verideq.certify.bound import run_method
from verideq.certify.certificate import Split
from verideq.certify.quadratic_tree import Ends, Leaf, Search
from verideq.checker import Checker
from verideq.region import Region

EPS = "3/20"


def samples(seed: int, count: int = 8) -> Tensor:
    return torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_small_sample_is_decided_and_every_proof_is_accepted(norm: str) -> None:
    found: Counter[Status] = Counter()
    split = 0
    for seed in range(6):
        prepared, images = prepare(monotone(seed, units=4)), samples(seed)
        labels = prepared.graph(images).argmax(1)
        arguments = (prepared, images, labels, EPS)
        plain = certify(*arguments, norm=norm, method="quadratic", attack="pgd")
        verdicts = certify(*arguments, norm=norm, method="branch-and-bound", attack="pgd")
        for before, after in zip(plain, verdicts, strict=True):
            assert before.status is Status.UNKNOWN or after.status is before.status
        found.update(v.status for v in verdicts)
        records = [v.certificate for v in verdicts if v.certificate is not None]
        split += sum(b"below" in record for record in records)
        for exactly in (False, True):
            decisions = Checker(prepared.file, prepared.certificate, exact=exactly).decide(records)
            assert [reason for accepted, reason, _ in decisions if not accepted] == []
    assert set(found) <= {Status.CERTIFIED, Status.FALSIFIED, Status.UNKNOWN}
    # What is left is nearly a tie, or waits for a better attack.
    assert found[Status.UNKNOWN] <= 2 and min(found[Status.CERTIFIED], found[Status.FALSIFIED], split) >= 3


def test_both_halves_of_every_split_are_proved() -> None:
    for seed in range(6):
        prepared, images = prepare(monotone(seed, units=4)), samples(seed)
        labels = prepared.graph(images).argmax(1)
        region, C = Region(images, EPS), margin_rows(labels, 3)
        bounds = run_method(prepared, region, C, "branch-and-bound", rhs=torch.zeros(8, 2), upper=False)
        for i in range(8):
            proof = bounds.proof(i)
            ends: list[int] = []
            pending = [tree for _, tree in proof.trees]
            while pending:
                tree = pending.pop()
                if isinstance(tree, Split):
                    pending += [tree.below, tree.above]
                else:
                    ends.append(tree)
            assert sorted(ends) == list(range(len(proof.cases)))


def test_a_search_that_is_interrupted_loses_no_part_and_highs_finds_points(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = Search.run, 0

    def interrupted(self: Search, roots: list[Leaf]) -> bool:
        nonlocal asked
        for leaf in roots:
            self._add(leaf)
        asked += bool(roots) and bool(self.open)
        return run(self, []) if not roots or not self.open else False

    proved = broken = 0
    for seed in range(6):
        prepared, images = prepare(monotone(seed, units=4)), samples(seed)
        labels = prepared.graph(images).argmax(1)
        arguments = (prepared, images, labels, EPS)
        whole = certify(*arguments, method="branch-and-bound", timeout=60)
        with monkeypatch.context() as patch:
            patch.setattr(Search, "run", interrupted)
            again = certify(*arguments, method="branch-and-bound", timeout=60)
            patch.setattr(Search, "run", lambda self, roots: [self._add(leaf) for leaf in roots] == [])
            only = certify(*arguments, method="branch-and-bound", timeout=60)
        assert [v.status for v in again] == [v.status for v in whole]
        proved += sum(v.certified and not o.certified for v, o in zip(again, only, strict=True))
        broken += sum(v.status is Status.FALSIFIED for v in only)
        decisions = Checker(prepared.file, prepared.certificate, exact=True).decide(
            [v.certificate for v in again if v.certificate is not None]
        )
        assert all(accepted for accepted, _, _ in decisions)
    assert asked > 10 and min(proved, broken) >= 3


def test_a_leaf_that_is_not_solved_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Search.run
    seen: list[bool] = []

    def looked_at(self: Search, roots: list[Leaf]) -> bool:
        waiting = {id(leaf) for leaf in roots if not leaf.value > 0} | {id(leaf) for _, _, leaf in self.open}
        decided = run(self, roots)
        left = {id(leaf) for _, _, leaf in self.open}
        seen.append(decided is (not waiting) and (self.witness is not None or left == waiting))
        return decided

    monkeypatch.setattr(Search, "run", looked_at)
    monkeypatch.setattr(Leaf, "worst", lambda *_: -1)
    monkeypatch.setattr(Ends, "solve", lambda *_: None)
    for seed in range(6):
        prepared, images = prepare(monotone(seed, units=4)), samples(seed)
        arguments = (prepared, images, prepared.graph(images).argmax(1), EPS)
        certify(*arguments, method="branch-and-bound", timeout=60)
    assert len(seen) > 10 and all(seen)


def test_the_clock_is_kept_and_nothing_is_certified_by_it() -> None:
    prepared, images = prepare(monotone(3, units=5, inputs=2, m=0.125, size=3.0)), samples(3, 4)
    labels = prepared.graph(images).argmax(1)
    started = time.monotonic()
    verdicts = certify(prepared, images, labels, "1/2", method="branch-and-bound", timeout=0.2)
    assert time.monotonic() - started < 30
    assert all(v.checked is v.certified for v in verdicts)


def test_without_thresholds_it_is_the_quadratic_bound() -> None:
    prepared = prepare(monotone(0))
    region = Region(samples(0, 2), "1/10")
    ours = run_method(prepared, region, None, "branch-and-bound").box
    theirs = run_method(prepared, region, None, "quadratic").box
    assert torch.equal(ours.lower, theirs.lower) and torch.equal(ours.upper, theirs.upper)
