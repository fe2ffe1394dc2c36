"""A run of equilibrium propagation: `verideq train` on a recipe with ``kind = "equilibrium-propagation"``.

The folder gets ``weights.safetensors``, to be attacked with ``verideq attack package.module:builder --weights``;
``settling.json``, the accuracy after each step of the free phase; and ``model.safetensors``, to be certified, where the
net is made of supported operations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verideq.data import Dataset, load
from verideq.errors import DataError, InputError, ModelError, RecipeError
from verideq.graph import save_model
from verideq.models.epnet import EPNet
from verideq.training.augment import augmented
from verideq.training.plain import Line, PlainRecipe, PlainTrainer
from verideq.training.propagation import Propagation
from verideq.training.tables import AugmentTable, need

KIND = "equilibrium-propagation"
OPTIMIZERS = ("sgd", "adam")
PART = 500
"""Samples at a time when nothing is trained."""


@dataclass(frozen=True)
class EnergyRecipe(PlainRecipe):
    """What to train by equilibrium propagation, and how. Every field is a key of the TOML file.

    Args:
        kind: ``equilibrium-propagation``.
        options: of the `EPNet`: channels, pool, readout, free_steps and so on.
        estimator: ``symmetric``, ``one-sided``, ``random-sign``, or ``bptt``, the reference.
        beta: the nudge ``β``.
        nudged_steps: of a nudged phase.
        optimizer: ``sgd`` or ``adam``.
        learning_rates: one for all couplings, or one each from the input on, the readout's last.
        momentum: of ``sgd``.
        weight_decay: of all weights.
        cosine_epochs: the rates fall along half a cosine in so many epochs, then stay; 0: in all of them.
        last_rate: at its end.
        held_out: the last samples of the training split, which the accuracy by step is measured on.
        tested: the first samples of the test split, whose accuracy by step is measured in the end; 0 for all.
        adversary: train on inputs that one step moves uphill in an l_inf ball, by the same rule; its radius, which
            grows over the first half of the run; 0 for none.
        noise: uniform noise of at most so much, on every pixel of a training image.
    """

    kind: str = KIND
    options: Mapping[str, Any] = field(default_factory=dict)
    estimator: str = "symmetric"
    beta: float = 0.5
    nudged_steps: int = 10
    optimizer: str = "sgd"
    learning_rates: Sequence[float] = (0.05,)
    momentum: float = 0.9
    weight_decay: float = 0.0
    cosine_epochs: int = 0
    last_rate: float = 1e-5
    held_out: int = 0
    tested: int = 0
    adversary: float = 0.0
    noise: float = 0.0
    batch_size: int = 64
    augment: AugmentTable = field(default_factory=AugmentTable)

    def __post_init__(self) -> None:
        self.propagation()
        self.at_least(1, "epochs", "batch_size")
        self.at_least(0, "samples", "held_out", "tested", "cosine_epochs", "weight_decay", "last_rate")
        self.at_least(0, "noise", "adversary")
        need("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
        rates = all(0 < rate < float("inf") for rate in self.learning_rates) and len(self.learning_rates) > 0
        need("learning_rates", self.learning_rates, rates, "positive numbers")
        need("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")

    def propagation(self) -> Propagation:
        """The estimator of the gradient."""
        try:
            return Propagation(self.estimator, self.beta, self.nudged_steps)
        except InputError as error:
            raise RecipeError(str(error)) from error

    def build(self, data: Dataset) -> EPNet:
        return self.net(data.input_shape, data.classes)

    def net(self, input_shape: Sequence[int], classes: int) -> EPNet:
        """The net with freshly drawn weights."""
        torch.manual_seed(self.seed)
        try:
            net = EPNet(input_shape, classes, **self.options)
        except (TypeError, InputError) as error:
            raise RecipeError(f"options: {error}") from error
        modules = len(list(net.parts()))
        if len(self.learning_rates) not in (1, modules):
            raise RecipeError(f"learning_rates: expected 1, or {modules}; got {list(self.learning_rates)}")
        return net

    def share(self, epoch: float) -> float:
        """Of the first learning rate above the last one, at a moment of the run."""
        length = self.cosine_epochs or self.epochs
        return (1 + math.cos(math.pi * min(epoch / length, 1.0))) / 2


class EnergyTrainer(PlainTrainer[EnergyRecipe, EPNet]):
    """One run of equilibrium propagation in one folder; see `PlainTrainer`."""

    recipe_type = EnergyRecipe
    refusal = ""
    """Why there is no model file."""

    def build(self) -> EPNet:
        return self.recipe.build(self.data)

    def prepare(self) -> None:
        count = len(self.labels) - self.recipe.held_out
        if count < 1:
            raise RecipeError(f"held_out: expected fewer than the {len(self.labels)} there are")
        self.held_images, self.held_labels = self.images[count:], self.labels[count:]
        self.images, self.labels = self.images[:count], self.labels[:count]

    def optimize(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        parts = list(self.model.parts())
        rates = list(recipe.learning_rates) * (len(parts) if len(recipe.learning_rates) == 1 else 1)
        groups: list[dict[str, Any]] = [
            {"params": list(part.parameters()), "lr": rate, "first": rate}
            for part, rate in zip(parts, rates, strict=True)
        ]
        if recipe.optimizer == "adam":
            return torch.optim.Adam(groups, weight_decay=recipe.weight_decay)
        return torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    def train(self, draw: torch.Generator) -> Line:
        recipe, how = self.recipe, self.recipe.propagation()
        order = torch.randperm(len(self.labels), generator=draw).to(self.device)
        self.model.train()
        costs, wrong, rate = [], 0, 0.0
        for step in range(self.steps):
            share = recipe.share(self.epoch + step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.last_rate + max(group["first"] - recipe.last_rate, 0.0) * share
            rate = self.optimizer.param_groups[0]["lr"]
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self._changed(self.images[rows], draw), self.labels[rows]
            if recipe.adversary:
                radius = recipe.adversary * min(2 * (self.epoch + step / self.steps) / recipe.epochs, 1.0)
                images = how.adversary(self.model, images, labels, radius, draw, self.data.clip)
            self.optimizer.zero_grad()
            settled = how.backward(self.model, images, labels, draw)
            self.optimizer.step()
            costs.append(settled.cost)
            wrong += int((settled.outputs.argmax(1) != labels).sum())
        self.model.eval()
        return {
            "learning_rate": rate,
            "loss": self.mean(costs),
            "train_error": wrong / (self.steps * self.batch_size),
            "validation_error": self._held_out_error(),
            "residual": self._residual(),
        }

    def _changed(self, images: Tensor, draw: torch.Generator) -> Tensor:
        recipe, clip = self.recipe, self.data.clip
        if recipe.augment.used:
            least = 0.0 if clip is None else clip[0]
            images = augmented(images, recipe.augment, draw, least, slice(None), len(images))
        if recipe.noise:
            images = images + recipe.noise * (2 * torch.rand(images.shape, generator=draw) - 1).to(images)
            images = images if clip is None else images.clamp(*clip)
        return images

    def _held_out_error(self) -> float | None:
        if not len(self.held_labels):
            return None
        return 1 - self._accuracies(self.held_images, self.held_labels, self.model.free_steps)[-1]

    @torch.no_grad()
    def _residual(self) -> float:
        """The median change, relative, that one more step than those of the free phase makes."""
        solution = self.model.solve(self.model.inject(self.images[:PART]))
        return float(solution.residual.median())

    def _accuracies(self, images: Tensor, labels: Tensor, steps: int) -> list[float]:
        """The accuracy after each step of the free phase."""
        self.model.eval()
        parts = zip(torch.split(images, PART), torch.split(labels, PART), strict=True)
        right = sum(self.model.curve(x, y, steps) for x, y in parts)
        return [float(count) / len(labels) for count in torch.as_tensor(right)]

    def finish(self) -> None:
        """``settling.json``, over twice the steps of the free phase, and ``model.safetensors`` where it can be.

        The test split is read here, once, and nothing is chosen by it.
        """
        steps = 2 * self.model.free_steps
        shown: dict[str, Any] = {"free_steps": self.model.free_steps}
        if len(self.held_labels):
            shown["held out"] = self._accuracies(self.held_images, self.held_labels, steps)
        test = self._test()
        if test is not None:
            part = slice(0, self.recipe.tested or len(test))
            images = test.scaled(part).to(self.device, torch.float32)
            shown["test"] = self._accuracies(images, test.labels[part].to(self.device), steps)
        (self.folder / "settling.json").write_text(json.dumps(shown) + "\n", encoding="utf-8")
        try:
            certifiable = self.model.certifiable()
        except ModelError as error:
            self.refusal = str(error)
        else:
            save_model(certifiable, self.model_file)

    @property
    def model_file(self) -> Path:
        """The net as supported operations, where it can be written as such."""
        return self.folder / "model.safetensors"

    def _test(self) -> Dataset | None:
        try:
            return load(self.recipe.data, "test")
        except DataError:
            return None

    def progress(self, line: Line) -> str:
        held = "" if line["validation_error"] is None else f"  held out: error {line['validation_error']:6.2%}"
        residual = f"residual {line['residual']:.2g}"
        return f"loss {line['loss']:<8.3g} error {line['train_error']:6.2%}{held}  {residual}"

    def advice(self, path: Path) -> str:
        settling = json.loads((self.folder / "settling.json").read_text(encoding="utf-8"))
        found = settling.get("test")
        right = "" if found is None else f", {found[self.model.free_steps - 1]:.2%} of the test split right"
        after = f"{self.model_file}: the model; certify it: verideq certify {self.model_file} --data {self.recipe.data}"
        if self.refusal:
            after = f"no model file: {self.refusal}"
        return (
            f"{path}: the weights of an energy-based network{right}; attack it: verideq attack {self.folder} "
            f"--data {self.recipe.data}\n{after}"
        )
