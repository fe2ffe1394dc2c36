"""The plots of the page: inline SVG in the colours of the page's style, so that they follow light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from verideq.certify.summary import attacked_radius
from verideq.report.run import Run
from verideq.report.table import eps_text

Floats = NDArray[np.float64]

INK, GRID = "#fe00a0", "#fe00b0"
SERIES = tuple(f"#fe000{i}" for i in range(1, 7))
"""Stand-ins that `svg_of` replaces by the page's own colours."""

COLOURS = len(SERIES)
QUANTITIES = {"clean": ("s", ":"), "attacked": ("^", "--"), "certified": ("o", "-")}
"""Marker and line of each accuracy: no reader has to tell them by colour alone."""


def colour_of(run: int, quantity: str, runs: int) -> int:
    """The series, from 0, that draws a quantity: one colour a quantity for a single run, else one colour a run."""
    return run % COLOURS if runs > 1 else ("certified", "attacked", "clean").index(quantity)


def accuracy_plot(runs: Sequence[Run]) -> str:
    """Clean, attacked and certified accuracy against eps, with 95 % bands, or bars where a run has one eps."""
    figure, (axes,) = figure_of([2.6])
    radii = sorted({float(r["eps"]) for run in runs for r in run.summary["results"]})
    span = (radii[-1] - radii[0]) or radii[0] or 1.0
    curves = [
        (index, run, quantity)
        for index, run in enumerate(runs)
        for quantity in QUANTITIES
        if any(r[quantity] is not None for r in run.summary["results"])
    ]
    for place, (index, run, quantity) in enumerate(curves):
        results = [r for r in run.summary["results"] if r[quantity] is not None]
        x = np.array([r["eps"] for r in results], dtype=np.float64)
        y = np.array([100 * r[quantity] / r["n"] for r in results], dtype=np.float64)
        low, high = 100 * np.array([r[f"{quantity}_interval"] for r in results], dtype=np.float64).T
        colour = SERIES[colour_of(index, quantity, len(runs))]
        marker, line = QUANTITIES[quantity]
        if len(x) == 1:
            # Side by side, so that overlapping bars stay readable.
            shift = span * 0.04 * (place - (len(curves) - 1) / 2)
            ends = np.array([y - low, high - y])
            axes.errorbar(x + shift, y, yerr=ends, fmt=marker, color=colour, capsize=4, markersize=5)
        else:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, y, line, marker=marker, color=colour, markersize=4, linewidth=1.6)
    if len(radii) == 1:
        axes.set_xlim(radii[0] - 0.5 * span, radii[0] + 0.5 * span)
        axes.set_xticks(radii)
        axes.set_xticklabels([eps_text(radii[0])])
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_xlabel("radius eps")
    axes.set_ylabel("accuracy in %")
    return svg_of(figure, "accuracy", "Clean, attacked and certified accuracy against the radius")


def margin_plot(runs: Sequence[Run]) -> str | None:
    """Histograms of the proved lower bounds of the margin, a panel an eps; `None` where no bound is finite."""

    def finite(run: Run, eps: float) -> Floats:
        found = [r["margin"] for r in run.records if r["margin"] is not None and float(r["eps"]) == eps]
        values = np.array(found, dtype=np.float64)
        return values[np.isfinite(values)]

    radii = sorted({float(r["eps"]) for run in runs for r in run.records})
    panels = {eps: [finite(run, eps) for run in runs] for eps in radii}
    panels = {eps: values for eps, values in panels.items() if any(map(len, values))}
    if not panels:
        return None
    figure, grid = figure_of([1.5 if len(panels) == 1 else 1.0] * len(panels))
    for axes, (eps, values) in zip(grid, panels.items(), strict=True):
        edges = _edges(np.concatenate(values))
        _histogram(axes, [v.clip(edges[0], edges[-1]) for v in values], edges)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_title(f"eps {eps_text(eps)}", loc="left", fontsize=10, color=INK)
    grid[-1].set_xlabel("proved margin (right of the line: certified)")
    return svg_of(figure, "margins", "Histograms of the proved margins")


def radius_plot(runs: Sequence[Run]) -> str | None:
    """Histograms of the certified radii, and of the attacked ones on the same axis; `None` where none was asked for.

    A sample without a certified radius counts at 0, one that no attack has broken not at all.
    """
    runs = [run for run in runs if "radii" in run.summary]
    if not runs:
        return None
    samples = [{r["index"]: r for r in run.records}.values() for run in runs]
    certified = [np.array([r["radius"] or 0 for r in own], dtype=np.float64) for own in samples]
    attacked = [np.array([attacked_radius(r) for r in own], dtype=np.float64) for own in samples]
    attacked = [values[np.isfinite(values)] for values in attacked]
    edges = _edges(np.concatenate([*certified, *attacked]))
    figure, (axes,) = figure_of([2.6])
    for quantity, values in (("certified", certified), ("attacked", attacked)):
        for index, sample in enumerate(values):
            colour = SERIES[colour_of(index, quantity, len(runs))]
            clipped, line = sample.clip(edges[0], edges[-1]), QUANTITIES[quantity][1]
            axes.hist(clipped, bins=edges.tolist(), color=colour, histtype="stepfilled", alpha=0.18)
            axes.hist(clipped, bins=edges.tolist(), color=colour, histtype="step", linewidth=1.6, linestyle=line)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.set_xlabel("radius eps")
    axes.set_ylabel("samples")
    return svg_of(figure, "radii", "Histograms of the certified and of the attacked radii")


def step_plot(runs: Sequence[Run]) -> str | None:
    """A histogram of the solver steps a sample; `None` where no step was counted."""
    values = [np.array([r["steps"] for r in run.records if r["steps"] is not None], dtype=np.float64) for run in runs]
    if not any(map(len, values)):
        return None
    pooled = np.concatenate(values)
    # Whole numbers: every bar holds the same number of them.
    width = int(np.ceil((np.ptp(pooled) + 1) / 30))
    edges = np.arange(pooled.min() - 0.5, pooled.max() + 0.5 + width, width)
    figure, (axes,) = figure_of([2.6])
    _histogram(axes, values, edges)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("solver steps")
    axes.set_ylabel("samples")
    return svg_of(figure, "steps", "Histogram of the solver steps")


def entropy_plot(run: Run) -> str | None:
    """The entropy of the prediction along the states of the forward pass, clean and attacked, at the largest radius:
    medians with the middle half of the samples; `None` where no state was recorded.
    """
    radius = max(float(r["eps"]) for r in run.records)
    mine = [r for r in run.records if float(r["eps"]) == radius and r.get("entropy_clean")]
    if not mine:
        return None
    figure, (axes,) = figure_of([2.6])
    for series, (key, marker, line) in enumerate((("entropy_clean", "o", "-"), ("entropy_attacked", "^", "--"))):
        curves = np.array([r[key] for r in mine], dtype=np.float64)
        low, middle, high = np.percentile(curves, [25, 50, 75], axis=0)
        x = np.arange(1, curves.shape[1] + 1)
        axes.fill_between(x, low, high, color=SERIES[series], alpha=0.18, linewidth=0)
        name = key.removeprefix("entropy_")
        axes.plot(x, middle, line, marker=marker, color=SERIES[series], markersize=4, linewidth=1.6)
        axes.annotate(name, (x[-1], middle[-1]), (4, 4), textcoords="offset points", color=INK, fontsize=9, ha="right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel(f"state along the forward pass, eps {eps_text(radius)}")
    axes.set_ylabel("entropy in nats")
    return svg_of(figure, "entropy", "Entropy of the prediction along the forward pass, clean and attacked")


def figure_of(heights: list[float]) -> tuple[Figure, list[Axes]]:
    """A figure, 4.6 inches wide so that it stays legible on a phone, with one panel a height (in inches)."""
    figure = Figure(figsize=(4.6, sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False)[:, 0].tolist()
    for axes in grid:
        axes.tick_params(colors=INK, labelsize=10, length=3)
        axes.xaxis.label.set(color=INK, fontsize=11)
        axes.yaxis.label.set(color=INK, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.yaxis.grid(visible=True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, grid


def _edges(values: Floats) -> Floats:
    """Edges of about 30 bars, one at zero, over the middle 96 % of the values and both signs where both occur."""
    low, high = (float(v) for v in np.percentile(values, [2, 98]))
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / 30 or 1.0
    first = min(np.floor(low / width), -1.0 if values.min() < 0 else 0.0)
    last = max(np.ceil(high / width), 1.0)
    return np.asarray(np.arange(first, last + 1) * width, dtype=np.float64)


def _histogram(axes: Axes, values: Sequence[Floats], edges: Floats) -> None:
    for index, sample in enumerate(values):
        colour = SERIES[index % COLOURS]
        if len(values) == 1:
            axes.hist(sample, bins=edges.tolist(), color=colour, rwidth=0.92)
        else:
            axes.hist(sample, bins=edges.tolist(), color=colour, histtype="stepfilled", alpha=0.18)
            axes.hist(sample, bins=edges.tolist(), color=colour, histtype="step", linewidth=1.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))


def svg_of(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element: the same bytes every time, ids of its own, the colours of the page."""
    out = StringIO()
    # Text stays text: the page's font, selectable, and a third of the size.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text)
    text = text.replace("xlink:href", "href")
    for index, stand_in in enumerate(SERIES, start=1):
        text = text.replace(stand_in, f"var(--c{index})")
    return text.replace(INK, "currentColor").replace(GRID, "var(--rule)")
