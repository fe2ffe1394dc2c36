"""A run and its folder: the files that docs/run-folder.md promises, and the same lines after any interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import verideq
from verideq.certify.budget import Budget
from verideq.certify.run import IDENTITY, Questions, Run
from verideq.data import load
from verideq.errors import ResumeError
from verideq.graph import load_model, model_hash
from verideq.report.run import FIELDS

COUNT = 60
DIGITS = load("digits")
STATUSES = ("certified", "falsified", "misclassified", "unknown", "timeout", "error")


def make_run(folder: Path, model: Path, count: int = COUNT, **changes: Any) -> Run:
    """A run over the first digits at two radii, in chunks of seven samples."""
    indices = list(range(count))
    images, labels = DIGITS.scaled(indices), DIGITS.labels[:count]
    radii = [Fraction(1, 50), Fraction(1, 20)]
    questions = Questions(
        "digits", "digits", "test", DIGITS.hash, images, labels, indices, radii, "linf", None, (0.0, 1.0)
    )
    return replace(Run(folder, load_model(model), "small", questions, Budget(), batch_size=7), **changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(scope="module")
def whole(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, digits_model).execute()
    return folder


@pytest.fixture(scope="module")
def attacked(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an attack, and with witnesses."""
    folder = tmp_path_factory.mktemp("attacked")
    make_run(folder, digits_model, 14, budget=Budget(attack="pgd")).execute()
    return folder


# --- the files --------------------------------------------------------------------------------------------------------


def test_run_json_says_what_made_the_run(whole: Path, digits_model: Path) -> None:
    meta = json.loads((whole / "run.json").read_text())
    assert meta["version"] == verideq.__version__
    assert meta["model_hash"] == model_hash(load_model(digits_model))
    assert meta["data_hash"] == DIGITS.hash
    assert meta["indices"] == list(range(COUNT))
    assert (meta["eps"], meta["norm"], meta["method"], meta["attack"]) == (["1/50", "1/20"], "linf", "auto", "none")
    promised = {"command", "version", "model_hash", "data_hash", "seed", "tolerances", "threads", "device", "date"}
    assert promised | set(IDENTITY) <= set(meta)


def test_a_line_a_sample_and_eps_with_the_promised_fields(whole: Path) -> None:
    records = lines(whole)
    assert all(tuple(record) == FIELDS for record in records)
    assert sorted((r["eps"], r["index"]) for r in records) == [(e, i) for e in (0.02, 0.05) for i in range(COUNT)]
    for record in records:
        assert record["label"] == int(DIGITS.labels[record["index"]])
        assert record["checked"] is (record["status"] == "CERTIFIED")
        assert record["attacked"] is None
        assert record["status"] in {name.upper() for name in STATUSES}


def test_the_summary_counts_the_lines(whole: Path) -> None:
    records, summary = lines(whole), json.loads((whole / "summary.json").read_text())
    assert (summary["model"], summary["data"], summary["version"]) == ("small", "digits", verideq.__version__)
    assert [result["eps"] for result in summary["results"]] == [0.02, 0.05]
    for result in summary["results"]:
        mine = [record for record in records if record["eps"] == result["eps"]]
        assert result["n"] == len(mine) == COUNT == sum(result[name] for name in STATUSES)
        for name in STATUSES:
            assert result[name] == sum(record["status"] == name.upper() for record in mine)
        assert result["clean"] == sum(record["prediction"] == record["label"] for record in mine)
        assert result["attacked"] is None
        assert result["checked"] is (result["certified"] > 0)
        assert result["rejected"] == 0
        methods = [record["method"] for record in mine if record["status"] == "CERTIFIED"]
        assert result["by_method"] == {method: methods.count(method) for method in set(methods)}
        assert "interval" in methods
        assert result["seconds"] == pytest.approx(sum(record["seconds"] for record in mine))
        low, high = result["certified_interval"]
        assert low < result["certified"] / COUNT < high
    assert summary["results"][0]["certified"] > summary["results"][1]["certified"] > 0


def test_an_attack_fills_its_column_and_stores_witnesses(attacked: Path, digits_model: Path) -> None:
    records, summary = lines(attacked), json.loads((attacked / "summary.json").read_text())
    for result in summary["results"]:
        mine = [record for record in records if record["eps"] == result["eps"]]
        assert result["attacked"] == sum(record["attacked"] is True for record in mine)
        assert result["certified"] <= result["attacked"] <= result["clean"]
    broken = [record for record in records if record["status"] == "FALSIFIED"]
    assert broken
    for record in records:
        assert (record["witness"] is None) == (record not in broken)
    model = load_model(digits_model)
    for record in broken:
        witness = np.load(attacked / record["witness"])
        assert witness.shape == (1, 8, 8)
        assert np.abs(witness - DIGITS.scaled([record["index"]])[0].numpy()).max() <= record["eps"]
        with torch.no_grad():
            assert int(model(torch.from_numpy(witness)[None].float()).argmax()) != record["label"]
    assert sorted(path.name for path in (attacked / "witnesses").iterdir()) == sorted(
        Path(record["witness"]).name for record in broken
    )


def test_radius_adds_a_field(tmp_path: Path, digits_model: Path) -> None:
    make_run(tmp_path, digits_model, 7, budget=Budget(radius=True)).execute()
    for record in lines(tmp_path):
        assert (record["radius"] is None) == (record["status"] == "MISCLASSIFIED")
        assert record["radius"] is None or (record["radius"] >= record["eps"]) == (record["status"] == "CERTIFIED")


def test_progress_counts_lines_and_ends_at_the_total(tmp_path: Path, digits_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_run(tmp_path, digits_model, 16).execute(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 32), (14, 32), (28, 32), (32, 32)]
    seen.clear()
    make_run(tmp_path, digits_model, 16).execute(resume=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 32)]


# --- interruption and resumption --------------------------------------------------------------------------------------


def _slowly(folder: Path, model: Path) -> None:
    """A run in a child process, a little slower than usual so that there is something to interrupt."""
    torch.set_num_threads(1)
    make_run(folder, model).execute(resume=True, progress=lambda done, total: time.sleep(0.02))


def test_killed_ten_times_and_resumed(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    """SIGKILL at ten random moments of one run, during writes too; the lines are those of the run without any."""
    context, draw, killed, sizes = multiprocessing.get_context("fork"), random.Random(1), 0, []
    results, latest = tmp_path / "results.jsonl", 0.25
    while killed < 10:
        child = context.Process(target=_slowly, args=(tmp_path, digits_model))
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside threads warns; the child runs on one thread and takes no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        time.sleep(draw.uniform(0.02, latest))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        if child.exitcode == 0:  # it was faster than the signal: take a part away, so that there is more to do
            results.write_bytes(results.read_bytes()[: draw.randrange(results.stat().st_size)])
            continue
        killed += 1
        sizes.append(results.stat().st_size if results.exists() else 0)
        latest *= 1 if max(sizes) else 2  # a busy machine has not come to anything yet
    make_run(tmp_path, digits_model).execute(resume=True)
    assert timeless(lines(tmp_path)) == timeless(lines(whole))
    assert max(sizes) > 0, "no interruption was late enough to have something to resume"
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, whole))
    for mine, other in zip(summary["results"], expected["results"], strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("seed", range(6))
def test_a_torn_file_is_cut_and_completed(tmp_path: Path, whole: Path, digits_model: Path, seed: int) -> None:
    """Cut at any byte: inside a line, after one, inside a chunk."""
    data = (whole / "results.jsonl").read_bytes()
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / "results.jsonl").write_bytes(data[: random.Random(seed).randrange(len(data))])
    make_run(tmp_path, digits_model).execute(resume=True)
    assert timeless(lines(tmp_path)) == timeless(lines(whole))


def test_what_was_done_is_kept_byte_for_byte(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    data = (whole / "results.jsonl").read_bytes()
    chunk = b"".join(line + b"\n" for line in data.split(b"\n")[:14])
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / "results.jsonl").write_bytes(chunk + b'{"index": 7, "ep')
    make_run(tmp_path, digits_model).execute(resume=True)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(chunk)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    for name in ("run.json", "results.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    make_run(tmp_path, digits_model).execute(resume=True)
    for name in ("run.json", "results.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_another_batch_size_goes_on_with_the_first_one(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    data = (whole / "results.jsonl").read_bytes()
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / "results.jsonl").write_bytes(data[: len(data) // 2])
    make_run(tmp_path, digits_model, batch_size=64).execute(resume=True)
    assert timeless(lines(tmp_path)) == timeless(lines(whole))


def test_resume_of_nothing_begins(tmp_path: Path, digits_model: Path) -> None:
    make_run(tmp_path / "new", digits_model, 7).execute(resume=True)
    assert len(lines(tmp_path / "new")) == 14


def copy(source: Path, target: Path) -> dict[str, bytes]:
    """A copy of the run's three files, and their bytes: a refusal must leave them as they are."""
    for name in ("run.json", "results.jsonl", "summary.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return contents(target)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(run: Run, *, resume: bool = True) -> str:
    with pytest.raises(ResumeError) as caught:
        run.execute(resume=resume)
    message = str(caught.value)
    assert "\n" not in message
    assert "another --out" in message
    return message


def test_a_folder_with_a_run_needs_resume(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    before = copy(whole, tmp_path)
    assert "holds a run already; pass --resume" in refused(make_run(tmp_path, digits_model), resume=False)
    assert contents(tmp_path) == before


def _questions(**changes: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, questions=replace(run.questions, **changes))


def _budget(**changes: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, budget=replace(run.budget, **changes))


def _other_weights(run: Run) -> Run:
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] += 1e-6
    return run


DIFFERENT: dict[str, Callable[[Run], Run]] = {
    "model_hash": _other_weights,
    "data_hash": _questions(data_hash="0" * 64),
    "split": _questions(split="train"),
    "indices": _questions(indices=list(range(1, COUNT + 1))),
    "eps": _questions(eps=[Fraction(1, 50)]),
    "norm": _questions(norm="l2"),
    "method": _budget(method="interval"),
    "attack": _budget(attack="pgd"),
    "seed": _budget(seed=1),
    "tolerances": _budget(max_steps=7),
    "radius": _budget(radius=True),
    "check": _budget(check=False),
    "certificates": lambda run: replace(run, certificates=True),
}


@pytest.mark.parametrize("key", DIFFERENT)
def test_a_run_that_differs_is_not_resumed(tmp_path: Path, whole: Path, digits_model: Path, key: str) -> None:
    before = copy(whole, tmp_path)
    message = refused(DIFFERENT[key](make_run(tmp_path, digits_model)))
    assert f"{tmp_path} holds another run: {key} differ" in message
    assert contents(tmp_path) == before


def test_another_version_is_not_resumed(
    tmp_path: Path, whole: Path, digits_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(whole, tmp_path)
    monkeypatch.setattr(verideq, "__version__", "99.0")
    assert "version differ" in refused(make_run(tmp_path, digits_model))


def test_every_field_of_the_identity_is_tried() -> None:
    assert set(DIFFERENT) | {"version"} == set(IDENTITY)


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\n",
        b"\x00\xff\xfe\n",
        b"[]\n",
        b"7\n",
        b"{}\n",
        b"\n",
        b'{"index": 0}\n',
        b'{"index": "0", "eps": 0.02}\n',
    ],
)
def test_garbage_among_the_lines_is_refused(tmp_path: Path, whole: Path, digits_model: Path, garbage: bytes) -> None:
    copy(whole, tmp_path)
    data = (tmp_path / "results.jsonl").read_bytes().split(b"\n")
    (tmp_path / "results.jsonl").write_bytes(b"\n".join(data[:20]) + b"\n" + garbage + b"\n".join(data[21:]))
    before = contents(tmp_path)
    assert "results.jsonl" in refused(make_run(tmp_path, digits_model))
    assert contents(tmp_path) == before


def test_lines_of_other_samples_are_refused(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    copy(whole, tmp_path)
    data = (tmp_path / "results.jsonl").read_bytes().split(b"\n")
    (tmp_path / "results.jsonl").write_bytes(b"\n".join([*data[:3], data[4], data[3], *data[5:]]))
    assert "holds other samples" in refused(make_run(tmp_path, digits_model))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7", "null", '"run"'])
def test_a_damaged_run_json_is_refused(tmp_path: Path, whole: Path, digits_model: Path, text: str) -> None:
    copy(whole, tmp_path)
    (tmp_path / "run.json").write_text(text)
    assert "run.json" in refused(make_run(tmp_path, digits_model))


def test_a_run_json_without_its_batch_size_is_refused(tmp_path: Path, whole: Path, digits_model: Path) -> None:
    copy(whole, tmp_path)
    meta = json.loads((tmp_path / "run.json").read_text())
    del meta["batch_size"]
    (tmp_path / "run.json").write_text(json.dumps(meta))
    assert "batch_size" in refused(make_run(tmp_path, digits_model))


@pytest.mark.parametrize("resume", [True, False])
def test_results_without_a_run_json_are_not_appended_to(
    tmp_path: Path, whole: Path, digits_model: Path, resume: bool
) -> None:
    copy(whole, tmp_path)
    (tmp_path / "run.json").unlink()
    before = contents(tmp_path)
    assert "no run.json" in refused(make_run(tmp_path, digits_model), resume=resume)
    assert contents(tmp_path) == before
