"""Training from a recipe, certified or not: a checkpoint every epoch, the same file for the same seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import verideq
from verideq.box import Box
from verideq.data import Dataset, load
from verideq.equilibrium import Auto, Equilibrium, Implicit
from verideq.errors import ParametrizationError, RecipeError, ResumeError
from verideq.graph import Normalize, save_model, trace
from verideq.models.zoo import architecture_named, ibp_initialise
from verideq.parametrizations import annealed_m, set_m
from verideq.training.loss import certified_loss, standard_loss
from verideq.training.recipe import Recipe
from verideq.training.schedule import eps_at

Epoch = dict[str, Any]


def build(recipe: Recipe, data: Dataset) -> nn.Sequential:
    """The recipe's model with freshly drawn weights: the seed decides them."""
    torch.manual_seed(recipe.seed)
    try:
        model = architecture_named(recipe.architecture)(
            data.input_shape, data.classes, recipe.parametrize, **recipe.sizes()
        )
    except (ParametrizationError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{recipe.architecture} cannot be built for inputs of shape {data.input_shape}: {error}; see [options]"
        ) from error
    if recipe.loss == "interval":
        ibp_initialise(model)
    for module in model.modules():
        if isinstance(module, Equilibrium):
            module.solver = Auto(recipe.tol, recipe.max_steps)
            module.gradient = Implicit(Auto(recipe.backward_tol, recipe.max_steps))
    return nn.Sequential(Normalize(list(recipe.mean), list(recipe.std)), *model) if recipe.mean else model


class Trainer:
    """One training run in one folder.

    The folder gets ``recipe.toml``, ``log.jsonl`` (a line an epoch), ``checkpoint.safetensors`` (free tensors, Adam's
    state, the epoch) and in the end ``model.safetensors``.

    Args:
        recipe: what to do.
        folder: made if it is not there.
        device: where to train.
        data: the training split; ``None``: the recipe's.
        resume: go on from the folder's checkpoint.

    Raises:
        RecipeError: the recipe's sizes do not fit the data.
        ResumeError: the folder holds a run and `resume` is not set, or it is a run of another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        data: Dataset | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.data = load(recipe.data, "train") if data is None else data
        self.model = build(recipe, self.data).to(device)
        self.graph = trace(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.learning_rate)
        self.images = self.data.scaled().to(device, torch.get_default_dtype())
        self.labels = self.data.labels.to(device)
        self.batch_size = min(recipe.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.batch_size
        self.epoch = 0
        if self.checkpoint.exists():
            if not resume:
                raise ResumeError(f"{folder} holds a training run; pass --resume to go on with it, or another --out")
            self._restore(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """The file that an interrupted run goes on from."""
        return self.folder / "checkpoint.safetensors"

    def run(self, *, report: Callable[[Epoch], None] = lambda epoch: None) -> Path:
        """Train to the end and write the model.

        Args:
            report: called with every epoch's line.

        Returns:
            the path of the model file.
        """
        log = self.folder / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines()[: self.epoch] if log.exists() else []
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.toml").write_text(self.recipe.toml(), encoding="utf-8")
        log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        while self.epoch < self.recipe.epochs:
            line = self._train_epoch()
            self.epoch += 1
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            self._save(self.checkpoint)
            report(line)
        path = self.folder / "model.safetensors"
        # As attributes, because here "no range" is a range to record.
        self.model.input_shape, self.model.pixel_range = self.data.input_shape, self.data.clip  # type: ignore[assignment]  # torch types attributes as modules or tensors
        save_model(self.model.cpu(), path)
        return path

    def _train_epoch(self) -> Epoch:
        recipe, started = self.recipe, time.monotonic()
        decays = sum(self.epoch >= e for e in recipe.decay_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.decay_factor**decays
        order = torch.randperm(
            len(self.labels), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.epoch)
        )
        order = order.to(self.device)
        self.model.train()
        certified = recipe.loss == "interval"
        eps, losses, wrong, open_ = 0.0, [], [], []
        for step in range(self.steps):
            eps = certified * eps_at(
                self.epoch * self.steps + step,
                natural=recipe.natural_epochs * self.steps,
                ramp=recipe.ramp_epochs * self.steps,
                final=recipe.radius,
            )
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self.images[batch], self.labels[batch]
            if recipe.anneal_m:
                set_m(self.model, annealed_m(recipe.all_options()["m"], eps, recipe.radius))
            if certified:
                loss, mistaken, uncertified = certified_loss(
                    self.graph, images, self._box(images, eps), labels, recipe.clean_weight
                )
                open_.append(uncertified)
            else:
                loss, mistaken = standard_loss(self.graph, images, labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
            self.optimizer.step()
            losses.append(loss.detach())
            wrong.append(mistaken)
        return {
            "epoch": self.epoch + 1,
            "eps": eps,
            "loss": float(torch.stack(losses).mean()),
            "train_error": float(torch.cat(wrong).double().mean()),
            "train_interval_error": float(torch.cat(open_).double().mean()) if certified else None,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _box(self, images: Tensor, eps: float) -> Box:
        weights = self.data.eps_weights
        reach = eps if weights is None else eps * weights.to(images)
        lower, upper = images - reach, images + reach
        clip = self.data.clip
        return Box(lower, upper) if clip is None else Box(lower.clamp(*clip), upper.clamp(*clip))

    def _save(self, path: Path) -> None:
        tensors = {f"model/{name}": t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"adam/{index}/{name}": value.detach().cpu().contiguous() for name, value in state.items()})
        meta = {
            "epoch": self.epoch,
            "recipe": asdict(self.recipe),
            "data_hash": self.data.hash,
            "version": verideq.__version__,
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(save(tensors, metadata={"verideq": json.dumps(meta)}))
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as handle:
                meta = json.loads(handle.metadata()["verideq"])
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(f"{path} is no training checkpoint: {error}; use another --out") from error
        mine = {
            "recipe": json.loads(json.dumps(asdict(self.recipe))),
            "data_hash": self.data.hash,
            "version": verideq.__version__,
        }
        for key, value in mine.items():
            if meta.get(key) != value:
                raise ResumeError(
                    f"{path} was made with another {key.replace('_', ' ')}; repeat its options, or use another --out"
                )
        self.model.load_state_dict({k.removeprefix("model/"): t for k, t in tensors.items() if k.startswith("model/")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.epoch = int(meta["epoch"])
