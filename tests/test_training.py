"""Recipes, the schedule, the certified loss, and runs that give the same bytes, interrupted or not."""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import verideq
from verideq.box import Box
from verideq.certify import margin_rows
from verideq.cli.main import run
from verideq.data import Dataset, load
from verideq.equilibrium import Equilibrium, MonotoneFusion, gauge
from verideq.errors import InputError, ModelError, RecipeError, ResumeError, UnknownName
from verideq.graph import load_model, trace
from verideq.graph.file import KEY
from verideq.models.zoo import ARCHITECTURES, PARAMETRIZATIONS
from verideq.parametrizations import annealed_m
from verideq.training import Recipe, Trainer, read_recipe
from verideq.training.loss import bounded_margins, certified_loss, margins, standard_loss
from verideq.training.objective import Objective, Terms
from verideq.training.recipe import make_recipe
from verideq.training.schedule import eps_at
from verideq.training.train import build

CPU = torch.device("cpu")
DIGITS = load("digits", "train")
SMALL: dict[str, Any] = {
    "architecture": "linear-deq",
    "options": {"width": 8},
    "eps": "0.05",
    "epochs": 4,
    "natural_epochs": 1,
    "ramp_epochs": 2,
    "learning_rate": 1e-2,
    "decay_epochs": [3],
}
FEW = DIGITS.subset(range(256))
SIMPLE = ("linear-deq", "conv-deq")


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


Write = Callable[[str], Path]


def test_an_empty_recipe_is_the_default(recipe_file: Write) -> None:
    assert read_recipe(recipe_file("")) == Recipe()


def test_the_shipped_recipes_are_valid() -> None:
    folder = Path(__file__).resolve().parent.parent / "recipes"
    recipes = sorted(folder.glob("*.toml"))
    assert recipes
    for path in recipes:
        assert read_recipe(path).epochs > 0


BAD = {
    "epohcs = 5": "epohcs: no such key; did you mean epochs?",
    "zzz = 5": "zzz: no such key; the keys are data, architecture",
    "epochs = 'five'": "epochs: expected int; got 'five'",
    "epochs = 5.0": "epochs: expected int; got 5.0",
    "epochs = true": "epochs: expected int; got True",
    "learning_rate = '1e-3'": "learning_rate: expected float; got '1e-3'",
    "learning_rate = true": "learning_rate: expected float; got True",
    "data = 7": "data: expected str; got 7",
    "options = 5": "options: expected a table [options]; got 5",
    "mean = 0.5": "mean: expected a list; got 0.5",
    "mean = ['a']": "mean[0]: expected float; got 'a'",
    "mean = [0.5]": "std: expected as many numbers as mean",
    "decay_epochs = [1.5]": "decay_epochs[0]: expected int; got 1.5",
    "decay_epochs = [0]": "decay_epochs: expected epochs of 1 or more",
    "epochs = 0": "epochs: expected 1 or more; got 0",
    "natural_epochs = -1": "natural_epochs: expected 0 or more; got -1",
    "batch_size = 0": "batch_size: expected 1 or more; got 0",
    "seed = -1": "seed: expected 0 or more; got -1",
    "seed = 99999999999999999999": "seed: expected a seed below 2**32",
    "learning_rate = 0": "learning_rate: expected a positive number; got 0.0",
    "learning_rate = nan": "learning_rate: expected a positive number; got nan",
    "tol = inf": "tol: expected a positive number; got inf",
    "decay_factor = 1.5": "decay_factor: expected a number in (0, 1]; got 1.5",
    "clean_weight = -0.1": "clean_weight: expected a number in [0, 1]; got -0.1",
    "[options]\nwdith = 5": "options.wdith: linear-deq has no such option; it has width, m",
    "[options]\nwidth = 'five'": "options.width: expected int; got 'five'",
    "[options]\nwidth = -5": "options.width: expected a number above 0; got -5",
    "[options]\nm = true": "options.m: expected float; got True",
    "[options]\nm = nan": "options.m: expected a number above 0; got nan",
    "[options]\nm = 1.5": "options: m = 1.5 is outside (0, 1)",
    "[options]\ngamma = 2.0": "options.gamma: linear-deq has no such option; it has width, m",
    "parametrization = 'lben'\n[options]\ngamma = 1.0": "options: gamma = 1.0: the largest ratio",
    "parametrization = 'lben'\n[options]\nmm = 1": "linear-deq with lben has no such option; it has width, m, gamma",
    "parametrization = 'cerdeq'\n[options]\niterations = 2.5": "options.iterations: expected int; got 2.5",
    "parametrization = 'mondeq'": 'loss: expected "cross-entropy" with mondeq, which has no gauge',
    "parametrization = 'mondeq'\nloss = 'cross-entropy'\n[options]\nm = inf": "options: m = inf is outside (0, inf)",
    "parametrization = 7": "parametrization: expected str; got 7",
    "loss = 'hinge'": "loss: expected interval or cross-entropy; got 'hinge'",
    "anneal_m = 1": "anneal_m: expected bool; got 1",
    "anneal_m = true\nloss = 'cross-entropy'": "anneal_m: expected false",
    "anneal_m = true\neps = 0": "anneal_m: expected false",
    "epochs = ": "is no TOML file",
    "schedule = 'step'": "schedule: expected steps, cosine or linear; got 'step'",
    "schedule = 'cosine'\ndecay_epochs = [3]": "decay_epochs: expected none with cosine; got [3]",
    "warmup_epochs = 60": "warmup_epochs: expected fewer than epochs; got 60.0",
    "average = 1": "average: expected a number in [0, 1); got 1.0",
    "solver = 'newton'": "solver: expected auto, picard or anderson; got 'newton'",
    "gradient = 'exact'": "gradient: expected implicit or phantom; got 'exact'",
    "precision = 'float16'": "precision: expected float32 or mixed; got 'float16'",
    "initialisation = 'he'": "initialisation: expected auto, ibp, cerdeq or torch; got 'he'",
    "explicit = 1": "explicit: expected bool; got 1",
    "constrained = true": "constrained: expected false without explicit; got True",
    "explicit = true\nconstrained = true\nparametrization = 'mondeq'": "constrained: expected false with mondeq",
    "clean_weight = [0.5]": "clean_weight: expected a number, or two: at radius 0 and at the last one; got [0.5]",
    "clean_weight = [0.5, 2]": "clean_weight: expected numbers in [0, 1]; got [0.5, 2.0]",
    "clean_weight = [0.5, 'a']": "clean_weight[1]: expected float; got 'a'",
    "adjoint = 1": "adjoint: expected a table [adjoint]; got 1",
    "[adjoint]\nwieght = 1": "adjoint.wieght: no such key; did you mean adjoint.weight?",
    "[adjoint]\nweight = 1.5": "adjoint.weight: expected a number in [0, 1]; got 1.5",
    "[adjoint]\nsteps = 0": "adjoint.steps: expected 1 or more; got 0",
    "[attack]\nbox = 0": "attack.box: expected a number in (0, 1]; got 0.0",
    "[attack]\nbox = 0.5\nreach = 2": "attack.reach: expected 1 or less where attack.box is below 1; got 2.0",
    "[attack]\nrestarts = 0": "attack.restarts: expected 1 or more; got 0",
    "[attack]\nstep_size = nan": "attack.step_size: expected a positive number; got nan",
    "[penalty]\nl1 = -1": "penalty.l1: expected 0 or more; got -1.0",
    "[penalty]\nthreshold = 0": "penalty.threshold: expected a positive number; got 0.0",
    "[augment]\nfill = 'mirror'": "augment.fill: expected edge or zero; got 'mirror'",
    "[augment]\nshift = -1": "augment.shift: expected 0 or more; got -1",
    "[validation]\nsamples = -1": "validation.samples: expected 0 or more; got -1",
    "[validation]\nevery = 0": "validation.every: expected 1 or more; got 0",
    "[checkpoint]\nminutes = nan": "checkpoint.minutes: expected 0 or more; got nan",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_recipe_names_the_file_the_key_and_the_value(recipe_file: Write, text: str) -> None:
    path = recipe_file(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert BAD[text] in str(caught.value)


@pytest.mark.parametrize("text", ["eps = -0.1", "eps = 'big'", "eps = nan", "architecture = 'resnet'"])
def test_a_bad_radius_or_architecture(recipe_file: Write, text: str) -> None:
    with pytest.raises(InputError, match=r"eps|resnet"):
        read_recipe(recipe_file(text))


def test_an_unknown_parametrization_names_those_there_are(recipe_file: Write) -> None:
    with pytest.raises(UnknownName, match=r"parametrization.*'deq'.*ibp-mondeq.*row-gauge.*mondeq"):
        read_recipe(recipe_file("parametrization = 'deq'"))


def test_a_recipe_leaves_the_random_numbers_of_the_process_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_recipe({"parametrization": "mondeq", "loss": "cross-entropy"})
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_every_option_of_a_parametrization_is_an_option_of_the_recipe(recipe_file: Write, name: str) -> None:
    text = f'architecture = "conv-deq"\nparametrization = "{name}"\nloss = "cross-entropy"\n'
    recipe = read_recipe(recipe_file(text))
    accepted = list(inspect.signature(PARAMETRIZATIONS[name].register).parameters.values())[1:]
    own = {p.name: p.default for p in accepted}
    assert "m" in own
    sizes = {"width": 32, "stride": 2, "pool": 1, "kernel": 3, "stem": 0, "units": 0}
    assert recipe.all_options() == {**sizes, **own}
    assert read_recipe(recipe_file(recipe.toml())) == replace(recipe, options=recipe.all_options())


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        read_recipe(tmp_path / "nowhere.toml")


def test_settings(recipe_file: Write) -> None:
    path = recipe_file("epochs = 5\n[options]\nwidth = 3\n")
    tables = ["clean_weight=[1, 0.5]", "adjoint.weight=0.5", "validation.eps=1/255", "augment.flip=true"]
    changed = read_recipe(path, tables)
    assert (changed.clean_weight, changed.adjoint.weight) == ((1.0, 0.5), 0.5)
    assert (changed.validation.eps, changed.augment.flip) == ("1/255", True)
    settings = ["epochs=7", "options.m=0.25", "data=mnist", "eps=8/255", "decay_epochs=[2, 4]", "mean=[0.5]", "std=[1]"]
    recipe = read_recipe(path, settings)
    assert (recipe.epochs, recipe.data, recipe.eps, recipe.decay_epochs) == (7, "mnist", "8/255", (2, 4))
    assert (recipe.options, recipe.mean, recipe.std) == ({"width": 3, "m": 0.25}, (0.5,), (1.0,))
    for setting, message in (("epochs", "no value"), ("epohcs=3", "did you mean epochs"), ("epochs.x=3", "no table")):
        with pytest.raises(RecipeError, match=message):
            read_recipe(path, [setting])


def test_a_radius_is_exact_and_rounded_down(recipe_file: Write) -> None:
    assert read_recipe(recipe_file("eps = 0.1")).eps == "0.1"
    assert read_recipe(recipe_file("eps = '8/255'")).radius == pytest.approx(8 / 255)
    assert make_recipe({"eps": "1/3"}).radius <= 1 / 3


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=12)


@given(
    data=texts,
    epochs=st.integers(1, 10**6),
    rate=st.floats(1e-12, 1e3),
    mean=st.lists(st.floats(-5, 5), max_size=3),
    width=st.integers(1, 1000),
)
def test_what_show_prints_reads_back_as_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, data: str, epochs: int, rate: float, mean: list[float], width: int
) -> None:
    recipe = make_recipe(
        {"data": data, "epochs": epochs, "learning_rate": rate, "mean": mean, "std": mean, "options": {"width": width}}
    )
    text = recipe.toml()
    values = tomllib.loads(text)
    assert set(values) == set(Recipe.__dataclass_fields__), "every default is spelled out"
    path = tmp_path_factory.getbasetemp() / "shown.toml"
    path.write_text(text, encoding="utf-8", newline="")
    again = read_recipe(path)
    assert again == replace(recipe, options=recipe.all_options())


# --- the schedule -----------------------------------------------------------------------------------------------------


@given(natural=st.integers(0, 50), ramp=st.integers(0, 400), final=st.floats(1e-6, 1.0))
def test_the_radius_rises_from_zero_to_its_end_and_stays(natural: int, ramp: int, final: float) -> None:
    values = [eps_at(step, natural=natural, ramp=ramp, final=final) for step in range(natural + ramp + 5)]
    assert all(value == 0 for value in values[:natural])
    assert values[natural + ramp :] == [final] * 5
    assert all(0 <= a <= b <= final for a, b in pairwise(values))
    if ramp >= 8:
        # A straight line with a smooth start: no step is longer than the line's, which covers 4/3 of the mean at most.
        assert max(b - a for a, b in pairwise(values)) <= 4 / 3 * final / ramp * (1 + 1e-9)


def test_the_two_parts_of_the_ramp_meet_in_value_and_slope() -> None:
    ramp, final = 4_000_000, 0.3  # so fine that differences are derivatives
    at = [eps_at(ramp // 4 + shift, natural=0, ramp=ramp, final=final) for shift in (-2, -1, 0, 1, 2)]
    slopes = [(b - a) * ramp for a, b in pairwise(at)]
    assert slopes == pytest.approx([slopes[0]] * 4, rel=1e-4)
    assert eps_at(ramp - 1, natural=0, ramp=ramp, final=final) == pytest.approx(final, rel=1e-5)
    first = [eps_at(step, natural=0, ramp=ramp, final=final) for step in (1000, 2000)]
    assert first[1] == pytest.approx(16 * first[0]), "a fourth power"


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_margins_against_all_pairs_one_by_one(bias: bool) -> None:
    torch.manual_seed(0)
    center, radius = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    V, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64) * bias
    labels = torch.tensor([0, 1, 2, 3, 0, 2])
    found = margins(Box(center - radius, center + radius), V, b if bias else None, labels)
    assert found.shape == (6, 4)
    for i, y in enumerate(labels.tolist()):
        for j in range(4):
            row = V[y] - V[j]
            # Over a box a linear function is least at the corner against the signs of its row.
            corner = center[i] - radius[i] * row.sign()
            assert float(found[i, j]) == pytest.approx(float(row @ corner + b[y] - b[j]), abs=1e-12)
            assert j != y or float(found[i, j]) == 0


SMALLER = {"deq-7": {"units": 12}, "7layer": {"units": 12}, "cerdeq": {"units": 12}}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    built = {
        name: make(DIGITS.input_shape, 10, width=6, **SMALLER.get(name, {})) for name, make in ARCHITECTURES.items()
    }
    for model in built.values():
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(DIGITS.scaled(slice(64)).float())  # batch norm sees some data
    return built


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bounded_margins_are_those_of_the_bound(name: str) -> None:
    """In evaluation mode and float64 the training bound is the proof's, but for its rounding."""
    model = models()[name].double().eval()
    images, labels = DIGITS.scaled(slice(8)), DIGITS.labels[:8]
    for module in model.modules():
        if isinstance(module, Equilibrium):
            module.solver = replace(module.solver, tol=1e-12)
    box = Box((images - 0.03).clamp(0, 1), (images + 0.03).clamp(0, 1))
    clean, lower = bounded_margins(trace(model), images, box, labels)
    assert torch.allclose(clean, model(images))
    proved = verideq.bound(model, box, C=margin_rows(labels, 10)).lower
    others = lower.gather(1, (labels[:, None] + 1 + torch.arange(9)) % 10)
    assert torch.allclose(others, proved, atol=1e-5)
    assert torch.equal(lower.gather(1, labels[:, None]), torch.zeros(8, 1, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_mixes_two_cross_entropies_and_counts_errors(training: bool) -> None:
    model = models()["conv-deq"].train(training)
    images, labels = DIGITS.scaled(slice(16)).float(), DIGITS.labels[:16]
    graph, box = trace(model), Box(images - 0.01, images + 0.01)
    outputs, lower = bounded_margins(graph, images, box, labels)
    certified, clean = (nn.functional.cross_entropy(x, labels) for x in (-lower, outputs))
    for kappa in (0.0, 0.25, 1.0):
        loss, wrong, uncertified = certified_loss(graph, images, box, labels, kappa)
        assert loss.item() == pytest.approx(((1 - kappa) * certified + kappa * clean).item(), rel=1e-4)
        assert torch.equal(wrong, outputs.argmax(1) != labels)
        others = torch.ones(16, 10, dtype=torch.bool).scatter(1, labels[:, None], False)
        expected = [bool((lower[i][others[i]] <= 0).any()) for i in range(16)]
        assert uncertified.tolist() == expected
    assert bool((uncertified >= wrong).all()), "what is wrong is not certified"


def test_at_radius_zero_the_certified_loss_is_the_clean_one() -> None:
    model = models()["linear-deq"].double()
    images, labels = DIGITS.scaled(slice(16)), DIGITS.labels[:16]
    loss, _, _ = certified_loss(trace(model), images, Box(images, images), labels, 0.0)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(model(images), labels).item(), rel=1e-4)


def test_the_standard_loss_is_the_cross_entropy_of_the_outputs() -> None:
    model = models()["conv-deq"].double().train()
    images, labels = DIGITS.scaled(slice(16)), DIGITS.labels[:16]
    loss, wrong = standard_loss(trace(model), images, labels)
    outputs = model(images)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(outputs, labels).item(), rel=1e-4)
    assert torch.equal(wrong, outputs.argmax(1) != labels)


def test_the_model_has_to_end_in_a_linear_layer() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.rand(2, 4)
    with pytest.raises(ModelError, match="the model ends in relu"):
        bounded_margins(trace(model), x, Box(x, x), torch.tensor([0, 1]))


def test_batch_norm_in_training_takes_the_statistics_of_the_clean_batch() -> None:
    """One box of radius zero: the bounds are the clean outputs, in training mode too."""
    model = models()["conv-deq"].double().train()
    images, labels = DIGITS.scaled(slice(16)), DIGITS.labels[:16]
    clean, lower = bounded_margins(trace(model), images, Box(images, images), labels)
    assert torch.allclose(lower, clean.gather(1, labels[:, None]) - clean, atol=1e-3)


@pytest.mark.parametrize("radius", [1e-3, 1e-6, 1e-9])
def test_a_radius_far_below_the_rounding_of_its_centre_keeps_its_digits(radius: float) -> None:
    """A ramp begins with such radii, and the solver asks for a relative tolerance of the radius too."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        layer = models()["conv-deq"].to(dtype).eval()[0]
        assert isinstance(layer, Equilibrium)
        layer.solver = replace(layer.solver, tol=1e-4, max_steps=500)
        with torch.no_grad():
            center = layer.injection(DIGITS.scaled(slice(16)).to(dtype))
            found[dtype] = layer.equilibrate_ball(center, torch.full_like(center, radius))[1]
    single, double = found[torch.float32].double(), found[torch.float64]
    assert torch.allclose(single, double, rtol=1e-2, atol=1e-2 * radius)


# --- runs -------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, *, resume: bool = False, data: Dataset = FEW, **changes: Any) -> Trainer:
    return Trainer(make_recipe(SMALL | changes), folder, CPU, data, resume=resume)


def log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).run()
    return folder


def test_the_loss_falls_and_the_radius_rises(tmp_path: Path) -> None:
    trainer(tmp_path, data=DIGITS, epochs=5, ramp_epochs=0, learning_rate=2e-2).run()
    records = log(tmp_path)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]
    assert (records[0]["eps"], records[-1]["eps"]) == (0.0, pytest.approx(0.05))
    assert records[-1]["train_error"] < records[0]["train_error"] / 2
    assert records[-1]["loss"] < 0.8 * records[1]["loss"]
    assert records[-1]["train_interval_error"] < records[1]["train_interval_error"]


def test_the_folder_of_a_run(whole: Path) -> None:
    names = {"recipe.toml", "log.jsonl", "log.csv", "diagnosis.json", "checkpoint.safetensors", "model.safetensors"}
    assert {path.name for path in whole.iterdir()} == names
    assert read_recipe(whole / "recipe.toml") == make_recipe({**SMALL, "options": make_recipe(SMALL).all_options()})
    model = load_model(whole / "model.safetensors")
    assert (model.input_shape, model.pixel_range, model.classes) == ((1, 8, 8), (0.0, 1.0), 10)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path, whole: Path) -> None:
    expected = (whole / "model.safetensors").read_bytes()
    assert trainer(tmp_path / "again").run().read_bytes() == expected
    assert log(tmp_path / "again") == log(whole)
    assert trainer(tmp_path / "other", seed=1).run().read_bytes() != expected


class Interrupting:
    """A report that interrupts the run after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, line: dict[str, Any]) -> None:
        if line["epoch"] == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path, whole: Path, epoch: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path).run(report=Interrupting(epoch))
    assert not (tmp_path / "model.safetensors").exists()
    torch.rand(7)  # whatever the process drew in between
    path = trainer(tmp_path, resume=True).run()
    assert path.read_bytes() == (whole / "model.safetensors").read_bytes()
    assert log(tmp_path) == log(whole)


def test_an_interruption_within_an_epoch_loses_that_epoch_only(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step_of = 0, Objective.__call__

    def impatient(*arguments: Any) -> Terms:
        nonlocal steps
        steps += 1
        if steps == 6:  # four steps an epoch
            raise KeyboardInterrupt
        return step_of(*arguments)

    monkeypatch.setattr(Objective, "__call__", impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path).run()
    assert [record["epoch"] for record in log(tmp_path)] == [1]
    path = trainer(tmp_path, resume=True).run()
    assert steps == 6 + 3 * 4
    assert path.read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_folder_with_a_run_needs_resume_and_the_same_recipe(tmp_path: Path, whole: Path) -> None:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResumeError, match="holds a training run; pass --resume"):
        trainer(tmp_path)
    for changes in ({"epochs": 5}, {"seed": 1}, {"eps": "0.06"}, {"options": {"width": 9}}):
        with pytest.raises(ResumeError, match="another recipe"):
            trainer(tmp_path, resume=True, **changes)
    with pytest.raises(ResumeError, match="another data hash"):
        trainer(tmp_path, resume=True, data=DIGITS.subset(range(255)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert trainer(tmp_path, resume=True).run().read_bytes() == before["model.safetensors"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(ResumeError, match="no training checkpoint"):
        trainer(tmp_path, resume=True)


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    trainer(tmp_path / "new", resume=True, epochs=1).run()
    assert len(log(tmp_path / "new")) == 1


def test_normalisation_becomes_the_first_layer(tmp_path: Path) -> None:
    recipe = make_recipe({**SMALL, "mean": [0.5], "std": [0.25], "epochs": 1})
    path = Trainer(recipe, tmp_path, CPU, FEW).run()
    first = load_model(path).nodes[0]
    assert first.operation.kind == "normalize"
    assert (first.module.mean.tolist(), first.module.std.tolist()) == ([0.5], [0.25])


def test_weights_of_features_shape_the_box_that_is_trained_on(tmp_path: Path) -> None:
    weights = torch.linspace(0, 2, 64, dtype=torch.float64).view(1, 8, 8)
    made = trainer(tmp_path, data=replace(FEW, eps_weights=weights))
    images = FEW.scaled(slice(3)).float()
    box = made.objective.box(images, 0.1)
    reach = 0.1 * weights.float()
    assert torch.equal(box.lower, (images - reach).clamp(0, 1))
    assert torch.equal(box.upper, (images + reach).clamp(0, 1))
    free = trainer(tmp_path, data=replace(FEW, clip=None))
    assert float(free.objective.box(images, 0.1).lower.min()) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"m": 2.0}}, "m = 2.0 is outside"),
        ({"architecture": "conv-deq", "data": "rows"}, "cannot be built for inputs of shape"),
    ],
)
def test_sizes_that_do_not_fit_are_a_recipe_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = FEW
    if changes.pop("data", None):
        data = replace(FEW, images=FEW.images.flatten(1))
    with pytest.raises(RecipeError, match=message):
        trainer(tmp_path, data=data, **changes)


def test_the_seed_decides_the_weights_and_leaves_nothing_else_to_chance() -> None:
    recipe = make_recipe(SMALL)
    one = build(recipe, FEW).state_dict()
    torch.rand(11)
    two, other = build(recipe, FEW).state_dict(), build(replace(recipe, seed=1), FEW).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_ends_before_its_ramp_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "short.toml"
    recipe.write_text('eps = "0.1"\nepochs = 1\nnatural_epochs = 1\nramp_epochs = 4\n[options]\nwidth = 4\n')
    assert run(["train", str(recipe), "--out", str(tmp_path / "out"), "--threads", "1"]) == 0
    assert capsys.readouterr().err.count("the epochs end before the ramp of eps does, at 0 of 0.1") == 2
    assert Recipe(epochs=5, natural_epochs=1, ramp_epochs=4).last_radius == Recipe().radius


# --- parametrizations and losses --------------------------------------------------------------------------------------

STANDARD = {"loss": "cross-entropy", "learning_rate": 2e-2, "decay_epochs": []}


def layer_of(path: Path) -> Equilibrium:
    ((_, layer),) = load_model(path).equilibria()
    return layer


@pytest.mark.parametrize("architecture", SIMPLE)
@pytest.mark.parametrize("name", [name for name in PARAMETRIZATIONS if name != "mondeq"])
def test_certified_training_in_every_class_with_a_gauge(tmp_path: Path, architecture: str, name: str) -> None:
    changes = {"architecture": architecture, "parametrization": name, "options": {"width": 6}, "epochs": 3}
    path = trainer(tmp_path, **changes).run()
    records = log(tmp_path)
    assert records[2]["loss"] < records[0]["loss"]
    layer = layer_of(path)
    assert float(gauge(layer).slack(layer).min()) > 0
    with safe_open(path, framework="pt") as handle:
        recorded = json.loads(handle.metadata()[KEY])["nodes"]
    assert [PARAMETRIZATIONS[name].__name__] in [node["parametrizations"] for node in recorded]


@pytest.mark.parametrize("architecture", SIMPLE)
def test_a_mondeq_is_trained_by_its_factors(tmp_path: Path, architecture: str) -> None:
    changes = {"architecture": architecture, "parametrization": "mondeq", "options": {"width": 6, "m": 5.0}}
    made = trainer(tmp_path, data=DIGITS, **changes, **STANDARD)
    fusions = [module for module in made.model.modules() if isinstance(module, MonotoneFusion)]
    drawn = [(fusion.A.detach().clone(), fusion.B.detach().clone()) for fusion in fusions]
    fusion = layer_of(made.run()).fusion
    assert log(tmp_path)[-1]["train_error"] < 0.4
    assert isinstance(fusion, MonotoneFusion)
    assert float(fusion.m) == 5.0
    ((A, B),) = drawn
    assert not torch.equal(fusion.A, A) and not torch.equal(fusion.B, B)


def test_standard_training_knows_no_radius(tmp_path: Path) -> None:
    """Neither the radius and its ramp nor the weight of the certified part change a byte of the model."""
    one = trainer(tmp_path / "one", **STANDARD).run()
    changes = {"eps": "0.3", "ramp_epochs": 9, "natural_epochs": 0, "clean_weight": 0.5}
    two = trainer(tmp_path / "two", **STANDARD | changes).run()
    assert one.read_bytes() == two.read_bytes()
    assert [(record["eps"], record["train_interval_error"]) for record in log(tmp_path / "one")] == [(0.0, None)] * 4
    losses = [record["loss"] for record in log(tmp_path / "one")]
    assert losses == sorted(losses, reverse=True)


def test_standard_training_starts_from_the_weights_of_torch() -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(64, 8), nn.Linear(8, 10))
    built = build(make_recipe(SMALL | STANDARD), FEW)
    assert torch.equal(built[2].weight, expected[2].weight)
    spread = float(build(make_recipe(SMALL), FEW)[2].weight.detach().std())
    assert spread == pytest.approx(math.sqrt(2 * math.pi) / 8, rel=0.3)


def test_m_falls_while_the_radius_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, options={"width": 8, "m": 0.3}, anneal_m=True)
    fusion = made.model[1].fusion
    seen, step_of = [], Objective.__call__

    def watched(*arguments: Any) -> Terms:
        seen.append(float(fusion.parametrizations.weight[0].m))
        return step_of(*arguments)

    monkeypatch.setattr(Objective, "__call__", watched)
    path = made.run()
    radii = [eps_at(step, natural=4, ramp=8, final=made.recipe.radius) for step in range(16)]
    assert seen == pytest.approx([annealed_m(0.3, eps, made.recipe.radius) for eps in radii], abs=1e-6)
    assert (seen[0], seen[-1]) == pytest.approx((0.99, 0.3), abs=1e-6)
    assert all(a >= b for a, b in pairwise(seen))
    size = layer_of(path).fusion.weight.detach().abs()
    rate = float(torch.linalg.eigvalsh((size + size.T) / 2)[-1])
    assert rate == pytest.approx(0.7, rel=1e-4), "the weight that is stored is that of the last m"


def test_annealing_can_be_interrupted_too(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", anneal_m=True).run().read_bytes()
    assert whole != trainer(tmp_path / "plain").run().read_bytes()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", anneal_m=True).run(report=Interrupting(2))
    assert trainer(tmp_path / "cut", anneal_m=True, resume=True).run().read_bytes() == whole


def test_the_shipped_recipe_for_the_digits_by_cross_entropy(tmp_path: Path) -> None:
    recipe = read_recipe(Path(__file__).resolve().parent.parent / "recipes/digits-standard.toml", ["epochs=8"])
    model = load_model(Trainer(recipe, tmp_path, CPU).run())
    test = load("digits", "test")
    with torch.no_grad():
        right = model(test.scaled().float()).argmax(1) == test.labels
    assert float(right.double().mean()) > 0.93


def test_the_shipped_mondeq_is_784_40_10_with_m_20() -> None:
    recipe = read_recipe(Path(__file__).resolve().parent.parent / "recipes/mondeq.toml")
    blank = replace(FEW, images=torch.zeros(4, 1, 28, 28, dtype=FEW.images.dtype), labels=FEW.labels[:4])
    model = build(recipe, blank)
    layer = model[2]
    assert [type(module).__name__ for module in model] == ["Normalize", "Flatten", "Equilibrium", "Linear"]
    assert isinstance(layer.fusion, MonotoneFusion) and float(layer.fusion.m) == 20
    assert (layer.injection.weight.shape, model[3].weight.shape) == ((40, 784), (10, 40))


def test_the_command_trains_without_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "plain.toml"
    recipe.write_text('loss = "cross-entropy"\nparametrization = "nemon"\nepochs = 1\n[options]\nwidth = 4\n')
    assert run(["train", str(recipe), "--out", str(tmp_path / "out"), "--threads", "1"]) == 0
    shown = capsys.readouterr().err
    assert "error" in shown
    assert "uncertified" not in shown and "warning" not in shown
