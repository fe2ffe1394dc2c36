"""``verideq report``: draw the page of a run again, or several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from verideq.data import load
from verideq.errors import InputError


def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders of verideq certify.", metavar="DIR...")],
    out: Annotated[Path | None, typer.Option(help="The file to write.", metavar="FILE")] = None,
) -> int:
    """Draw report.html again from a run's files, or several runs side by side."""
    from verideq.report.html import write_report  # matplotlib takes a second to load

    typer.echo(str(write_report(folders, _images, out)))
    return 0


def _images(folder: Path, indices: list[int]) -> NDArray[np.float64] | None:
    """The samples of a run, if its data set can still be read and is the one that was certified."""
    meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    try:
        dataset = load(meta["data_path"], meta["split"])
    except (InputError, KeyError):
        return None
    return np.asarray(dataset.scaled(indices)) if dataset.hash == meta["data_hash"] else None
