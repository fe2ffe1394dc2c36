"""Suites, defences and `verideq attack`: the pointwise worst, its warnings, and folders that can be taken up again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from verideq.attacks import ATTACKS, PGD, SUITES, Problem, Square, open_model, sweep
from verideq.attacks.defences import (
    Deciding,
    EarlyState,
    EntropyReduction,
    FinalState,
    StateEnsemble,
    choose_early,
    defence_named,
    entropies,
    entropy,
    entropy_curve,
    transfer,
)
from verideq.attacks.opened import PlainDynamics
from verideq.attacks.suites import READY_MADE, Stage, Suite, warnings_of
from verideq.attacks.warm import Warm
from verideq.certify import certify
from verideq.certify.attack import general_hash
from verideq.certify.bound import margin_rows
from verideq.cli.main import run as command
from verideq.data import load
from verideq.equilibrium import DEQ, Auto, Broyden, Equilibrium, Implicit, Picard, path
from verideq.equilibrium.surrogates import Final, Simultaneous, Unrolled
from verideq.errors import InputError, UnknownName
from verideq.graph import load_model
from verideq.models.mdeq import dense
from verideq.parametrizations import RowGauge
from verideq.region import Region
from verideq.status import Status


def problem_of(model: nn.Module, x: Tensor, labels: Tensor, eps: str = "0.05") -> Problem:
    C = margin_rows(labels, 10)
    return Problem(open_model(model), Region(x, eps), C, torch.zeros(C.shape[:2]).double(), torch.arange(len(x)))


@pytest.fixture(scope="module")
def digits(digits_model: Path) -> tuple[nn.Module, Tensor, Tensor]:
    model, data = load_model(digits_model), load("digits", "test")
    return model, data.scaled(range(12)), data.labels[:12]


@pytest.fixture(scope="module")
def general() -> tuple[DEQ, Tensor, Tensor]:
    """A general DEQ that has seen the digits for a second."""
    torch.manual_seed(0)
    model, data = dense((1, 8, 8), 10, units=16), load("digits", "train")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    images, labels = data.scaled(range(512)).float(), data.labels[:512]
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = load("digits", "test")
    return model.eval(), test.scaled(range(12)), test.labels[:12]


SMALL = Suite("small", (Stage(PGD(5, 1)), Stage(READY_MADE, Unrolled((2,), 2, 0.5)), Stage(Square(20))))


def test_the_sweep_is_the_papers_144_attacks_strongest_first() -> None:
    stages = sweep()
    assert len(stages) == 144 == len({s.name for s in stages})
    seen = {(s.surrogate.states[0], s.surrogate.steps, s.surrogate.damping) for s in stages}  # type: ignore[attr-defined]  # unrolled
    assert seen == {(n, k, d) for n in range(1, 9) for k in range(1, 10) for d in (0.5, 1.0)}
    assert stages[0].surrogate == Unrolled((3,), 5, 0.5)


def test_every_suite_has_a_stage_at_every_kind_of_state() -> None:
    assert list(ATTACKS) == ["none", "pgd", "standard", "intermediate", "full"]
    names = {name: [s.name for s in suite.stages] for name, suite in SUITES.items()}
    assert {s.attack.name for s in SUITES["standard"].stages} == {
        "PGD-20x3", "APGD-CE", "APGD-T", "FAB-T", "Square-5000"
    }  # fmt: skip
    assert set(names["standard"]) | set(names["intermediate"]) <= set(names["full"])
    for kind in ("final", "unrolled z3", "unrolled z1-8", "simultaneous z4", "simultaneous z1-8"):
        assert any(kind in name for name in names["intermediate"]), kind
    assert all(len(set(n)) == len(n) for n in names.values())


@pytest.mark.parametrize("prune", [True, False])
def test_a_suite_is_the_pointwise_worst(digits: tuple[nn.Module, Tensor, Tensor], prune: bool) -> None:
    problem = problem_of(*digits)
    report = replace(SMALL, prune=prune).run(problem)
    assert bool(problem.region.contains(report.points).all())
    torch.testing.assert_close(problem.judge(report.points), report.margins, rtol=1e-5, atol=1e-5)
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for tried in report.tried:
        best[tried.at] = torch.minimum(best[tried.at], tried.found.margins)
    assert torch.equal(best, report.margins)
    counts = [len(t.at) for t in report.tried]
    assert counts[0] == 12
    assert counts == sorted(counts, reverse=True) if prune else counts == [12, 12, 12]
    for k in range(12):
        own = next(t for t in report.tried if t.name == report.name(k))
        assert float(own.found.margins[own.at == k]) == float(report.margins[k])
    points, margins = SMALL(digits[0], problem.region, problem.C, problem.rhs, indices=problem.indices)
    assert bool((margins <= report.margins + 1e-9).all()) or not prune
    assert points.shape == report.points.shape


def test_a_model_without_an_equilibrium_gets_each_attack_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    problem = problem_of(model, x, model(x).argmax(1))
    assert isinstance(problem.dynamics, PlainDynamics)
    suite = Suite("twice", (Stage(PGD(3, 1)), Stage(READY_MADE, Unrolled((1,))), Stage(READY_MADE)), prune=False)
    assert [t.name for t in suite.run(problem).tried] == ["PGD-3 at final", "PGD-10 at final"]


def test_warm_gradients_of_a_hard_sigmoid_stop_at_its_ceiling() -> None:
    torch.manual_seed(0)
    layer = Equilibrium(RowGauge.apply(nn.Linear(12, 12, bias=False)), nn.Linear(6, 12), activation="hard-sigmoid")
    model, x = nn.Sequential(layer, nn.Linear(12, 3)).double().eval(), 3 * torch.rand(5, 6, dtype=torch.float64)
    assert bool((layer(x) == 1).any()) and bool((layer(x) == 0).any())
    dynamics = open_model(model, tol=1e-12, backward_tol=1e-12)
    exact = Final().slope(dynamics, x, lambda f: f[:, 0]).gradient
    found = Warm(first=Auto(tol=1e-12)).slope(dynamics, x, lambda f: f[:, 0]).gradient
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_warm_gradients_are_the_exact_ones(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    problem = problem_of(*digits)
    x, warm = problem.region.center, Warm(6)

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, digits[2], reduction="none")

    for step in range(3):
        near = x + 0.01 * step
        exact = Final(Implicit()).slope(problem.dynamics, near, loss)
        found = warm.slope(problem.dynamics, near, loss)
        torch.testing.assert_close(
            found.gradient, exact.gradient, rtol=0.03, atol=0.03 * float(exact.gradient.abs().max())
        )
        torch.testing.assert_close(found.losses, exact.losses, rtol=0.02, atol=0.02)
    plain = replace(problem, dynamics=PlainDynamics(nn.Sequential(nn.Flatten(), nn.Linear(64, 10).double())))
    assert Warm().slope(plain.dynamics, x, loss).gradient.shape == x.shape
    cold, quick = PGD(20, 1).search(problem), PGD(20, 1).search(replace(problem, surrogate=Warm()))
    assert int((quick.margins < 0).sum()) >= int((cold.margins < 0).sum()) - 1
    torch.testing.assert_close(problem.judge(quick.points), quick.margins)


# Defences


@pytest.mark.parametrize("defence", [EarlyState(3), StateEnsemble(4), EntropyReduction(states=4)], ids=lambda d: d.name)
def test_a_defence_shows_no_sample_another(general: tuple[DEQ, Tensor, Tensor], defence: EarlyState) -> None:
    model, x, _ = general
    dynamics = open_model(model)
    together = defence.outputs(dynamics, x)
    torch.testing.assert_close(defence.outputs(dynamics, x[4:5])[0], together[4], rtol=1e-9, atol=1e-9)
    assert not together.requires_grad


def test_defences_read_the_states_that_they_name(general: tuple[DEQ, Tensor, Tensor]) -> None:
    dynamics, x = open_model(general[0]), general[1]
    injected = dynamics.inject(x)
    states = path(dynamics, injected).states
    torch.testing.assert_close(EarlyState(3).outputs(dynamics, x), dynamics.head(states[2], injected))
    mean = (states.sum(0) + dynamics.final(injected)) / 9
    torch.testing.assert_close(StateEnsemble().outputs(dynamics, x), dynamics.head(mean, injected))
    torch.testing.assert_close(FinalState().outputs(dynamics, x), general[0].double()(x).detach())
    general[0].float()


@pytest.mark.parametrize("track", [Broyden(max_steps=8), Picard(max_steps=8)], ids=["broyden", "picard"])
def test_entropy_reduction_without_a_radius_is_the_forward_path(
    general: tuple[DEQ, Tensor, Tensor], track: Broyden
) -> None:
    dynamics, x = open_model(general[0]), general[1]
    still, _ = EntropyReduction(radius=0.0, track=track).states_of(dynamics, x)
    torch.testing.assert_close(still, path(dynamics, dynamics.inject(x), track).states)


def test_entropy_reduction_lowers_the_entropy_and_stays_in_its_ball(general: tuple[DEQ, Tensor, Tensor]) -> None:
    dynamics, x = open_model(general[0]), general[1]
    reduction = EntropyReduction(beta=0.01, radius=0.04)
    states, injected = reduction.states_of(dynamics, x)
    after = entropy(dynamics.head(states[-1], injected))
    before = entropy_curve(dynamics, x)
    assert float((after - before[-1]).mean()) < 0
    z = path(dynamics, dynamics.inject(x)).states[1]
    moved = reduction._reduce(dynamics, x, x, z)
    assert bool(((moved - x).abs() <= 0.04 + 1e-12).all())
    assert bool(((moved >= 0) & (moved <= 1)).all())
    # Before the first update the states are those of the plain path.
    torch.testing.assert_close(states[0], path(dynamics, dynamics.inject(x)).states[0])


def test_entropies_are_those_of_the_formula() -> None:
    outputs = torch.tensor([[0.0, 0.0], [100.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(entropy(outputs), torch.tensor([np.log(2), 0.0], dtype=torch.float64))
    found = entropies(torch.tensor([0.1, 0.5, 0.2]), torch.tensor([0.3, 0.4, 0.2]))
    assert found.share == pytest.approx(1 / 3)
    assert found.difference == pytest.approx(-0.1 / 3)


def test_the_early_state_is_the_best_one_on_the_attacked_validation_points(general: tuple[DEQ, Tensor, Tensor]) -> None:
    model, x, labels = general
    problem = problem_of(model, x, labels, "0.1")
    chosen = choose_early(problem, labels)
    points = READY_MADE.search(problem).points
    right = [int((EarlyState(n).outputs(problem.dynamics, points).argmax(1) == labels).sum()) for n in range(1, 9)]
    assert right[chosen.state - 1] == max(right)


def test_transfer_takes_the_worst_over_sources(general: tuple[DEQ, Tensor, Tensor]) -> None:
    model, x, labels = general
    problem = problem_of(model, x, labels, "0.08")
    defences = [FinalState(), EarlyState(2), StateEnsemble()]
    suite = Suite("two", (Stage(READY_MADE), Stage(READY_MADE, Simultaneous((1, 2, 3)))))
    table = transfer(problem, defences, suite)
    assert list(table) == ["final", "early:2", "ensemble"]
    for row in table.values():
        assert list(row) == ["final", "early:2", "ensemble", "ALL"]
        assert torch.equal(row["ALL"], row["final"] & row["early:2"] & row["ensemble"])
    own = replace(suite, prune=False).run(replace(problem, decide=Deciding(defences[1], problem.dynamics)))
    assert not bool((table["early:2"]["early:2"] & (own.margins < 0)).any())


def test_defences_have_names() -> None:
    assert defence_named("early:4", radius=0.1, clip=None) == EarlyState(4)
    found = defence_named("entropy", radius=0.1, clip=(0, 1))
    assert isinstance(found, EntropyReduction)
    assert (found.radius, found.beta) == (0.1, 0.025)
    for bad in ("late", "early:x", "early:"):
        with pytest.raises(UnknownName, match="defence"):
            defence_named(bad, radius=0.1, clip=None)
    for build in (lambda: EarlyState(0), lambda: EntropyReduction(updates=0), lambda: EntropyReduction(beta=0)):
        with pytest.raises(InputError):
            build()


# Warnings


def test_masked_gradients_are_reported() -> None:
    quiet = warnings_of([None] * 40, [False] * 40, [1.0] * 40, [0.5] * 40)
    assert quiet == []
    (vanished,) = warnings_of([None] * 40, [True] + [False] * 39, [1.0] * 40, [0.5] * 40)
    assert "vanished on 1 of 40" in vanished
    (square,) = warnings_of(["Square-5000 at final"] + [None] * 39, [False] * 40, [1.0] * 40, [0.5] * 40)
    assert "Square" in square
    (hidden,) = warnings_of(["PGD-10 at unrolled z1 k=1 λ=1"] + [None] * 39, [False] * 40, [1.0] * 40, [0.5] * 40)
    assert "it hides gradients" in hidden
    (steps,) = warnings_of([None] * 40, [False] * 40, [1.0] * 40, [1.0] * 40)
    assert "more steps do not help" in steps
    assert warnings_of([], [], [], []) == []


# Certify, and the command


def test_certify_with_a_suite_agrees_with_the_attack(
    digits: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "standard", SMALL)
    model, x, labels = digits
    verdicts = certify(model, x, labels, "0.05", attack="standard", method="interval")
    assert any(v.status is Status.FALSIFIED for v in verdicts)
    for v in verdicts:
        assert not (v.certified and v.attacked is False)
        assert v.status is not Status.FALSIFIED or v.witness is not None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "intermediate", replace(SMALL, name="intermediate"))


def lines(folder: Path) -> list[dict[str, object]]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "results.jsonl").read_text().splitlines()
    ]


def test_the_command_attacks_resumes_and_reports(
    digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None
) -> None:
    arguments = ["attack", str(digits_model), "--limit", "10", "--eps", "0.02", "--eps", "0.06", "--threads", "1"]
    arguments += ["--suite", "intermediate", "--batch-size", "4", "--device", "cpu"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert command([*arguments, "--out", str(whole), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["suite"], summary["defence"]) == ("intermediate", "final")
    model = load_model(digits_model)
    for result in summary["results"]:
        mine = [r for r in lines(whole) if r["eps"] == result["eps"]]
        assert result["n"] == len(mine) == 10
        assert result["certified"] == 0
        assert result["attacked"] == sum(r["attacked"] is True for r in mine)
        assert sum(result["by_attack"].values()) == sum(r["attacked"] is False for r in mine)
        assert result["entropy"]["P"] >= 0.5
    broken = [r for r in lines(whole) if r["attacked"] is False]
    assert broken
    data = load("digits", "test")
    for r in broken:
        point = torch.from_numpy(np.load(whole / str(r["witness"])))[None]
        assert bool(Region(data.scaled([r["index"]]), str(r["eps"])).contains(point)[0])  # type: ignore[list-item]  # an int
        assert int(model(point.float()).argmax(1)) != r["label"]
        assert r["status"] == "FALSIFIED"
    assert command([*arguments, "--out", str(torn)]) == 0
    assert "intermediate against final" in capsys.readouterr().out.replace("\n", " ")
    content = (torn / "results.jsonl").read_bytes()
    (torn / "results.jsonl").write_bytes(content[: len(content) * 2 // 3])
    assert command([*arguments, "--out", str(torn), "--resume"]) == 0
    assert lines(torn) == lines(whole)
    page = (torn / "report.html").read_text()
    assert "What broke the samples" in page
    assert "Entropy of the prediction" in page
    capsys.readouterr()
    assert command([*arguments, "--out", str(torn), "--resume", "--defence", "ensemble"]) == 2
    assert "defence" in capsys.readouterr().err
    assert command([*arguments, "--out", str(torn), "--resume", "--suite", "pgd"]) == 2
    assert command(["report", str(whole), str(torn), "--out", str(tmp_path / "both.html")]) == 0


@pytest.mark.parametrize("defence", ["final", "early", "early:2", "ensemble", "entropy"])
def test_a_general_deq_is_attacked_from_its_weights(
    general: tuple[DEQ, Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small: None,
    defence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_deq", raising=False)
    from safetensors.torch import save_file

    save_file(general[0].state_dict(), tmp_path / "weights.safetensors")
    source = "from verideq.models.mdeq import dense\n\n\ndef build():\n    return dense((1, 8, 8), 10, units=16)\n"
    (tmp_path / "my_deq.py").write_text(source)
    arguments = ["attack", "my_deq:build", "--weights", "weights.safetensors", "--limit", "6", "--eps", "0.08"]
    arguments += ["--suite", "intermediate", "--threads", "1", "--json", "--out", "run", "--defence", defence]
    assert command(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    (result,) = summary["results"]
    assert result["falsified"] == result["certified"] == result["error"] == 0
    meta = json.loads(Path("run/run.json").read_text())
    assert meta["defence"] == summary["defence"] != "early"
    for r in lines(Path("run")):
        if r["attacked"] is False:
            assert r["witness"] is not None
            assert "as the model runs" in str(r["reason"])


def test_refusals_are_one_line(digits_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--suite", "autoattack"], "unknown suite 'autoattack'; choose one of: pgd, standard, intermediate, full"),
        (["--defence", "late"], "unknown defence 'late'"),
        (["--limit", "0"], "--limit 0"),
        (["--resume"], "--out DIR"),
        (["--norm", "l1"], "unknown norm"),
        (["--batch-size", "0"], "--batch-size 0"),
    ):
        assert command(["attack", str(digits_model), "--threads", "1", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split())
        assert len(error.splitlines()) == 1


def test_the_hash_of_a_general_deq_covers_its_weights(general: tuple[DEQ, Tensor, Tensor]) -> None:
    model = general[0]
    before = general_hash(model)
    assert before == general_hash(model)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6  # type: ignore[union-attr, index]  # a Linear
    assert general_hash(model) != before
