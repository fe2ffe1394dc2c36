"""The summary as a table for the terminal, and the words and the table that the page shares with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def table(summary: Mapping[str, Any]) -> Table:
    """One row an eps: n, clean, attacked, certified with its 95 % interval, unknown, errors, time.

    Timeouts and refused certificates get a column when there are any. The certified number says "unchecked" when no
    checker accepted it, and counts the errors that it hides.

    Args:
        summary: ``summary.json``.

    Returns:
        A `rich.table.Table`, ready to print.
    """
    results = summary["results"]
    if "suite" in summary:
        return _attack_table(summary)
    extra = [name for name in ("timeout", "rejected") if any(r[name] for r in results)]
    view = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.title = Text(f"{summary['model']} on {summary['data']}")
    view.add_column("eps", no_wrap=True)
    for name in ("n", "clean", "attacked"):
        view.add_column(name, justify="right", no_wrap=True)
    # Wide enough that neither an interval nor a flag is ever cut.
    view.add_column("certified [95 %]", min_width=12)
    for name in ("unknown", *(heading(name) for name in extra), "errors", "time"):
        view.add_column(name, justify="right", no_wrap=True)
    for r in results:
        certified = " ".join([percent(r["certified"], r["n"]), interval(r["certified_interval"]), *flags(r)])
        cells = [
            eps_text(r["eps"]),
            str(r["n"]),
            percent(r["clean"], r["n"]),
            percent(r["attacked"], r["n"]),
            certified,
            *(str(r[name]) for name in ("unknown", *extra, "error")),
            duration(r["seconds"]),
        ]
        # Text, not str: rich would read brackets as markup.
        view.add_row(*map(Text, cells))
    if "radii" in summary:
        view.caption = Text(radii_text(summary["radii"]))
    return view


def radii_text(radii: Mapping[str, Any]) -> str:
    """Median and mean of the radii in one line.

    >>> radii_text({"certified_median": 0.05, "attacked_median": 0.11, "certified_mean": 0.06, "attacked_mean": None})
    'median radius: certified 0.05, attacked 0.11; mean: certified 0.06, attacked -'
    """

    def of(name: str) -> str:
        values = {kind: radii[f"{kind}_{name}"] for kind in ("certified", "attacked")}
        return ", ".join(f"{kind} {'-' if value is None else f'{value:.4g}'}" for kind, value in values.items())

    return f"median radius: {of('median')}; mean: {of('mean')}"


def _attack_table(summary: Mapping[str, Any]) -> Table:
    """One row an eps of a run of attacks: n, clean, attacked with its 95 % interval, and what broke the most."""
    view = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.title = Text(f"{summary['model']} on {summary['data']}: {summary['suite']} against {summary['defence']}")
    for name in ("eps", "n", "clean"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("attacked [95 %]", min_width=12)
    view.add_column("broken by")
    for name in ("errors", "time"):
        view.add_column(name, justify="right", no_wrap=True)
    for r in summary["results"]:
        worst = ", ".join(f"{name} {count}" for name, count in list(r["by_attack"].items())[:3])
        cells = [
            eps_text(r["eps"]),
            str(r["n"]),
            percent(r["clean"], r["n"]),
            f"{percent(r['attacked'], r['n'])} {interval(r['attacked_interval'])}",
            worst or "-",
            str(r["error"]),
            duration(r["seconds"]),
        ]
        view.add_row(*map(Text, cells))
    if "corruptions" in summary:
        view.caption = Text(corruption_text(summary["corruptions"]))
    return view


def corruption_text(corruptions: Mapping[str, Any]) -> str:
    """The mean corruption error in one line, over all and by family.

    >>> corruption_text({"correct": {"fog": [9] * 5}, "error": {"all": 0.1, "weather": 0.1}})
    'mean corruption error, not normalised: 10.0 % over 1 corruption at 5 severities; weather 10.0 %'
    """
    errors, count = corruptions["error"], len(corruptions["correct"])
    families = ", ".join(f"{name} {100 * error:.1f} %" for name, error in errors.items() if name != "all")
    return (
        f"mean corruption error, not normalised: {100 * errors['all']:.1f} % over {count} "
        f"corruption{'s' if count > 1 else ''} at 5 severities; {families}"
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, style: str = "numbers") -> str:
    """A table that scrolls sideways on a narrow screen, by keyboard too.

    Args:
        head: the column titles, as HTML.
        rows: the cells, as HTML.
        label: what the table shows, for those who hear the page.
        style: ``"numbers"`` or ``"words"``, how the columns are set.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0"><table class="{style}">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def flags(result: Mapping[str, Any]) -> list[str]:
    """What must stand beside the certified number of one result, so that it is not read as more than it is."""
    found = []
    if result["certified"] and not result["checked"]:
        found.append("unchecked")
    if result["error"]:
        found.append(f"({result['error']} {'error' if result['error'] == 1 else 'errors'})")
    return found


def heading(count: str) -> str:
    """The column title of a count of the summary."""
    return {"timeout": "timeouts", "rejected": "refused", "error": "errors"}.get(count, count)


def percent(k: int | None, n: int) -> str:
    """``k`` of ``n`` in percent, never 100.0 or 0.0 unless it is exactly that; a dash where nothing was counted."""
    if k is None or n == 0:
        return "-"
    text = f"{100 * k / n:.1f}"
    if text == "100.0" and k < n:
        text = "99.9"
    if text == "0.0" and k > 0:
        text = "0.1"
    return text + " %"


def interval(ends: tuple[float, float] | list[float]) -> str:
    """An interval of fractions, in percent."""
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def eps_text(eps: float) -> str:
    """A radius as a person would have typed it.

    >>> eps_text(0.05), eps_text(8 / 255)
    ('0.05', '8/255')
    """
    short = f"{eps:g}"
    if math.isclose(float(short), eps, rel_tol=1e-12):
        return short
    ratio = Fraction(eps).limit_denominator(255)
    return str(ratio) if math.isclose(ratio, eps, rel_tol=1e-12) else f"{eps:.6g}"


def duration(seconds: float) -> str:
    """A time span, in the units a person would use.

    >>> duration(0.25), duration(65), duration(3725)
    ('0.2 s', '1 min 05 s', '1 h 02 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
