"""``verideq attack``: how much of a model's accuracy is left under attack."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from verideq.attacks.defences import Defence, choose_early, defence_named
from verideq.attacks.opened import open_model
from verideq.attacks.problem import Problem
from verideq.attacks.suites import SUITES
from verideq.certify.attack import AttackRun
from verideq.certify.bound import margin_rows
from verideq.certify.budget import Budget
from verideq.certify.run import Questions
from verideq.cli.certify import STATELESS, execute, finish, questions_of, require_states
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
    training_of,
    use_threads,
)
from verideq.data import load, parse_indices
from verideq.data.corruptions import parse_corruptions
from verideq.distributed import joined
from verideq.errors import DataError, InputError, UnknownName
from verideq.region import Region, check_norm

VALIDATION = 500
"""Samples at the end of the training split on which an early state is chosen."""


def attack(
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
    suite: Annotated[str, typer.Option(help="pgd, standard, intermediate or full.")] = "standard",
    defence: Annotated[
        str, typer.Option(help="final, early (chosen on training samples), early:N, ensemble or entropy.")
    ] = "final",
    corruptions: Annotated[
        str,
        typer.Option(
            help="Natural corruptions to try too: all, noise, blur, weather, digital, or names; commas between.",
            metavar="NAMES",
        ),
    ] = "",
    weights: Weights = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples that reach the folder together; no outcome depends on it. 64, or 16 of the suites "
            "intermediate and full.",
            metavar="N",
        ),
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the run; a new one under runs/ by default.", metavar="DIR")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> int:
    """Attack a model on a data set: the pointwise worst of a suite, with warnings where attacks are blind."""
    use_threads(threads)
    if suite not in SUITES:
        raise UnknownName("suite", suite, SUITES)
    network, name = read_model(model, weights)
    require_states(network, name, "--suite", suite, STATELESS)
    require_states(network, name, "--defence", defence, ("final",))
    dataset = load(data, split)
    chosen = parse_indices(indices, len(dataset)) if indices is not None else list(range(len(dataset)))
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give 1 or more")
    if batch_size is None:
        batch_size = 16 if SUITES[suite].looks_inside else 64
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: give 1 or more")
    questions = questions_of(dataset, data, chosen[:limit], network, eps or ["0.1"], check_norm(norm))
    chosen_corruptions = parse_corruptions(corruptions, dataset.input_shape) if corruptions else []
    if chosen_corruptions and questions.clip != (0.0, 1.0):
        raise InputError(f"--corruptions are of images in [0, 1]; the pixel range here is {questions.clip}")
    if resume and out is None:
        raise InputError("--resume needs the folder of the run: --out DIR")
    fresh = Path("runs") / f"attack-{Path(name).stem.replace(':', '-')}-{dataset.name}-{datetime.now():%Y%m%d-%H%M%S}"
    with joined(choose_device(device)) as (world, place):
        folder = world.lead(lambda: out or fresh)
        deciding = _defences(defence, network, questions, place, seed, batch_size)
        if chosen_corruptions and len(set(deciding)) > 1:
            raise InputError(f"--defence {defence} differs from eps to eps: with --corruptions give one --eps")
        budget = Budget(attack=suite, seed=seed)
        run = AttackRun(
            folder, network, name, questions, budget, batch_size, place, False, sys.argv, deciding,
            corruptions=chosen_corruptions, training=training_of(model),
        )  # fmt: skip
        try:
            summary = execute(run, resume, world, quiet=as_json)
        except KeyboardInterrupt:
            raise Interrupted(folder) from None
    if not world.leads:
        return int(any(result["error"] for result in summary["results"]))
    return finish(summary, dataset, folder, as_json)


def _defences(
    name: str, network: torch.nn.Module, asked: Questions, place: torch.device, seed: int, batch_size: int
) -> list[Defence]:
    """The defence at every radius; ``early`` is chosen on samples that are not those of the run."""
    if name != "early":
        return [defence_named(name, radius=float(eps), clip=asked.clip, norm=asked.norm) for eps in asked.eps]
    try:
        training = load(asked.path, "train")
    except (DataError, UnknownName) as error:
        raise InputError(
            f"--defence early chooses a state on the training split, and {asked.path} has none ({error}); name a state "
            "yourself: --defence early:3"
        ) from error
    own = set(asked.indices) if asked.split == "train" else set()
    rows = [i for i in range(max(len(training) - VALIDATION, 0), len(training)) if i not in own]
    if not rows:
        raise InputError("--defence early chooses on the last 500 training samples: they are those of the run")
    labels = training.labels[rows].to(place)
    weights = None if asked.weights is None else asked.weights.to(place)
    images, dynamics = training.scaled(rows).to(place), open_model(network, device=place)
    C = margin_rows(labels, dynamics.outputs(images[:1]).shape[1])
    rhs = torch.zeros(C.shape[:2], dtype=C.dtype, device=place)
    regions = (Region(images, eps, asked.norm, asked.clip, weights=weights) for eps in asked.eps)
    problems = (Problem(dynamics, region, C, rhs, torch.tensor(rows), seed=seed) for region in regions)
    return [choose_early(problem, labels, batch_size=batch_size) for problem in problems]
