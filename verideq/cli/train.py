"""``verideq train``: training from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verideq.cli.options import Device, Interrupted, Json, Threads, choose_device, use_threads
from verideq.distributed import joined
from verideq.training import Recipe, Trainer, read_recipe
from verideq.training.kinds import KINDS, kind_of
from verideq.training.plain import PlainRecipe, PlainTrainer


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; see recipes/.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key: epochs=80, options.width=64; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with every default, and stop.")] = False,
    data: Annotated[str | None, typer.Option(help="Another data set than the recipe's.", metavar="NAME|PATH")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's.", metavar="N")] = None,
    threads: Threads = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="The folder of the run; runs/RECIPE by default.", metavar="DIR")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    as_json: Json = False,
) -> int:
    """Train a model so that it can be certified; with torchrun, in several processes."""
    extra = [f"data={json.dumps(data)}"] * (data is not None) + [f"seed={seed}"] * (seed is not None)
    given, kind = [*(settings or []), *extra], kind_of(recipe)
    chosen: Recipe | PlainRecipe = (
        read_recipe(recipe, given) if kind is None else KINDS[kind].recipe_type.read(recipe, given)
    )
    if show:
        typer.echo(chosen.toml(), nl=False)
        return 0
    use_threads(threads)
    folder = out or Path("runs") / recipe.stem
    if isinstance(chosen, PlainRecipe):
        _train_plainly(KINDS[chosen.kind](chosen, folder, choose_device(device), resume=resume), as_json=as_json)
        return 0
    with joined(choose_device(device)) as (world, place):
        _train(Trainer(chosen, folder, place, resume=resume, world=world), as_json=as_json)
    return 0


def _train_plainly(trainer: PlainTrainer[Any, Any], *, as_json: bool) -> None:
    folder, epochs, last = trainer.folder, trainer.epochs, dict[str, Any]()
    console = Console(stderr=True, highlight=False, emoji=False, quiet=as_json)
    console.print(f"{len(trainer.labels)} samples, {trainer.steps} steps an epoch, {epochs} epochs; {folder}")

    def report(line: dict[str, Any]) -> None:
        last.update(line)
        console.print(f"epoch {line['epoch']:>3}/{epochs}  {trainer.progress(line)}  {line['seconds']:.1f} s")

    try:
        path = trainer.run(report=report)
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    from verideq.report.training import write_training_report  # matplotlib takes a second to load

    page = write_training_report(folder)
    if as_json:
        typer.echo(json.dumps({"weights": str(path), **last}))
    else:
        console.print(trainer.advice(path), soft_wrap=True)
        console.print(f"{page}: the curves", soft_wrap=True)


def _train(trainer: Trainer, *, as_json: bool) -> None:
    recipe, folder, world = trainer.recipe, trainer.folder, trainer.world
    console = Console(stderr=True, highlight=False, emoji=False, quiet=as_json or not world.leads)
    together = f" in each of {world.size} processes" if world.size > 1 else ""
    held = "" if trainer.held_out is None else f", {len(trainer.held_out)} held out"
    console.print(
        f"{len(trainer.data)} samples{held}, {trainer.steps} steps an epoch{together}, {recipe.epochs} epochs; {folder}"
    )
    last: dict[str, Any] = {}
    short = recipe.loss == "interval" and recipe.epochs < recipe.natural_epochs + recipe.ramp_epochs
    warning = (
        f"warning: the epochs end before the ramp of eps does, at {recipe.last_radius:.3g} of {recipe.radius:.3g}; set "
        "epochs or ramp_epochs for a model that is trained to be certified"
    )
    if short:
        console.print(warning, style="yellow", soft_wrap=True)

    def report(line: dict[str, Any]) -> None:
        last.update(line)
        console.print(_progress(line, recipe.epochs), soft_wrap=True)

    try:
        path = trainer.run(report=report)
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    if not world.leads:
        return
    from verideq.report.training import write_training_report  # matplotlib takes a second to load

    page = write_training_report(folder)
    if as_json:
        typer.echo(json.dumps({"model": str(path), **last}))
        return
    if short:
        console.print(warning, style="yellow", soft_wrap=True)
    console.print(f"{path}: the model; certify it: verideq certify {path} --data {recipe.data}", soft_wrap=True)
    console.print(f"{page}: the curves", soft_wrap=True)


def _progress(line: dict[str, Any], epochs: int) -> str:
    """One epoch as a line of the terminal."""
    parts = [f"epoch {line['epoch']:>3}/{epochs}", f"eps {line['eps']:<8.3g}", f"loss {line['loss']:<8.3g}"]
    parts += [f"error {line['train_error']:6.2%}"]
    if line["train_interval_error"] is not None:
        parts += [f"uncertified {line['train_interval_error']:6.2%}"]
    if line["validation_error"] is not None:
        parts += [f"held out: error {line['validation_error']:6.2%}"]
    if line["validation_interval_error"] is not None:
        parts += [f"uncertified {line['validation_interval_error']:6.2%}"]
    return "  ".join([*parts, f"{line['solver_steps']} steps", f"{line['seconds']:.1f} s"])
