"""Runs of equilibrium propagation: recipes, folders, interruptions, and what becomes of the nets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from verideq.attacks import open_model
from verideq.attacks.problem import Problem
from verideq.attacks.suites import SUITES
from verideq.certify.bound import margin_rows
from verideq.cli.main import run as command
from verideq.data import load
from verideq.equilibrium.surrogates import Unrolled
from verideq.errors import InputError, RecipeError, ResumeError, UnknownName
from verideq.graph import load_model
from verideq.models import epnet
from verideq.models.epnet import EPNet
from verideq.region import Region
from verideq.training.energy import EnergyRecipe, EnergyTrainer
from verideq.training.kinds import kind_of

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "equilibrium-propagation"
SMALL: dict[str, Any] = {
    "kind": "equilibrium-propagation", "data": "digits", "samples": 192, "held_out": 64, "epochs": 2, "batch_size": 32,
    "nudged_steps": 4, "optimizer": "adam", "learning_rates": [0.02],
    "options": {"channels": [8], "pool": "stride", "free_steps": 8, "margin": 0.05},
}  # fmt: skip
CPU = torch.device("cpu")


def recipe_of(**changes: Any) -> EnergyRecipe:
    return EnergyRecipe.make({**SMALL, **changes})


@pytest.mark.parametrize(
    ("estimator", "readout"), [("symmetric", "squared"), ("symmetric", "cross-entropy"), ("bptt", "cross-entropy")]
)
def test_training_lowers_the_cost(estimator: str, readout: str, tmp_path: Path) -> None:
    options = {"channels": [8, 8], "free_steps": 8, "readout": readout}
    recipe = recipe_of(estimator=estimator, options=options, samples=512, beta=0.2, epochs=4)
    lines: list[dict[str, float]] = []
    EnergyTrainer(recipe, tmp_path, CPU).run(report=lines.append)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["validation_error"] < 0.6  # of ten classes
    assert lines[-1]["learning_rate"] < lines[0]["learning_rate"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_run_ends_with_the_same_bytes(optimizer: str, tmp_path: Path) -> None:
    augment = {"shift": 1, "flip": True}
    changes: dict[str, Any] = {"noise": 0.1, "adversary": 0.05, "augment": augment}
    recipe = recipe_of(epochs=3, estimator="random-sign", optimizer=optimizer, **changes)
    EnergyTrainer(recipe, tmp_path / "whole", CPU).run()

    def interrupt(line: dict[str, object]) -> None:
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    torn = tmp_path / "torn"
    with pytest.raises(KeyboardInterrupt):
        EnergyTrainer(recipe, torn, CPU).run(report=interrupt)
    with pytest.raises(ResumeError, match="--resume"):
        EnergyTrainer(recipe, torn, CPU)
    path = EnergyTrainer(recipe, torn, CPU, resume=True).run()
    for name in (path.name, "model.safetensors", "settling.json"):
        assert (torn / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [json.loads(line)["epoch"] for line in (torn / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(ResumeError, match="another recipe"):
        EnergyTrainer(recipe_of(seed=1), torn, CPU, resume=True)


def test_noise_stays_in_the_range_and_rates_are_by_layer(tmp_path: Path) -> None:
    recipe = recipe_of(noise=0.3, learning_rates=[0.1, 0.2], optimizer="sgd")
    trainer = EnergyTrainer(recipe, tmp_path, CPU)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.2]
    images = trainer.images[:8]
    changed = trainer._changed(images, torch.Generator().manual_seed(0))
    assert float((changed - images).abs().max()) <= 0.3 + 1e-6
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert float((changed - images).abs().mean()) > 0.05
    assert len(trainer.labels) == 128 and len(trainer.held_labels) == 64
    assert recipe.share(0) == 1 and recipe.share(1) == pytest.approx(0.5) and recipe.share(2) == pytest.approx(0)
    assert recipe_of(epochs=6, cosine_epochs=2).share(5) == 0


def test_the_command_trains_what_can_be_attacked_and_certified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "mine.toml", tmp_path / "run"
    path.write_text(recipe_of(samples=0, epochs=3).toml(), encoding="utf-8")
    assert kind_of(path) == "equilibrium-propagation" and EnergyRecipe.read(path) == recipe_of(samples=0, epochs=3)
    arguments = ["train", str(path), "--out", str(folder), "--threads", "1", "--device", "cpu"]
    assert command([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    settling = json.loads((folder / "settling.json").read_text())
    assert settling["free_steps"] == 8 and len(settling["test"]) == 16
    page = (folder / "report.html").read_text()
    assert 'aria-label="accuracy in % against step of the free phase"' in page
    # The curve at the end of the free phase is the accuracy of the net, and nearly that of its steady state.
    digits = load("digits", split="test")
    net = EPNet(digits.input_shape, 10, **SMALL["options"])
    net.load_state_dict(load_file(report["weights"]))
    images = digits.scaled(slice(None))
    with torch.no_grad():
        right = (net(images.float()).argmax(1) == digits.labels).double().mean()
        settled = (load_model(folder / "model.safetensors")(images.float()).argmax(1) == digits.labels).double().mean()
    assert float(right) == pytest.approx(settling["test"][7], abs=0.01)
    assert float(settled) == pytest.approx(float(right), abs=0.02)
    assert float(right) > 0.5

    monkeypatch.setattr(epnet, "small", lambda: EPNet(digits.input_shape, 10, **SMALL["options"]), raising=False)
    given = ["--data", "digits", "--limit", "6", "--threads", "1", "--device", "cpu", "--json"]
    weights = ["--weights", report["weights"]]
    asked = ["verideq.models.epnet:small", *weights, "--eps", "1.0", "--norm", "l2", "--suite", "pgd"]
    assert command(["attack", *asked, *given, "--out", str(tmp_path / "attack")]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["n"] == 6 and result["attacked"] < result["clean"]
    model = str(folder / "model.safetensors")
    assert command(["certify", model, "--eps", "0.005", *given, "--out", str(tmp_path / "certify")]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["checked"] and result["certified"] > 0
    assert command(["inspect", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_net_with_max_pooling_gets_no_model_file_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipe_of(options={"channels": [2, 2], "free_steps": 3}, samples=96, epochs=1).toml())
    assert command(["train", str(path), "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "two units tie" in " ".join(capsys.readouterr().err.split())


def test_attacks_unroll_every_number_of_steps() -> None:
    torch.manual_seed(0)
    net = EPNet((1, 8, 8), 3, channels=(4, 6), free_steps=9)
    names = [stage.name for stage in SUITES["pgd"]._distinct(open_model(net))]
    first = SUITES["pgd"].stages[0].attack.name
    assert names == [f"{first} at final", *(f"{first} at unrolled z0 k={k} λ=1" for k in (4, 8))]
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    C = margin_rows(torch.tensor([0, 1]), 3)
    problem = Problem(open_model(net), Region(x, "0.1"), C, torch.zeros(C.shape[:2]).double(), torch.arange(2))
    report = SUITES["pgd"].run(problem)
    assert report.margins.shape == (2,)
    # From zero, k steps are what a net with k free steps computes.
    short = open_model(EPNet((1, 8, 8), 3, channels=(4, 6), free_steps=4))
    short.load_state_dict(open_model(net).state_dict())  # type: ignore[attr-defined]  # an EPNet
    slope = Unrolled((0,), 4).slope(open_model(net), x, lambda outputs: outputs[:, 0])
    torch.testing.assert_close(slope.outputs, short.outputs(x))
    with pytest.raises(InputError, match="numbered from 0"):
        Unrolled((-1,), 4)


def test_the_shipped_recipes_are_valid_and_have_their_builders() -> None:
    names = sorted(path.name for path in RECIPES.glob("*.toml") if kind_of(path) == SMALL["kind"])
    assert names == ["cifar10.toml", "mnist-gauge.toml", "mnist.toml"]
    for name in names:
        recipe = EnergyRecipe.read(RECIPES / name)
        assert EnergyRecipe.make(tomllib.loads(recipe.toml())) == recipe
        built: EPNet = getattr(epnet, name.removesuffix(".toml").replace("-", "_"))()
        trained = recipe.net(built.input_shape, 10)
        assert repr(trained) == repr(built)
        shapes = {key: tuple(t.shape) for key, t in built.state_dict().items()}
        assert shapes == {key: tuple(t.shape) for key, t in trained.state_dict().items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"betta": 0.1}, "did you mean beta"),
        ({"beta": 0}, "positive beta"),
        ({"estimator": "three"}, "estimator"),
        ({"optimizer": "lbfgs"}, "optimizer"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [-0.1]}, "learning_rates"),
        ({"momentum": 1.0}, "momentum"),
        ({"epochs": 0}, "epochs 0"),
        ({"held_out": -1}, "held_out -1"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"adversary": -0.1}, "adversary -0.1"),
        ({"augment": {"turn": True}}, "augment.turn"),
        ({"epochs": "many"}, "expected int"),
    ],
)
def test_bad_recipes_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"options": {"depth": 3}}, "options.*depth"),
        ({"options": {"pool": "median"}}, "options.*median"),
        ({"learning_rates": [0.1, 0.1, 0.1]}, "expected 1, or 2"),
        ({"held_out": 192}, "held_out"),
    ],
)
def test_recipes_that_do_not_fit_their_data_are_refused(
    values: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        EnergyTrainer(recipe_of(**values), tmp_path, CPU)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('kind = "evolution"\n')
    with pytest.raises(UnknownName, match="equilibrium-propagation"):
        kind_of(path)
