"""``verideq import``: a model file from the checkpoints of other people's code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verideq.errors import InputError, UnknownName
from verideq.graph import save_model
from verideq.models.checkpoints import read_ibp_mondeq, read_mondeq

KINDS = ("mondeq", "ibp-mondeq")


def import_(
    kind: Annotated[str, typer.Argument(help="mondeq or ibp-mondeq: whose code wrote the file.", metavar="KIND")],
    file: Annotated[Path, typer.Argument(help="A state dict (.pt, .pth), .npz or .mat.", metavar="FILE")],
    m: Annotated[
        float | None, typer.Option("--m", help="The m of the training, which the file does not hold.", metavar="M")
    ] = None,
    mean: Annotated[float | None, typer.Option(help="The mean that pixels were normalised with.", metavar="X")] = None,
    std: Annotated[float | None, typer.Option(help="The standard deviation, likewise.", metavar="X")] = None,
    gamma: Annotated[float, typer.Option(help="ibp-mondeq: the condition number of its scaling.", metavar="G")] = 3.0,
    out: Annotated[
        Path | None, typer.Option(help="The model file to write; FILE's name by default.", metavar="FILE")
    ] = None,
) -> int:
    """Make a model file of a MonDEQ or IBP-MonDEQ checkpoint."""
    if kind not in KINDS:
        raise UnknownName("kind of checkpoint", kind, KINDS)
    if (mean is None) != (std is None):
        raise InputError("--mean and --std go together: pixels are normalised by both, or by neither")
    normalisation = None if mean is None or std is None else (mean, std)
    if kind == "mondeq":
        model, known = read_mondeq(file, m, normalisation)
    else:
        model, known = read_ibp_mondeq(file, m, normalisation, gamma)
    target = out or Path(file.stem + ".safetensors")
    digest = save_model(model, target)
    typer.echo(f"{target}: {known}; hash {digest[:16]}. See it: verideq inspect {target}")
    return 0
