"""A training recipe: a TOML file whose every key is known, typed and bounded."""

from __future__ import annotations

import inspect
import json
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from verideq.errors import ParametrizationError, RecipeError
from verideq.models.zoo import architecture_named, parametrization_named
from verideq.parametrizations import Contraction
from verideq.region import parse_eps, round_down
from verideq.training.schedule import SCHEDULES, eps_at
from verideq.training.tables import (
    AdjointTable,
    AttackTable,
    AugmentTable,
    CheckpointTable,
    PenaltyTable,
    Ramped,
    ValidationTable,
    need,
    need_share,
)

LOSSES = ("interval", "cross-entropy")
INITIALISATIONS = ("auto", "ibp", "cerdeq", "torch")
GRADIENTS = ("implicit", "phantom")
SOLVERS = ("auto", "picard", "anderson")
PRECISIONS = ("float32", "mixed")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. Every field is a key of the TOML file; ``options`` and the last ones are tables.

    Args:
        data: a data set by name or path.
        architecture: of `verideq.models.zoo`.
        parametrization: of the equilibrium's ``W``; of `verideq.models.zoo`.
        explicit: the explicit twin: every equilibrium replaced by one application of its ``U`` and of a free ``W``.
        constrained: the twin's ``W`` keeps the parametrization: with ``cerdeq`` the Orth-CNN of its Table 6.
        options: the sizes of the architecture, and what the parametrization takes.
        initialisation: of the weights that no parametrization draws: ``ibp`` (Shi et al.), ``cerdeq``, ``torch``, or
            ``auto``: ``ibp`` for the interval loss, else ``torch``.
        loss: ``interval``, the certified one, or ``cross-entropy`` of the outputs, for which there is no radius.
        mean: normalisation by channel; empty for none.
        std: likewise.
        eps: the radius to train for, a number or a string like ``"8/255"``.
        anneal_m: let `m` fall to its value while the radius grows (`verideq.parametrizations.annealed_m`).
        epochs: over the training split.
        natural_epochs: at radius 0, first.
        ramp_epochs: from radius 0 to `eps`, after them.
        batch_size: samples a step; an incomplete last batch is left out.
        learning_rate: of AdamW, at its largest.
        schedule: of the learning rate: ``steps`` at `decay_epochs`, ``cosine`` or ``linear`` down to 0.
        warmup_epochs: in which the learning rate rises linearly, before the schedule.
        decay_epochs: after these epochs the learning rate is multiplied by `decay_factor`.
        decay_factor: in (0, 1].
        weight_decay: of AdamW, decoupled.
        gradient_clip: largest norm of the gradient.
        average: the model is the exponential moving average of the weights with this decay a step; 0 for the last ones.
        clean_weight: ``κ``, the weight of the clean cross-entropy against the certified one.
        solver: of the equilibria: ``auto``, ``picard`` or ``anderson``.
        tol: of the forward solver, relative.
        gradient: ``implicit`` or ``phantom``.
        phantom_steps: tracked steps of the phantom gradient.
        phantom_damping: their damping.
        backward_tol: of the adjoint, relative.
        backward_steps: of the adjoint, at most, a last iterate then being good enough; 0: `max_steps`, and it has to
            converge.
        max_steps: of both.
        precision: ``float32``, or ``mixed``: linear and convolutional layers but the last in bfloat16. Equilibria,
            batch norm and margins stay in float32.
        seed: of the weights, of the order of the samples and of all that is drawn.
        adjoint: see `AdjointTable`, and so on.
    """

    data: str = "digits"
    architecture: str = "linear-deq"
    parametrization: str = "ibp-mondeq"
    explicit: bool = False
    constrained: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    initialisation: str = "auto"
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    loss: str = "interval"
    eps: str = "0.1"
    anneal_m: bool = False
    epochs: int = 60
    natural_epochs: int = 1
    ramp_epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 5e-4
    schedule: str = "steps"
    warmup_epochs: float = 0.0
    decay_epochs: Sequence[int] = ()
    decay_factor: float = 0.2
    weight_decay: float = 0.0
    gradient_clip: float = 10.0
    average: float = 0.0
    clean_weight: Ramped = 0.0
    solver: str = "auto"
    tol: float = 1e-4
    gradient: str = "implicit"
    phantom_steps: int = 5
    phantom_damping: float = 0.5
    backward_tol: float = 1e-2
    backward_steps: int = 0
    max_steps: int = 500
    precision: str = "float32"
    seed: int = 0
    adjoint: AdjointTable = field(default_factory=AdjointTable)
    attack: AttackTable = field(default_factory=AttackTable)
    penalty: PenaltyTable = field(default_factory=PenaltyTable)
    augment: AugmentTable = field(default_factory=AugmentTable)
    validation: ValidationTable = field(default_factory=ValidationTable)
    checkpoint: CheckpointTable = field(default_factory=CheckpointTable)

    def __post_init__(self) -> None:
        self._check_options()
        choices = {
            "loss": LOSSES,
            "schedule": SCHEDULES,
            "initialisation": INITIALISATIONS,
            "gradient": GRADIENTS,
            "solver": SOLVERS,
            "precision": PRECISIONS,
        }
        for key, known in choices.items():
            self._need(key, getattr(self, key) in known, " or ".join((", ".join(known[:-1]), known[-1])))
        parse_eps(self.eps)
        at_least = {"epochs": 1, "natural_epochs": 0, "ramp_epochs": 0, "batch_size": 1, "max_steps": 1, "seed": 0}
        at_least |= {"phantom_steps": 1, "backward_steps": 0}
        for key, least in at_least.items():
            self._need(key, getattr(self, key) >= least, f"{least} or more")
        for key in ("learning_rate", "gradient_clip", "tol", "backward_tol"):
            self._need(key, 0 < getattr(self, key) < float("inf"), "a positive number")
        for key in ("warmup_epochs", "weight_decay"):
            self._need(key, 0 <= getattr(self, key) < float("inf"), "0 or more")
        self._need("warmup_epochs", self.warmup_epochs < self.epochs, "fewer than epochs")
        self._need("seed", self.seed < 2**32, "a seed below 2**32")
        for key in ("decay_factor", "phantom_damping"):
            self._need(key, 0 < getattr(self, key) <= 1, "a number in (0, 1]")
        self._need("average", 0 <= self.average < 1, "a number in [0, 1)")
        need_share("clean_weight", self.clean_weight)
        self._need("decay_epochs", all(e >= 1 for e in self.decay_epochs), "epochs of 1 or more")
        self._need("decay_epochs", self.schedule == "steps" or not self.decay_epochs, f"none with {self.schedule}")
        grows = self.loss == "interval" and self.radius > 0
        self._need("anneal_m", grows or not self.anneal_m, "false, as no radius grows without interval loss and eps")
        self._need("std", len(self.std) == len(self.mean), "as many numbers as mean")

    def _check_options(self) -> None:
        known = self._defaults()
        # The default parametrization goes without saying.
        plain = self.parametrization == type(self).parametrization
        owner = self.architecture if plain else f"{self.architecture} with {self.parametrization}"
        for key, value in self.options.items():
            if key not in known:
                raise RecipeError(f"options.{key}: {owner} has no such option; it has {', '.join(known)}")
            number = _typed(f"options.{key}", value, type(known[key]))
            # What is 0 by default may be 0: a part that is left out.
            if not (number > 0 or number == known[key]):
                raise RecipeError(f"options.{key}: expected a number above 0; got {value!r}")
        try:
            with torch.random.fork_rng(devices=[]):
                self.parametrize(nn.Linear(1, 1, bias=False))
        except ParametrizationError as error:
            raise RecipeError(f"options: {error}") from error
        contracts = issubclass(parametrization_named(self.parametrization), Contraction)
        self._need("constrained", self.explicit or not self.constrained, "false without explicit")
        self._need("constrained", contracts or not self.constrained, f"false with {self.parametrization}")
        if not contracts and not self.explicit:
            wanted = f'"cross-entropy" with {self.parametrization}, which has no gauge for intervals to converge by'
            self._need("loss", self.loss != "interval", wanted)

    def _need(self, key: str, holds: bool, wanted: str) -> None:
        need(key, getattr(self, key), holds, wanted)

    @property
    def radius(self) -> float:
        """`eps` as a number."""
        return round_down(parse_eps(self.eps))

    @property
    def last_radius(self) -> float:
        """The radius of the last step of a training run: less than `radius` where the epochs end before the ramp."""
        return eps_at(self.epochs, natural=self.natural_epochs, ramp=self.ramp_epochs, final=self.radius)

    def toml(self) -> str:
        """The recipe in full, every default spelled out."""
        return toml_of(asdict(self) | {"options": self.all_options()})

    def all_options(self) -> dict[str, Any]:
        """`options`, defaults included."""
        return self._defaults() | dict(self.options)

    def sizes(self) -> dict[str, Any]:
        """Those of the options that the architecture takes, defaults included."""
        accepted = _settings(architecture_named(self.architecture))
        return {key: value for key, value in self.all_options().items() if key in accepted}

    def parametrize(self, layer: nn.Module) -> nn.Module:
        """The fusion with the recipe's parametrization and the options that it takes.

        Raises:
            ParametrizationError: an option out of range.
        """
        register = parametrization_named(self.parametrization).register
        accepted = _settings(register)
        return register(layer, **{key: value for key, value in self.all_options().items() if key in accepted})

    def fusion(self, layer: nn.Module) -> nn.Module:
        """The ``W`` of the recipe's model from a fresh layer: parametrized, but for a free twin's."""
        return self.parametrize(layer) if self.constrained or not self.explicit else layer

    def _defaults(self) -> dict[str, Any]:
        return _settings(architecture_named(self.architecture)) | _settings(
            parametrization_named(self.parametrization).register
        )


def _settings(function: Callable[..., nn.Module]) -> dict[str, int | float]:
    """The arguments of a function that have a number for their default."""
    accepted = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in accepted if type(p.default) in (int, float)}


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, with settings ``key=value`` on top (``options.width=64`` for a table's key).

    Raises:
        RecipeError: the file cannot be read; a key that does not exist (the message names the nearest one); a value of
            the wrong type or out of range.
    """
    values = read_values(Path(path), settings)
    try:
        return make_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def read_values(path: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a TOML file with settings on top, unchecked."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} is no TOML file: {error}") from error
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting!r} has no value; write key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word is a string
        table, dot, inner = key.strip().partition(".")
        if dot:
            if not isinstance(values.setdefault(table, {}), dict):
                raise RecipeError(f"--set {setting!r}: {table} is no table")
            values[table][inner] = value
        else:
            values[table] = value
    return values


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, every key and type checked."""
    return Recipe(**checked(values, Recipe))


def checked(values: Mapping[str, Any], table: type, prefix: str = "") -> dict[str, Any]:
    """The keys of a recipe or of one of its tables: each is a field of the dataclass `table`, and of its type.

    Raises:
        RecipeError: they are not; the message names the nearest key.
    """
    types = typing.get_type_hints(table)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            near = get_close_matches(key, types, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; the keys are {', '.join(types)}"
            raise RecipeError(f"{prefix}{key}: no such key{hint}")
        found[key] = _typed(prefix + key, value, types[key])
    return found


def _typed(key: str, value: Any, wanted: Any) -> Any:
    if isinstance(wanted, type) and is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{key}: expected a table [{key}]; got {value!r}")
        return wanted(**checked(value, wanted, f"{key}."))
    if wanted == Ramped:
        if not isinstance(value, (list, tuple)):
            return _typed(key, value, float)
        if len(value) != 2:
            raise RecipeError(f"{key}: expected a number, or two: at radius 0 and at the last one; got {value!r}")
        return tuple(_typed(f"{key}[{i}]", item, float) for i, item in enumerate(value))
    origin = typing.get_origin(wanted)
    if origin is None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in ("eps", "validation.eps") and number:
            return repr(value)
        if wanted is float and number:
            return float(value)
        if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
            return value
        raise RecipeError(f"{key}: expected {wanted.__name__}; got {value!r}")
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{key}: expected a table [{key}]; got {value!r}")
        return dict(value)
    if not isinstance(value, list):
        raise RecipeError(f"{key}: expected a list; got {value!r}")
    (inner,) = typing.get_args(wanted)
    return tuple(_typed(f"{key}[{i}]", item, inner) for i, item in enumerate(value))


def toml_of(values: Mapping[str, Any]) -> str:
    """Plain values as TOML, the tables among them last."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    for table, inner in values.items():
        if isinstance(inner, Mapping):
            lines += ["", f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in inner.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # the escapes of JSON are those of TOML
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
