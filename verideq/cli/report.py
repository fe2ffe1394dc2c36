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
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders of verideq certify and attack, or of train.", metavar="DIR...")
    ],
    out: Annotated[Path | None, typer.Option(help="The file to write.", metavar="FILE")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Of the folders the one whose errors under corruptions the others' are over.", metavar="DIR"),
    ] = None,
) -> int:
    """Draw report.html again from a run's files, or several runs side by side."""
    from verideq.report.html import write_report  # matplotlib takes a second to load
    from verideq.report.training import is_training, write_training_report

    trained = [is_training(folder) for folder in folders]
    if any(trained):
        if not all(trained):
            certified = folders[trained.index(False)]
            raise InputError(f"{certified} is no training run, as the others are; draw the two kinds apart")
        if baseline is not None:
            raise InputError("--baseline goes with runs of verideq attack --corruptions")
        typer.echo(str(write_training_report(*folders, out=out)))
        return 0
    typer.echo(str(write_report(folders, _images, out, baseline)))
    return 0


def _images(folder: Path, indices: list[int]) -> NDArray[np.float64] | None:
    """The samples of a run, if its data set can still be read and is the one that was certified."""
    meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    try:
        dataset = load(meta["data_path"], meta["split"])
    except (InputError, KeyError):
        return None
    return np.asarray(dataset.scaled(indices)) if dataset.hash == meta["data_hash"] else None
