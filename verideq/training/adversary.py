"""A run of adversarial training: `verideq train` on a recipe with ``kind = "adversarial"``.

The models are general DEQs and the explicit networks that they are compared with. The folder gets
``weights.safetensors``, and is itself a MODEL for ``verideq attack``; a network of supported operations gets a model
file besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.data import Dataset
from verideq.equilibrium import DEQ, Broyden, Gradient, Implicit, Phantom
from verideq.errors import RecipeError
from verideq.graph import save_model, unsupported
from verideq.models.named import EXPLICIT, classifier_named
from verideq.region import parse_eps
from verideq.training.adversarial import AdversarialLoss, Adversary, cosine, truncated_outputs
from verideq.training.plain import Line, PlainRecipe, PlainTrainer

KIND = "adversarial"
GRADIENTS = ("exact", "phantom")


@dataclass(frozen=True)
class AdversarialRecipe(PlainRecipe):
    """What to train, and against whom. Every field is a key of the TOML file; ``[options]`` is a table.

    Args:
        kind: ``adversarial``.
        data: a data set by name or path.
        architecture: of `verideq.models.named`: a general DEQ, or a network without an equilibrium.
        options: its sizes.
        samples: of the training split, the first; 0 for all.
        loss: ``pgd-at``, ``trades`` or ``clean``.
        eps: the radius of the adversary.
        norm: of its ball, ``linf`` or ``l2``.
        attack_steps: of the adversary, each a quarter of eps.
        trades_weight: of the divergence.
        random_states: the loss at random states up to this one; 0 for none.
        jacobian: weight of the Jacobian penalty.
        jacobian_share: of the steps that have it.
        gradient: ``exact`` or ``phantom``, of the loss.
        attack_gradient: that of the adversary, likewise; empty: the same.
        forward_steps: of Broyden's method.
        backward_steps: of the exact gradient's.
        phantom_steps: ``k``.
        phantom_damping: ``λ``.
        pretrain_steps: of clean training through `pretrain_layers` weight-tied layers, first.
        pretrain_layers: of them.
        epochs: after that, over the samples.
        batch_size: samples a step; an incomplete last batch is left out.
        learning_rate: of Adam, along half a cosine to 1e-6.
        gradient_clip: largest norm of the gradient; 0 for none.
        crop: pixels that images are padded and cropped by.
        flip: mirror images at random.
        seed: of everything that is drawn.
    """

    kind: str = KIND
    architecture: str = "dense-deq"
    options: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "pgd-at"
    eps: str = "0.1"
    norm: str = "linf"
    attack_steps: int = 10
    trades_weight: float = 6.0
    random_states: int = 0
    jacobian: float = 0.0
    jacobian_share: float = 1.0
    gradient: str = "phantom"
    attack_gradient: str = ""
    forward_steps: int = 8
    backward_steps: int = 7
    phantom_steps: int = 5
    phantom_damping: float = 0.5
    pretrain_steps: int = 0
    pretrain_layers: int = 8
    learning_rate: float = 1e-3
    gradient_clip: float = 0.0
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        self.objective()
        self.solver_gradient("gradient")
        self.at_least(1, "epochs", "batch_size", "forward_steps", "backward_steps", "pretrain_layers")
        self.at_least(0, "samples", "random_states", "pretrain_steps", "crop", "jacobian", "gradient_clip")
        if not self.learning_rate > 0:
            raise RecipeError(f"learning_rate {self.learning_rate}: give a positive number")
        for key in ("random_states", "pretrain_steps", "jacobian", "attack_gradient"):
            if self.architecture in EXPLICIT and getattr(self, key):
                raise RecipeError(f"{key} {getattr(self, key)}: {self.architecture} has no equilibrium; leave it out")

    def objective(self, clip: tuple[float, float] | None = (0.0, 1.0)) -> AdversarialLoss:
        """The loss of a step."""
        try:
            adversary = Adversary(float(parse_eps(self.eps)), self.attack_steps, clip=clip, norm=self.norm)
            climbed = self.solver_gradient("attack_gradient") if self.attack_gradient else None
            return AdversarialLoss(
                self.loss, adversary, self.trades_weight, self.random_states, self.jacobian, self.jacobian_share,
                climbed,
            )  # fmt: skip
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def solver_gradient(self, key: str) -> Gradient:
        """The gradient that a key of the recipe names."""
        name = getattr(self, key)
        if name not in GRADIENTS:
            raise RecipeError(f"{key} {name!r}: choose one of {', '.join(GRADIENTS)}")
        if name == "exact":
            return Implicit(Broyden(max_steps=self.backward_steps))
        return Phantom(self.phantom_steps, self.phantom_damping)

    def build(self, data: Dataset) -> nn.Module:
        """The model with freshly drawn weights."""
        torch.manual_seed(self.seed)
        try:
            model = classifier_named(self.architecture, data.input_shape, data.classes, **self.options)
        except TypeError as error:
            raise RecipeError(f"{self.architecture}: {error}; see [options]") from error
        if isinstance(model, DEQ):
            model.solver, model.gradient = Broyden(max_steps=self.forward_steps), self.solver_gradient("gradient")
        return model


class AdversarialTrainer(PlainTrainer[AdversarialRecipe, nn.Module]):
    """One run of adversarial training in one folder; see `PlainTrainer`."""

    recipe_type = AdversarialRecipe

    def build(self) -> nn.Module:
        return self.recipe.build(self.data)

    def optimize(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.recipe.learning_rate)

    @property
    def pretraining(self) -> int:
        """Epochs of pre-training, whole ones."""
        return -(-self.recipe.pretrain_steps // self.steps)

    @property
    def epochs(self) -> int:
        return self.pretraining + self.recipe.epochs

    def progress(self, line: Line) -> str:
        residual = "" if line["residual"] is None else f"  residual {line['residual']:.2g}"
        return f"{line['phase']:<9} loss {line['loss']:<8.3g} error {line['train_error']:6.2%}{residual}"

    def advice(self, path: Path) -> str:
        return (
            f"{path}: the weights of {self.recipe.architecture}, without a certificate; attack it: "
            f"verideq attack {self.folder} --data {self.recipe.data}"
        )

    def finish(self) -> None:
        """``model.safetensors`` of a network that a model file can hold."""
        if not isinstance(self.model, DEQ) and not unsupported(self.model):
            save_model(self.model, self.folder / "model.safetensors", input_shape=self.data.input_shape)

    def train(self, draw: torch.Generator) -> Line:
        recipe = self.recipe
        order = torch.randperm(len(self.labels), generator=draw).to(self.device)
        objective, first = recipe.objective(self.data.clip), self.epoch < self.pretraining
        total = self.epochs * self.steps
        self.model.train()
        losses = []
        for step in range(self.steps):
            done = self.epoch * self.steps + step
            for group in self.optimizer.param_groups:
                group["lr"] = cosine(done, total, recipe.learning_rate)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self._augmented(self.images[rows], draw), self.labels[rows]
            if first and isinstance(self.model, DEQ):
                loss = F.cross_entropy(truncated_outputs(self.model, images, recipe.pretrain_layers), labels)
            else:
                loss = objective(self.model, images, labels, draw)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            if recipe.gradient_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
            self.optimizer.step()
            losses.append(loss.detach())
        mean = self.mean(losses)
        self.model.eval()
        with torch.no_grad():
            part = self.images[: 10 * self.batch_size]
            residual = None
            if isinstance(self.model, DEQ):
                residual = float(self.model.solve(self.model.inject(part)).residual.median())
            outputs = self.model(part)
        return {
            "phase": "truncated" if first else recipe.loss,
            "loss": mean,
            "train_error": float((outputs.argmax(1) != self.labels[: len(part)]).double().mean()),
            "residual": residual,
        }

    def _augmented(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Each image cropped and mirrored on its own."""
        recipe, batch = self.recipe, len(images)
        if recipe.crop and images.dim() == 4:
            padded = F.pad(images, [recipe.crop] * 4)
            height, width = images.shape[2:]
            shift = torch.randint(0, 2 * recipe.crop + 1, (2, batch), generator=draw).to(images.device)
            rows = (shift[0][:, None] + torch.arange(height, device=images.device))[:, None, :, None]
            columns = (shift[1][:, None] + torch.arange(width, device=images.device))[:, None, None, :]
            every = torch.arange(batch, device=images.device)[:, None, None, None]
            channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
            images = padded[every, channel, rows, columns]
        if recipe.flip and images.dim() == 4:
            mirrored = (torch.rand(batch, generator=draw) < 0.5).to(images.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images
