"""What certified training reaches, row by row, and what the rows that were not run would cost.

    python benchmarks/certified_training.py run NAME [--runs DIR] [--limit N] [--timeout S]
    python benchmarks/certified_training.py cost NAME [--samples N] [--batch-size B]
    python benchmarks/certified_training.py twins [--seeds N]
    python benchmarks/certified_training.py table

`run` trains by the row's recipe, certifies the test split by intervals, and it or its first N samples by `auto`, every
certificate checked, and keeps the row in ``results/certified-training.json``; interrupted, it goes on where it was.
`cost` is a smoke run: an epoch of the first samples at full radius, and what a whole epoch takes at that rate, for rows
whose recipe wants a GPU. `twins` trains an equilibrium and its explicit twin from the same recipe, for as many epochs
and for as many seconds. `table` writes the rows as a table. One thread; CPU seconds, because the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import verideq
from verideq.data import load
from verideq.training import Trainer, read_recipe

HERE = Path(__file__).resolve().parent
RECIPES, RESULTS = HERE.parent / "recipes", HERE / "results"
WEI, LI = "Wei & Kolter, Table 2", "Li, Wang & Lin, Table 3"
ROWS: dict[str, dict[str, Any]] = {
    # recipe, settings, the radius that is certified; what a paper reports: certified error, clean error, place
    "mnist-0.1": {"recipe": "mnist-0.1", "eps": "0.1", "paper": (3.18, 1.62, f"{WEI}, DEQ-3")},
    "mnist-0.3": {"recipe": "mnist-0.3", "eps": "0.3", "paper": (11.96, 4.54, f"{WEI}, DEQ-3 + LBEN")},
    "mnist-deq-3": {"recipe": "mnist-deq-3", "eps": "0.1", "paper": (3.18, 1.62, f"{WEI}, DEQ-3")},
    "mnist-3layer": {
        "recipe": "mnist-deq-3", "set": ["architecture=3layer"], "eps": "0.1", "paper": (4.19, 2.10, f"{WEI}, 3Layer")
    },
    "mnist-deq-7": {"recipe": "mnist-deq-7", "eps": "0.1", "paper": (2.58, 0.79, f"{WEI}, DEQ-7")},
    "mnist-7layer": {
        "recipe": "mnist-deq-7", "set": ["architecture=7layer"], "eps": "0.1", "paper": (2.61, 0.89, f"{WEI}, 7Layer")
    },
    "cifar10-deq-3": {"recipe": "cifar10-deq-3", "eps": "8/255", "paper": (71.97, 59.35, f"{WEI}, DEQ-3")},
    "cifar10-deq-7": {"recipe": "cifar10-deq-7", "eps": "8/255", "paper": (66.87, 53.12, f"{WEI}, DEQ-7")},
    "cifar10-cerdeq": {"recipe": "cifar10-cerdeq", "eps": "8/255", "paper": (64.98, 50.34, f"{LI}, CerDEQ")},
}  # fmt: skip
TWINS = ["options.width=16", "options.stem=8", "options.units=64", "ramp_epochs=2"]
"""The short schedule of `twins`, on the recipe of MNIST at 0.1; four epochs."""


def keep(name: str, row: dict[str, Any]) -> None:
    """Put a row into the file of results, and show it."""
    path = RESULTS / "certified-training.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread"
    rows[name] = {**row, "machine": machine, "verideq": verideq.__version__, "torch": torch.__version__}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: rows[name]}))


def call(*arguments: str) -> str:
    """Run a command of verideq in this interpreter's environment; returns it as one types it."""
    subprocess.run([sys.executable, "-m", "verideq", *arguments, "--threads", "1"], check=True)
    return " ".join(["verideq", *arguments])


def train(recipe: str, settings: list[str], out: Path) -> dict[str, Any]:
    """Train, or go on with it; the command, the seconds, and how far it is."""
    options = [part for setting in settings for part in ("--set", setting)]
    call("train", str(RECIPES / f"{recipe}.toml"), *options, "--out", str(out), "--resume")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "train": " ".join(["verideq train", f"recipes/{recipe}.toml", *options, "--threads 1"]),
        "seed": read_recipe(RECIPES / f"{recipe}.toml", settings).seed,
        "epochs": len(lines),
        "cpu_seconds": round(sum(line["cpu_seconds"] for line in lines)),
    }


def certified(
    model: Path, data: str, eps: str, method: str, out: Path, limit: int | None, *more: str
) -> dict[str, Any]:
    """Certify the test split, or go on with it; errors in per cent."""
    some = ["--limit", str(limit)] if limit else []
    chosen = ["--data", data, "--eps", eps, "--method", method, *some, *more]
    began = time.process_time()
    call("certify", str(model), *chosen, "--out", str(out), *(["--resume"] if (out / "run.json").exists() else []))
    (result,) = json.loads((out / "summary.json").read_text(encoding="utf-8"))["results"]
    n = result["n"]
    return {
        "certify": " ".join(["verideq certify MODEL", *chosen]),
        "samples": n,
        "clean_error": round(100 - 100 * result["clean"] / n, 2),
        "attacked_error": None if result["attacked"] is None else round(100 - 100 * result["attacked"] / n, 2),
        "certified_error": round(100 - 100 * result["certified"] / n, 2),
        "checked": result["checked"],
        "rejected": result["rejected"],
        "by_method": result["by_method"],
        "seconds": round(result["seconds"] + time.process_time() - began),
    }


def run_row(name: str, runs: Path, limit: int | None, timeout: str) -> None:
    """One row: train, certify by intervals, certify by `auto`."""
    row, out = ROWS[name], runs / name
    recipe = read_recipe(RECIPES / f"{row['recipe']}.toml", row.get("set", []))
    trained = train(row["recipe"], row.get("set", []), out)
    model, args = out / "model.safetensors", (recipe.data, row["eps"])
    interval = certified(model, *args, "interval", runs / f"{name}-interval", None, "--attack", "none")
    auto = certified(model, *args, "auto", runs / f"{name}-auto", limit, "--timeout", timeout)
    keep(name, {"eps": row["eps"], "paper": row["paper"], **trained, "interval": interval, "auto": auto})


def cost(name: str, samples: int, batch_size: int) -> None:
    """A smoke run: one epoch of the first samples at full radius, and what a whole epoch takes at that rate."""
    row = ROWS[name]
    path, settings = RECIPES / f"{row['recipe']}.toml", row.get("set", [])
    small = ["epochs=1", "natural_epochs=0", "ramp_epochs=0", "validation.samples=0", f"batch_size={batch_size}"]
    recipe, whole = read_recipe(path, [*settings, *small]), read_recipe(path, settings)
    data = load(recipe.data, "train")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        trainer = Trainer(recipe, out, torch.device("cpu"), data.subset(list(range(samples))))
        trainer.run()
        line = json.loads((out / "log.jsonl").read_text(encoding="utf-8"))
    hours = line["cpu_seconds"] / (trainer.steps * batch_size) * (len(data) - whole.validation.samples) / 3600
    shown = {key: round(line[key], 3) for key in ("loss", "train_error", "train_interval_error", "solver_steps")}
    keep(name, {
        "eps": row["eps"], "paper": row["paper"], "seed": recipe.seed,
        "parameters": sum(p.numel() for p in trainer.free),
        "train": " ".join([f"verideq train recipes/{row['recipe']}.toml", *(f"--set {one}" for one in settings)]),
        "smoke_run": {"samples": samples, "set": small, **shown},
        "step_cpu_seconds": round(line["cpu_seconds"] / trainer.steps, 3),
        "epoch_cpu_hours": round(hours, 2), "epochs": whole.epochs, "cpu_hours": round(hours * whole.epochs),
    })  # fmt: skip


def twins(seeds: int, runs: Path) -> None:
    """The equilibrium, its twin for as many epochs, and its twin for as many seconds, over some seeds."""
    found: dict[str, list[dict[str, Any]]] = {"equilibrium": [], "twin, equal epochs": [], "twin, equal time": []}
    for seed in range(seeds):
        epochs = 4
        for kind in found:
            if kind == "twin, equal time":
                first, second = found["equilibrium"][-1], found["twin, equal epochs"][-1]
                epochs = round(4 * first["cpu_seconds"] / second["cpu_seconds"])
            explicit = "true" if kind.startswith("twin") else "false"
            settings = [*TWINS, f"epochs={epochs}", f"explicit={explicit}", f"seed={seed}"]
            out = runs / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}"
            trained = train("mnist-0.1", settings, out)
            shown = certified(
                out / "model.safetensors", "mnist", "0.1", "interval", runs / f"{out.name}-certified", None,
                "--attack", "none", "--no-check",
            )  # fmt: skip
            found[kind].append({**trained, **shown})
    keep("twins", {
        kind: {
            "train": lines[0]["train"], "epochs": [line["epochs"] for line in lines],
            **{key: [line[key] for line in lines] for key in ("cpu_seconds", "clean_error", "certified_error")},
            "mean_certified_error": round(statistics.mean(line["certified_error"] for line in lines), 2),
            "deviation": round(statistics.stdev(line["certified_error"] for line in lines), 2) if seeds > 1 else None,
        }
        for kind, lines in found.items()
    })  # fmt: skip


def table() -> None:
    """Write the rows as a table of certified errors in per cent."""
    rows = json.loads((RESULTS / "certified-training.json").read_text(encoding="utf-8"))
    lines = [
        "| row | eps | command | seed | CPU minutes | clean | intervals | `auto` | attacked | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if name == "twins":
            continue
        certified_error, clean_error, place = row["paper"]
        paper = f"{certified_error} (clean {clean_error}; {place})"
        head = f"| {name} | {row['eps']} | `{row['train']}` | {row['seed']} "
        if "smoke_run" in row:
            what = f"not run: {row['cpu_hours']} CPU hours, {row['epoch_cpu_hours']} an epoch"
            lines.append(f"{head}| {what} | | | | | {paper} |")
            continue
        interval, auto = row["interval"], row["auto"]
        some = "" if auto["samples"] == interval["samples"] else f" (first {auto['samples']:,})"
        lines.append(
            f"{head}| {row['cpu_seconds'] / 60:.0f} | {interval['clean_error']} | {interval['certified_error']} "
            f"| {auto['certified_error']}{some} | {auto['attacked_error']}{some} | {paper} |"
        )
    path = RESULTS / "certified-training.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "cost", "twins", "table"))
    parser.add_argument("name", nargs="?", choices=sorted(ROWS))
    parser.add_argument("--runs", type=Path, default=Path("runs") / "certified-training")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--timeout", default="1", help="seconds a sample of auto")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.what in ("run", "cost") and chosen.name is None:
        parser.error(f"{chosen.what} takes a NAME: {', '.join(ROWS)}")
    if chosen.what == "run":
        run_row(chosen.name, chosen.runs, chosen.limit, chosen.timeout)
    elif chosen.what == "cost":
        cost(chosen.name, chosen.samples, chosen.batch_size)
    elif chosen.what == "twins":
        twins(chosen.seeds, chosen.runs)
    else:
        table()


if __name__ == "__main__":
    main()
