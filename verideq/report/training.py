"""`write_training_report`: the curves of training runs and the papers' figures, as one HTML file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from verideq.errors import DataError
from verideq.report.plots import COLOURS, SERIES, figure_of, svg_of
from verideq.report.style import STYLE
from verideq.report.table import html_table

LINES = ("-", "--", ":", "-.")
"""Of the curves of one run: its colour says which run it is."""
DASHES = {"-": "", "--": ' stroke-dasharray="6 3"', ":": ' stroke-dasharray="2 3"', "-.": ' stroke-dasharray="6 3 2 3"'}


@dataclass(frozen=True)
class TrainingRun:
    """The folder of a training run in memory.

    Args:
        folder: where it lies.
        name: what to call it on the page.
        epochs: the lines of ``log.jsonl``.
        diagnosis: ``diagnosis.json``, or nothing where the run has not got there.
        recipe: the text of ``recipe.toml``.
        settling: ``settling.json``, or nothing where no energy-based network was trained.
    """

    folder: Path
    name: str
    epochs: list[dict[str, Any]]
    diagnosis: dict[str, dict[str, Any]]
    recipe: str
    settling: dict[str, Any]


Curve = tuple[int, str, str, Sequence[float], Sequence[float]]
"""Run, line, label, x and y."""


def is_training(folder: Path) -> bool:
    """Whether a folder was written by ``verideq train``."""
    return (folder / "log.jsonl").exists()


def write_training_report(*folders: Path, out: Path | None = None) -> Path:
    """Draw the page of one training run, or of several in the same axes: the same runs give the same bytes.

    Args:
        folders: of ``verideq train``, finished or not.
        out: the file to write; by default ``report.html`` in the folder, or in the working directory for several.

    Raises:
        DataError: a folder is no training run, or a damaged one.
    """
    runs = [_read(folder) for folder in folders]
    out = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    partial = out.with_name(out.name + ".part")
    partial.write_text(_page(runs), encoding="utf-8")
    os.replace(partial, out)
    return out


def _read(folder: Path) -> TrainingRun:
    try:
        text = (folder / "log.jsonl").read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # what follows the last newline was torn off by an interruption
        epochs = [json.loads(line) for line in whole.splitlines()]
        diagnosis, settling = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            for path in (folder / "diagnosis.json", folder / "settling.json")
        )
        recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no whole folder of `verideq train`: {error}; train again") from error
    return TrainingRun(folder, folder.resolve().name, epochs, diagnosis, recipe, settling)


def _page(runs: Sequence[TrainingRun]) -> str:
    title = "verideq: training of " + ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>", *map(_claim, runs)]
    body.append(
        '<p class="note">Errors during training are counts of bounds in the precision of training, up to rounding and '
        "the solver's tolerance: they are no certificates. Those come from <code>verideq certify</code>.</p>"
    )
    body.append(f'<h2>Curves</h2><div class="plots">{"".join(_curves(runs))}</div>')
    figures = "".join(_figures(runs))
    body.append(f'<h2>Bounds and weights</h2><div class="plots">{figures}</div>' if figures else "")
    for run in runs:
        body.append(f"<h2>Recipe: {escape(run.name)}</h2><details><summary>recipe.toml</summary>")
        body.append(f"<pre>{escape(run.recipe)}</pre></details>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


def _claim(run: TrainingRun) -> str:
    if not run.epochs:
        return f'<p class="claim"><b>{escape(run.name)}:</b> no epoch is finished yet.</p>'
    last = run.epochs[-1]
    seconds = sum(line["seconds"] for line in run.epochs)
    rows = [
        [label, _share(last.get(clean)), _share(last.get(bound))]
        for label, clean, bound in (
            ("training samples, mean of the last epoch", "train_error", "train_interval_error"),
            ("samples held out", "validation_error", "validation_interval_error"),
        )
    ]
    head = ["errors", "clean", "not certified by intervals"]
    radius = f", eps {last['eps']:.4g} in the last one" if "eps" in last else ""
    return (
        f'<p class="claim"><b>{escape(run.name)}:</b> {last["epoch"]} epochs{radius}, {seconds:.0f} seconds.</p>'
        f"{html_table(head, rows, 'Errors')}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _curves(runs: Sequence[TrainingRun]) -> list[str]:
    def over(name: str, label: str, keys: Mapping[str, str], caption: str, *, log: bool = False, by: float = 1) -> str:
        curves: list[Curve] = []
        for index, run in enumerate(runs):
            for line, (key, words) in zip(LINES, keys.items(), strict=False):
                points = [(e["epoch"], by * e[key]) for e in run.epochs if e.get(key) is not None]
                if points:
                    x, y = zip(*points, strict=True)
                    curves.append((index, line, _named(runs, run, words), x, y))
        return _drawn(name, "epoch", label, curves, caption, log=log)

    errors = {
        "train_error": "training",
        "train_interval_error": "training, not certified",
        "validation_error": "held out",
        "validation_interval_error": "held out, not certified",
    }
    losses = {
        "certified_loss": "certified",
        "clean_loss": "clean",
        "attacked_loss": "attacked",
        "penalty_loss": "penalty",
    }
    growth = "Mean radius of the features before the last layer over that of the input, mean of an epoch."
    return [
        over("errors", "error in %", errors, "Errors; those of training at the radius of the step.", by=100),
        over("losses", "loss", losses, "Parts of the loss, before they are weighted."),
        over("eps", "radius eps", {"eps": "eps"}, "The radius at the end of an epoch."),
        over("rate", "learning rate", {"learning_rate": "learning rate"}, "The learning rate at the end of an epoch."),
        over("growth", "bound growth", {"bound_growth": "growth"}, growth, log=True),
        over("solver", "solver steps", {"solver_steps": "steps"}, "The most steps of any equilibrium and sample."),
    ]


def _figures(runs: Sequence[TrainingRun]) -> list[str]:
    def curves(points: Callable[[dict[str, Any]], Mapping[str, Sequence[float | None]]]) -> list[Curve]:
        found: list[Curve] = []
        for index, run in enumerate(runs):
            for line, moment in zip(("--", "-"), ("drawn", "trained"), strict=True):
                for name, values in points(run.diagnosis.get(moment, {})).items():
                    pairs = [(i, v) for i, v in enumerate(values) if v is not None]
                    if pairs:
                        x, y = zip(*pairs, strict=True)
                        label = " ".join(filter(None, (name, "as drawn" if moment == "drawn" else moment)))
                        found.append((index, line, _named(runs, run, label), x, y))
        return found

    depth = curves(lambda d: {"": list(d["depth"].values())} if d else {})
    steps = curves(lambda d: d.get("steps", {}))
    singular = curves(lambda d: d.get("singular", {}))
    settling: list[Curve] = [
        (
            index,
            line,
            _named(runs, run, name),
            range(1, len(run.settling[name]) + 1),
            [100 * a for a in run.settling[name]],
        )
        for index, run in enumerate(runs)
        for line, name in zip(LINES, ("test", "held out"), strict=False)
        if name in run.settling
    ]
    steps_of = sorted({run.settling["free_steps"] for run in runs if run.settling})
    caption = f"Accuracy after each step of the free phase, which ends at {', '.join(map(str, steps_of))}."
    return [
        _drawn("settling", "step of the free phase", "accuracy in %", settling, caption),
        _drawn(
            "depth", "layer", "bound growth", depth, "Mean radius after each layer over that of the input.", log=True
        ),
        _drawn("steps", "solver step", "mean width", steps, "Mean width of the interval iterates, from 0."),
        _drawn("singular", "index", "relative value", singular, "Singular values of W, over the largest.", log=True),
    ]


def _named(runs: Sequence[TrainingRun], run: TrainingRun, label: str) -> str:
    return label if len(runs) == 1 else f"{run.name}, {label}"


def _drawn(name: str, x: str, y: str, curves: Sequence[Curve], caption: str, *, log: bool = False) -> str:
    """One figure with its legend, or nothing where there is nothing to draw."""
    if not curves:
        return ""
    figure, (axes,) = figure_of([2.4])
    several = len({run for run, *_ in curves}) > 1
    keys = []
    for place, (run, line, label, xs, ys) in enumerate(curves):
        colour = (run if several else place) % COLOURS
        _plot(axes, xs, ys, SERIES[colour], line)
        keys.append(
            f'<li><svg viewBox="0 0 36 12" aria-hidden="true" style="stroke:var(--c{colour + 1})">'
            f'<path d="M0 6 H36" stroke-width="2"{DASHES[line]}/></svg>{escape(label)}</li>'
        )
    if log and all(value > 0 for *_, ys in curves for value in ys):
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    drawn = svg_of(figure, name, f"{y} against {x}")
    return f'<figure><ul class="key">{"".join(keys)}</ul>{drawn}<figcaption>{caption}</figcaption></figure>'


def _plot(axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, line: str) -> None:
    axes.plot(xs, ys, line, color=colour, linewidth=1.6, marker="o" if len(xs) == 1 else None, markersize=4)
