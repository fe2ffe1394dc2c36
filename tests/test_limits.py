"""Limits of time and memory: who pays for what, where work stops, how it is cut, and that cuts change no verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from verideq import Equilibrium, Region, Status, bound
from verideq import memory as limits
from verideq.box import Box
from verideq.certify import Prepared, Verdict, certify, footprint, prepare
from verideq.certify.bound import METHODS, margin_rows, run_method
from verideq.certify.footprint import Footprint
from verideq.certify.method import Bounds, Query
from verideq.checker import STOPPED, Checker
from verideq.checker.files import parse_blob
from verideq.clock import Accounts, OutOfTime, tick, until
from verideq.data import load
from verideq.errors import NotEnoughMemory
from verideq.graph import load_model
from verideq.parametrizations import RowGauge

DIGITS = load("digits")
COUNT = 6
IMAGES, LABELS = DIGITS.scaled(slice(0, COUNT)), DIGITS.labels[:COUNT]


@pytest.fixture(scope="module")
def prepared(digits_model: Path) -> Prepared:
    return prepare(load_model(digits_model))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


# --- time -------------------------------------------------------------------------------------------------------------


def test_work_is_paid_for_by_those_for_whom_it_is_done(clock: list[float]) -> None:
    accounts = Accounts(4, 2.0)
    assert accounts.left([0, 1]) == 4.0
    with accounts.charged([0, 1]) as deadline:
        assert deadline == 104.0
        clock[0] += 3
    assert accounts.spent == [1.5, 1.5, 0.0, 0.0]
    with pytest.raises(ZeroDivisionError), accounts.charged([1, 1, 2], 0.5) as deadline:
        assert deadline == 103 + 0.5 * 2.5
        clock[0] += 1.5
        _ = 1 / 0
    assert accounts.spent == [1.5, 2.5, 0.5, 0.0]
    assert [accounts.late(i) for i in range(4)] == [False, True, False, False]
    assert accounts.late(0, 0.75) and not accounts.late(2, 0.75)
    assert accounts.left(range(4)) == 0.5 + 0 + 1.5 + 2
    with Accounts(1, None).charged([0]) as deadline:
        assert deadline == math.inf


def test_an_inner_deadline_is_no_later_than_the_outer_one(clock: list[float]) -> None:
    tick()
    with until(101), until(200):
        tick()
        clock[0] = 102
        with pytest.raises(OutOfTime):
            tick()
    with until(102):
        tick()
    tick()


def _moving(monkeypatch: pytest.MonkeyPatch, by: float) -> list[float]:
    """A clock that goes on by so much whenever somebody looks at it."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += by
        return now[0]

    monkeypatch.setattr("time.monotonic", monotonic)
    return now


@pytest.mark.parametrize("method", ["interval", "adjoint", "adjoint-refined", "adjoint-ascent", "branch-and-bound"])
def test_a_bound_looks_at_the_clock_and_stops(prepared: Prepared, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: every loop looks, and no more than a few looks happen after the deadline."""
    region, C = Region(IMAGES, "1/10"), margin_rows(LABELS, 10)
    rhs = torch.full((COUNT, 9), 1e3, dtype=torch.float64)  # what nothing proves

    def asked(deadline: float) -> Bounds:
        return run_method(prepared, region, C, method, rhs=rhs, upper=False, deadline=deadline)

    whole = run_method(prepared, region, C, "interval", rhs=rhs, upper=False)
    for looks in (0, 3, 40, 200):
        now = _moving(monkeypatch, 1.0)
        found = asked(looks)
        assert now[0] <= looks + 60
        lower = found.box.lower
        assert bool((lower <= found.box.upper).all())
        # All that was found is a bound: never above what the model does at the centre.
        outputs = (C @ prepared.graph(IMAGES.double())[:, :, None])[:, :, 0]
        assert bool((lower <= outputs).all())
    if method == "interval":
        assert bool((asked(1e9).box.lower == whole.box.lower).all())


def test_a_hard_sample_takes_no_ones_time(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that takes 1 s a sample, and for one sample for ever: that one alone is TIMEOUT, and pays alone."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    plain = METHODS["interval"]
    hard = IMAGES[2].double()

    def slow(prepared: Prepared, query: Query) -> Bounds:
        stopped = torch.zeros(len(query), dtype=torch.bool)
        for place, own in query.parts(torch.arange(len(query)), 1):
            if bool((own.box.center[0] - hard).abs().max() < 1e-3):
                now[0] = own.deadline + 1e-3
                stopped[place] = True
            else:
                now[0] += 1.0
        found = plain(prepared, query)
        lower = torch.where(stopped[:, None], -torch.inf, found.box.lower)
        return replace(found, box=Box(lower, found.box.upper))

    monkeypatch.setitem(METHODS, "adjoint", slow)
    for size in (COUNT, 2, 1):
        now[0] = 0.0
        verdicts = certify(prepared, IMAGES, LABELS, "1/1000", method="adjoint", timeout=5.0, batch_size=size)
        assert [v.status for v in verdicts] == [Status.TIMEOUT if i == 2 else Status.CERTIFIED for i in range(COUNT)]
        assert now[0] <= 5 * 1.1 + COUNT - 1 + 0.1


def test_a_stopped_check_is_a_timeout_and_no_refusal(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checker, "decide", lambda self, payloads, stop: [(False, STOPPED, None)] * len(payloads))
    for verdict in certify(prepared, IMAGES, LABELS, "1/1000", method="interval"):
        assert verdict.status is Status.UNKNOWN and "refused" not in verdict.reason
        assert not verdict.checked and verdict.certificate is None


def test_a_checker_that_is_stopped_accepts_nothing_more(prepared: Prepared) -> None:
    verdicts = certify(prepared, IMAGES, LABELS, "1/1000", method="interval")
    payloads = [v.certificate for v in verdicts if v.certificate is not None]
    assert len(payloads) == COUNT
    assert all(accepted for accepted, *_ in prepared.checker.decide(payloads))
    assert prepared.checker.decide(payloads, lambda: True) == [(False, STOPPED, None)] * COUNT


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_piece_that_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available", lambda device: 2**31)
    cpu = torch.device("cpu")
    assert limits.fitting(2**20, cpu, "a thing") == 2**10
    assert limits.fitting(2**20, cpu, "a thing", 2**29) == 2**9
    assert limits.fitting(2**30, cpu, "a thing") == 1
    with pytest.raises(NotEnoughMemory, match=r"a thing needs about 1\.5 GiB .* 1 GiB may be used .* on cpu"):
        limits.fitting(2**29, cpu, "a thing", 2**30)


def test_limits_of_containers_count(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "groups"
    job = root / "jobs" / "one"
    job.mkdir(parents=True)
    own.write_text("0::/jobs/one\n")
    for folder, most, taken in ((job, "max", "5"), (root / "jobs", str(3 * 2**30), str(2**30))):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(taken + "\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {2**29}\n")
    assert list(limits._control_groups(root, own)) == [2 * 2**30 + 2**29]
    old = root / "memory" / "box"
    old.mkdir(parents=True)
    own.write_text("4:cpu,memory:/box\n3:pids:/box\n")
    (old / "memory.limit_in_bytes").write_text("1000\n")
    (old / "memory.usage_in_bytes").write_text("400\n")
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert list(limits._control_groups(root, own)) == [650]
    assert list(limits._control_groups(root, tmp_path / "nowhere")) == []
    assert 0 < limits.available(torch.device("cpu")) < 2**50


def test_processes_of_one_run_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_system", lambda: iter([900]))
    monkeypatch.setattr(limits, "_control_groups", lambda: iter([1200, 800]))
    monkeypatch.setattr(limits, "_own_limit", lambda: iter(()))
    assert limits.available(torch.device("cpu")) == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limits.available(torch.device("cpu")) == 200
    monkeypatch.setattr(limits, "_control_groups", lambda: iter([-5]))
    assert limits.available(torch.device("cpu")) == 0


def _conv() -> nn.Module:
    torch.manual_seed(0)
    layer = Equilibrium(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(1, 3, 4, stride=2, padding=1))
    RowGauge.apply(layer.fusion, m=0.6)
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 10))


def _dense_monotone() -> nn.Module:
    layer = Equilibrium(nn.Linear(10, 10, bias=False), nn.Linear(64, 10))
    with torch.no_grad():
        A = torch.randn(10, 10) * 0.4
        layer.fusion.weight.copy_(-A.T @ A + 3 * (A - A.T))
    return nn.Sequential(nn.Flatten(), layer, nn.Linear(10, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "conv": (_conv, ("interval", "adjoint", "adjoint-refined", "adjoint-ascent", "branch-and-bound"), "1/50"),
    "monotone": (_dense_monotone, ("quadratic", "branch-and-bound"), "1/100"),
}
CASES = [(name, method) for name, (_, methods, _) in NETS.items() for method in methods]


def _record(payload: bytes | None) -> tuple[Any, dict[str, Any]] | None:
    if payload is None:
        return None
    blob = parse_blob(payload)
    head = {key: value for key, value in blob.head.items() if key not in ("margin", "cases", "trees")}
    return head, {name: np.asarray(array) for name, array in blob.arrays.items()}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_verdicts_do_not_depend_on_the_memory(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _, eps = NETS[name]
    prepared = prepare(make())
    with torch.no_grad():
        labels = prepared.graph(IMAGES.double()).argmax(1)
    monkeypatch.setattr("verideq.certify.branching.NODES", 12)
    monkeypatch.setattr("verideq.certify.quadratic_tree.NODES", 8)

    def verdicts() -> list[Verdict]:
        return certify(prepared, IMAGES, labels, eps, method=method)

    whole, shape = verdicts(), Footprint.of(prepared, IMAGES, 9)
    assert any(v.certified for v in whole)
    assert {v.status for v in whole} <= {Status.CERTIFIED, Status.FALSIFIED, Status.UNKNOWN}
    fixed, row, base = shape._parts(method)
    leaf = footprint.NUMBER * (10 * 10**2 + 4 * 10 * 64) if name == "monotone" else shape.climb
    # A sample and a half; and one row of one sample.
    for bytes_ in (base + 1.5 * (fixed + 9 * row), max(base + fixed + row, leaf)):
        monkeypatch.setattr(limits, "available", lambda device, bytes_=bytes_: int(bytes_ / limits.SHARE) + 2)
        assert shape.samples_at_once(method) == 1
        cut = verdicts()
        assert [(v.status, v.method) for v in cut] == [(v.status, v.method) for v in whole]
        for own, other in zip(cut, whole, strict=True):
            assert own.margin == pytest.approx(other.margin, rel=1e-6, abs=1e-7)
            records = _record(own.certificate), _record(other.certificate)
            assert (records[0] is None) == (records[1] is None)
            if records[0] is not None and records[1] is not None and shape.rows_at_once(method) == 9:
                assert records[0][0] == records[1][0] and set(records[0][1]) == set(records[1][1])
                for array, twin in zip(records[0][1].values(), records[1][1].values(), strict=True):
                    np.testing.assert_allclose(array, twin, rtol=1e-4, atol=1e-5)


def test_rows_are_cut_too_and_their_proofs_put_together(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = METHODS["adjoint-refined"]

    def counting(prepared: Prepared, query: Query) -> Bounds:
        seen.append(0 if query.C is None else query.C.shape[1])
        return plain(prepared, query)

    monkeypatch.setitem(METHODS, "adjoint-refined", counting)
    whole = bound(prepared, Region(IMAGES[:2], "1/20"), method="adjoint-refined")
    assert seen.pop() in (0, 10)
    shape = Footprint.of(prepared, IMAGES, 20)
    fixed, row, base = shape._parts("adjoint-refined")
    monkeypatch.setattr(limits, "available", lambda device: int((base + fixed + 8 * row) / limits.SHARE) + 2)
    cut = bound(prepared, Region(IMAGES[:2], "1/20"), method="adjoint-refined")
    assert seen == [4, 4, 2] * 2
    for side in ("lower", "upper"):
        torch.testing.assert_close(getattr(cut, side), getattr(whole, side), rtol=1e-6, atol=1e-7)


def test_what_cannot_fit_is_unknown_and_says_how_much_it_needs(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "available", lambda device: 2**12)
    for verdict in certify(prepared, IMAGES, LABELS, "1/1000", attack="pgd", radius=True):
        assert verdict.status is Status.UNKNOWN and verdict.radius is None
        assert "needs about" in verdict.reason and "may be used" in verdict.reason
    with pytest.raises(NotEnoughMemory, match="adjoint of one sample and row needs about"):
        bound(prepared, Region(IMAGES, "1/1000"), method="adjoint")


def test_a_footprint_counts_values_and_columns() -> None:
    shape = Footprint.of(prepare(_conv()), IMAGES, 9)
    assert (shape.relaxed, shape.inputs, shape.rows) == (96, 64, 9)
    assert shape.plain == 64 + 48 and shape.values == 64 + 4 * 48 + 10
    assert shape.columns == max(16 * 3 * 9, 64 * 1 * 16)
    assert shape.row > footprint.NUMBER * footprint.BACKWARD * 96
