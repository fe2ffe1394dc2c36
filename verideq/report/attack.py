"""What the page of a run of attacks says besides: what broke what, what speaks against it, and the entropies."""

from __future__ import annotations

from html import escape

from verideq.report.plots import entropy_plot
from verideq.report.run import Run
from verideq.report.table import eps_text, html_table, interval, percent


def is_attack(run: Run) -> bool:
    """Whether a folder holds a run of ``verideq attack``."""
    return "defence" in run.meta


def attack_claim(run: Run) -> str:
    """The sentence above everything."""
    parts = [
        f"{r['attacked']} of {r['n']} samples survive at eps {eps_text(r['eps'])}, {percent(r['attacked'], r['n'])} "
        f"{interval(r['attacked_interval'])}"
        for r in run.summary["results"]
    ]
    subject = f"{escape(str(run.summary['model']))} on {escape(str(run.summary['data']))}"
    suite = f"the suite {escape(str(run.summary['suite']))} against {escape(str(run.summary['defence']))}"
    return (
        f'<p class="claim"><b>{subject}:</b> {"; ".join(parts)}, by {suite}. Each sample counts as its worst attack '
        "has it; surviving attacks is no proof.</p>"
    )


def attack_warnings(run: Run) -> list[str]:
    """What speaks against the numbers, as HTML."""
    return [
        f"eps {eps_text(r['eps'])}: {escape(warning)}."
        for r in run.summary["results"]
        for warning in r.get("warnings", ())
    ]


def attack_section(run: Run) -> str:
    """Broken samples by attack, ``P`` and ``ΔH``, and the entropy along the states."""
    rows = [
        [eps_text(r["eps"]), escape(name), str(count)]
        for r in run.summary["results"]
        for name, count in r["by_attack"].items()
    ]
    parts = ["<h2>What broke the samples</h2>"]
    parts.append(
        html_table(["eps", "attack", "samples"], rows, "Broken samples by attack", "words")
        if rows
        else "<p>No sample was broken.</p>"
    )
    known = [(r["eps"], r["entropy"]) for r in run.summary["results"] if r["entropy"] is not None]
    if known:
        cells = [[eps_text(eps), f"{100 * e['P']:.1f} %", f"{e['dH']:+.4f}"] for eps, e in known]
        parts.append("<h2>Entropy of the prediction</h2>")
        parts.append(
            '<p class="note">P: the share of samples whose prediction has less entropy than that of the attacked one. '
            "ΔH: clean minus attacked, the mean in nats.</p>"
        )
        parts.append(html_table(["eps", "P", "ΔH"], cells, "Entropy statistics"))
        parts.append(entropy_plot(run) or "")
    return "\n".join(filter(None, parts))
