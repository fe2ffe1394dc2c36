"""The kinds of training by name: what ``kind`` in a recipe may say, besides nothing, for the certified one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verideq.errors import UnknownName
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
