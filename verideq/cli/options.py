"""Options that several commands share, and what they mean."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from verideq.errors import InputError, ModelError, VerideqError
from verideq.graph import load_model, refuse_pickle
from verideq.models import BUNDLED

MODEL = "A model file, a folder of verideq train, or package.module:builder; none: the bundled digits model."
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A state dict (.safetensors, or .pt read without pickles) for a package.module:builder.", metavar="FILE"
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default the cores that are idle.", metavar="N")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.", metavar="N")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else.")]


class Interrupted(VerideqError):
    """Ctrl-C during a run that can be taken up again.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; {folder} keeps what was finished: repeat with --out {folder} --resume")


def use_threads(threads: int | None) -> None:
    """Set torch's threads; the default is the cores that the load average leaves free.

    On a busy machine two threads can be many times slower than one.
    """
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        threads = max(1, min(cores, 8, round(cores - busy)))
    if threads < 1:
        raise InputError(f"--threads {threads}: give 1 or more")
    torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name.split(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this machine, or this build of torch, has no CUDA; use --device cpu")
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
            return device
        except RuntimeError as error:
            raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    raise InputError(f"unknown device {name!r}; choose one of: auto, cpu, cuda")


def read_model(model: str | None, weights: Path | None) -> tuple[nn.Module, str]:
    """A model and its name: from a model file, a folder of ``verideq train``, ``package.module:builder`` with
    ``--weights``, or the bundled one.

    Raises:
        ModelError: it cannot be had.
    """
    if model is None:
        if weights is not None:
            raise ModelError("--weights goes with a package.module:builder")
        return load_model(BUNDLED), BUNDLED.stem
    if Path(model).is_dir():
        if weights is not None:
            raise ModelError(
                f"--weights goes with a package.module:builder; {model} is a folder, which has its weights"
            )
        return _trained(Path(model)), Path(model).resolve().name
    module, colon, builder = model.partition(":")
    is_name = bool(colon) and not Path(model).exists() and all(part.isidentifier() for part in module.split("."))
    if not is_name:
        if weights is not None:
            raise ModelError(
                f"--weights goes with a package.module:builder; {model} is a model file, which has its weights"
            )
        return load_model(model), Path(model).name
    built = _build(module, builder)
    if weights is not None:
        _load_weights(built, weights)
    return built, model


def training_of(model: str | None) -> dict[str, Any] | None:
    """The recipe of a folder of ``verideq train`` without its seed, and the seed; ``None`` for other models."""
    if model is None or not (Path(model) / "recipe.toml").exists():
        return None
    from verideq.training.recipe import read_values

    recipe = dict(read_values(Path(model) / "recipe.toml"))
    return {"seed": recipe.pop("seed", 0), "recipe": recipe}


def _trained(folder: Path) -> nn.Module:
    from verideq.training.kinds import read_trained

    if (folder / "model.safetensors").exists():
        return load_model(folder / "model.safetensors")
    return read_trained(folder)


def _build(module: str, name: str) -> nn.Module:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        imported = importlib.import_module(module)
        builder: Callable[[], object] | None = getattr(imported, name, None)
        built = builder() if callable(builder) and not isinstance(builder, nn.Module) else builder
    except ImportError as error:
        raise ModelError(f"{module}:{name}: {error}; run the command where `import {module}` works") from error
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"{module}:{name} raised {type(error).__name__}: {error}; mend the builder") from error
    finally:
        sys.path.pop(0)
    if builder is None:
        raise ModelError(f"the module {module} has no {name!r}")
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{module}:{name} gave a value of type {type(built).__name__}; a builder returns a torch.nn.Module"
        )
    return built.eval()


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.exists():
        raise ModelError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            refuse_pickle(path)
            raise ModelError(f"{path}: a state dict ends in .safetensors, .pt or .pth")
        model.load_state_dict(state)
    except ModelError:
        raise
    except Exception as error:  # torch and safetensors raise many types on a damaged file
        raise ModelError(f"{path} does not fit the model: {error}") from error
