"""Several runs of ``verideq attack`` as one comparison: accuracy against eps by norm, corruptions, perturbed images.

Runs of one model, at several norms say, are one *subject*; so are those of models that one recipe made from several
seeds. Runs that differ in what was attacked or by what are different subjects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit

from verideq.certify.corruption import normalised_error
from verideq.certify.summary import interval95
from verideq.data.corruptions import CORRUPTIONS, SEVERITIES
from verideq.report.gallery import Images, grid
from verideq.report.plots import COLOURS, SERIES, figure_of, svg_of
from verideq.report.run import Run
from verideq.report.table import eps_text, html_table

SAMPLES = 3
"""How many perturbed samples are shown a norm."""
NORMS = {"l2": "l2", "linf": "l∞"}
MARKERS = ("o", "^", "s", "D", "v", "P")


@dataclass(frozen=True)
class Share:
    """A share of the samples with its 95 % interval, all in percent.

    Args:
        value: the mean over the seeds.
        low: end of the interval; `value` where none is known.
        high: likewise.
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float], counts: tuple[int, int] | None = None) -> Share:
        """Of one value a seed, as fractions: an interval of Student's t over them, or of one the binomial one.

        Args:
            values: one a seed.
            counts: successes and trials, for a single seed.
        """
        middle = fmean(values)
        low = high = middle
        if len(values) > 1:
            reach = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values))
            low, high = max(middle - reach, 0.0), min(middle + reach, 1.0)
        elif counts is not None:
            low, high = interval95(*counts)
        return Share(100 * middle, 100 * low, 100 * high)

    def __str__(self) -> str:
        return f"{self.value:.1f} %"

    @property
    def ends(self) -> str:
        """The interval as text."""
        return f"[{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Subject:
    """What a curve is of.

    Args:
        name: what its runs' names begin with.
        runs: of one model, or of models that differ in their seed alone.
    """

    name: str
    runs: tuple[Run, ...]

    @cached_property
    def seeds(self) -> int:
        """Different models among the runs."""
        return len({run.meta["model_hash"] for run in self.runs})

    def curve(self, norm: str) -> dict[float, Share]:
        """By radius the accuracy under attack; at 0 without one."""
        found: dict[float, dict[str, tuple[int, int]]] = {}
        for run in self.runs:
            for r in run.summary["results"]:
                if r["norm"] == norm and r["attacked"] is not None:
                    found.setdefault(0.0, {})[run.meta["model_hash"]] = (r["clean"], r["n"])
                    found.setdefault(r["eps"], {})[run.meta["model_hash"]] = (r["attacked"], r["n"])
        return {
            eps: Share.of([k / n for k, n in counts.values()], next(iter(counts.values())))
            for eps, counts in sorted(found.items())
        }

    @cached_property
    def corruptions(self) -> list[dict[str, Any]]:
        """Those of the summaries, one a model."""
        by_model = {r.meta["model_hash"]: r.summary["corruptions"] for r in self.runs if "corruptions" in r.summary}
        return list(by_model.values())

    @cached_property
    def counted(self) -> dict[str, Any]:
        """`corruptions` with the samples of all seeds together; without any, of no corruption."""
        names = [name for name in CORRUPTIONS if all(name in c["correct"] for c in self.corruptions)]
        return {
            "n": sum(c["n"] for c in self.corruptions),
            "correct": {
                name: np.sum([c["correct"][name] for c in self.corruptions], axis=0).tolist()
                for name in (names if self.corruptions else ())
            },
        }

    def clean(self) -> float:
        """The accuracy without a corruption, of the models that met some."""
        first = {
            r.meta["model_hash"]: r.summary["results"][0] for r in self.runs if "corruptions" in r.summary
        }.values()
        return fmean(r["clean"] / r["n"] for r in first)


def subjects_of(runs: Sequence[Run]) -> list[Subject]:
    """The runs put together, in the order of their first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        training = run.meta.get("training")
        model = run.meta["model_hash"] if training is None else training["recipe"]
        what = [model, *(run.meta.get(key) for key in ("data_hash", "defence", "attack"))]
        groups.setdefault(json.dumps(what, sort_keys=True), []).append(run)
    names = [_common([run.name for run in group]) for group in groups.values()]
    return [
        Subject(name if names.count(name) == 1 else group[0].name, tuple(group))
        for name, group in zip(names, groups.values(), strict=True)
    ]


def _common(names: Sequence[str]) -> str:
    """What names begin with, in whole words; of one name the name."""
    words = [re.split(r"[-_. ]", name) for name in names]
    shared: list[str] = []
    for row in zip(*words, strict=False):
        if len(set(row)) > 1:
            break
        shared.append(row[0])
    return names[0] if len(names) == 1 else "-".join(shared) or names[0]


def comparison(runs: Sequence[Run], images: Images | None, baseline: Run | None) -> str:
    """The sections of a page: curves by norm, corruptions, and perturbed images.

    Args:
        runs: of ``verideq attack``, two or more.
        images: see `verideq.report.html.write_report`.
        baseline: the run by whose errors those under corruptions are divided.
    """
    subjects = subjects_of(runs)
    norms = [norm for norm in NORMS if any(subject.curve(norm) for subject in subjects)]
    parts = ["<h2>Accuracy under attack</h2>", _seeds(subjects)]
    parts.append('<div class="plots">' + "".join(_accuracy(subjects, norm) for norm in norms) + "</div>")
    parts += [_table(subjects, norm) for norm in norms]
    parts.append(corruption_section(subjects, baseline))
    pictures = [_pictures(subjects, norm, images) for norm in norms]
    if any(pictures):
        parts.append("<h2>Perturbed images</h2>")
        parts.append(
            '<p class="note">The worst point that the attacks found, by model and radius; a dash where the prediction '
            "held. The first column is the sample itself.</p>"
        )
    return "\n".join(filter(None, [*parts, *pictures]))


def _seeds(subjects: Sequence[Subject]) -> str:
    several = [f"{escape(s.name)} ({s.seeds})" for s in subjects if s.seeds > 1]
    over = f"over the seeds of training for {', '.join(several)}, by Student's t; otherwise " if several else ""
    return (
        f'<p class="note">Bands and brackets: 95 % intervals, {over}for the data that the samples were drawn from '
        "(Clopper-Pearson). Surviving attacks is no proof.</p>"
    )


def _legend(subjects: Sequence[Subject]) -> str:
    keys = "".join(
        f'<li><svg viewBox="0 0 36 12" aria-hidden="true" style="stroke:var(--c{i % COLOURS + 1})">'
        f'<path d="M0 6 H36" stroke-width="4"/></svg>{escape(subject.name)}</li>'
        for i, subject in enumerate(subjects)
    )
    return f'<ul class="key">{keys}</ul>'


def _figure(subjects: Sequence[Subject], svg: str, caption: str) -> str:
    return f"<figure>{_legend(subjects)}{svg}<figcaption>{caption}</figcaption></figure>"


def _accuracy(subjects: Sequence[Subject], norm: str) -> str:
    figure, (axes,) = figure_of([2.8])
    for index, subject in enumerate(subjects):
        curve = subject.curve(norm)
        if not curve:
            continue
        x, colour, marker = list(curve), SERIES[index % COLOURS], MARKERS[index % len(MARKERS)]
        low, middle, high = zip(*((s.low, s.value, s.high) for s in curve.values()), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, middle, marker=marker, color=colour, markersize=4, linewidth=1.6)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel(f"radius eps, {NORMS[norm]}")
    axes.set_ylabel("accuracy in %")
    drawn = svg_of(figure, f"attacked-{norm}", f"Accuracy under attack against the radius, {norm}")
    return _figure(subjects, drawn, f"Accuracy against eps, {NORMS[norm]}; at 0 without an attack.")


def _table(subjects: Sequence[Subject], norm: str) -> str:
    curves = [subject.curve(norm) for subject in subjects]
    radii = sorted({eps for curve in curves for eps in curve})
    rows = [
        [
            "clean" if eps == 0 else f"{eps_text(eps)} <small>{NORMS[norm]}</small>",
            *(f"<b>{c[eps]}</b><small>{c[eps].ends}</small>" if eps in c else "-" for c in curves),
        ]
        for eps in radii
    ]
    return html_table(["eps", *(escape(s.name) for s in subjects)], rows, f"Accuracy under attack, {norm}")


def corruption_section(subjects: Sequence[Subject], baseline: Run | None = None) -> str:
    """Accuracy under corruptions by severity, family and name; empty where no run met any."""
    subjects = [subject for subject in subjects if subject.corruptions]
    if not subjects:
        return ""
    parts = [
        "<h2>Natural corruptions</h2>",
        '<p class="note">verideq\'s own corruptions, at five severities; the numbers are not those of CIFAR-10-C. The '
        "mean corruption error is the mean over the corruptions of the error, itself a mean over the severities.</p>",
        f'<div class="plots">{_severities(subjects)}{_families(subjects)}</div>',
        _errors(subjects, baseline),
        _by_name(subjects),
    ]
    return "\n".join(parts)


def _severities(subjects: Sequence[Subject]) -> str:
    figure, (axes,) = figure_of([2.6])
    for index, subject in enumerate(subjects):
        counts = np.array(list(subject.counted["correct"].values()), dtype=np.float64)
        y = 100 * np.array([subject.clean(), *counts.mean(0) / subject.counted["n"]])
        colour, marker = SERIES[index % COLOURS], MARKERS[index % len(MARKERS)]
        axes.plot((0, *SEVERITIES), y, marker=marker, color=colour, markersize=4, linewidth=1.6)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_xlabel("severity")
    axes.set_ylabel("accuracy in %")
    drawn = svg_of(figure, "severities", "Accuracy against the severity of the corruptions")
    return _figure(subjects, drawn, "Accuracy against severity, the mean over the corruptions; 0 is uncorrupted.")


def _families(subjects: Sequence[Subject]) -> str:
    figure, (axes,) = figure_of([2.6])
    families = [f for f in dict.fromkeys(f for s in subjects for c in s.corruptions for f in c["error"]) if f != "all"]
    width = 0.8 / len(subjects)
    for index, subject in enumerate(subjects):
        y = [100 * fmean(c["error"].get(family, 0.0) for c in subject.corruptions) for family in families]
        x = np.arange(len(families)) + width * (index - (len(subjects) - 1) / 2)
        axes.bar(x, y, 0.92 * width, color=SERIES[index % COLOURS])
    axes.set_xticks(range(len(families)))
    axes.set_xticklabels(families)
    axes.set_ylim(0, None)
    axes.set_ylabel("error in %")
    drawn = svg_of(figure, "families", "Mean error by family of corruptions")
    return _figure(subjects, drawn, "Mean error by family; shorter is better.")


def _errors(subjects: Sequence[Subject], baseline: Run | None) -> str:
    against: Mapping[str, Any] | None = None if baseline is None else baseline.summary.get("corruptions")
    families = list(dict.fromkeys(f for s in subjects for c in s.corruptions for f in c["error"] if f != "all"))
    head = ["model", "mean corruption error", *families, "clean error"]
    rows = []
    for subject in subjects:
        mean = Share.of([c["error"]["all"] for c in subject.corruptions])
        ends = f"<small>{mean.ends}</small>" if subject.seeds > 1 else ""
        row = [escape(subject.name), f"<b>{mean}</b>{ends}"]
        row += [
            "-" if any(f not in c["error"] for c in subject.corruptions)
            else f"{100 * fmean(c['error'][f] for c in subject.corruptions):.1f} %"
            for f in families
        ]  # fmt: skip
        row.append(f"{100 * (1 - subject.clean()):.1f} %")
        if against is not None:
            ratio = normalised_error(subject.counted, against)
            row.insert(2, "-" if ratio is None else f"{100 * ratio:.1f} %")
        rows.append(row)
    note = "Not normalised by another model's errors; <code>verideq report --baseline</code> does that."
    if against is not None and baseline is not None:
        head.insert(2, "normalised")
        note = (
            f"Normalised: each corruption's error over that of {escape(baseline.name)}, the mean of these; corruptions "
            "under which that run is never wrong are left out."
        )
    return html_table(head, rows, "Mean corruption error") + f'<p class="note">{note}</p>'


def _by_name(subjects: Sequence[Subject]) -> str:
    names = [name for name in CORRUPTIONS if any(name in s.counted["correct"] for s in subjects)]
    rows = []
    for name in names:
        row = [escape(name)]
        for subject in subjects:
            counts, n = subject.counted["correct"].get(name), subject.counted["n"]
            if counts is None:
                row.append("-")
                continue
            at_each = " ".join(f"{100 * k / n:.0f}" for k in counts)
            row.append(f"<b>{100 * fmean(counts) / n:.1f}</b><small>{at_each}</small>")
        rows.append(row)
    table = html_table(["corruption", *(escape(s.name) for s in subjects)], rows, "Accuracy by corruption")
    words = "Accuracy in % by corruption: the mean, and at severities 1 to 5"
    return f"<details open><summary>{words}</summary>{table}</details>"


def _pictures(subjects: Sequence[Subject], norm: str, images: Images | None) -> str:
    """Samples that every subject's first run of a norm was right on, those broken most often first."""
    chosen = [(s.name, next((r for r in s.runs if r.meta.get("norm") == norm), None)) for s in subjects]
    found = [(name, run) for name, run in chosen if run is not None]
    if images is None or not found:
        return ""
    right = [{r["index"] for r in run.records if r["attacked"] is not None} for _, run in found]
    common = set.intersection(*right)
    times = {
        index: sum(r["attacked"] is False for _, run in found for r in run.records if r["index"] == index)
        for index in common
    }
    picked = sorted(common, key=lambda index: (-times[index], index))[:SAMPLES]
    drawn = grid(found, picked, images)
    return f"<h3>{NORMS[norm]}</h3>{drawn}" if drawn else ""
