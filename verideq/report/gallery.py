"""The hardest samples of a run: what was certified with the least to spare, and what was falsified."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave
from numpy.typing import NDArray

from verideq.report.run import Run
from verideq.report.table import eps_text, html_table
from verideq.status import Status

Images = Callable[[Path, list[int]], "NDArray[Any] | None"]
"""From a run folder and sample indices to their inputs, (len, *shape) in the pixel range, or `None`."""

PROVED, BROKEN = 8, 6
"""How many samples of each kind are shown."""


def hardest(run: Run) -> list[dict[str, Any]]:
    """The certified samples of smallest proved margin, each sample once."""
    proved = [r for r in run.records if r["status"] == Status.CERTIFIED and r["margin"] is not None]
    return _once(sorted(proved, key=lambda r: (r["margin"], r["index"])))[:PROVED]


def broken(run: Run) -> list[dict[str, Any]]:
    """The falsified samples, each once, at the smallest eps that broke it; the most fragile first."""
    falsified = [r for r in run.records if r["status"] == Status.FALSIFIED]
    return _once(sorted(falsified, key=lambda r: (r["eps"], r["index"])))[:BROKEN]


def _once(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[Any, dict[str, Any]] = {}
    for record in records:
        first.setdefault(record["index"], record)
    return list(first.values())


def gallery(run: Run, images: Images | None) -> str:
    """The hardest samples as HTML: cards with pictures, or a list without; empty if there are none."""
    chosen = [(hardest(run), "Certified with the smallest margin"), (broken(run), "Falsified at the smallest radius")]
    indices = sorted({r["index"] for records, _ in chosen for r in records})
    found = images(run.folder, indices) if images is not None and indices else None
    inputs = {} if found is None else dict(zip(indices, np.asarray(found, dtype=np.float64), strict=True))
    parts = []
    for records, title in chosen:
        if records:
            pictures = all(r["index"] in inputs and _drawable(inputs[r["index"]]) for r in records)
            body = "".join(_card(run, r, inputs[r["index"]]) for r in records) if pictures else _list(records)
            parts.append(f"<h3>{title}</h3>" + (f'<div class="cards">{body}</div>' if pictures else body))
    return "".join(parts)


def grid(runs: Sequence[tuple[str, Run]], indices: Sequence[int], images: Images) -> str:
    """What became of samples in several runs: a row a run, a column a radius; empty without pictures.

    Args:
        runs: with their names, all of one data set and norm.
        indices: of the samples, in the data set.
        images: of the first run's folder.
    """
    found = images(runs[0][1].folder, list(indices)) if indices else None
    if found is None:
        return ""
    radii = sorted({float(r["eps"]) for _, run in runs for r in run.records})
    parts = []
    for index, clean in zip(indices, np.asarray(found, dtype=np.float64), strict=True):
        if not _drawable(clean):
            return ""
        label = next(r["label"] for r in runs[0][1].records if r["index"] == index)
        what = f"sample {_cell(index)}, label {_cell(label)}"
        rows = []
        for name, run in runs:
            records = {float(r["eps"]): r for r in run.records if r["index"] == index}
            cells = [escape(name), _picture(_pixels(run, clean), "", f"{what}, clean")]
            for eps in radii:
                witness = _witness(run, records[eps], clean.shape) if eps in records else None
                about = f"{what}, {escape(name)}, eps {eps_text(eps)}"
                cells.append("-" if witness is None else _picture(_pixels(run, witness), "", about))
            rows.append(cells)
        head = ["", "clean", *(f"eps {eps_text(eps)}" for eps in radii)]
        table = html_table(head, rows, f"Perturbed images of {what}", "pictures")
        parts.append(f"<figure>{table}<figcaption>{what}</figcaption></figure>")
    return "".join(parts)


def _list(records: list[dict[str, Any]]) -> str:
    rows = [[_cell(r["index"]), _cell(r["label"]), eps_text(r["eps"]), _number(r["margin"])] for r in records]
    return html_table(["sample", "label", "eps", "margin"], rows, "Hardest samples")


def _card(run: Run, record: dict[str, Any], clean: NDArray[np.float64]) -> str:
    what = f"sample {_cell(record['index'])}, label {_cell(record['label'])}"
    pictures = [_picture(_pixels(run, clean), "clean", what)]
    notes = [f"eps {eps_text(record['eps'])}"]
    if record["margin"] is not None:
        notes.append(f"margin {_number(record['margin'])}")
    if record["status"] == Status.FALSIFIED:
        witness = _witness(run, record, clean.shape)
        if witness is None:
            notes.append("witness file missing or unreadable")
        else:
            change = witness - clean
            largest = float(np.abs(change).max())
            pictures.append(_picture(_pixels(run, witness), "witness", what))
            pictures.append(_picture(_difference(change, largest), "difference", what))
            notes.append(f"largest change {largest:.3g}")
    return (
        f'<figure class="card"><div class="strip">{"".join(pictures)}</div>'
        f"<figcaption><b>{what}</b><br>{', '.join(notes)}</figcaption></figure>"
    )


def _witness(run: Run, record: dict[str, Any], shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    if record["witness"] is None:
        return None
    path = (run.folder / str(record["witness"])).resolve()
    # A run folder may come from a stranger: nothing outside it is read, and nothing pickled.
    if not path.is_relative_to(run.folder.resolve()):
        return None
    try:
        witness = np.load(path, allow_pickle=False)
        return np.asarray(witness, dtype=np.float64).reshape(shape)
    except (OSError, ValueError, EOFError):
        return None


def _drawable(image: NDArray[Any]) -> bool:
    """Whether it is (height, width), or that with one or three channels in front."""
    return image.ndim == 2 or (image.ndim == 3 and image.shape[0] in (1, 3))


def _pixels(run: Run, image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours in [0, 1], shape (height, width, 3)."""
    low, high = run.meta.get("clip") or (0.0, 1.0)
    planes = image if image.ndim == 3 else image[None]
    scaled = (planes - low) / ((high - low) or 1.0)
    return np.broadcast_to(scaled, (3, *planes.shape[1:])).transpose(1, 2, 0).clip(0, 1)


def _difference(change: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """White where nothing changed; red up and blue down for one channel, the channels' own changes for three."""
    scaled = change / (largest or 1.0)
    if change.ndim == 3 and change.shape[0] == 3:
        return 0.5 + 0.5 * scaled.transpose(1, 2, 0)
    plane = scaled if change.ndim == 2 else scaled[0]
    return np.asarray(colormaps["RdBu_r"](0.5 + 0.5 * plane), dtype=np.float64)[..., :3]


def _picture(colours: NDArray[np.float64], kind: str, what: str) -> str:
    out = BytesIO()
    imsave(out, np.round(colours * 255).astype(np.uint8), format="png")
    data = base64.b64encode(out.getvalue()).decode("ascii")
    alt, below = (f"{kind}: {what}", f"<small>{kind}</small>") if kind else (what, "")
    return f'<span><img src="data:image/png;base64,{data}" alt="{alt}">{below}</span>'


def _cell(value: Any) -> str:
    return escape(str(value))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
