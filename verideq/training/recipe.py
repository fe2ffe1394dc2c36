"""A training recipe: a TOML file whose every key is known, typed and bounded."""

from __future__ import annotations

import inspect
import json
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from verideq.errors import ParametrizationError, RecipeError
from verideq.models.zoo import architecture_named, parametrization_named
from verideq.parametrizations import Contraction
from verideq.region import parse_eps, round_down
from verideq.training.schedule import eps_at

LOSSES = ("interval", "cross-entropy")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. Every field is a key of the TOML file; ``[options]`` is a table.

    Args:
        data: a data set by name or path.
        architecture: of `verideq.models.zoo`.
        parametrization: of the equilibrium's ``W``; of `verideq.models.zoo`.
        options: the sizes of the architecture, and what the parametrization takes.
        loss: ``interval``, the certified one, or ``cross-entropy`` of the outputs, for which there is no radius.
        mean: normalisation by channel; empty for none.
        std: likewise.
        eps: the radius to train for, a number or a string like ``"8/255"``.
        anneal_m: let `m` fall to its value while the radius grows (`verideq.parametrizations.annealed_m`).
        epochs: over the training split.
        natural_epochs: at radius 0, first.
        ramp_epochs: from radius 0 to `eps`, after them.
        batch_size: samples a step; an incomplete last batch is left out.
        learning_rate: of Adam.
        decay_epochs: after these epochs the learning rate is multiplied by `decay_factor`.
        decay_factor: in (0, 1].
        gradient_clip: largest norm of the gradient.
        clean_weight: ``κ``, the weight of the clean cross-entropy against the certified one.
        tol: of the forward solver, relative.
        backward_tol: of the adjoint, relative.
        max_steps: of both.
        seed: of the weights and of the order of the samples.
    """

    data: str = "digits"
    architecture: str = "linear-deq"
    parametrization: str = "ibp-mondeq"
    options: Mapping[str, Any] = field(default_factory=dict)
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
    decay_epochs: Sequence[int] = ()
    decay_factor: float = 0.2
    gradient_clip: float = 10.0
    clean_weight: float = 0.0
    tol: float = 1e-4
    backward_tol: float = 1e-2
    max_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_options()
        self._need("loss", self.loss in LOSSES, " or ".join(LOSSES))
        parse_eps(self.eps)
        at_least = {"epochs": 1, "natural_epochs": 0, "ramp_epochs": 0, "batch_size": 1, "max_steps": 1, "seed": 0}
        for key, least in at_least.items():
            self._need(key, getattr(self, key) >= least, f"{least} or more")
        for key in ("learning_rate", "gradient_clip", "tol", "backward_tol"):
            self._need(key, 0 < getattr(self, key) < float("inf"), "a positive number")
        self._need("seed", self.seed < 2**32, "a seed below 2**32")
        self._need("decay_factor", 0 < self.decay_factor <= 1, "a number in (0, 1]")
        self._need("clean_weight", 0 <= self.clean_weight <= 1, "a number in [0, 1]")
        self._need("decay_epochs", all(e >= 1 for e in self.decay_epochs), "epochs of 1 or more")
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
            if not _typed(f"options.{key}", value, type(known[key])) > 0:
                raise RecipeError(f"options.{key}: expected a number above 0; got {value!r}")
        try:
            with torch.random.fork_rng(devices=[]):
                self.parametrize(nn.Linear(1, 1, bias=False))
        except ParametrizationError as error:
            raise RecipeError(f"options: {error}") from error
        if not issubclass(parametrization_named(self.parametrization), Contraction):
            wanted = f'"cross-entropy" with {self.parametrization}, which has no gauge for intervals to converge by'
            self._need("loss", self.loss != "interval", wanted)

    def _need(self, key: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise RecipeError(f"{key}: expected {wanted}; got {getattr(self, key)!r}")

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
        lines = [f"{f.name} = {_toml(getattr(self, f.name))}" for f in fields(self) if f.name != "options"]
        lines += ["", "[options]", *(f"{key} = {_toml(value)}" for key, value in self.all_options().items())]
        return "\n".join(lines) + "\n"

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

    def _defaults(self) -> dict[str, Any]:
        return _settings(architecture_named(self.architecture)) | _settings(
            parametrization_named(self.parametrization).register
        )


def _settings(function: Callable[..., nn.Module]) -> dict[str, int | float]:
    """The arguments of a function that have a number for their default."""
    accepted = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in accepted if isinstance(p.default, (int, float))}


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, with settings ``key=value`` on top (``options.width=64`` for a table's key).

    Raises:
        RecipeError: the file cannot be read; a key that does not exist (the message names the nearest one); a value of
            the wrong type or out of range.
    """
    path = Path(path)
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
    try:
        return make_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, every key and type checked."""
    types = typing.get_type_hints(Recipe)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            near = get_close_matches(key, types, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(types)}"
            raise RecipeError(f"{key}: no such key{hint}")
        checked[key] = _typed(key, value, types[key])
    return Recipe(**checked)


def _typed(key: str, value: Any, wanted: Any) -> Any:
    origin = typing.get_origin(wanted)
    if origin is None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == "eps" and number:
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


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # the escapes of JSON are those of TOML
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
