"""The largest certified and the smallest attacked radius: proved, between each other, the same in any batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from verideq.attacks import ATTACKS, PGD, uniform_noise
from verideq.box import Box
from verideq.certify import Budget, Prepared, Verdict, certify, prepare
from verideq.certify import decide as deciding
from verideq.certify import radius as radii
from verideq.certify.bound import METHODS
from verideq.certify.method import Bounds, Query
from verideq.certify.run import Questions, Run
from verideq.certify.summary import REJECTED, summarise
from verideq.checker import Checker, check
from verideq.checker.files import parse_blob
from verideq.data import load
from verideq.errors import InconsistencyError, RegionError
from verideq.graph import load_model
from verideq.region import Region
from verideq.report.html import write_report
from verideq.report.run import read_runs
from verideq.status import Status

DIGITS = load("digits")
COUNT = 4
IMAGES, LABELS = DIGITS.scaled(slice(0, COUNT)), DIGITS.labels[:COUNT]


@pytest.fixture(scope="module", autouse=True)
def _short_attack() -> Iterator[None]:
    """A few steps break these models; what is tested is what is made of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKS, "pgd", PGD(steps=6, restarts=2))
        yield


@pytest.fixture(scope="module")
def prepared(digits_model: Path) -> Prepared:
    return prepare(load_model(digits_model))


@pytest.fixture(scope="module")
def verdicts(prepared: Prepared) -> list[Verdict]:
    return certify(prepared, IMAGES, LABELS, "1/20", attack="pgd", radius=True)


# --- balls of several radii -------------------------------------------------------------------------------------------

RADII = (Fraction(1, 10), Fraction(0), Fraction("1e-3"), Fraction(1, 3), Fraction(7))


def mixed(norm: str, weights: Tensor | None = None, clip: tuple[float, float] | None = (0.0, 1.0)) -> Region:
    center = torch.rand(len(RADII), 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Region(center, RADII, norm, clip, weights=weights)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_ball_does_not_feel_its_neighbours(norm: str, weighted: bool) -> None:
    weights = torch.tensor([[[1.0, 0.0, 0.3], [2.0, 1.0, 0.7]]]) if weighted else None
    region = mixed(norm, weights)
    x = region.center + torch.linspace(-0.4, 0.4, 6, dtype=torch.float64).view(1, 1, 2, 3)
    assert region.radii == RADII
    for i, eps in enumerate(RADII):
        one = Region(region.center[i : i + 1], eps, norm, weights=weights)
        for own, other in ((region[i : i + 1], one), (region[torch.tensor([i])], one), (one.with_eps([eps]), one)):
            assert own.radii == (eps,) and own.eps == eps
            assert torch.equal(own.center, other.center)
        for make in (Region.box, Region.inner_box):
            whole, alone = make(region), make(one)
            assert torch.equal(whole.lower[i], alone.lower[0]) and torch.equal(whole.upper[i], alone.upper[0])
        points = region.project(x)
        assert torch.equal(points[i], one.project(x[i : i + 1])[0])
        assert bool(region.contains(points)[i]) and bool(one.contains(points[i : i + 1]))
        assert bool(region.contains(x)[i]) == bool(one.contains(x[i : i + 1]))


def test_several_radii_have_no_eps_of_all() -> None:
    region = mixed("linf")
    with pytest.raises(RegionError, match="5 samples of this region have radii of their own"):
        _ = region.eps
    with pytest.raises(RegionError, match="4 radii for 5 samples"):
        region.with_eps(RADII[:4])
    with pytest.raises(RegionError, match="negative"):
        region.with_eps([*RADII[:4], -1])
    assert region.with_eps("1/7").eps == Fraction(1, 7) and region.radii == RADII


@given(st.lists(st.integers(-(2**20), 2**20), min_size=3, max_size=3), st.sampled_from(["linf", "l2"]), st.booleans())
def test_a_point_lies_at_its_distance_and_nowhere_nearer(shifts: list[int], norm: str, weighted: bool) -> None:
    weights = torch.tensor([1.0, 0.3, 3.0], dtype=torch.float64) if weighted else None
    center = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64)
    region = Region(center, 0, norm, None, weights=weights)
    x = center + torch.tensor([shifts], dtype=torch.float64) * 2.0**-20
    (distance,) = region.distances(x)
    assert isinstance(distance, Fraction)
    assert bool(region.with_eps(distance).contains(x))
    if distance:
        inside = distance * (1 - Fraction(1, 2**50)) if norm == "l2" else distance - Fraction(1, 2**2000)
        assert not bool(region.with_eps(inside).contains(x))


def test_what_may_not_move_is_infinitely_far() -> None:
    region = Region(torch.zeros(1, 2), 1, "l2", None, weights=torch.tensor([1.0, 0.0]))
    assert region.distances(torch.tensor([[1.0, 2.0**-1000]], dtype=torch.float64)) == (math.inf,)
    assert region.distances(torch.tensor([[0.75, 0.0]], dtype=torch.float64)) == (Fraction(3, 4),)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_covering_ball_holds_every_corner_of_the_range(norm: str) -> None:
    region = mixed(norm, clip=(0.0, 1.0))
    covering = region.covering()
    assert covering is not None
    whole = region.with_eps(covering)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6).view(-1, 1, 2, 3)
    for corner in corners:
        assert bool(whole.contains(corner.expand_as(region.center)).all())
    smaller = region.with_eps([eps * Fraction(999, 1000) for eps in covering])
    held = torch.stack([smaller.contains(corner.expand_as(region.center)) for corner in corners])
    assert not bool(held.all(0).any())
    assert mixed(norm, clip=None).covering() is None


def test_noise_and_attack_depend_on_a_samples_own_radius(prepared: Prepared) -> None:
    own = [Fraction(1, 50), Fraction(1, 7), Fraction(2**70 + 1, 2**73), Fraction(1, 5)]
    indices, region = torch.arange(4), Region(IMAGES[:4], own)
    noise = uniform_noise(3, indices, own, 1, (1, 8, 8))
    C = torch.eye(10, dtype=torch.float64)[None] - torch.eye(10, dtype=torch.float64)[LABELS[:4]][:, None]
    C, rhs = -C[:, 1:], torch.zeros(4, 9, dtype=torch.float64)
    points, margins = PGD()(prepared.graph, region, C, rhs, indices=indices, seed=3)
    for i in range(4):
        part = torch.tensor([i])
        assert torch.equal(noise[i], uniform_noise(3, part, own[i : i + 1], 1, (1, 8, 8))[0])
        alone = PGD()(prepared.graph, region[part], C[part], rhs[part], indices=part, seed=3)
        torch.testing.assert_close(points[i], alone[0][0], rtol=0, atol=1e-9)
        torch.testing.assert_close(margins[i], alone[1][0], rtol=1e-6, atol=1e-9)


# --- what is reported -------------------------------------------------------------------------------------------------


def test_a_radius_is_what_the_checker_accepted(prepared: Prepared, verdicts: list[Verdict]) -> None:
    checker = Checker(prepared.file, prepared.certificate)
    for i, verdict in enumerate(verdicts):
        assert verdict.radius is not None and verdict.radius_certificate is not None
        head = parse_blob(verdict.radius_certificate).head
        assert (head["eps"], head["index"], head["label"]) == (str(verdict.radius), i, int(LABELS[i]))
        assert checker.decide([verdict.radius_certificate])[0][0]
        assert (verdict.radius >= Fraction(1, 20)) or not verdict.certified
        # Exactly as far as claimed, and about as far as it goes.
        assert certify(prepared, IMAGES[i : i + 1], LABELS[i : i + 1], verdict.radius)[0].certified
        wider = verdict.radius * Fraction(102, 100)
        assert not certify(prepared, IMAGES[i : i + 1], LABELS[i : i + 1], wider)[0].certified


def test_an_attacked_radius_is_that_of_a_proved_witness(prepared: Prepared, verdicts: list[Verdict]) -> None:
    for i, verdict in enumerate(verdicts):
        radius, witness = verdict.attacked_radius, verdict.radius_witness
        assert radius is not None and witness is not None and verdict.radius is not None
        assert verdict.radius < radius < 2 * verdict.radius
        point, region = torch.as_tensor(witness)[None], Region(IMAGES[i : i + 1], radius)
        assert bool(region.contains(point)) and not bool(
            region.with_eps(radius * (1 - Fraction(1, 2**60))).contains(point)
        )
        assert int(prepared.graph(point).argmax()) != int(LABELS[i])
        highest = METHODS["interval"](prepared, Query(Box(point, point), None, None)).box
        others = [highest.lower[0, j] - highest.upper[0, int(LABELS[i])] for j in range(10) if j != int(LABELS[i])]
        assert max(others) > 0


def test_eps_says_where_to_begin_and_no_more(prepared: Prepared, verdicts: list[Verdict]) -> None:
    for eps in ("1/500",):
        for verdict, other in zip(
            certify(prepared, IMAGES, LABELS, eps, attack="pgd", radius=True), verdicts, strict=True
        ):
            assert verdict.radius is not None and other.radius is not None
            assert abs(verdict.radius - other.radius) <= Fraction(1, 100) * other.radius
            assert not verdict.certified or verdict.radius >= verdict.eps


def test_a_radius_does_not_depend_on_the_batch(prepared: Prepared) -> None:
    order = list(range(COUNT))[::-1]
    plain = certify(prepared, IMAGES, LABELS, "1/20", radius=True, method="adjoint")
    found = certify(prepared, IMAGES[order], LABELS[order], "1/20", radius=True, method="adjoint", batch_size=3)
    assert [v.radius for v in found] == [plain[i].radius for i in order]
    assert all(v.attacked_radius is None and v.radius_witness is None for v in plain)
    options: dict[str, Any] = {"attack": "pgd", "radius": True, "method": "interval"}
    whole, halves = (certify(prepared, IMAGES, LABELS, "1/20", batch_size=size, **options) for size in (4, 2))
    for own, other in zip(halves, whole, strict=True):
        assert own.radius == other.radius
        assert float(own.attacked_radius or 0) == pytest.approx(float(other.attacked_radius or 1), rel=1e-9)


def test_l2_balls_are_bounded_as_balls_and_checked(prepared: Prepared) -> None:
    part, options = slice(0, 2), {"attack": "pgd", "method": "adjoint-refined"}
    tight = certify(prepared, IMAGES[part], LABELS[part], "1/10", norm="l2", radius=True, **options)
    boxes = certify(prepared, IMAGES[part], LABELS[part], "1/10", norm="l2", radius=True, method="interval")
    checker = Checker(prepared.file, prepared.certificate, exact=False)
    for i, (verdict, box) in enumerate(zip(tight, boxes, strict=True)):
        assert verdict.radius is not None and box.radius is not None and verdict.radius_certificate is not None
        assert verdict.radius > 1.2 * box.radius
        head = parse_blob(verdict.radius_certificate).head
        assert head["norm"] == "l2" and head["eps"] == str(verdict.radius)
        assert checker.decide([verdict.radius_certificate])[0][0]
        assert verdict.attacked_radius is not None and verdict.radius < verdict.attacked_radius
        point = torch.as_tensor(verdict.radius_witness)[None]
        assert bool(Region(IMAGES[i : i + 1], verdict.attacked_radius, "l2").contains(point))


def test_what_is_wrong_at_the_centre_has_no_radius(prepared: Prepared) -> None:
    wrong = (LABELS[:2] + 1) % 10
    for verdict in certify(prepared, IMAGES[:2], wrong, "1/20", attack="pgd", radius=True):
        assert verdict.status is Status.MISCLASSIFIED
        assert verdict.radius is verdict.attacked_radius is verdict.radius_certificate is None


def test_radii_without_a_valid_range_and_with_weights() -> None:
    """A linear model, whose radius is known: |margin| over the weighted sum of the coefficients."""
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        net.bias.zero_()
    net.pixel_range = None  # type: ignore[assignment]  # an attribute that the tracer reads
    x, weights = torch.tensor([[3.0, 1.0]]), torch.tensor([1.0, 0.5])
    for norm, truth in (("linf", 5 / 2), ("l2", 5 / math.sqrt(2))):
        (verdict,) = certify(
            net, x, torch.tensor([0]), 1, norm=norm, weights=weights, radius=True, attack="pgd", method="adjoint"
        )
        assert float(verdict.radius or 0) <= truth <= float(verdict.attacked_radius or 0)
        assert float(verdict.radius or 0) >= 0.99 * truth and float(verdict.attacked_radius or 9) <= 1.01 * truth


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("weights", [(0.0, 2.0**-280), (2.0**-280, 2.0**-290), (0.0, 0.0)])
@pytest.mark.parametrize("eps", ["1e-400", "1e-3", "1e300"])
def test_radii_that_no_float64_tells_apart(norm: str, weights: tuple[float, float], eps: str) -> None:
    net = torch.nn.Linear(2, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        net.bias.copy_(torch.tensor([-1.0, 0.0]))
    x, label = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([0])
    (verdict,) = certify(
        net, x, label, eps, norm=norm, weights=torch.tensor(weights, dtype=torch.float64), radius=True, attack="pgd"
    )
    # The whole range is left, one feature or two; or nothing moves, and everything holds.
    reach = 0.25 / max(weights) if any(weights) else math.inf
    certified, attacked = verdict.radius or Fraction(0), verdict.attacked_radius or Fraction(2) ** 1001
    assert verdict.reason in ("", "a point of the region provably lacks the property")
    assert 0 < certified < attacked and certified <= (Fraction(2) ** 1000 if reach == math.inf else 2 * Fraction(reach))
    assert radii.Bracket(Fraction(0), Fraction(1, 10**400), Fraction(0), radii.NEAR).next() > 0


@given(st.fractions(min_value=1, max_value=10**9), st.integers(-2000, 2000), st.sampled_from((1, 2)))
def test_a_short_number_is_near(value: Fraction, exponent: int, root: int) -> None:
    value *= Fraction(2) ** exponent
    assert abs(radii._short(value, root) ** root - value) <= value / 2**13


# --- when something is wrong ------------------------------------------------------------------------------------------


def _refusing(monkeypatch: pytest.MonkeyPatch, keep: Callable[[str], bool]) -> None:
    plain = Checker.decide

    def decide(self: Checker, payloads: list[bytes], *rest: Any) -> list[Any]:
        found = plain(self, payloads, *rest)
        return [
            one if keep(parse_blob(payload).head["eps"]) else (False, "as the test says", None)
            for payload, one in zip(payloads, found, strict=True)
        ]

    monkeypatch.setattr(Checker, "decide", decide)


def test_a_refused_radius_is_never_reported(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(monkeypatch, lambda eps: eps == "1/20")
    reasons = []
    for verdict in certify(prepared, IMAGES, LABELS, "1/20", radius=True):
        # What was accepted at eps stands, and nothing above it.
        assert verdict.radius == (Fraction(1, 20) if verdict.certified else None)
        assert verdict.radius_certificate == verdict.certificate
        assert verdict.reason.count(REJECTED) == 1 or not verdict.certified
        reasons.append(verdict.reason)
    lines = [{"index": 0, "eps": 0.05, "norm": "linf", "status": "CERTIFIED", "reason": max(reasons)}]
    blank = dict.fromkeys(("prediction", "attacked", "checked", "method", "seconds"), None) | {"label": 1}
    assert summarise([line | blank for line in lines], {})["results"][0]["rejected"] == 1


def _lying(prepared: Prepared, query: Query) -> Bounds:
    rows = query.rhs if query.rhs is not None else torch.zeros(len(query), 1)
    return Bounds(Box(rows + 1, rows + 2), torch.zeros(len(query), dtype=torch.long))


def test_a_witness_in_a_certified_ball_is_an_inconsistency(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = METHODS["interval"]

    def interval(prepared: Prepared, query: Query) -> Bounds:
        # Right about points, which prove witnesses, and about the small ball of the question.
        small = bool((query.box.width < 0.03).all())
        return plain(prepared, query) if small else _lying(prepared, query)

    monkeypatch.setitem(METHODS, "interval", interval)
    with pytest.raises(InconsistencyError, match="broken by a proved witness") as caught:
        certify(prepared, IMAGES[:2], LABELS[:2], "1/100", attack="pgd", radius=True, check=False)
    evidence = caught.value.evidence
    assert Region(IMAGES[evidence["index"]][None], evidence["verdict"].eps).contains(
        torch.as_tensor(evidence["witness"])[None]
    )


def test_with_the_checker_a_lying_bound_is_refused(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "interval", _lying)
    for verdict in certify(prepared, IMAGES[:2], LABELS[:2], "1/4", radius=True, method="interval"):
        assert not verdict.certified and verdict.radius is None


def test_what_breaks_costs_one_sample(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = radii.written

    def written(prepared: Prepared, part: Any, *others: Any) -> bytes:
        if int(part.indices[others[0]]) == 2:
            raise MemoryError("as the test says")
        return plain(prepared, part, *others)

    monkeypatch.setattr(radii, "written", written)
    found = certify(prepared, IMAGES, LABELS, "1/20", radius=True, method="interval")
    assert found[2].radius is None and "the search for the radius ended with MemoryError" in found[2].reason
    assert all(
        v.radius is not None and v.radius > 0 and "search" not in v.reason for i, v in enumerate(found) if i != 2
    )


def test_a_clock_that_runs_out_leaves_a_smaller_radius(
    prepared: Prepared, verdicts: list[Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by a hundredth of a second whenever it is read."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 0.01
        return now[0]

    decided = [replace(v, radius=None) for v in verdicts]
    task = deciding.Task(
        Region(IMAGES, "1/20"),
        LABELS,
        *deciding.specification(prepared, IMAGES, LABELS, None, None),
        torch.arange(COUNT),
        True,
    )
    found = []
    monkeypatch.setattr("time.monotonic", monotonic)
    for timeout in (0.02, 0.1, 1.0):
        now[0] = 0.0
        found.append(
            radii.reaches(prepared, task, Budget(attack="pgd", timeout=timeout, method="interval"), None, [decided])
        )
        assert now[0] <= timeout * COUNT * 1.1 + 0.06  # a few looks at the clock
    for early, later, last, verdict in zip(*found, decided, strict=True):
        assert (early.radius or 0) <= (later.radius or 0) <= (last.radius or 0) <= Fraction(1)
        assert early.radius is None or early.radius >= verdict.eps or not verdict.certified
        assert (early.attacked or 1) >= (last.attacked or 1)


# --- in a run ---------------------------------------------------------------------------------------------------------


def make_run(folder: Path, model: Path, **changes: Any) -> Run:
    budget = Budget(attack="pgd", radius=True, method="interval")
    questions = Questions(
        "digits", "digits", "test", DIGITS.hash, DIGITS.scaled(slice(0, 6)), DIGITS.labels[:6], list(range(6)),
        [Fraction(1, 50), Fraction(1, 20)], "linf", None, (0.0, 1.0),
    )  # fmt: skip
    return replace(
        Run(folder, load_model(model), "small", questions, budget, batch_size=2, certificates=True), **changes
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"seconds": 0} for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("radii")
    make_run(folder, digits_model).execute()
    return folder


def test_a_run_keeps_radii_records_and_witnesses(whole: Path) -> None:
    records = lines(whole)
    assert len(records) == 12 and all(outcome.accepted for outcome in check(whole))
    data = (whole / "certificates" / "records.bin").read_bytes()
    for record in records:
        twin = next(r for r in records if r["index"] == record["index"])
        assert record["radius"] == twin["radius"] and record["radius_certificate"] == twin["radius_certificate"]
        if record["radius"] is None:
            continue
        start = int(record["radius_certificate"].rpartition(":")[2])
        payload = data[start + 8 : start + 8 + int.from_bytes(data[start : start + 8], "little")]
        head = parse_blob(payload).head
        assert head["index"] == record["index"] and float(Fraction(head["eps"])) == record["radius"]
        assert record["radius"] >= record["eps"] or record["status"] != "CERTIFIED"
        assert record["radius"] < record["attacked_radius"]
        witness = np.load(whole / record["radius_witness"])
        shift = np.abs(witness - DIGITS.scaled([record["index"]])[0].numpy()).max()
        assert shift == pytest.approx(record["attacked_radius"], rel=1e-12)
    # A radius is a radius of a sample: once, whatever the number of eps.
    assert len({r["radius_certificate"] for r in records}) <= 6


class Killed(BaseException):
    """What SIGKILL would do, as far as files can tell."""


@pytest.mark.parametrize("after", [4, 8])
def test_a_run_with_radii_resumes_between_chunks(tmp_path: Path, whole: Path, digits_model: Path, after: int) -> None:
    def stop(done: int, total: int) -> None:
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        make_run(tmp_path, digits_model).execute(progress=stop)
    assert len(lines(tmp_path)) == after
    # Part of what the next chunk would have written.
    with (tmp_path / "certificates" / "records.bin").open("ab") as stream:
        stream.write(b"\x10" + bytes(20))
    make_run(tmp_path, digits_model).execute(resume=True)
    assert lines(tmp_path) == lines(whole)
    for name in ("certificates/records.bin", "witnesses/0_radius.npy"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    mine, other = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, whole))
    assert mine["radii"] == other["radii"] and mine["radii"]["n"] == 6


def test_the_page_and_the_table_show_radii(whole: Path, tmp_path: Path) -> None:
    page = write_report([whole], out=tmp_path / "page.html").read_text()
    assert 'aria-label="Histograms of the certified and of the attacked radii"' in page
    assert "median radius: certified" in page
    (run,) = read_runs([whole])
    assert run.summary["radii"]["certified_median"] > 0


def test_medians_and_means_count_every_sample() -> None:
    blank = {
        "eps": 0.1,
        "norm": "linf",
        "label": 1,
        "prediction": 1,
        "reason": "",
        "checked": True,
        "method": "interval",
    }
    blank |= {"seconds": 0.0, "attacked": True}
    samples = [
        {"status": "CERTIFIED", "radius": 0.3, "attacked_radius": 0.5},
        {"status": "MISCLASSIFIED", "radius": None, "attacked_radius": None},
        {"status": "UNKNOWN", "radius": 0.06, "attacked_radius": 0.1},
    ]
    records = [blank | sample | {"index": i} for i, sample in enumerate(samples)]
    records += [record | {"eps": 0.2} for record in records]
    meta = {"attack": "pgd", "radius": True}
    assert summarise(records, meta)["radii"] == pytest.approx(
        {"n": 3, "certified_median": 0.06, "certified_mean": 0.12, "attacked_median": 0.1, "attacked_mean": 0.2}
    )
    unbroken = [record | {"attacked_radius": None} if record["index"] == 0 else record for record in records]
    found = summarise(unbroken, meta)["radii"]
    assert found["attacked_median"] == 0.1 and found["attacked_mean"] is None
    alone = summarise(records, meta | {"attack": "none"})["radii"]
    assert alone["attacked_median"] is alone["attacked_mean"] is None and alone["certified_mean"] == pytest.approx(0.12)
    assert "radii" not in summarise(records, {"attack": "pgd"})
