"""The page of several runs of attacks: who is compared with whom, with which intervals, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from verideq.certify.attack import summarise_attack
from verideq.certify.summary import interval95
from verideq.cli.main import run as command
from verideq.errors import InputError
from verideq.report.comparison import Share, subjects_of
from verideq.report.html import write_report
from verideq.report.run import read_runs

RECIPE = {"kind": "adversarial", "architecture": "convnet"}
NAMES = ("fog", "jpeg")


def line(index: int, eps: float, norm: str, attacked: bool | None, fog: int, witness: str | None) -> dict[str, Any]:
    return {
        "index": index, "label": 3, "prediction": 5 if attacked is None else 3, "eps": eps, "norm": norm,
        "status": "MISCLASSIFIED" if attacked is None else "UNKNOWN", "margin": None, "method": "none",
        "checked": False, "attacked": attacked, "reason": "", "steps": None, "seconds": 0.1, "witness": witness,
        "certificate": None, "attack": "PGD", "attack_margin": 0.5, "first_margin": 0.5, "blind": False,
        "entropy_clean": [0.1], "entropy_attacked": [0.2],
        "corrupted": {"fog": [3] * fog + [4] * (5 - fog), "jpeg": [3] * 5},
    }  # fmt: skip


def make(
    folder: Path, norm: str, *, model: str, seed: int | None = None, broken: int = 2, fog: int = 3, **meta: Any
) -> Path:
    """Ten samples at two radii: sample 9 is misclassified, the first `broken` fall at the larger radius."""
    training = None if seed is None else {"recipe": RECIPE, "seed": seed}
    folder.mkdir(parents=True)
    (folder / "witnesses").mkdir()
    records = []
    for eps in (0.1, 0.2):
        for index in range(10):
            fallen = index < broken and eps == 0.2
            place = f"witnesses/{index}.npy" if fallen else None
            if place is not None:
                np.save(folder / place, pixels(folder, [index])[0] + 0.1)
            attacked = None if index == 9 else not fallen
            records.append(line(index, eps, norm, attacked, fog, place))
    about = {
        "model": model, "model_hash": f"hash of {model}", "data": "digits", "data_hash": "d", "version": "0.1.0",
        "attack": "pgd", "defence": "final", "norm": norm, "training": training, "corruptions": list(NAMES),
        "input_shape": [1, 4, 4], "clip": [0, 1], **meta,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps(summarise_attack(records, about)))
    return folder


def pixels(folder: Path, indices: list[int]) -> np.ndarray[Any, Any]:
    return np.stack([np.linspace(0, 0.8, 16).reshape(1, 4, 4) * (1 + i) / 10 for i in indices])


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        make(tmp_path / "bp-cnn-0-l2", "l2", model="a", seed=0, broken=2, fog=3),
        make(tmp_path / "bp-cnn-1-l2", "l2", model="b", seed=1, broken=4, fog=2),
        make(tmp_path / "bp-cnn-0-linf", "linf", model="a", seed=0, broken=8),
        make(tmp_path / "ep-l2", "l2", model="c", broken=1, fog=5),
        make(tmp_path / "ep-linf", "linf", model="c", broken=0, fog=5),
    ]


def test_seeds_of_a_recipe_and_norms_of_a_model_are_one_subject(folders: list[Path], tmp_path: Path) -> None:
    subjects = subjects_of(read_runs(folders))
    assert [(s.name, len(s.runs), s.seeds) for s in subjects] == [("bp-cnn", 3, 2), ("ep", 2, 1)]
    other = make(tmp_path / "early" / "ep-l2", "l2", model="c", defence="early state 2")
    names = [s.name for s in subjects_of(read_runs([*folders, other]))]
    assert len(names) == len(set(names)) == 3


def test_intervals_are_over_seeds_where_there_are_some(folders: list[Path]) -> None:
    bp, ep = subjects_of(read_runs(folders))
    curve = bp.curve("l2")
    assert list(curve) == [0.0, 0.1, 0.2]
    assert curve[0.0] == Share(90.0, 90.0, 90.0)
    values = [0.7, 0.5]
    reach = student.ppf(0.975, 1) * np.std(values, ddof=1) / np.sqrt(2)
    assert curve[0.2].value == pytest.approx(60.0)
    assert (curve[0.2].low, curve[0.2].high) == (0.0, 100.0) and reach > 0.6  # cut to what a share can be
    single = ep.curve("l2")[0.2]
    low, high = interval95(8, 10)
    assert (single.value, single.low, single.high) == pytest.approx((80, 100 * low, 100 * high))
    three = Share.of([0.5, 0.52, 0.54])
    assert three.high - three.value == pytest.approx(100 * student.ppf(0.975, 2) * 0.02 / np.sqrt(3))


def test_corruptions_are_counted_once_a_model(folders: list[Path]) -> None:
    bp, ep = subjects_of(read_runs(folders))
    assert bp.counted == {"n": 20, "correct": {"fog": [20, 20, 10, 0, 0], "jpeg": [20] * 5}}
    assert ep.counted["n"] == 10 and ep.clean() == 0.9


def test_the_page_compares(folders: list[Path], tmp_path: Path) -> None:
    page = write_report(folders, pixels, tmp_path / "page.html", baseline=folders[0]).read_text()
    for words in (
        "Accuracy under attack",
        "Natural corruptions",
        "Perturbed images",
        "bp-cnn (2)",
        "not those of CIFAR",
    ):
        assert words in page
    # One figure a norm, one of severities, one of families, none of certificates.
    assert page.count("<figcaption>Accuracy against eps") == 2
    assert "Solver steps, one" not in page and "<h2>Results by radius" not in page
    assert page.count("<summary><b>All of ") == 5
    # bp: (0.4 + 0.6) / 2 of fog, nothing of jpeg; over the baseline's 0.4 of fog, as jpeg never failed there.
    assert "<b>25.0 %</b>" in page and "125.0 %" in page and "that of bp-cnn-0-l2" in page
    # The pictures: sample 0 first, broken in all that break any; a dash where a prediction held.
    assert 'alt="sample 0, label 3, bp-cnn, eps 0.2"' in page and 'alt="sample 0, label 3, ep, eps 0.2"' in page
    assert 'alt="sample 0, label 3, ep, eps 0.1"' not in page
    assert "sample 9" not in page.replace("samples", "")
    plain = write_report(folders, None, tmp_path / "plain.html").read_text()
    assert "Perturbed images" not in plain and "Not normalised" in plain and "125.0 %" not in plain
    assert write_report(folders, pixels, tmp_path / "again.html", baseline=folders[0]).read_text() == page


def test_one_run_has_its_corruptions_and_a_mixture_its_curves(folders: list[Path], tmp_path: Path) -> None:
    single = write_report([folders[0]], pixels).read_text()
    assert "Natural corruptions" in single and "Results by radius" in single and "Accuracy under attack" not in single


def test_a_baseline_is_one_of_the_runs(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="name one of the runs"):
        write_report(folders[:2], pixels, tmp_path / "page.html", baseline=folders[3])
    out = str(tmp_path / "page.html")
    assert command(["report", str(folders[0]), str(folders[3]), "--out", out, "--baseline", str(folders[3])]) == 0
    assert "Normalised" in Path(out).read_text()
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "recipe.toml").write_text("")
    assert command(["report", str(tmp_path), "--baseline", str(folders[3])]) == 2
    assert "--baseline goes with" in " ".join(capsys.readouterr().err.split())


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<b>x"
    folders = [make(tmp_path / f"{evil}-{norm}", norm, model="c") for norm in ("l2", "linf")]
    page = write_report(folders, pixels, tmp_path / "page.html").read_text()
    assert "<b>x" not in page and "&lt;b&gt;x" in page
