"""Training from a recipe, certified or not: checkpoints, the same file for the same seed, however often interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import verideq
from verideq.certify.run import write_json
from verideq.data import Dataset, load
from verideq.distributed import ALONE, World
from verideq.equilibrium import Anderson, Auto, Equilibrium, Gradient, Implicit, Phantom, Picard, Solution, Solver
from verideq.errors import ConvergenceError, DivergenceError, ParametrizationError, RecipeError, ResumeError
from verideq.graph import Normalize, save_model, trace
from verideq.graph.operations import evaluating
from verideq.models.zoo import architecture_named, initialise
from verideq.parametrizations import annealed_m, set_m
from verideq.region import parse_eps, round_down
from verideq.training.augment import augmented
from verideq.training.checkpoint import read_checkpoint, restore, write_checkpoint
from verideq.training.diagnosis import SAMPLES, diagnose
from verideq.training.log import Epoch, Log, Sums, line_of
from verideq.training.loss import Pass, uncertified
from verideq.training.objective import Objective
from verideq.training.recipe import Recipe
from verideq.training.schedule import eps_at, rate_at

SLOWER = "lower learning_rate, or let eps grow more slowly (ramp_epochs)"
BATCH = 256
"""Samples at a time in a look at the validation samples."""


def build(recipe: Recipe, data: Dataset) -> nn.Sequential:
    """The recipe's model with freshly drawn weights: the seed decides them."""
    torch.manual_seed(recipe.seed)
    try:
        model = architecture_named(recipe.architecture)(
            data.input_shape, data.classes, recipe.fusion, explicit=recipe.explicit, **recipe.sizes()
        )
    except (ParametrizationError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{recipe.architecture} cannot be built for inputs of shape {data.input_shape}: {error}; see [options]"
        ) from error
    plain = "ibp" if recipe.loss == "interval" else "torch"
    initialise(model, plain if recipe.initialisation == "auto" else recipe.initialisation)
    for module in model.modules():
        if isinstance(module, Equilibrium):
            module.solver, module.gradient = _solver(recipe), _gradient(recipe)
    return nn.Sequential(Normalize(list(recipe.mean), list(recipe.std)), *model) if recipe.mean else model


def _solver(recipe: Recipe) -> Solver:
    kinds: dict[str, type[Solver]] = {"auto": Auto, "picard": Picard, "anderson": Anderson}
    return kinds[recipe.solver](recipe.tol, recipe.max_steps)


def _gradient(recipe: Recipe) -> Gradient:
    if recipe.gradient == "phantom":
        return Phantom(recipe.phantom_steps, recipe.phantom_damping)
    return Implicit(Auto(recipe.backward_tol, recipe.max_steps), recipe.backward_steps)


class Trainer:
    """One training run in one folder.

    The folder gets ``recipe.toml``, ``log.jsonl`` and ``log.csv`` (a line an epoch), ``diagnosis.json``,
    ``checkpoint.safetensors`` and in the end ``model.safetensors``.

    Args:
        recipe: what to do.
        folder: made if it is not there.
        device: where to train.
        data: the training split; ``None``: the recipe's.
        resume: go on from the folder's checkpoint.
        world: the processes that train together, this one among them.

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
        world: World = ALONE,
    ) -> None:
        self.recipe, self.folder, self.device, self.world = recipe, folder, device, world
        whole = load(recipe.data, "train") if data is None else data
        self.hash = whole.hash
        self.data, self.held_out = _split(whole, recipe)
        self.model = build(recipe, self.data).to(device)
        self.graph = trace(self.model)
        self.objective = Objective(recipe, self.graph, self.data.clip, self.data.eps_weights, world)
        self.free = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.free, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.batch_size = min(recipe.batch_size, len(self.data))
        self.part = world.part(self.batch_size)
        self.steps = len(self.data) // self.batch_size
        self.epoch, self.sums = 0, Sums()
        self.average = {name: t.clone() for name, t in self._averaged()} if recipe.average else {}
        self.solver_steps = 0
        for _, layer in self.graph.equilibria():
            layer.observer = self._observe
        if self.checkpoint.exists():
            if not resume:
                raise ResumeError(f"{folder} holds a training run; pass --resume to go on with it, or another --out")
            self._restore()

    @property
    def checkpoint(self) -> Path:
        """The file that an interrupted run goes on from."""
        return self.folder / "checkpoint.safetensors"

    def run(self, *, report: Callable[[Epoch], None] = lambda epoch: None) -> Path:
        """Train to the end and write the model.

        Args:
            report: called with every epoch's line, in the process that leads.

        Returns:
            the path of the model file.

        Raises:
            DivergenceError: the loss or a gradient is not finite, or an equilibrium is not found.
        """
        log = Log(self.folder)
        if self.world.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.toml").write_text(self.recipe.toml(), encoding="utf-8")
            log.cut(self.epoch)
            if self.epoch == 0 and self.sums.steps == 0:
                self._diagnose("drawn")
        while self.epoch < self.recipe.epochs:
            line = self._train_epoch()
            self.epoch, self.sums = self.epoch + 1, Sums()
            if self.world.leads:
                log.append(line)
                self._save()
                report(line)
        path = self.folder / "model.safetensors"
        # As attributes, because here "no range" is a range to record.
        self.model.input_shape, self.model.pixel_range = self.data.input_shape, self.data.clip  # type: ignore[assignment]  # torch types attributes as modules or tensors
        if self.world.leads:
            with self.averaged():
                self._diagnose("trained")
                save_model(self.model.cpu(), path)
        self.world.wait()
        return path

    def eps(self, step: int) -> float:
        """The radius at a step of the epoch."""
        recipe = self.recipe
        if recipe.loss != "interval":
            return 0.0
        natural, ramp = recipe.natural_epochs * self.steps, recipe.ramp_epochs * self.steps
        return eps_at(self.epoch * self.steps + step, natural=natural, ramp=ramp, final=recipe.radius)

    def _train_epoch(self) -> Epoch:
        recipe, clock = self.recipe, _Clock(self.sums)
        order = torch.randperm(
            len(self.data), generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.epoch)
        )
        self.model.train()
        saved = time.monotonic()
        for step in range(self.sums.steps, self.steps):
            self._step(step, order[step * self.batch_size : (step + 1) * self.batch_size][self.part])
            clock.stamp()
            due = recipe.checkpoint.steps and (step + 1) % recipe.checkpoint.steps == 0
            late = recipe.checkpoint.minutes and time.monotonic() - saved > 60 * recipe.checkpoint.minutes
            if self.world.leads and (due or late) and step + 1 < self.steps:
                self._save()
                saved = time.monotonic()
        every = recipe.validation.every
        look = (self.epoch + 1) % every == 0 or self.epoch + 1 == recipe.epochs
        with self.averaged():
            validation = self.validate() if look else _NOTHING
        clock.stamp()
        return line_of(self.epoch + 1, self.eps(self.steps - 1), self._rate(self.steps - 1), self.sums, validation)

    def _step(self, step: int, batch: Tensor) -> None:
        recipe, eps = self.recipe, self.eps(step)
        draw = torch.Generator().manual_seed((recipe.seed * 1_000_003 + self.epoch) * 1_000_003 + step)
        images, labels = self._inputs(self.data, batch)
        if recipe.augment.used:
            images = self._augmented(images, draw)
        if recipe.anneal_m:
            set_m(self.model, annealed_m(recipe.all_options()["m"], eps, recipe.radius))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        self.solver_steps = 0
        try:
            terms = self.objective(images, labels, eps, draw)
            if not float(terms.loss.detach()) < float("inf"):  # NaN is not
                raise self._diverged(step, self._culprit(images, eps), SLOWER)
            self.optimizer.zero_grad()
            terms.loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        except ConvergenceError as error:
            raise self._diverged(step, str(error), "raise options.m or max_steps, or lower learning_rate") from error
        self.world.sum_gradients(self.free)
        norm = float(nn.utils.clip_grad_norm_(self.free, recipe.gradient_clip))
        if not norm < float("inf"):
            raise self._diverged(step, self._culprit(images, eps), SLOWER)
        self.optimizer.step()
        self.sums.add(terms, norm, self.solver_steps, self.world)
        if self.average:
            self._move_average(self.epoch * self.steps + step)

    def _rate(self, step: int) -> float:
        recipe = self.recipe
        return rate_at(
            self.epoch + step / self.steps,
            schedule=recipe.schedule,
            peak=recipe.learning_rate,
            epochs=recipe.epochs,
            warmup=recipe.warmup_epochs,
            decay_epochs=recipe.decay_epochs,
            factor=recipe.decay_factor,
        )

    def _inputs(self, data: Dataset, batch: Tensor) -> tuple[Tensor, Tensor]:
        return data.scaled(batch).to(self.device, torch.get_default_dtype()), data.labels[batch].to(self.device)

    def _augmented(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """What is drawn is drawn for the batches of all processes, each of which takes its part."""
        least = 0.0 if self.data.clip is None else self.data.clip[0]
        return augmented(images, self.recipe.augment, draw, least, self.part, self.batch_size)

    @torch.no_grad()
    def validate(self) -> Epoch:
        """The errors of the model as it is on the samples that are held out."""
        if self.held_out is None:
            return _NOTHING
        data, recipe = self.held_out, self.recipe
        eps = round_down(parse_eps(recipe.validation.eps)) if recipe.validation.eps else recipe.radius
        mine = torch.arange(self.world.rank, len(data), self.world.size)
        wrong = open_ = 0
        with evaluating(self.model), parametrize.cached():
            for batch in torch.split(mine, BATCH):
                images, labels = self._inputs(data, batch)
                one = Pass(self.graph)
                wrong += int((one.run(images).argmax(1) != labels).sum())
                if recipe.loss == "interval":
                    center, radius = one.margins(one.enclosed(self.objective.box(images, eps)), labels)
                    open_ += int(uncertified(center - radius, labels).sum())
        counts = self.world.means({"wrong": float(wrong), "open": float(open_)})
        shares = {name: count * self.world.size / len(data) for name, count in counts.items()}
        return {
            "validation_error": shares["wrong"],
            "validation_interval_error": shares["open"] if recipe.loss == "interval" else None,
        }

    # --- averages -----------------------------------------------------------------------------------------------------

    def _averaged(self) -> Iterator[tuple[str, Tensor]]:
        """What takes part in the average: parameters, and the running statistics that belong to them."""
        names = {name for name, _ in self.model.named_parameters()}
        for name, tensor in self.model.state_dict().items():
            if name in names or name.endswith(("running_mean", "running_var")):
                yield name, tensor

    @torch.no_grad()
    def _move_average(self, step: int) -> None:
        # Early on an average that long would be mostly the first weights.
        decay = min(self.recipe.average, (1 + step) / (10 + step))
        for name, tensor in self._averaged():
            self.average[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the last ones for a while, where the recipe averages."""
        before = {name: t.clone() for name, t in self._averaged()} if self.average else {}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(before)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        state = self.model.state_dict()
        for name, value in values.items():
            state[name].copy_(value)

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def _observe(self, solution: Solution) -> None:
        self.solver_steps = max(self.solver_steps, int(solution.steps.max()))

    def _diagnose(self, moment: str) -> None:
        """``diagnosis.json``: what the papers draw, as the weights were drawn and as they are in the end."""
        if self.recipe.radius == 0:
            return
        path = self.folder / "diagnosis.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() and moment == "trained" else {}
        images, _ = self._inputs(self.data, torch.arange(min(SAMPLES, len(self.data))))
        found = diagnose(self.model, images, self.objective.box(images, self.recipe.radius))
        write_json(path, {**before, moment: found})

    def _diverged(self, step: int, what: str, remedy: str) -> DivergenceError:
        kept = f"; {self.checkpoint} is from before" if self.checkpoint.exists() else ""
        return DivergenceError(
            f"training diverged in epoch {self.epoch + 1}, step {step + 1} of {self.steps} (eps {self.eps(step):.3g}, "
            f"learning rate {self._rate(step):.3g}): {what}; {remedy}{kept}"
        )

    @torch.no_grad()
    def _culprit(self, images: Tensor, eps: float) -> str:
        """The first layer whose values, bounds or gradients are not finite."""
        one = Pass(self.graph)
        for layer in (layer for _, layer in self.graph.equilibria()):
            layer.throw = False  # its last iterate shows what is wrong with it
        one.run(images)
        for name, value in one.clean.items():
            if not bool(value.isfinite().all()):
                return f"the clean values of {name} are not finite"
        for name, box in one.enclosed(self.objective.box(images, eps)).items():
            if not bool((box.center.isfinite() & box.radius.isfinite()).all()):
                return f"the bounds of {name} are not finite"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name} is not finite"
        return "the loss is not finite"

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        return {"recipe": recipe, "data_hash": self.hash, "version": verideq.__version__}

    def _save(self) -> None:
        meta = {"epoch": self.epoch, "sums": asdict(self.sums), **self._identity()}
        write_checkpoint(self.checkpoint, self.model, self.average, self.optimizer, meta)

    def _restore(self) -> None:
        tensors, meta = read_checkpoint(self.checkpoint, self._identity())
        restore(tensors, self.model, self.average, self.optimizer)
        self.epoch, self.sums = int(meta["epoch"]), Sums(**meta["sums"])


_NOTHING: Epoch = {"validation_error": None, "validation_interval_error": None}


class _Clock:
    """Keeps the seconds of an epoch, those from before an interruption included."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self.start, self.cpu_start = time.monotonic() - sums.seconds, time.process_time() - sums.cpu_seconds

    def stamp(self) -> None:
        """Write down the seconds up to now."""
        self.sums.seconds = time.monotonic() - self.start
        self.sums.cpu_seconds = time.process_time() - self.cpu_start


def _split(data: Dataset, recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """The samples to train on, and those to watch the run by."""
    table = recipe.validation
    if not table.samples:
        return data, None
    if table.samples >= len(data):
        raise RecipeError(f"validation.samples: expected fewer than the {len(data)} there are; got {table.samples}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(table.seed))
    held, rest = order[: table.samples].sort().values, order[table.samples :].sort().values
    return data.subset(rest.tolist()), data.subset(held.tolist())
