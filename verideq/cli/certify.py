"""``verideq certify``: verdicts for a data set, a table, a page, a line a sample."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from verideq.attacks import SUITES
from verideq.attacks.opened import has_states, is_opaque
from verideq.certify.attack import AttackRun
from verideq.certify.bound import METHODS
from verideq.certify.budget import Budget
from verideq.certify.run import Questions, Run
from verideq.cli.options import (
    MODEL,
    Device,
    Interrupted,
    Json,
    Seed,
    Threads,
    Weights,
    choose_device,
    read_model,
    use_threads,
)
from verideq.data import Dataset, load, parse_indices
from verideq.distributed import World, joined
from verideq.equilibrium import DEQ
from verideq.errors import DataError, InputError, ModelError
from verideq.graph import evaluating, trace
from verideq.region import Region, check_images, check_norm, parse_eps

STATELESS = tuple(name for name, suite in SUITES.items() if not suite.looks_inside)
"""Suites that ask for nothing but outputs and their gradients."""


def certify(
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    data: Annotated[
        str, typer.Option(help="digits, mnist, cifar10, or a path that ends in .npz.", metavar="NAME|PATH")
    ] = "digits",
    split: Annotated[str, typer.Option(help="train or test.", metavar="NAME")] = "test",
    indices: Annotated[
        str | None, typer.Option(help="0:100, 3,5,8, or a file with one index a line.", metavar="A:B|FILE")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first N samples only.", metavar="N")] = None,
    eps: Annotated[
        list[str] | None,
        typer.Option(help="A radius in pixel units, 0.1 or 8/255; repeat the option for several.", metavar="E"),
    ] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    method: Annotated[str, typer.Option(help=f"auto, {', '.join(METHODS)}.")] = "auto",
    attack: Annotated[
        str, typer.Option(help="none, pgd, standard, intermediate or full: look for counterexamples too.")
    ] = "pgd",
    timeout: Annotated[float | None, typer.Option(help="Seconds a sample.", metavar="S")] = None,
    radius: Annotated[
        bool, typer.Option("--radius", help="Also find the largest certified and the smallest attacked radius.")
    ] = False,
    certificates: Annotated[bool, typer.Option("--certificates", help="Keep the certificates in the folder.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Believe the bounds without the independent checker; the table says so.")
    ] = False,
    deployed_tolerance: Annotated[
        str, typer.Option(help="Of the solver that will run the model, in units of the gauge's slack.", metavar="T")
    ] = "0",
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time; no verdict depends on it.", metavar="N")] = 64,
    threads: Threads = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the run; a new one under runs/ by default.", metavar="DIR")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> int:
    """Certify a model on a data set: for every sample a verdict, with a page and a line a sample."""
    use_threads(threads)
    network, name = read_model(model, weights)
    dataset = load(data, split)
    chosen = parse_indices(indices, len(dataset)) if indices is not None else list(range(len(dataset)))
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give 1 or more")
    if certificates and no_check:
        raise InputError("--certificates keeps what the checker has accepted: it does not go with --no-check")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: give 1 or more")
    chosen = chosen[:limit]
    if attack in SUITES and not isinstance(network, DEQ):  # of which nothing can be certified anyway
        require_states(network, name, "--attack", attack, STATELESS)
    questions = questions_of(dataset, data, chosen, network, eps or ["0.02", "0.05", "0.1"], check_norm(norm))
    if resume and out is None:
        raise InputError("--resume needs the folder of the run: --out DIR")
    fresh = Path("runs") / f"{Path(name).stem.replace(':', '-')}-{dataset.name}-{datetime.now():%Y%m%d-%H%M%S}"
    tolerance = parse_eps(deployed_tolerance, "--deployed-tolerance")
    budget = Budget(method, attack, timeout=timeout, seed=seed, radius=radius, check=not no_check, tolerance=tolerance)
    with joined(choose_device(device)) as (world, place):
        folder = world.lead(lambda: out or fresh)
        run = Run(folder, network, name, questions, budget, batch_size, place, certificates, sys.argv)
        try:
            summary = execute(run, resume, world, quiet=as_json)
        except KeyboardInterrupt:
            raise Interrupted(folder) from None
    failed = any(result["error"] for result in summary["results"])
    return finish(summary, dataset, folder, as_json) if world.leads else int(failed)


def require_states(network: nn.Module, name: str, option: str, asked: str, stateless: tuple[str, ...]) -> None:
    """States on the way to an equilibrium are there to be looked at only where there is an equilibrium."""
    if asked not in stateless and not has_states(network):
        raise InputError(
            f"{option} {asked} looks at the states on the way to an equilibrium, and {name} has none: use {option} "
            f"{' or '.join(stateless)}"
        )


def questions_of(dataset: Dataset, path: str, chosen: list[int], network: Any, eps: list[str], norm: str) -> Questions:
    """Everything that is asked, refused here and in one line if it makes no sense."""
    exact = list(dict.fromkeys(parse_eps(e) for e in eps))
    if not chosen:
        raise DataError("no samples are chosen; see --indices and --limit")
    images, labels = dataset.scaled(chosen), dataset.labels[chosen]
    if isinstance(network, DEQ) or is_opaque(network):
        first = next((p for p in network.parameters() if p.is_floating_point()), images)
        try:
            with torch.no_grad(), evaluating(network):
                outputs = tuple(network(images[:1].to(first)).shape[1:])
        except Exception as error:  # the user's own forward may raise anything
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"the model does not take a sample of shape {tuple(images.shape[1:])}: {reason}"
            ) from error
        if len(outputs) != 1:
            raise ModelError(f"the model gives outputs of shape {outputs} a sample; a classifier gives (classes,)")
        clip = dataset.clip
    else:
        graph = trace(network).check_finite()
        outputs = graph.check_input(images[:1].to(graph.dtype))
        # The pixel range is the model's; a data set in another range is a mistake that images outside it show.
        clip = graph.pixel_range if dataset.clip is not None else None
    check_images(images, clip)
    for e in exact:
        Region(images[:1], e, norm, clip, weights=dataset.eps_weights)
        unweighted = norm == "linf" and dataset.eps_weights is None
        if clip is not None and unweighted and e >= Fraction(clip[1]) - Fraction(clip[0]):
            meant = f"; for {e} of 255 write {e}/255" if e.denominator == 1 and 1 < e < 256 else ""
            warn(f"eps {e} is the whole range of a pixel, {clip[0]:g} to {clip[1]:g}: any image is in reach{meant}")
    bad = (labels >= outputs[0]).nonzero().flatten()
    if len(bad):
        index = chosen[int(bad[0])]
        raise DataError(
            f"sample {index} has label {int(labels[bad[0]])}; the model has {outputs[0]} outputs, 0 to {outputs[0] - 1}"
        )
    path = str(Path(path).resolve()) if path.endswith(".npz") else path
    return Questions(
        dataset.name, path, dataset.split, dataset.hash, images, labels, chosen, exact, norm, dataset.eps_weights, clip
    )


def warn(text: str) -> None:
    """A line on standard error."""
    Console(stderr=True, emoji=False, soft_wrap=True, highlight=False).print(
        f"warning: {text}", style="yellow", markup=False
    )


def execute(run: Run, resume: bool, world: World, *, quiet: bool) -> dict[str, Any]:
    """Run it under a progress bar."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True, emoji=False), disable=quiet or not world.leads)
    task = bar.add_task("attacking" if isinstance(run, AttackRun) else "certifying", total=None)
    if isinstance(run, AttackRun):
        run = replace(run, tell=lambda n, all_: bar.update(task, description=f"attacking, {n} of {all_} attacks"))

    def show(done: int, total: int) -> None:
        bar.start()  # not before the folder is accepted: a refusal is one line and nothing else
        bar.update(task, completed=done, total=total)

    try:
        return run.execute(resume=resume, progress=show, world=world)
    finally:
        if bar.live.is_started:
            bar.stop()


def finish(summary: dict[str, Any], dataset: Dataset, folder: Path, as_json: bool) -> int:
    """Write the page, print the table, and give the exit code."""
    from verideq.report.html import write_report  # matplotlib takes a second to load
    from verideq.report.table import table

    page = write_report([folder], lambda _, indices: np.asarray(dataset.scaled(indices)))
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        console = Console(emoji=False)
        console.print(table(summary))
        console.print(f"{page}: the page; {folder / 'results.jsonl'}: a line a sample", highlight=False, soft_wrap=True)
        for result in summary["results"]:
            for warning in result.get("warnings", ()):
                warn(f"eps {result['eps']:g}: {warning}")
    return 1 if any(result["error"] for result in summary["results"]) else 0
