"""The command line: exit codes, one clear line for a bad call, nothing on standard output that was not asked for."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import verideq
from verideq.certify import METHODS, Prepared
from verideq.certify.bound import Bounds, interval
from verideq.cli.inspect import describe, predicted_steps
from verideq.cli.main import run
from verideq.data import load
from verideq.equilibrium import Equilibrium
from verideq.graph import load_model, save_model
from verideq.parametrizations import MonDEQ

Capture = pytest.CaptureFixture[str]
QUICK = ["--threads", "1", "--attack", "none", "--limit", "5", "--eps", "0.02"]

BUILDERS = """
import torch
from torch import nn
from verideq import Equilibrium
from verideq.parametrizations import NEMON, MonDEQ

CALLS = []

def small():
    CALLS.append("small")
    torch.manual_seed(0)
    fusion = nn.Linear(6, 6, bias=False)
    nn.init.constant_(fusion.weight, 0.1)
    return nn.Sequential(nn.Flatten(), Equilibrium(fusion, nn.Linear(64, 6)), nn.Linear(6, 10))

def wild():
    model = small()
    nn.init.constant_(model[1].fusion.weight, 5.0)
    return model

def inverted():
    torch.manual_seed(0)
    fusion = NEMON.apply(nn.Linear(24, 24, bias=False))
    return nn.Sequential(nn.Flatten(), Equilibrium(fusion, nn.Linear(64, 24)), nn.Linear(24, 10))

def factored():
    torch.manual_seed(0)
    A, B = torch.randn(2, 24, 24)
    fusion = MonDEQ.from_weights(A, B, 20.0)
    return nn.Sequential(nn.Flatten(), Equilibrium(fusion, nn.Linear(64, 24)), nn.Linear(24, 10))

def multiplied():
    model = factored()
    return nn.Sequential(
        nn.Flatten(), Equilibrium.from_matrices(model[1].operator().weight, torch.ones(24, 64)), nn.Linear(24, 10)
    )

def curved():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh())

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 10))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def nan():
    model = small()
    nn.init.constant_(model[2].bias, float("nan"))
    return model

def rows():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2))

def fails():
    raise KeyError("no configuration")

def needs(argument):
    return small()

def gives_text():
    return "a model"

instance = small()
number = 5
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a module of builders in it."""
    (tmp_path / "builders.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "builders", raising=False)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def refusal(capsys: Capture, arguments: list[str], code: int = 2) -> str:
    """The one line that a bad call prints; it exits with 2, says nothing else and changes no file."""
    before = tree(Path.cwd())
    assert run(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", output.err), output.err
    assert tree(Path.cwd()) == before
    return output.err


def certified(capsys: Capture, arguments: list[str], code: int = 0) -> dict[str, Any]:
    """The summary that ``certify --json`` prints, which is all that it prints."""
    assert run(["certify", *arguments, "--json"]) == code, capsys.readouterr().err
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 1
    summary: dict[str, Any] = json.loads(output.out)
    return summary


# --- certify ----------------------------------------------------------------------------------------------------------


def test_a_radius_that_is_the_whole_pixel_range_is_warned_of(digits_model: Path, here: Path, capsys: Capture) -> None:
    arguments = [str(digits_model), "--data", "digits", "--limit", "1", "--method", "interval"]
    assert run(["certify", *arguments, "--eps", "8", "--eps", "1/10"]) == 0
    error = capsys.readouterr().err
    assert "eps 8 is the whole range of a pixel, 0 to 1" in error
    assert "write 8/255" in error
    assert "eps 1/10" not in error


def test_certify_writes_the_folder_and_prints_the_table(digits_model: Path, here: Path, capsys: Capture) -> None:
    assert run(["certify", str(digits_model), *QUICK, "--eps", "8/255", "--out", "out"]) == 0
    output = capsys.readouterr()
    assert {"run.json", "results.jsonl", "summary.json", "report.html"} <= {
        path.name for path in (here / "out").iterdir()
    }
    assert "certified" in output.out
    assert "unchecked" not in output.out
    assert run(["certify", str(digits_model), *QUICK, "--no-check", "--out", "unchecked"]) == 0
    assert "unchecked" in capsys.readouterr().out
    assert "8/255" in output.out
    assert "report.html" in output.out
    assert len((here / "out/results.jsonl").read_text().splitlines()) == 10


def test_json_is_the_summary_and_nothing_else(digits_model: Path, here: Path, capsys: Capture) -> None:
    summary = certified(capsys, [str(digits_model), *QUICK, "--out", "out"])
    assert summary == json.loads((here / "out/summary.json").read_text())
    assert summary["results"][0]["n"] == 5


def test_without_a_model_the_bundled_one_on_the_digits(here: Path, capsys: Capture) -> None:
    summary = certified(capsys, ["--threads", "1", "--limit", "2", "--eps", "0.01", "--attack", "none"])
    assert (summary["model"], summary["data"]) == ("digits", "digits")
    assert summary["results"][0]["certified"] == 2
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("digits-digits-")


def test_the_default_is_an_attack_at_three_radii(digits_model: Path, here: Path, capsys: Capture) -> None:
    summary = certified(capsys, [str(digits_model), "--threads", "1", "--limit", "3"])
    assert [result["eps"] for result in summary["results"]] == [0.02, 0.05, 0.1]
    assert all(result["attacked"] is not None for result in summary["results"])


def test_indices_limit_and_split(digits_model: Path, here: Path, capsys: Capture) -> None:
    (here / "chosen.txt").write_text("9\n4\n")
    common = [str(digits_model), "--threads", "1", "--attack", "none", "--eps", "0.02"]
    for number, (arguments, expected) in enumerate(
        [
            (["--indices", "3:6"], [3, 4, 5]),
            (["--indices", "8,2,5", "--limit", "2"], [8, 2]),
            (["--indices", "chosen.txt"], [9, 4]),
            (["--limit", "2", "--split", "train"], [0, 1]),
        ]
    ):
        certified(capsys, [*common, *arguments, "--out", str(number)])
        lines = [json.loads(line) for line in (here / str(number) / "results.jsonl").read_text().splitlines()]
        assert [line["index"] for line in lines] == expected
        labels = load("digits", "train" if "train" in arguments else "test").labels
        assert [line["label"] for line in lines] == [int(labels[i]) for i in expected]


def test_radius_l2_and_repeated_eps(digits_model: Path, here: Path, capsys: Capture) -> None:
    arguments = [*QUICK, "--eps", "0.02", "--eps", "1/50", "--norm", "l2", "--radius", "--out", "out"]
    summary = certified(capsys, [str(digits_model), *arguments])
    assert [(result["eps"], result["norm"]) for result in summary["results"]] == [(0.02, "l2")], (
        "one radius, spelled twice"
    )
    lines = [json.loads(line) for line in (here / "out/results.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["radius"] is None or line["radius"] > 0 for line in lines)


def test_resume_goes_on_and_refuses_another_run(digits_model: Path, here: Path, capsys: Capture) -> None:
    call = ["certify", str(digits_model), *QUICK, "--batch-size", "2", "--out", "out"]
    assert run(call) == 0
    results = here / "out/results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole[: len(whole) // 2])
    assert run([*call, "--resume"]) == 0
    seconds = re.compile(rb'"seconds": [^,]+')
    assert seconds.sub(b"", results.read_bytes()) == seconds.sub(b"", whole)
    capsys.readouterr()
    assert "holds a run already; pass --resume" in refusal(capsys, call)
    for changed in (
        ["--eps", "0.3"],
        ["--seed", "1"],
        ["--norm", "l2"],
        ["--limit", "4"],
        ["--attack", "pgd"],
        ["--split", "train"],
    ):
        assert "holds another run" in refusal(capsys, [*call, "--resume", *changed])
    other = load_model(digits_model)
    with torch.no_grad():
        other.operations[-1].bias += 1e-3
    save_model(other, here / "other.safetensors")
    assert "model_hash differ" in refusal(capsys, ["certify", "other.safetensors", *call[2:], "--resume"])


def test_an_error_verdict_exits_with_1(
    digits_model: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(prepared: Prepared, *arguments: Any) -> Bounds:
        raise RuntimeError("a cosmic ray")

    monkeypatch.setitem(METHODS, "fragile", fragile)
    summary = certified(capsys, [str(digits_model), *QUICK, "--method", "fragile", "--out", "out"], code=1)
    result = summary["results"][0]
    assert result["error"] == result["n"] - result["misclassified"] > 0
    assert "a cosmic ray" in (here / "out/results.jsonl").read_text()


def test_an_inconsistency_exits_with_1_and_one_line(
    digits_model: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Bounds:
        result = interval(*arguments)
        return Bounds(verideq.Box(result.box.lower.abs() + 1, result.box.upper.abs() + 2), result.steps)

    monkeypatch.setitem(METHODS, "broken", broken)
    call = [
        "certify",
        str(digits_model),
        "--threads",
        "1",
        "--eps",
        "0.2",
        "--limit",
        "5",
        "--method",
        "broken",
        "--no-check",
        "--out",
        "out",
        "--json",
    ]
    assert run(call) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: InconsistencyError: sample \d+ is certified [^\n]+\n", output.err)
    assert {path.name for path in (here / "out/inconsistency").iterdir()} == {"witness.npy", "verdict.json"}


def test_an_interruption_exits_with_130(
    digits_model: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*arguments: Any) -> Bounds:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "impatient", impatient)
    assert run(["certify", str(digits_model), *QUICK, "--method", "impatient", "--out", "out", "--json"]) == 130
    assert capsys.readouterr().err.endswith("repeat with --out out --resume\n")


def test_a_model_without_a_gauge_is_unknown_and_no_error(here: Path, capsys: Capture) -> None:
    summary = certified(capsys, ["builders:wild", *QUICK, "--out", "out"])
    assert summary["results"][0]["unknown"] == 5
    for line in map(json.loads, (here / "out/results.jsonl").read_text().splitlines()):
        assert "spectral radius of |W| is about 30" in line["reason"]


def test_tabular_rows_with_weights(here: Path, capsys: Capture) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
        model[0].bias.zero_()
    save_model(model, "rows.safetensors", pixel_range=(-10.0, 10.0))
    rows = np.array([[3.0, 1.0, -2.0], [0.5, 0.5, 0.5]])
    labels = np.array([0, 0])
    np.savez("plain.npz", images=rows, labels=labels, clip=[-10.0, 10.0])
    np.savez("weighted.npz", images=rows, labels=labels, clip=[-10.0, 10.0], eps_weights=[2.0, 0.0, 1.0])
    common = ["rows.safetensors", "--threads", "1", "--eps", "0.25", "--data"]
    margins = {}
    for name in ("plain", "weighted"):
        summary = certified(capsys, [*common, f"{name}.npz", "--out", name])
        assert summary["results"][0]["certified"] == 2
        lines = [json.loads(line) for line in (here / name / "results.jsonl").read_text().splitlines()]
        margins[name] = [line["margin"] for line in lines]
    assert margins["plain"] == pytest.approx([2 - 0.75, 1.5 - 0.75])
    assert margins["weighted"] == pytest.approx([2 - 0.75, 1.5 - 0.75])
    assert "outside the pixel range" in refusal(
        capsys, ["certify", "builders:rows", "--data", "plain.npz", "--threads", "1"]
    )


# --- package.module:builder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["builders:small", "builders:instance"])
def test_a_users_own_module(here: Path, capsys: Capture, name: str) -> None:
    summary = certified(capsys, [name, *QUICK, "--out", "out"])
    assert summary["model"] == name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_are_loaded(here: Path, capsys: Capture, suffix: str) -> None:
    sys.path.insert(0, str(here))
    try:
        import builders  # type: ignore[import-not-found]  # the file that the fixture wrote
    finally:
        sys.path.pop(0)
    state = {name: tensor + 0.01 for name, tensor in builders.small().state_dict().items()}
    path = here / f"state{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    assert run(["inspect", "builders:small", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run(["inspect", "builders:small", "--weights", str(path), "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["hash"] != plain["hash"]
    expected = builders.small()
    expected.load_state_dict(state)
    assert loaded["hash"] == verideq.graph.model_hash(expected)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".pkl", ".bin"])
def test_a_malicious_pickle_as_weights_does_nothing(here: Path, capsys: Capture, suffix: str) -> None:
    path, trace = here / f"state{suffix}", here / "executed"
    if suffix == ".pt":
        torch.save({"0.weight": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    assert str(path) in refusal(capsys, ["inspect", "builders:small", "--weights", str(path)])
    assert not trace.exists()


# --- bad input --------------------------------------------------------------------------------------------------------


def _files(folder: Path, model: Path) -> None:
    """Files that are wrong in every way."""
    data = model.read_bytes()
    (folder / "good.safetensors").write_bytes(data)
    (folder / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("hello, this is no model")
    save_file({"weight": torch.zeros(3)}, folder / "foreign.safetensors")
    torch.save({"weight": torch.zeros(3)}, folder / "state.pt")
    tensors = load_file(model)
    from safetensors import safe_open

    with safe_open(model, framework="pt") as handle:
        metadata = handle.metadata()
    for value in (math.nan, math.inf):
        name = next(iter(tensors))
        damaged = {**tensors, name: torch.full_like(tensors[name], value)}
        save_file(damaged, folder / f"{value}.safetensors", metadata=metadata)
    images, labels = np.zeros((4, 1, 8, 8)), np.array([0, 1, 2, 3])
    np.savez(folder / "good.npz", images=images, labels=labels)
    np.savez(folder / "bright.npz", images=images + 1.5, labels=labels)
    np.savez(folder / "nan.npz", images=images * math.nan, labels=labels)
    np.savez(folder / "shape.npz", images=np.zeros((4, 1, 9, 9)), labels=labels)
    np.savez(folder / "labels.npz", images=images, labels=labels + 9)
    (folder / "foreign.npz").write_bytes(b"no archive")
    (folder / "recipe.toml").write_text("epohcs = 5\n")
    (folder / "occupied").write_text("a file")


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "missing model": (["nowhere.safetensors"], "there is no model file nowhere.safetensors"),
    "truncated model": (["truncated.safetensors"], "truncated.safetensors is truncated or no safetensors file"),
    "empty model": (["empty.safetensors"], "empty.safetensors is truncated"),
    "text": (["text.safetensors"], "text.safetensors is truncated or no safetensors file"),
    "foreign model": (["foreign.safetensors"], "not a verideq model .* verideq.save_model"),
    "pickle": (["state.pt"], "state.pt is a pickle, .* not opened. Save a model with verideq.save_model"),
    "folder": (["."], "is a folder"),
    "nan weights": (["nan.safetensors"], r"nan.safetensors: .*\[0.*\] is nan"),
    "infinite weights": (["inf.safetensors"], r"inf.safetensors: .*\[0.*\] is inf"),
    "nan in a module": (["builders:nan"], r"2\.bias\[0\] is nan"),
    "bright images": (
        ["good.safetensors", "--data", "bright.npz"],
        r"bright.npz: images: input 0, .* outside the pixel range \[0, 1\]",
    ),
    "nan images": (["good.safetensors", "--data", "nan.npz"], "nan.npz: images: input 0, .*not finite"),
    "shape of images": (
        ["good.safetensors", "--data", "shape.npz"],
        r"takes inputs of shape \(1, 8, 8\), the data have \(1, 9, 9\)",
    ),
    "shape for a module": (
        ["builders:wide"],
        r"inputs of shape \(1, 8, 8\) do not fit the model: 1 \(linear\) got \(64,\)",
    ),
    "labels outside": (
        ["good.safetensors", "--data", "labels.npz"],
        "sample 1 has label 10; the model has 10 outputs, 0 to 9",
    ),
    "labels outside a module": (["builders:narrow"], r"sample \d+ has label \d; the model has 3 outputs, 0 to 2"),
    "negative eps": (["good.safetensors", "--eps=-0.1"], "eps '-0.1' is negative; a radius is 0 or more"),
    "nan eps": (["good.safetensors", "--eps", "nan"], "eps 'nan' is not a finite number; write e.g. 0.1 or 8/255"),
    "infinite eps": (["good.safetensors", "--eps", "inf"], "eps 'inf' is not a finite number"),
    "eps no number": (["good.safetensors", "--eps", "big"], "eps 'big' is not a finite number"),
    "eps over zero": (["good.safetensors", "--eps", "8/0"], "eps '8/0' is not a finite number"),
    "unknown data": (
        ["good.safetensors", "--data", "svhn"],
        "unknown data set 'svhn'; choose one of: digits, mnist, cifar10",
    ),
    "missing data": (["good.safetensors", "--data", "none.npz"], "none.npz: there is no such file"),
    "foreign data": (["good.safetensors", "--data", "foreign.npz"], "foreign.npz: the file cannot be read"),
    "no mnist": (["good.safetensors", "--data", "mnist"], "set VERIDEQ_DATA"),
    "unknown split": (
        ["good.safetensors", "--split", "val"],
        "unknown split of digits 'val'; choose one of: train, test",
    ),
    "unknown norm": (["good.safetensors", "--norm", "l1"], "unknown norm 'l1'; choose one of: linf, l2"),
    "unknown method": (["good.safetensors", "--method", "ibp"], "unknown method 'ibp'; choose one of: auto, interval"),
    "unknown attack": (
        ["good.safetensors", "--attack", "fgsm"],
        "unknown attack 'fgsm'; choose one of: none, pgd, standard, intermediate, full",
    ),
    "unknown device": (["good.safetensors", "--device", "tpu"], "unknown device 'tpu'; choose one of: auto, cpu, cuda"),
    "timeout": (["good.safetensors", "--timeout", "0"], "timeout 0.0"),
    "limit": (["good.safetensors", "--limit", "0"], "--limit 0: give 1 or more"),
    "batch size": (["good.safetensors", "--batch-size", "0"], "--batch-size 0: give 1 or more"),
    "indices": (["good.safetensors", "--indices", "0:1000"], "'0:1000' is out of range; there are 360 samples"),
    "indices file": (
        ["good.safetensors", "--indices", "nowhere.txt"],
        "indices 'nowhere.txt' are no list and no readable file",
    ),
    "resume without a folder": (["good.safetensors", "--resume"], "--resume needs the folder of the run: --out DIR"),
    "out is a file": (["good.safetensors", "--limit", "1", "--out", "occupied"], "occupied: .*; give a path"),
    "weights without a builder": (
        ["good.safetensors", "--weights", "state.pt"],
        "--weights goes with a package.module:builder",
    ),
    "weights without a model": (["--weights", "state.pt"], "--weights goes with a package.module:builder"),
    "unsupported": (["builders:curved"], "2: Tanh is not supported. Supported: normalize, linear, "),
    "no module": (["nomodule:x"], "nomodule:x: No module named 'nomodule'; run the command where"),
    "no builder": (["builders:nothing"], "the module builders has no 'nothing'"),
    "builder fails": (["builders:fails"], "builders:fails raised KeyError: 'no configuration'"),
    "builder with arguments": (["builders:needs"], "builders:needs raised TypeError: .*argument"),
    "builder gives text": (
        ["builders:gives_text"],
        "builders:gives_text gave a value of type str; a builder returns a torch.nn.Module",
    ),
    "builder is a number": (["builders:number"], "builders:number gave a value of type int"),
    "missing weights": (["builders:small", "--weights", "none.pt"], "there is no weights file none.pt"),
    "foreign weights": (
        ["builders:small", "--weights", "foreign.safetensors"],
        "foreign.safetensors does not fit the model: .*Missing key",
    ),
    "weights that are no weights": (
        ["builders:small", "--weights", "text.safetensors"],
        "text.safetensors does not fit the model",
    ),
    "weights of another kind": (
        ["builders:small", "--weights", "recipe.toml"],
        "a state dict ends in .safetensors, .pt or .pth",
    ),
    "unknown option": (["good.safetensors", "--epsilon", "1"], "No such option: --epsilon .*see verideq --help"),
    "no integer": (["good.safetensors", "--limit", "five"], "Invalid value for '--limit'"),
    "option without value": (["good.safetensors", "--eps"], "'--eps' requires an argument"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(
    digits_model: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.delenv("VERIDEQ_DATA", raising=False)
    _files(here, digits_model)
    arguments, message = BAD_INPUT[case]
    assert re.search(message, refusal(capsys, ["certify", "--threads", "1", *arguments]))


@pytest.mark.parametrize("command", ["frobnicate", "Certify", "--nonsense"])
def test_unknown_commands(here: Path, capsys: Capture, command: str) -> None:
    assert command in refusal(capsys, [command])


def test_threads_and_cuda(digits_model: Path, here: Path, capsys: Capture) -> None:
    assert "--threads 0: give 1 or more" in refusal(capsys, ["certify", str(digits_model), "--threads", "0"])
    if not torch.cuda.is_available():
        message = refusal(capsys, ["certify", str(digits_model), "--threads", "1", "--device", "cuda"])
        assert "use --device cpu" in message


# --- the other commands -----------------------------------------------------------------------------------------------


def test_inspect(digits_model: Path, here: Path, capsys: Capture) -> None:
    assert run(["inspect", str(digits_model), "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    facts = json.loads(output.out)
    model = load_model(digits_model)
    assert facts["hash"] == verideq.graph.model_hash(model)
    assert [node["operation"] for node in facts["operations"]] == ["flatten", "linear", "equilibrium", "linear"]
    assert facts["parameters"] == 64 * 24 + 24 + 24 * 24 + 24 * 10 + 10
    assert (facts["input_shape"], facts["pixel_range"], facts["classes"]) == ([1, 8, 8], [0.0, 1.0], 10)
    (layer,) = facts["equilibria"]
    assert layer["units"] == 24
    assert 0 < layer["rate"] < 1
    assert layer["smallest_slack"] > 0
    assert layer["steps"] == predicted_steps(layer["rate"])
    assert (layer["class"], layer["guarantee"], layer["gauge"]) == ("IBPMonDEQ", "gauge", "W")
    assert run(["inspect", str(digits_model)]) == 0
    text = capsys.readouterr().out
    for word in (
        "24 units, IBPMonDEQ: gauge of W",
        "contraction rate",
        "Picard steps",
        "equilibrium",
        facts["hash"][:16],
        "input shape (1, 8, 8)",
    ):
        assert word in text


def test_predicted_steps() -> None:
    for rate in (0.05, 0.5, 0.9, 0.999):
        steps = predicted_steps(rate)
        assert rate**steps <= 1e-5 < rate ** (steps - 1)
    assert predicted_steps(0.0) == 1


def test_inspect_of_a_model_without_a_gauge(here: Path, capsys: Capture) -> None:
    assert run(["inspect", "builders:wild", "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["equilibria"]
    assert layer["gauge"] is None
    assert layer["rate"] == pytest.approx(30, rel=0.01)
    assert (layer["class"], layer["guarantee"]) == (None, None)
    assert layer["excess"] == pytest.approx(29, rel=0.01)
    assert run(["inspect", "builders:wild"]) == 0
    text = capsys.readouterr().out
    assert "no gauge: the spectral radius of |W| is about 30" in text
    assert "6 units, no class recorded: nothing is guaranteed (too large by about 29)" in text
    assert "The smallest eigenvalue of I - sym W is about -29: no m > 0" in text
    assert (layer["m"], layer["by"], layer["smallest_eigenvalue"]) == (None, None, pytest.approx(-29, rel=1e-6))


def inspected(capsys: Capture, model: str) -> tuple[dict[str, Any], str]:
    """What `inspect` has for the one equilibrium of a model: the facts, and the line."""
    assert run(["inspect", model, "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["equilibria"]
    assert run(["inspect", model]) == 0
    return layer, capsys.readouterr().out.splitlines()[-1]


def test_inspect_of_a_factored_layer_is_monotone_by_algebra(here: Path, capsys: Capture) -> None:
    built, line = inspected(capsys, "builders:factored")
    expected = {"class": "MonDEQ", "guarantee": "monotone", "gauge": None, "m": 20.0, "by": "factors"}
    assert expected.items() <= built.items()
    assert built["excess"] > 0
    assert "24 units, MonDEQ: monotone with m = 20, by its factors: one equilibrium for every input; no gauge" in line
    save_model(sys.modules["builders"].factored(), here / "factored.safetensors")
    assert inspected(capsys, "factored.safetensors") == (built, line)


def test_inspect_proves_a_dense_weight_without_a_gauge_monotone(here: Path, capsys: Capture) -> None:
    layer, line = inspected(capsys, "builders:multiplied")
    assert (layer["class"], layer["guarantee"], layer["gauge"], layer["by"]) == (None, "monotone", None, "proof")
    W = sys.modules["builders"].multiplied()[1].fusion.weight.detach().double()
    smallest = float(1 - torch.linalg.eigvalsh((W + W.T) / 2)[-1])
    assert smallest * (1 - 1e-6) < layer["m"] <= smallest + 1e-9
    assert layer["smallest_eigenvalue"] == pytest.approx(smallest)
    shown = float(re.search(r"monotone with m = (\S+), proved of the stored W", line)[1])
    assert layer["m"] * (1 - 1e-3) < shown <= layer["m"]


def test_inspect_of_a_factored_layer_with_a_gauge_names_both(here: Path, capsys: Capture) -> None:
    small = torch.full((3, 3), 0.1)
    fusion = MonDEQ.from_weights(small, small, 20.0)
    save_model(nn.Sequential(Equilibrium(fusion, nn.Linear(4, 3)), nn.Linear(3, 2)), here / "tame.safetensors")
    layer, line = inspected(capsys, "tame.safetensors")
    assert (layer["guarantee"], layer["gauge"], layer["m"]) == ("gauge", "transformed layer", 20.0)
    assert "MonDEQ: gauge of the transformed layer" in line and line.endswith("(worst case); monotone with m = 20")


def test_inspect_of_a_convolution_without_a_gauge_asks_for_no_m(here: Path, capsys: Capture) -> None:
    fusion = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    nn.init.constant_(fusion.weight, 1.0)
    save_model(nn.Sequential(Equilibrium(fusion, nn.Conv2d(1, 2, 3, padding=1))), here / "conv.safetensors")
    layer, line = inspected(capsys, "conv.safetensors")
    assert (layer["guarantee"], layer["m"], layer["smallest_eigenvalue"]) == (None, None, None)
    assert "nothing is guaranteed (too large by about 17)" in line and "eigenvalue" not in line


def test_inspect_says_nothing_of_factors_that_are_not_finite() -> None:
    model = nn.Sequential(
        nn.Flatten(), Equilibrium(MonDEQ.from_weights(*torch.full((2, 3, 3), math.inf), 20.0), nn.Linear(4, 3))
    )
    (layer,) = describe(model, "broken", {})["equilibria"]
    assert (layer["guarantee"], layer["m"], layer["rate"]) == (None, None, None)


def test_inspect_names_the_class_of_a_builder_and_of_its_file(here: Path, capsys: Capture) -> None:
    assert run(["inspect", "builders:inverted", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    (layer,) = built["equilibria"]
    assert (layer["class"], layer["guarantee"], layer["gauge"]) == ("NEMON", "gauge", "transformed layer")
    assert 0 < layer["rate"] < 1 and layer["smallest_slack"] > 0
    save_model(sys.modules["builders"].inverted(), here / "inverted.safetensors")
    assert run(["inspect", "inverted.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equilibria"] == built["equilibria"]
    assert run(["inspect", "inverted.safetensors"]) == 0
    assert "24 units, NEMON: gauge of the transformed layer, smallest slack" in capsys.readouterr().out


def test_inspect_reads_the_guarantee_from_the_weights_and_not_from_the_record(here: Path, capsys: Capture) -> None:
    path = here / "inverted.safetensors"
    assert run(["inspect", "builders:inverted", "--json"]) == 0
    capsys.readouterr()
    save_model(sys.modules["builders"].inverted(), path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    (name,) = (name for name in tensors if name.endswith("fusion.weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], 0.5)}, path, metadata=metadata)
    assert run(["inspect", str(path), "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["equilibria"]
    assert (layer["class"], layer["guarantee"]) == ("NEMON", None)


def test_inspect_of_an_unsupported_model(here: Path, capsys: Capture) -> None:
    assert run(["inspect", "builders:curved", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert [problem.startswith("2: Tanh is not supported") for problem in facts["unsupported"]] == [True]
    assert run(["inspect", "builders:curved"]) == 1
    assert "builders:curved: not supported" in capsys.readouterr().out


def test_report_of_one_run_and_of_several(digits_model: Path, here: Path, capsys: Capture) -> None:
    for name in ("one", "two"):
        certified(capsys, [str(digits_model), *QUICK, "--out", name])
    page = here / "one/report.html"
    drawn = page.read_bytes()
    page.unlink()
    assert run(["report", "one"]) == 0
    assert page.read_bytes() == drawn, "drawn again, pictures and all"
    assert str(Path("one/report.html")) in capsys.readouterr().out
    assert run(["report", "one", "two", "--out", "both.html"]) == 0
    assert capsys.readouterr().out == "both.html\n"
    both = (here / "both.html").read_text()
    assert "one" in both and "two" in both
    assert "nowhere" in refusal(capsys, ["report", "nowhere"])
    assert "DIR" in refusal(capsys, ["report"])


def test_report_without_its_data_draws_no_pictures(here: Path, capsys: Capture) -> None:
    np.savez("own.npz", images=np.random.default_rng(0).random((4, 1, 8, 8)), labels=[0, 1, 2, 3])
    certified(capsys, ["builders:small", "--data", "own.npz", *QUICK, "--limit", "4", "--out", "run"])
    (here / "own.npz").unlink()
    assert run(["report", "run"]) == 0


def test_train_and_certify_what_was_trained(here: Path, capsys: Capture) -> None:
    (here / "small.toml").write_text(
        'architecture = "linear-deq"\neps = 0.05\nlearning_rate = 1e-2\n[options]\nwidth = 8\n'
    )
    call = ["train", "small.toml", "--set", "epochs=1", "--threads", "1", "--seed", "3", "--out", "run"]
    assert run([*call, "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    facts = json.loads(output.out)
    assert facts["epoch"] == 1
    assert tomllib.loads((here / "run/recipe.toml").read_text())["seed"] == 3
    assert "pass --resume" in refusal(capsys, call)
    assert "another recipe" in refusal(capsys, [*call[:-2], "--set", "epochs=2", "--out", "run", "--resume"])
    certified(capsys, [facts["model"], *QUICK, "--out", "certified"])


def test_show_prints_the_recipe_in_full(here: Path, capsys: Capture) -> None:
    (here / "small.toml").write_text('eps = "8/255"\n')
    assert run(["train", "small.toml", "--show", "--set", "options.width=7", "--data", "digits", "--seed", "5"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert (shown["eps"], shown["seed"], shown["options"]["width"], shown["epochs"]) == ("8/255", 5, 7, 60)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "there is no recipe nowhere.toml"),
        (["recipe.toml"], "recipe.toml: epohcs: no such key; did you mean epochs?"),
        (["empty.toml", "--set", "epochs"], "has no value; write key=value"),
        (["empty.toml", "--set", "epochs=many"], "epochs: expected int; got 'many'"),
        (["empty.toml", "--set", "data.x=1", "--set", "data=digits", "--set", "data.y=1"], "data is no table"),
        (["empty.toml", "--set", "options.m=2"], "m = 2.* is outside"),
        (["empty.toml", "--data", "svhn"], "unknown data set 'svhn'"),
    ],
)
def test_bad_recipes(here: Path, capsys: Capture, arguments: list[str], message: str) -> None:
    (here / "recipe.toml").write_text("epohcs = 5\n")
    (here / "empty.toml").write_text("")
    assert re.search(message, refusal(capsys, ["train", *arguments, "--threads", "1"]))


def test_version_and_help(here: Path, capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"verideq {verideq.__version__}\n"
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("certify", "inspect", "train", "report"))
    assert run([]) == 2
    output = capsys.readouterr()
    assert "certify" in output.out
    assert output.err == ""


def test_help_and_pages_have_every_option_and_method(here: Path, capsys: Capture) -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    page, methods = ((docs / name).read_text(encoding="utf-8") for name in ("command-line.md", "methods.md"))
    assert run(["certify", "--help"]) == 0
    text = capsys.readouterr().out
    options = set(re.findall(r"--[a-z-]+", text)) - {"--help"}
    listed = page[page.index("## `verideq certify") : page.index("## `verideq check")]
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", listed, re.MULTILINE))
    words = "".join(text.replace("│", " ").split())
    assert f"auto,{','.join(METHODS)}." in words
    assert all(f"| `{method}` |" in methods and f"`{method}`" in listed for method in METHODS)


def test_python_m_verideq(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-m", "verideq", "certify", "--norm", "l1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown norm 'l1'; choose one of: linf, l2\n"
