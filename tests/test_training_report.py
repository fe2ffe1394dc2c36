"""The page of a training run: what it shows, and what is said when it cannot be shown."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from verideq.box import Box
from verideq.cli.main import run
from verideq.equilibrium import Equilibrium, MonotoneFusion
from verideq.errors import DataError
from verideq.parametrizations import MonDEQ
from verideq.report.training import is_training, write_training_report
from verideq.training.diagnosis import STEPS, diagnose

RECIPE = """
architecture = "conv-deq"
eps = "0.05"
epochs = 2
natural_epochs = 0
ramp_epochs = 1
batch_size = 256
clean_weight = 0.5

[options]
width = 4

[validation]
samples = 100
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as the command leaves it."""
    place = tmp_path_factory.mktemp("training")
    (place / "recipe.toml").write_text(RECIPE)
    assert run(["train", str(place / "recipe.toml"), "--out", str(place / "run"), "--threads", "1"]) == 0
    return place / "run"


def test_the_page_has_every_figure_and_needs_nothing_else(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for label in (
        *("error in % against epoch", "loss against epoch", "radius eps against epoch", "bound growth against epoch"),
        *("solver steps against epoch", "bound growth against layer", "mean width against solver step"),
        "relative value against index",
    ):
        assert f'aria-label="{label}"' in page
    assert "they are no certificates" in page and "held out, not certified" in page
    assert not re.search(r'(src|href)="http', page)
    assert "validation.samples" in page or "samples = 100" in page


def test_the_same_run_gives_the_same_page_and_the_command_draws_it_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "report.html").read_bytes()
    assert run(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == before
    both = tmp_path / "both.html"
    assert run(["report", str(folder), str(folder), "--out", str(both)]) == 0
    assert both.read_text().count("<h2>Recipe: run</h2>") == 2
    capsys.readouterr()
    other = tmp_path / "certified"
    other.mkdir()
    assert run(["report", str(folder), str(other)]) == 2
    assert "is no training run, as the others are" in capsys.readouterr().err


def test_an_interrupted_run_is_drawn_from_the_lines_that_are_whole(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "log.jsonl").read_bytes()
    for cut, epochs in ((lines[: len(lines) // 2], 1 if b"\n" in lines[: len(lines) // 2] else 0), (b"", 0)):
        (tmp_path / "log.jsonl").write_bytes(cut)
        (tmp_path / "recipe.toml").write_bytes((folder / "recipe.toml").read_bytes())
        page = write_training_report(tmp_path).read_text()
        assert ("no epoch is finished yet" in page) == (epochs == 0)
    assert is_training(tmp_path)
    (tmp_path / "diagnosis.json").write_text("{")
    with pytest.raises(DataError, match="is no whole folder of `verideq train`"):
        write_training_report(tmp_path)


def test_the_diagnosis_holds_the_figures_of_the_papers(folder: Path) -> None:
    found = json.loads((folder / "diagnosis.json").read_text())
    assert set(found) == {"drawn", "trained"}
    for moment in found.values():
        (widths,) = moment["steps"].values()
        assert widths[0] == 0 and len(widths) == STEPS + 1
        # From 0 the iterates grow to the interval fixed point, at the rate of the gauge or faster.
        steps = [b - a for a, b in pairwise(widths)]
        assert abs(steps[-1]) < 0.2 * abs(steps[0])
        (values,) = moment["singular"].values()
        assert values[0] == 1 and values == sorted(values, reverse=True) and len(values) == 4
        assert all(value > 0 for value in moment["depth"].values())


def test_the_bounds_of_a_mondeq_leave_the_figure_where_they_diverge() -> None:
    torch.manual_seed(0)
    fusion = MonDEQ.apply(nn.Linear(20, 20, bias=False), m=0.5)
    assert isinstance(fusion, MonotoneFusion)
    with torch.no_grad():
        fusion.B.mul_(30)
    model = nn.Sequential(Equilibrium(fusion, nn.Linear(4, 20)), nn.Linear(20, 3))
    x = torch.rand(8, 4)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = diagnose(model, x, Box(x - 0.1, x + 0.1))
    (widths,) = found["steps"].values()
    assert widths[-1] is None or widths[-1] > 1e6 * widths[1]
    assert found["singular"] == {}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    json.dumps(found, allow_nan=False)
