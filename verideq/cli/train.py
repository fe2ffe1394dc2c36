"""``verideq train``: training from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verideq.cli.options import Device, Interrupted, Json, Threads, choose_device, use_threads
from verideq.training import Trainer, read_recipe


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
    """Train a model so that it can be certified; a checkpoint every epoch."""
    extra = [f"data={json.dumps(data)}"] * (data is not None) + [f"seed={seed}"] * (seed is not None)
    chosen = read_recipe(recipe, [*(settings or []), *extra])
    if show:
        typer.echo(chosen.toml(), nl=False)
        return 0
    use_threads(threads)
    folder = out or Path("runs") / recipe.stem
    trainer = Trainer(chosen, folder, choose_device(device), resume=resume)
    console = Console(stderr=True, highlight=False, emoji=False, quiet=as_json)
    console.print(f"{len(trainer.data)} samples, {trainer.steps} steps an epoch, {chosen.epochs} epochs; {folder}")
    last: dict[str, Any] = {}
    short = chosen.loss == "interval" and chosen.epochs < chosen.natural_epochs + chosen.ramp_epochs
    warning = (
        f"warning: the epochs end before the ramp of eps does, at {chosen.last_radius:.3g} of {chosen.radius:.3g}; set "
        "epochs or ramp_epochs for a model that is trained to be certified"
    )
    if short:
        console.print(warning, style="yellow", soft_wrap=True)

    def report(line: dict[str, Any]) -> None:
        last.update(line)
        uncertified = line["train_interval_error"]
        bounds = "" if uncertified is None else f"uncertified {uncertified:6.2%}  "
        console.print(
            f"epoch {line['epoch']:>3}/{chosen.epochs}  eps {line['eps']:<8.3g}  loss {line['loss']:<8.3g} "
            f"error {line['train_error']:6.2%}  {bounds}{line['seconds']:.1f} s"
        )

    try:
        path = trainer.run(report=report)
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    if as_json:
        typer.echo(json.dumps({"model": str(path), **last}))
    else:
        if short:
            console.print(warning, style="yellow", soft_wrap=True)
        console.print(f"{path}: the model; certify it: verideq certify {path} --data {chosen.data}", soft_wrap=True)
    return 0
