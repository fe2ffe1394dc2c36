"""Training runs without a radius, whose model is a state dict: what adversarial training and equilibrium propagation
share. One folder with ``recipe.toml``, ``log.jsonl``, ``checkpoint.safetensors`` after every epoch, and
``weights.safetensors`` in the end; a run that was interrupted and taken up again ends in the same bytes.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

import verideq
from verideq.data import Dataset, load
from verideq.errors import RecipeError, ResumeError
from verideq.training.checkpoint import read_checkpoint, restore, write_checkpoint
from verideq.training.log import Log
from verideq.training.recipe import checked, read_values, toml_of

Line = dict[str, Any]
"""What ``log.jsonl`` holds of an epoch."""
NetT = TypeVar("NetT", bound=nn.Module)


@dataclass(frozen=True)
class PlainRecipe(ABC):
    """What every recipe of a `kind` has: a data set, the first samples of it, epochs, a batch and a seed.

    Args:
        data: a data set by name or path.
        samples: of the training split, the first; 0 for all.
        epochs: over the samples.
        batch_size: samples a step; an incomplete last batch is left out.
        seed: of everything that is drawn.
    """

    kind: str = ""
    data: str = "mnist"
    samples: int = 0
    epochs: int = 10
    batch_size: int = 96
    seed: int = 0

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from plain values, every key and type checked."""
        return cls(**checked(values, cls))

    @classmethod
    def read(cls, path: Path, settings: Sequence[str] = ()) -> Self:
        """A recipe from a TOML file, with settings ``key=value`` on top.

        Raises:
            RecipeError: as `read_recipe` does.
        """
        values = read_values(path, settings)
        try:
            return cls.make(values)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @abstractmethod
    def build(self, data: Dataset) -> nn.Module:
        """The model with freshly drawn weights."""

    def toml(self) -> str:
        """The recipe with every default spelled out."""
        return toml_of(asdict(self))

    def at_least(self, least: int, *keys: str) -> None:
        """Refuse smaller values of these keys.

        Raises:
            RecipeError: one of them is.
        """
        for key in keys:
            if not getattr(self, key) >= least:
                raise RecipeError(f"{key} {getattr(self, key)}: give {least} or more")


RecipeT = TypeVar("RecipeT", bound=PlainRecipe)


class PlainTrainer(ABC, Generic[RecipeT, NetT]):
    """One run in one folder.

    Args:
        recipe: what to do.
        folder: made if it is not there.
        device: where to train.
        data: the training split; ``None``: the recipe's.
        resume: go on from the folder's checkpoint.
    """

    recipe_type: ClassVar[type[PlainRecipe]]

    def __init__(
        self,
        recipe: RecipeT,
        folder: Path,
        device: torch.device,
        data: Dataset | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.data = load(recipe.data, "train") if data is None else data
        self.model: NetT = self.build().to(device)
        count = recipe.samples or len(self.data)
        self.images = self.data.scaled(slice(0, count)).to(device, torch.float32)
        self.labels = self.data.labels[:count].to(device)
        self.prepare()
        self.batch_size = min(recipe.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.batch_size
        self.optimizer = self.optimize()
        self.epoch = 0
        if self.checkpoint.exists():
            if not resume:
                raise ResumeError(f"{folder} holds a training run; pass --resume to go on with it, or another --out")
            tensors, meta = read_checkpoint(self.checkpoint, self._meta())
            restore(tensors, self.model, {}, self.optimizer)
            self.epoch = int(meta["epoch"])

    @abstractmethod
    def build(self) -> NetT:
        """The model with freshly drawn weights."""

    @abstractmethod
    def optimize(self) -> torch.optim.Optimizer:
        """The optimiser of the model's parameters."""

    @abstractmethod
    def train(self, draw: torch.Generator) -> Line:
        """One epoch; what the log holds of it besides its number and its seconds."""

    def prepare(self) -> None:  # a hook that may stay empty
        """Change the samples before the first step is counted."""

    def finish(self) -> None:  # likewise
        """Write what else the folder gets, once the weights are there."""

    @property
    def epochs(self) -> int:
        """Of the whole run."""
        return self.recipe.epochs

    @property
    def checkpoint(self) -> Path:
        """The file that an interrupted run goes on from."""
        return self.folder / "checkpoint.safetensors"

    @abstractmethod
    def progress(self, line: Line) -> str:
        """An epoch as the terminal shows it."""

    @abstractmethod
    def advice(self, path: Path) -> str:
        """What to do with the weights that were written there."""

    def run(self, *, report: Callable[[Line], None] = lambda line: None) -> Path:
        """Train to the end; returns the path of the weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.toml").write_text(self.recipe.toml(), encoding="utf-8")
        log = Log(self.folder)
        log.cut(self.epoch)
        while self.epoch < self.epochs:
            started, processor = time.monotonic(), time.process_time()
            seed = self.recipe.seed * 1_000_003 + self.epoch
            torch.manual_seed(seed)  # of dropout
            line = self.train(torch.Generator().manual_seed(seed))
            self.epoch += 1
            spent = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - processor}
            line = {"epoch": self.epoch, **line, **{name: round(value, 3) for name, value in spent.items()}}
            log.append(line)
            meta = {"epoch": self.epoch, **self._meta()}
            write_checkpoint(self.checkpoint, self.model, {}, self.optimizer, meta)
            report(line)
        path = self.folder / "weights.safetensors"
        state = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(save(state))
        partial.replace(path)
        self.finish()
        return path

    def mean(self, losses: Sequence[Tensor]) -> float:
        """The mean loss of an epoch.

        Raises:
            RecipeError: it is not finite.
        """
        mean = float(torch.stack(list(losses)).mean())
        if not abs(mean) < float("inf"):
            raise RecipeError(f"the loss is {mean} in epoch {self.epoch + 1}: lower the learning rate")
        return mean

    def _meta(self) -> dict[str, Any]:
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        return {"recipe": recipe, "data_hash": self.data.hash, "version": verideq.__version__}
