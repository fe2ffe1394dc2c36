"""A run of adversarial training: `verideq train` on a recipe with ``kind = "adversarial"``.

The models are general DEQs, which no model file holds: the folder gets ``weights.safetensors``, to be attacked with
``verideq attack package.module:builder --weights``.
"""

from __future__ import annotations

import json
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import verideq
from verideq.data import Dataset, load
from verideq.equilibrium import DEQ, Broyden, Gradient, Implicit, Phantom
from verideq.errors import RecipeError, ResumeError
from verideq.models.mdeq import general_named
from verideq.region import parse_eps
from verideq.training.adversarial import AdversarialLoss, Adversary, cosine, truncated_outputs
from verideq.training.recipe import read_values

KIND = "adversarial"
GRADIENTS = ("exact", "phantom")


@dataclass(frozen=True)
class AdversarialRecipe:
    """What to train, and against whom. Every field is a key of the TOML file; ``[options]`` is a table.

    Args:
        kind: ``adversarial``.
        data: a data set by name or path.
        architecture: a general DEQ, of `verideq.models.mdeq`.
        options: its sizes.
        samples: of the training split, the first; 0 for all.
        loss: ``pgd-at``, ``trades`` or ``clean``.
        eps: the radius of the adversary.
        attack_steps: of the adversary, each a quarter of eps.
        trades_weight: of the divergence.
        random_states: the loss at random states up to this one; 0 for none.
        jacobian: weight of the Jacobian penalty.
        jacobian_share: of the steps that have it.
        gradient: ``exact`` or ``phantom``.
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
    data: str = "mnist"
    architecture: str = "dense-deq"
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    loss: str = "pgd-at"
    eps: str = "0.1"
    attack_steps: int = 10
    trades_weight: float = 6.0
    random_states: int = 0
    jacobian: float = 0.0
    jacobian_share: float = 1.0
    gradient: str = "phantom"
    forward_steps: int = 8
    backward_steps: int = 7
    phantom_steps: int = 5
    phantom_damping: float = 0.5
    pretrain_steps: int = 0
    pretrain_layers: int = 8
    epochs: int = 10
    batch_size: int = 96
    learning_rate: float = 1e-3
    gradient_clip: float = 0.0
    crop: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.objective()
        self.solver_gradient()
        for key in ("epochs", "batch_size", "forward_steps", "backward_steps", "pretrain_layers"):
            if getattr(self, key) < 1:
                raise RecipeError(f"{key} {getattr(self, key)}: give 1 or more")
        for key in ("samples", "random_states", "pretrain_steps", "crop", "jacobian", "gradient_clip"):
            if getattr(self, key) < 0:
                raise RecipeError(f"{key} {getattr(self, key)}: give 0 or more")
        if not self.learning_rate > 0:
            raise RecipeError(f"learning_rate {self.learning_rate}: give a positive number")

    def objective(self, clip: tuple[float, float] | None = (0.0, 1.0)) -> AdversarialLoss:
        """The loss of a step."""
        try:
            adversary = Adversary(float(parse_eps(self.eps)), self.attack_steps, clip=clip)
            return AdversarialLoss(
                self.loss, adversary, self.trades_weight, self.random_states, self.jacobian, self.jacobian_share
            )
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def solver_gradient(self) -> Gradient:
        """The gradient of the model."""
        if self.gradient not in GRADIENTS:
            raise RecipeError(f"gradient {self.gradient!r}: choose one of {', '.join(GRADIENTS)}")
        if self.gradient == "exact":
            return Implicit(Broyden(max_steps=self.backward_steps))
        return Phantom(self.phantom_steps, self.phantom_damping)

    def build(self, data: Dataset) -> DEQ:
        """The model with freshly drawn weights."""
        torch.manual_seed(self.seed)
        try:
            model = general_named(self.architecture, data.input_shape, data.classes, **self.options)
        except TypeError as error:
            raise RecipeError(f"{self.architecture}: {error}; see [options]") from error
        model.solver, model.gradient = Broyden(max_steps=self.forward_steps), self.solver_gradient()
        return model

    def toml(self) -> str:
        """The recipe with every default spelled out."""
        plain = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "options"]
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain]
        lines += ["", "[options]", *(f"{key} = {json.dumps(value)}" for key, value in self.options.items())]
        return "\n".join(lines) + "\n"


def make_adversarial(values: Mapping[str, Any]) -> AdversarialRecipe:
    """A recipe from plain values, every key and type checked."""
    types = typing.get_type_hints(AdversarialRecipe)
    checked = dict(values)
    for key, value in values.items():
        if key not in types:
            near = get_close_matches(key, types, 1)
            raise RecipeError(
                f"{key}: no such key; did you mean {near[0]}?" if near else f"{key}: no such key of {KIND} training"
            )
        wanted: type = dict if key == "options" else types[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == "eps" and number:
            checked[key] = repr(value)
        elif wanted is float and number:
            checked[key] = float(value)
        elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise RecipeError(f"{key}: expected {wanted.__name__}; got {value!r}")
    return AdversarialRecipe(**checked)


def kind_of(path: Path) -> object:
    """The ``kind`` of a recipe; ``None`` for those of certified and standard training."""
    return read_values(path).get("kind")


def read_adversarial(path: Path, settings: Sequence[str] = ()) -> AdversarialRecipe:
    """A recipe from a TOML file, with settings ``key=value`` on top.

    Raises:
        RecipeError: as `read_recipe` does.
    """
    try:
        return make_adversarial(read_values(path, settings))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


class AdversarialTrainer:
    """One run in one folder: ``recipe.toml``, ``log.jsonl``, ``checkpoint.safetensors``, ``weights.safetensors``.

    Args:
        recipe: what to do.
        folder: made if it is not there.
        device: where to train.
        data: the training split; ``None``: the recipe's.
        resume: go on from the folder's checkpoint.
    """

    def __init__(
        self,
        recipe: AdversarialRecipe,
        folder: Path,
        device: torch.device,
        data: Dataset | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.data = load(recipe.data, "train") if data is None else data
        self.model = recipe.build(self.data).to(device)
        count = recipe.samples or len(self.data)
        self.images = self.data.scaled(slice(0, count)).to(device, torch.float32)
        self.labels = self.data.labels[:count].to(device)
        self.batch_size = min(recipe.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.batch_size
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.learning_rate)
        self.epoch = 0
        if self.checkpoint.exists():
            if not resume:
                raise ResumeError(f"{folder} holds a training run; pass --resume to go on with it, or another --out")
            self._restore()

    @property
    def checkpoint(self) -> Path:
        """The file that an interrupted run goes on from."""
        return self.folder / "checkpoint.safetensors"

    @property
    def pretraining(self) -> int:
        """Epochs of pre-training, whole ones."""
        return -(-self.recipe.pretrain_steps // self.steps)

    def run(self, *, report: Callable[[dict[str, Any]], None] = lambda line: None) -> Path:
        """Train to the end; returns the path of the weights."""
        log = self.folder / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines()[: self.epoch] if log.exists() else []
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.toml").write_text(self.recipe.toml(), encoding="utf-8")
        log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        while self.epoch < self.pretraining + self.recipe.epochs:
            line = self._epoch()
            self.epoch += 1
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            self._save()
            report(line)
        path = self.folder / "weights.safetensors"
        state = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        _write(path, save(state))
        return path

    def _epoch(self) -> dict[str, Any]:
        recipe, started = self.recipe, time.monotonic()
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.epoch)
        torch.manual_seed(recipe.seed * 1_000_003 + self.epoch)  # of dropout
        order = torch.randperm(len(self.labels), generator=draw).to(self.device)
        objective, first = recipe.objective(self.data.clip), self.epoch < self.pretraining
        total = (self.pretraining + recipe.epochs) * self.steps
        self.model.train()
        losses = []
        for step in range(self.steps):
            done = self.epoch * self.steps + step
            for group in self.optimizer.param_groups:
                group["lr"] = cosine(done, total, recipe.learning_rate)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self._augmented(self.images[rows], draw), self.labels[rows]
            if first:
                loss = F.cross_entropy(truncated_outputs(self.model, images, recipe.pretrain_layers), labels)
            else:
                loss = objective(self.model, images, labels, draw)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            if recipe.gradient_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
            self.optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not mean < float("inf"):
            raise RecipeError(
                f"the loss is {mean} in epoch {self.epoch + 1}: lower learning_rate, or set gradient_clip"
            )
        self.model.eval()
        with torch.no_grad():
            part = self.images[: 10 * self.batch_size]
            injected = self.model.inject(part)
            solution = self.model.solve(injected)
            outputs = self.model(part)
        return {
            "epoch": self.epoch + 1,
            "phase": "truncated" if first else recipe.loss,
            "loss": mean,
            "train_error": float((outputs.argmax(1) != self.labels[: len(part)]).double().mean()),
            "residual": float(solution.residual.median()),
            "seconds": round(time.monotonic() - started, 3),
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

    def _meta(self) -> dict[str, Any]:
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        return {"recipe": recipe, "data_hash": self.data.hash, "version": verideq.__version__}

    def _save(self) -> None:
        tensors = {f"model/{k}": t.detach().cpu().contiguous() for k, t in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{index}/{k}": value.detach().cpu().contiguous() for k, value in state.items()}
        meta = self._meta() | {"epoch": self.epoch}
        _write(self.checkpoint, save(tensors, metadata={"verideq": json.dumps(meta)}))

    def _restore(self) -> None:
        path = self.checkpoint
        try:
            with safe_open(path, framework="pt") as handle:
                meta = json.loads(handle.metadata()["verideq"])
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(f"{path} is no training checkpoint: {error}; use another --out") from error
        for key, value in self._meta().items():
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


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
