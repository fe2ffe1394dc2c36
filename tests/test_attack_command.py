"""`verideq attack` and `certify --attack`: defences by eps and norm, what is warned of, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from verideq.attacks import ATTACKS, PGD, SUITES, EarlyState, EntropyReduction, Square, StateEnsemble, open_model
from verideq.attacks.suites import Stage, Suite
from verideq.certify import certify
from verideq.cli.main import run as command
from verideq.equilibrium.surrogates import Final, Through, Unrolled
from verideq.errors import InputError, UnsupportedOperation
from verideq.graph import save_model
from verideq.models.mdeq import dense

BUILDERS = """
import torch
from torch import nn

from verideq.models.mdeq import dense


def general():
    return dense((1, 8, 8), 10, units=16)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


class Coarse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.ones(()))

    def forward(self, x):
        hills = torch.maximum(0.53 - 3 * (x[:, 0] - 0.5).abs(), 0.9 - 3 * (x[:, 0] - 0.8).abs())
        y = torch.stack([torch.full_like(x[:, 0], 0.5), hills], 1)
        return y if y.dtype == torch.float64 else (8 * y).round() / 8


def coarse():
    return Coarse()


class Strange(nn.Module):
    # Tanh, which verideq cannot trace; NaN where the first pixel is dark. Or constant.
    def __init__(self, constant=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.constant = nn.Linear(4, 3), constant

    def forward(self, x):
        if self.constant:
            return self.layer.bias.expand(len(x), 3)
        y = torch.tanh(self.layer(x.flatten(1)))
        return torch.where(x.flatten(1)[:, :1] < 0.3, torch.nan * y, y)


def strange():
    return Strange()


def constant():
    return Strange(constant=True)


def brain():
    return Strange().bfloat16()


def needle():
    first, last = nn.Linear(1, 3), nn.Linear(3, 2)
    with torch.no_grad():
        first.weight.fill_(1.0)
        first.bias.copy_(torch.tensor([-0.55, -0.555, -0.56]))
        last.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1000.0, -2000.0, 1000.0]]))
        last.bias.copy_(torch.tensor([0.5, 0.0]))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
"""
SMALL = Suite("intermediate", (Stage(PGD(5, 1)), Stage(PGD(3, 1), Unrolled((2,), 2, 0.5)), Stage(Square(20))))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with builders and the weights of a general DEQ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SUITES, "intermediate", SMALL)
    monkeypatch.setitem(ATTACKS, "intermediate", SMALL)
    name = f"builders_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(BUILDERS)
    torch.manual_seed(0)
    save_file(dense((1, 8, 8), 10, units=16).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / name


def attacked(
    here: Path, builder: str, *arguments: str, out: str = "run"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``run.json`` and the lines of a run."""
    model = [f"{here.name}:{builder}"] + (["--weights", "weights.safetensors"] if builder == "general" else [])
    assert command(["attack", *model, "--threads", "1", "--json", "--out", out, *arguments]) == 0
    lines = [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]
    return json.loads(Path(out, "run.json").read_text()), [{**r, "seconds": 0, "witness": None} for r in lines]


@pytest.mark.parametrize("defence", ["entropy", "early"])
def test_an_eps_is_defended_as_it_is_alone(here: Path, capsys: pytest.CaptureFixture[str], defence: str) -> None:
    options = ["--suite", "pgd", "--limit", "6", "--defence", defence]
    _, alone = attacked(here, "general", *options, "--eps", "0.02", out="alone")
    meta, both = attacked(here, "general", *options, "--eps", "0.02", "--eps", "0.3", out="both")
    assert [r for r in both if r["eps"] == 0.02] == alone
    assert len(meta["defence_settings"]) == 2
    if defence == "entropy":
        assert [s["radius"] for s in meta["defence_settings"]] == [0.02, 0.3]
        assert [s["beta"] for s in meta["defence_settings"]] == [0.005, 0.075]
    capsys.readouterr()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_entropy_reduction_stays_in_the_ball_of_its_norm(norm: str) -> None:
    torch.manual_seed(0)
    dynamics, x = open_model(dense((1, 8, 8), 10, units=16)), torch.rand(5, 1, 8, 8, dtype=torch.float64)
    defence = EntropyReduction(beta=0.1, radius=0.3, norm=norm)
    moved: list[Tensor] = []
    inject = dynamics.inject
    dynamics.inject = lambda at: moved.append(at.detach()) or inject(at)  # type: ignore[func-returns-value, method-assign]  # a spy
    defence.outputs(dynamics, x)
    order = {"linf": float("inf"), "l2": 2}[norm]
    away = torch.stack([(at - x).flatten(1).norm(order, dim=1) for at in moved])
    assert 0.2 < float(away.max()) <= 0.3 + 1e-9
    assert all(float(at.min()) >= 0 and float(at.max()) <= 1 for at in moved)


def test_an_attack_looks_where_a_defence_reads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = Suite("some", (Stage(PGD()), Stage(Square(20)), Stage(PGD(), Unrolled((2,), 1))))
    assert suite.looking_at(()) is suite
    for defence, states in ((EarlyState(3), (3,)), (StateEnsemble(4), (1, 2, 3, 4))):
        stages = suite.looking_at(defence.reads).stages
        assert [s.surrogate for s in stages] == [Final(), Through(states), Final(), Unrolled((2,), 1)]
        assert [type(s.attack) for s in stages] == [PGD, PGD, Square, PGD]
    _, lines = attacked(here, "general", "--suite", "pgd", "--limit", "200", "--eps", "0.02", "--defence", "early:2")
    assert any("through z2" in str(r["attack"]) for r in lines)
    capsys.readouterr()


def test_one_attack_alone_is_not_said_to_gain_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["attack", "--suite", "pgd", "--eps", "0.01", "--limit", "40", "--threads", "1"]
    assert command([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "warning" not in capsys.readouterr().err
    (result,) = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert result["attacked"] >= 20 and result["warnings"] == []


def test_what_rounding_saves_is_asked_again(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hill beside the input breaks a float64 copy, and not the model, which rounds to eighths; the one behind it
    breaks both, and is found by starts that are drawn.
    """
    monkeypatch.setitem(SUITES, "pgd", Suite("pgd", (Stage(PGD(20, 1, 0.05)), Stage(PGD(20, 4)))))
    options = [*labelled(np.full((12, 1), 0.45), [0] * 12), "--suite", "pgd"]
    _, wide = attacked(here, "coarse", *options, "--eps", "0.4", out="wide")
    assert sum(r["attacked"] is False for r in wide) >= 3
    assert all(r["attack_margin"] < -0.0625 for r in wide if r["attacked"] is False)
    _, narrow = attacked(here, "coarse", *options, "--eps", "0.08", out="narrow")
    assert all(r["attacked"] for r in narrow)
    for r in narrow + [r for r in wide if r["attacked"]]:
        assert "breaks a float64 copy, and not the model" in r["reason"]
    capsys.readouterr()


def labelled(images: np.ndarray, labels: list[int]) -> list[str]:
    np.savez("data.npz", images=images, labels=np.array(labels))
    return ["--data", "data.npz"]


def test_outputs_that_are_no_numbers_are_errors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).random((12, 4))
    images[:, 0] = np.linspace(0.05, 0.95, 12)
    outputs = __import__(here.name).strange()(torch.tensor(images).float())
    options = labelled(images, outputs.nan_to_num(0.0).argmax(1).tolist())
    model = [f"{here.name}:strange", "--suite", "standard", "--eps", "0.2", "--eps", "0", "--threads", "1"]
    assert command(["attack", *model, *options, "--out", "run"]) == 1
    lines = [json.loads(line) for line in Path("run", "results.jsonl").read_text().splitlines()]
    dark = [r for r in lines if images[r["index"], 0] < 0.3]
    assert dark and all(r["status"] == "ERROR" and r["attacked"] is None and r["prediction"] is None for r in dark)
    assert all(r["status"] == "UNKNOWN" for r in lines if r not in dark)
    witnesses = [np.load(Path("run", r["witness"])) for r in lines if r["witness"]]
    assert all(w.flatten()[0] >= 0.3 for w in witnesses)  # NaN is no other class
    capsys.readouterr()


def test_no_gradient_leaves_square(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias = __import__(here.name).constant().layer.bias
    options = labelled(np.full((3, 4), 0.5), [int(bias.argmax())] * 3)
    _, lines = attacked(here, "constant", "--suite", "standard", "--eps", "0.1", *options)
    assert all(r["blind"] and r["attacked"] for r in lines)
    _, still = attacked(here, "constant", "--suite", "pgd", "--eps", "0", *options, out="still")
    assert not any(r["blind"] for r in still)  # none was asked for
    attacked(here, "brain", "--suite", "pgd", "--eps", "0.1", *labelled(np.full((3, 4), 0.5), [0, 1, 2]), out="brain")
    capsys.readouterr()


def test_what_a_bound_has_broken_does_not_survive_an_attack(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [f"{here.name}:needle", *labelled(np.full((6, 1), 0.6), [0] * 6), "--eps", "0.2", "--threads", "1"]
    for attack in ("pgd", "standard"):
        assert command(["certify", *model, "--attack", attack, "--method", "exact", "--out", attack]) == 0
        lines = [json.loads(line) for line in Path(attack, "results.jsonl").read_text().splitlines()]
        assert all(r["status"] == "FALSIFIED" and r["attacked"] is False for r in lines)
        (result,) = json.loads(Path(attack, "summary.json").read_text())["results"]
        assert result["attacked"] == 0
    assert all(r["attack_margin"] is None or r["attack_margin"] < 0 for r in lines)
    capsys.readouterr()


def test_certify_tells_of_its_suite(
    digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ATTACKS, "standard", replace(SMALL, name="standard"))
    arguments = [
        "certify",
        str(digits_model),
        "--limit",
        "30",
        "--eps",
        "0.01",
        "--method",
        "interval",
        "--threads",
        "1",
    ]
    assert command([*arguments, "--attack", "standard", "--out", str(tmp_path / "run")]) == 0
    (result,) = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    asked = [r for r in lines if r["attack"] is not None]
    assert len(asked) == result["n"] - result["misclassified"]
    assert sum(result["by_attack"].values()) == sum(r["attacked"] is False for r in asked)
    assert all(
        r["first_margin"] is not None and r["attack_margin"] <= r["first_margin"] for r in asked if r["attacked"]
    )
    error = capsys.readouterr().err
    assert all(warning in " ".join(error.split()) for warning in result["warnings"])
    assert command([*arguments, "--out", str(tmp_path / "pgd")]) == 0
    assert "attack" not in json.loads((tmp_path / "pgd" / "results.jsonl").read_text().splitlines()[0])


def test_blind_attacks_are_warned_of_beside_a_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "standard", replace(SMALL, name="standard"))
    first, last = nn.Linear(64, 4), nn.Linear(4, 10)
    with torch.no_grad():
        first.bias.fill_(-100.0)  # no unit is ever active: every gradient is zero
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
    save_model(model, tmp_path / "blind.safetensors", input_shape=(1, 8, 8))
    options = ["--limit", "60", "--eps", "0.1", "--attack", "standard", "--threads", "1"]
    assert command(["certify", str(tmp_path / "blind.safetensors"), *options, "--out", str(tmp_path / "run")]) == 0
    assert "the gradient vanished on" in " ".join(capsys.readouterr().err.split())
    assert "the gradient vanished on" in (tmp_path / "run" / "report.html").read_text()


def test_what_does_not_go_together_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("one.npz", images=np.random.default_rng(0).random((8, 1, 8, 8)), labels=np.arange(8))
    weights = ["--weights", "weights.safetensors"]
    for arguments, message in (
        (["certify", f"{here.name}:plain", "--attack", "intermediate"], "plain has none: use --attack pgd or standard"),
        (["certify", f"{here.name}:general", *weights], "a general DEQ, of which nothing can be certified"),
        (
            ["attack", f"{here.name}:general", *weights, "--data", "one.npz", "--defence", "early"],
            "name a state yourself: --defence early:3",
        ),
        (
            ["attack", f"{here.name}:general", *weights, "--defence", "entropy", "--corruptions", "blur",
             "--eps", "0.1", "--eps", "0.2"],
            "with --corruptions give one --eps",
        ),
    ):  # fmt: skip
        assert command([*arguments, "--limit", "3", "--threads", "1", "--out", "refused"]) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split())
        assert len(error.splitlines()) == 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match="use pgd or standard"):
        certify(model, torch.rand(2, 1, 8, 8), torch.zeros(2).long(), "0.1", attack="full")
    with pytest.raises(UnsupportedOperation, match="general DEQ"):
        certify(dense((1, 8, 8), 10, units=16), torch.rand(2, 1, 8, 8), torch.zeros(2).long(), "0.1")
