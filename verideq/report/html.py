"""`write_report`: one or several runs as a single HTML file that needs nothing else."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from verideq.errors import InputError
from verideq.report.attack import attack_claim, attack_section, attack_warnings, is_attack
from verideq.report.comparison import comparison, corruption_section, subjects_of
from verideq.report.gallery import Images, gallery
from verideq.report.plots import QUANTITIES, accuracy_plot, colour_of, margin_plot, radius_plot, step_plot
from verideq.report.run import Run, read_runs
from verideq.report.style import STYLE
from verideq.report.table import duration, eps_text, flags, heading, html_table, interval, percent, radii_text
from verideq.status import Status

REASONS = 20
"""The most reasons that are listed for a run."""


def write_report(
    folders: Sequence[Path], images: Images | None = None, out: Path | None = None, baseline: Path | None = None
) -> Path:
    """Draw the page of one run, or of several side by side.

    The same runs give the same bytes. An interrupted run is drawn from the results that it has.

    Args:
        folders: run folders.
        images: from a folder and sample indices to their inputs, (len, *shape) in pixel space; without it, or where
            it returns `None`, the hardest samples are listed without pictures.
        out: the file to write; by default ``report.html`` in the folder, or in the working directory for several.
        baseline: of `folders` the one by whose errors those under corruptions are divided.

    Returns:
        The file that was written.

    Raises:
        DataError: a folder is no run folder.
        InputError: the baseline is not one of the folders, or met no corruptions.
    """
    runs = read_runs(folders)
    places = [folder.resolve() for folder in folders]
    against = None
    if baseline is not None:
        against = runs[places.index(baseline.resolve())] if baseline.resolve() in places else None
        if against is None or "corruptions" not in against.summary:
            raise InputError(f"--baseline {baseline}: name one of the runs to be drawn, made with --corruptions")
    if out is None:
        out = folders[0] / "report.html" if len(runs) == 1 else Path("report.html")
    page = _page(runs, images, against)
    # Never half a page: readers see the old file or the new one.
    part = out.with_name(out.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, out)
    return out


def _page(runs: Sequence[Run], images: Images | None, baseline: Run | None) -> str:
    several = len(runs) > 1
    above = "attacked" if _attacked(runs) else "clean"
    title = "verideq: " + ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>"]
    compared = several and all(map(is_attack, runs))
    if compared:
        body += [comparison(runs, images, baseline), "<h2>Warnings</h2>" if any(map(_warnings, runs)) else ""]
        body += [*map(_warnings, runs), "<h2>Run by run</h2>"]
    else:
        body += [*map(_claim, runs), _meaning(runs), *map(_warnings, runs)]
        body.append("<h2>Results by radius</h2>" + (_side_by_side(runs) if several else _table(runs[0])))
        body.append(
            '<p class="note">In brackets, 95 % intervals (Clopper-Pearson) for the data that the samples were drawn '
            f"from. The true robust accuracy on these samples lies between certified and {above}.</p>"
        )
        body.append("<h2>Plots</h2>" + _plots(runs))
        body.append(corruption_section(subjects_of([run for run in runs if is_attack(run)]), baseline))
    for run in runs:
        of = f": {escape(run.name)}" if several else ""
        if compared:
            parts = f"{_table(run)}{attack_section(run)}{_provenance(run, of)}"
            body.append(f"<details><summary><b>All of {escape(run.name)}</b></summary>{parts}</details>")
            continue
        if several:
            body.append(f"<h2>All numbers{of}</h2>{_table(run)}")
        body.append(attack_section(run) if is_attack(run) else "")
        pictures = gallery(run, images)
        body.append(f"<h2>Hardest samples{of}</h2>{pictures}" if pictures else "")
        body.append(_reasons(run, of))
        body.append(_provenance(run, of))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


def _claim(run: Run) -> str:
    if is_attack(run):
        return attack_claim(run)
    results = run.summary["results"]
    first, last = results[0], results[-1]
    subject = f"{escape(str(run.summary['model']))} on {escape(str(run.summary['data']))}"
    share = f"{first['certified']} of {first['n']} samples are certified at {_standing(first)}"
    if last is not first:
        share += f"; {last['certified']} of {last['n']} at {_standing(last)}"
    return f'<p class="claim"><b>{subject}:</b> {share}.</p>'


def _standing(result: Mapping[str, Any]) -> str:
    share = [percent(result["certified"], result["n"]), interval(result["certified_interval"]), *flags(result)]
    return f"eps {eps_text(result['eps'])}, {' '.join(share)}"


def _meaning(runs: Sequence[Run]) -> str:
    pixels = all(len(run.meta.get("input_shape") or ()) > 1 for run in runs)
    weighted = "" if pixels else " (times the feature's weight, where the data set gives weights)"
    words = {
        "linf": f"no change of any {'pixel' if pixels else 'feature'} by eps or less{weighted}",
        "l2": f"no change of Euclidean length eps or less{weighted}",
    }
    norms = sorted({str(r["norm"]) for run in runs for r in run.summary["results"]}, reverse=True)
    change = ", or for l2 ".join(words.get(norm, f"no change of {escape(norm)} norm eps or less") for norm in norms)
    return (
        "<p>Certified means: the model is right on the sample, and it is proved that "
        f"{change}, within the valid range, makes it wrong. Falsified means: such a change was found.</p>"
    )


def _warnings(run: Run) -> str:
    found = []
    if not run.finished:
        found.append("the run has not finished; the numbers count the samples done so far.")
    both = [r["index"] for r in run.records if r["status"] == Status.CERTIFIED and r["attacked"] is False]
    if both:
        listed = ", ".join(map(str, both[:10]))
        found.append(f"certified and broken by the attack at once, so that neither may be believed: sample {listed}.")
    found += attack_warnings(run)
    errors = sum(r["error"] for r in run.summary["results"])
    if errors:
        found.append(f"verdicts that are ERROR: {errors}; see the reasons below.")
    if any("unchecked" in flags(r) for r in run.summary["results"]):
        found.append("the numbers marked unchecked rest on proofs that no checker has accepted.")
    return "".join(f'<p class="warn"><b>{escape(run.name)}:</b> {text}</p>' for text in found)


def _table(run: Run) -> str:
    results = run.summary["results"]
    extra = [name for name in ("timeout", "rejected") if any(r[name] for r in results)]
    counts = ["falsified", "misclassified", "unknown", *extra, "error"]
    # What matters most stands where a phone shows it without scrolling.
    head = ["eps", "certified", "attacked", "clean", *map(heading, counts), "samples", "time"]
    rows = [
        [
            f"{eps_text(r['eps'])} <small>{escape(r['norm'])}</small>",
            _certified(r),
            _share(r, "attacked"),
            _share(r, "clean"),
            *(str(r[name]) for name in counts),
            str(r["n"]),
            duration(r["seconds"]),
        ]
        for r in results
    ]
    return html_table(head, rows, "Results by radius")


def _side_by_side(runs: Sequence[Run]) -> str:
    cells: dict[tuple[float, str], dict[int, str]] = {}
    for index, run in enumerate(runs):
        for r in run.summary["results"]:
            others = f"<small>attacked {percent(r['attacked'], r['n'])}</small>"
            others += f"<small>clean {percent(r['clean'], r['n'])}</small>"
            cells.setdefault((r["eps"], r["norm"]), {})[index] = _certified(r) + others
    rows = [
        [f"{eps_text(eps)} <small>{escape(norm)}</small>", *(row.get(i, "-") for i in range(len(runs)))]
        for (eps, norm), row in sorted(cells.items())
    ]
    return html_table(["eps", *(escape(run.name) for run in runs)], rows, "Certified accuracy, run by run")


def _share(result: Mapping[str, Any], quantity: str) -> str:
    ends = result[f"{quantity}_interval"]
    text = percent(result[quantity], result["n"])
    return text if ends is None else f"{text}<small>{interval(ends)}</small>"


def _certified(result: Mapping[str, Any]) -> str:
    beside = " ".join(flags(result))
    text = f"<b>{percent(result['certified'], result['n'])}</b>"
    return f'{text} <span class="flag">{beside}</span><small>{interval(result["certified_interval"])}</small>'


def _plots(runs: Sequence[Run]) -> str:
    several = len(runs) > 1
    searched = [run for run in runs if "radii" in run.summary]
    curves = _curves(runs, tuple(reversed(QUANTITIES)))
    names = _legend([_key(i, "certified", escape(run.name)) for i, run in enumerate(runs)]) if several else ""
    figures = [
        (accuracy_plot(runs), _legend(curves), "Accuracy against eps. Bands and bars: 95 % intervals."),
        (radius_plot(runs), _legend(_curves(searched, ("certified", "attacked"))), _radii(searched)),
        (step_plot(runs), names, "Solver steps, one count a sample and eps."),
        (margin_plot(runs), names, "Proved margins; what lies far out is counted in the outermost bars."),
    ]
    drawn = "".join(
        f"<figure>{legend}{svg}<figcaption>{caption}</figcaption></figure>"
        for svg, legend, caption in figures
        if svg is not None
    )
    return f'<div class="plots">{drawn}</div>'


def _curves(runs: Sequence[Run], quantities: Sequence[str]) -> list[str]:
    """The keys of all curves of a plot."""
    return [
        _key(colour_of(i, quantity, len(runs)), quantity, (f"{escape(run.name)}, " if len(runs) > 1 else "") + quantity)
        for i, run in enumerate(runs)
        for quantity in quantities
        if quantity != "attacked" or _attacked([run])
    ]


def _radii(runs: Sequence[Run]) -> str:
    told = [(f"{escape(run.name)}, " if len(runs) > 1 else "") + radii_text(run.summary["radii"]) + "." for run in runs]
    return (
        "Largest certified and smallest attacked radius, one count a sample: the true one lies between. Nothing "
        "certified counts as 0; what no attack broke is left out. " + " ".join(told)
    )


def _attacked(runs: Sequence[Run]) -> bool:
    return any(r["attacked"] is not None for run in runs for r in run.summary["results"])


def _legend(keys: Sequence[str]) -> str:
    return f'<ul class="key">{"".join(keys)}</ul>'


def _key(colour: int, quantity: str, text: str) -> str:
    """One entry of a legend: the line and marker of `quantity` in the colour of a series."""
    marker, line = QUANTITIES[quantity]
    dash = {"-": "", "--": ' stroke-dasharray="6 3"', ":": ' stroke-dasharray="2 3"'}[line]
    shape = {
        "o": '<circle cx="18" cy="6" r="4"/>',
        "^": '<path d="M18 1 L23 10 L13 10 Z"/>',
        "s": '<rect x="14" y="2" width="8" height="8"/>',
    }[marker]
    paint = f"var(--c{colour + 1})"
    return (
        f'<li><svg viewBox="0 0 36 12" aria-hidden="true" style="fill:{paint};stroke:{paint}">'
        f'<path d="M0 6 H36" stroke-width="2"{dash}/>{shape}</svg>{text}</li>'
    )


def _reasons(run: Run, of: str) -> str:
    undecided = (Status.UNKNOWN, Status.TIMEOUT, Status.ERROR)
    counts: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for r in run.records:
        if r["status"] in undecided:
            reason = str(r["reason"] or "no reason was given")
            # Reasons that differ only in their numbers are one reason.
            kind = (str(r["status"]), re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "0", reason))
            counts[kind] += 1
            example.setdefault(kind, reason)
    if not counts:
        return ""
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [[str(count), escape(kind[0]), escape(example[kind])] for kind, count in listed[:REASONS]]
    hidden = len(listed) - len(rows)
    more = f'<p class="note">{hidden} rarer reasons are in results.jsonl.</p>' if hidden else ""
    table = html_table(["count", "verdict", "reason (numbers of the first such sample)"], rows, "Reasons", "words")
    return f"<h2>Why samples are undecided{of}</h2>{table}{more}"


def _provenance(run: Run, of: str) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_brief(value))}</dd>" for key, value in run.meta.items())
    return f"<h2>Provenance{of}</h2><details><summary>How this run was made</summary><dl>{items}</dl></details>"


def _brief(value: Any) -> str:
    if isinstance(value, list) and len(value) > 20:
        return f"{len(value)} values: {json.dumps(value[:3])[1:-1]}, ..., {json.dumps(value[-1])}"
    return value if isinstance(value, str) else json.dumps(value)
