"""Runs that are killed, and runs in several processes: the same weights as those of one that nothing disturbed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from verideq.cli.main import run
from verideq.training import Trainer, read_recipe

RECIPE = """
data = "{data}"
architecture = "{architecture}"
eps = "0.05"
epochs = {epochs}
natural_epochs = 1
ramp_epochs = 1
batch_size = 128
learning_rate = 1e-2
average = 0.9
clean_weight = 0.2
seed = 5
{more}
[options]
width = 8
{options}
[penalty]
bounds = 0.5
jacobian = 0.1
jacobian_share = 0.5

[attack]
box = 0.5
steps = 1

[augment]
flip = true
shift = 1

[validation]
samples = 64

[checkpoint]
steps = 2
minutes = 0.0
"""


def recipe(folder: Path, **changes: Any) -> Path:
    values = {"data": "digits", "architecture": "conv-deq", "epochs": 2, "more": "", "options": ""} | changes
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(**values), encoding="utf-8")
    return path


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "verideq", "train", str(path), "--out", str(out), "--threads", "1", *more]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def here(path: Path, out: Path) -> None:
    """The same run in this process."""
    Trainer(read_recipe(path), out, torch.device("cpu"), resume=out.exists()).run()


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


def test_a_run_that_is_killed_anywhere_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Killed without warning: before anything is saved, within the first epoch, and within the second."""
    path = recipe(tmp_path)
    here(path, tmp_path / "whole")
    out, kills = tmp_path / "killed", 0
    for wanted in (-1, 3, 1001):  # epochs and steps that a checkpoint has seen before the kill
        with subprocess.Popen(command(path, out, "--resume"), env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + 240
                while process.poll() is None and not _far(out, wanted) and time.monotonic() < deadline:
                    time.sleep(0.002)
            finally:
                if process.poll() is None:
                    process.kill()
                    kills += 1
    assert kills == 3, "the run has to be there to be killed"
    here(path, out)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert lines(out) == lines(tmp_path / "whole")


def _far(folder: Path, wanted: int) -> bool:
    """Whether a run has begun, and its checkpoint has seen so much."""
    return (folder / "diagnosis.json").exists() and _steps(folder) >= wanted


def _steps(folder: Path) -> int:
    """What the checkpoint of a run has seen: steps, and 1,000 for each whole epoch; -1 without one."""
    try:
        # Read at one go: safetensors opens a file twice, and the run may replace it in between.
        stored = (folder / "checkpoint.safetensors").read_bytes()
    except FileNotFoundError:
        return -1
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    meta = json.loads(header["__metadata__"]["verideq"])
    return int(meta["epoch"]) * 1000 + int(meta["sums"]["steps"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(arguments: list[str], processes: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """A command as torchrun starts it: the same in every process, told apart by its environment."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            arguments,
            env={**ENVIRONMENT, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    results = []
    for process in started:
        out, err = process.communicate(timeout=300)
        results.append(subprocess.CompletedProcess(arguments, process.returncode, out, err))
    return results


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Up to the order of summation; the files are those of one run, written once."""
    path = recipe(tmp_path, more="tol = 1e-6\nbackward_tol = 1e-6\n")
    # A learning rate at which rounding does not grow: Adam divides by the size of a gradient, however small that is.
    path.write_text(path.read_text().replace("learning_rate = 1e-2", "learning_rate = 1e-3"))
    here(path, tmp_path / "one")
    for result in together(command(path, tmp_path / "two")):
        assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        assert float((tensor - two[name]).abs().max()) <= 5e-3 * float(tensor.abs().max()) + 1e-6, name
    for mine, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for key, value in mine.items():
            near = 3 if key == "solver_steps" else 2e-2  # near the rounding of float32 a step more or less
            assert theirs[key] == (None if value is None else pytest.approx(value, rel=2e-2, abs=near)), key
    files = {place.name for place in (tmp_path / "one").iterdir()}
    assert {place.name for place in (tmp_path / "two").iterdir()} == files | {"report.html"}


def test_one_step_in_two_processes_has_the_gradient_of_one(tmp_path: Path) -> None:
    """In float64 what couples the samples of a batch is shared exactly: statistics, penalties, what is drawn."""
    script = tmp_path / "step.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_num_threads(1)\n"
        "from verideq.training import Trainer, read_recipe\n"
        "from verideq.distributed import joined\n"
        "with joined(torch.device('cpu')) as (world, device):\n"
        "    recipe = read_recipe(sys.argv[1], ['tol=1e-12', 'backward_tol=1e-12', 'natural_epochs=0'])\n"
        "    trainer = Trainer(recipe, Path(sys.argv[2]), device, world=world)\n"
        "    trainer.model.train()\n"
        "    order = torch.arange(128)\n"
        "    trainer.eps = lambda step: 0.02\n"
        "    trainer._step(0, order[trainer.part])\n"
        "    grads = {n: p.grad for n, p in trainer.model.named_parameters()}\n"
        "    state = {**{f'grad/{n}': g for n, g in grads.items()}, **trainer.model.state_dict()}\n"
        "    from safetensors.torch import save_file\n"
        "    save_file(state, f'{sys.argv[3]}{world.rank}.safetensors')\n"
    )
    path = recipe(tmp_path)
    arguments = [sys.executable, str(script), str(path), str(tmp_path / "run")]
    subprocess.run([*arguments, str(tmp_path / "one")], env=ENVIRONMENT, timeout=300, check=True)
    for result in together([*arguments, str(tmp_path / "two")]):
        assert result.returncode == 0, result.stderr
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("one0", "two0", "two1"))
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), f"{name}: the processes agree to the last bit"
        if name.startswith("grad/"):
            assert torch.allclose(first[name], tensor, rtol=1e-7, atol=1e-10), name
        else:
            assert torch.allclose(first[name].double(), tensor.double(), rtol=1e-5, atol=1e-6), name


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("batch_size = 128", "batch_size = 33"))
    for result in together(command(path, tmp_path / "out")):
        assert result.returncode == 2
        assert "a batch of 33 cannot be shared by 2 processes; make batch_size divisible" in result.stderr


def results(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def certify(out: Path, *more: str) -> list[str]:
    chosen = ["--eps", "0.05", "--eps", "0.15", "--indices", "0:11", "--batch-size", "3", "--certificates"]
    return [sys.executable, "-m", "verideq", "certify", *chosen, "--threads", "1", "--out", str(out), *more]


def test_two_processes_certify_into_the_folder_of_one(tmp_path: Path) -> None:
    assert run(certify(tmp_path / "one")[3:]) == 0
    for result in together(certify(tmp_path / "two")):
        assert result.returncode == 0, result.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    assert results(two) == results(one)
    assert len(results(one)) == 22
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert {path.relative_to(two) for path in two.rglob("*") if path.is_file()} == files
    for name in ("records.bin", "model.safetensors", "gauges.safetensors"):
        assert (two / "certificates" / name).read_bytes() == (one / "certificates" / name).read_bytes()
    # Cut within a line, and taken up by more processes.
    written = (one / "results.jsonl").read_bytes()
    (two / "results.jsonl").write_bytes(written[: len(written) // 2])
    (two / "summary.json").unlink()
    for result in together(certify(two, "--resume"), 3):
        assert result.returncode == 0, result.stderr
    assert results(two) == results(one)
    assert (two / "certificates/records.bin").read_bytes() == (one / "certificates/records.bin").read_bytes()
    refused = together(certify(two))
    assert [r.returncode for r in refused] == [2, 2]
    assert all("holds a run already; pass --resume" in r.stderr for r in refused)
