"""Draw certified, attacked and clean accuracy against eps from a run folder, as one SVG file.

    verideq certify --eps 0 --eps 0.02 --eps 0.04 --eps 0.05 --eps 0.06 --eps 0.08 --eps 0.1 --eps 0.12 --eps 0.15 \\
        --out runs/curve
    python examples/accuracy_curve.py runs/curve docs/certified.svg

The plot is the one of ``report.html``; what a page gives it there (colours, a legend) comes with it here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from verideq.report.plots import QUANTITIES, accuracy_plot, colour_of
from verideq.report.run import read_runs
from verideq.report.style import STYLE

MARKS = {"o": "●", "^": "▲", "s": "■"}


def draw(folder: Path, out: Path) -> None:
    (run,) = read_runs([folder])
    plot = accuracy_plot([run])
    box = re.match(r'<svg viewBox="([^"]*)"', plot)
    if box is None:
        sys.exit("the plot has no viewBox; this script belongs to another version of verideq")
    left, top, width, height = (float(v) for v in box[1].split())
    shown = [name for name in ("certified", "attacked", "clean") if run.summary["results"][0][name] is not None]
    legend = "".join(
        f'<text x="{left + 55 + 90 * place}" y="{top - 8}" '
        f'style="fill: var(--c{colour_of(0, name, 1) + 1}) !important">{MARKS[QUANTITIES[name][0]]} {name}</text>'
        for place, name in enumerate(shown)
    )
    colours = STYLE.partition("* {")[0]  # the light and the dark set
    position = f'x="{left}" y="{top}" width="{width}" height="{height}"'
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top - 26} {width} {height + 26}" '
        f'width="{1.8 * width:.0f}" height="{1.8 * (height + 26):.0f}">'
        f"<style>{colours} svg {{ color: var(--ink); font: 11px system-ui, sans-serif; }} "
        "text { font-family: inherit !important; fill: currentColor !important; }</style>"
        f'<rect x="{left}" y="{top - 26}" width="{width}" height="{height + 26}" style="fill: var(--paper)"/>'
        f"{legend}{plot.replace('<svg', f'<svg {position}', 1)}</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/accuracy_curve.py RUN_FOLDER FILE.svg")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
