"""The kinds of training by name: what ``kind`` in a recipe may say, besides nothing, for the certified one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from verideq.data import load
from verideq.errors import ModelError, UnknownName
from verideq.training import adversary, energy
from verideq.training.adversary import AdversarialTrainer
from verideq.training.energy import EnergyTrainer
from verideq.training.plain import PlainTrainer
from verideq.training.recipe import read_values

KINDS: dict[str, type[PlainTrainer[Any, Any]]] = {adversary.KIND: AdversarialTrainer, energy.KIND: EnergyTrainer}


def kind_of(path: Path) -> str | None:
    """The ``kind`` of a recipe; ``None`` for those of certified and standard training.

    Raises:
        RecipeError: the file cannot be read.
        UnknownName: another kind.
    """
    kind = read_values(path).get("kind")
    if kind is not None and kind not in KINDS:
        raise UnknownName("kind", str(kind), tuple(KINDS))
    return kind


def read_trained(folder: Path) -> nn.Module:
    """The model of a finished run of one of these kinds, in evaluation mode, as it was trained.

    Raises:
        ModelError: the folder is none, or its weights are missing or do not fit.
        RecipeError: its recipe is no longer one.
    """
    path = folder / "recipe.toml"
    kind = kind_of(path) if path.exists() else None
    if kind is None:
        raise ModelError(f"{folder} is a folder that holds no finished training; name another, or a model file")
    recipe = KINDS[kind].recipe_type.read(path)
    model, weights = recipe.build(load(recipe.data, "train")), folder / "weights.safetensors"
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{weights} does not hold what {path} trains: {error}; finish the training") from error
    return model.eval()
