"""How robust an energy-based network is beside a convolutional one, an adversarially trained one and a transformer.

    python benchmarks/robustness.py --folder RUNS [--limit 200] [--seeds 1] [--set samples=20000] [--out NAME]

Needs MNIST. Every model of `MODELS` is trained from its recipe unless ``RUNS/models/NAME-SEED`` holds one already (a
folder of ``verideq train``), then attacked on the first `--limit` test samples in both norms at the radii of `RADII`:
by PGD with 20 steps from the sample and, where that fails, by Square, 500 queries; white boxes through the network's
own dynamics, unrolled. The l_inf runs meet the natural corruptions too. All runs go on where they were interrupted. The
page ``RUNS/robustness.html`` has all of it, its corruption errors divided by those of ``bp-cnn``.

The suite is weaker than ``standard``, so that the whole takes minutes and not hours: what is left under it is an upper
bound of what is left under ``verideq attack --suite standard``. Accuracies are shares of all samples, the misclassified
ones included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import verideq
from verideq.attacks import ATTACKS, PGD, SUITES, Square, Stage, Suite
from verideq.certify.corruption import normalised_error
from verideq.cli.main import run as command
from verideq.cli.options import training_of

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "equilibrium-propagation"
RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"ep-cnn": "mnist", "bp-cnn": "mnist-bp-cnn", "adv-cnn": "mnist-adv-cnn", "vit": "mnist-vit"}
"""By name, the recipe."""
RADII = {"linf": ("0.05", "0.1", "0.2"), "l2": ("0.5", "1", "2")}
BASELINE = "bp-cnn"


def call(*arguments: str) -> None:
    """A command of verideq, in this process."""
    print("verideq", *arguments, flush=True)
    code = command(list(arguments))
    if code:
        sys.exit(code)


def train(name: str, seed: int, options: argparse.Namespace) -> Path:
    """The folder of a trained model; trained here where it is not there or was interrupted."""
    folder = options.folder / "models" / f"{name}-{seed}"
    if not (folder / "weights.safetensors").exists():
        settings = [part for setting in options.set for part in ("--set", setting)]
        resume = ["--resume"] if (folder / "checkpoint.safetensors").exists() else []
        recipe = str(RECIPES / f"{MODELS[name]}.toml")
        call("train", recipe, "--seed", str(seed), "--out", str(folder), *settings, *resume, *options.common)
    return folder


def attack(name: str, seed: int, norm: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The summary of a run against one model in one norm."""
    out = options.folder / f"{name}-{seed}-{norm}"
    if not (out / "summary.json").exists():
        radii = [part for eps in RADII[norm] for part in ("--eps", eps)]
        corruptions = ["--corruptions", "all"] if norm == "linf" else []
        resume = ["--resume"] if (out / "run.json").exists() else []
        call(
            "attack", str(model), "--data", "mnist", "--limit", str(options.limit), "--norm", norm, *radii,
            *corruptions, "--suite", "robustness", "--batch-size", "20", "--out", str(out), *resume, *options.common,
        )  # fmt: skip
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the models, the runs and the page")
    parser.add_argument("--limit", type=int, default=200, help="test samples")
    parser.add_argument("--queries", type=int, default=500, help="of Square")
    parser.add_argument("--seeds", type=int, default=1, help="of training, a model")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--set", action="append", default=[], help="a setting of every training, e.g. samples=20000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="keep the figures in results/NAME.json")
    options = parser.parse_args()
    options.common = ["--threads", str(options.threads), "--device", "cpu"]
    suite = Suite("robustness", (Stage(PGD(restarts=1)), Stage(Square(options.queries))))
    SUITES["robustness"] = ATTACKS["robustness"] = suite
    figures: list[dict[str, Any]] = []
    folders: list[Path] = []
    summaries: dict[tuple[str, int], dict[str, Any]] = {}
    trainings: list[dict[str, Any]] = []
    for name in options.models:
        for seed in range(options.seeds):
            model = train(name, seed, options)
            trainings.append({"model": name, **(training_of(str(model)) or {})})
            for norm in RADII:
                summary = attack(name, seed, norm, model, options)
                folders.append(options.folder / f"{name}-{seed}-{norm}")
                for r in summary["results"]:
                    kept = ("eps", "n", "clean", "attacked", "by_attack", "error", "warnings")
                    figures.append({"model": name, "seed": seed, "norm": norm, **{key: r[key] for key in kept}})
                if "corruptions" in summary:
                    summaries[name, seed] = summary["corruptions"]
    corruptions = [
        {
            "model": name, "seed": seed, **own,
            "normalised": normalised_error(own, summaries[BASELINE, 0]) if (BASELINE, 0) in summaries else None,
        }
        for (name, seed), own in summaries.items()
    ]  # fmt: skip
    page = options.folder / "robustness.html"
    baseline = ["--baseline", str(options.folder / f"{BASELINE}-0-linf")] if BASELINE in options.models else []
    call("report", *map(str, folders), *baseline, "--out", str(page))
    result = {
        "limit": options.limit, "queries": options.queries, "settings": options.set, "seeds": options.seeds,
        "torch": torch.__version__, "version": verideq.__version__, "cpus": os.cpu_count(),
        "trainings": trainings, "attacks": figures, "corruptions": corruptions,
    }  # fmt: skip
    print(json.dumps(result))
    if options.out:
        (RESULTS / f"{options.out}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
