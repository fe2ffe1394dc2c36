"""The exception tree.

::

    VerideqError
    ├── InputError (ValueError)         the call was wrong: exit code 2
    │   ├── RegionError                 a perturbation or an image that makes no sense
    │   ├── ModelError                  a model or a model file that cannot be read
    │   │   └── UnsupportedOperation    a node that no bound is known for
    │   ├── DataError                   a data set that cannot be read
    │   ├── RecipeError                 a training recipe with a wrong key or value
    │   ├── ResumeError                 a folder that holds another run
    │   └── UnknownName                 a data set, norm, method, ... that does not exist
    ├── ParametrizationError            a weight outside the class of its parametrization
    ├── NoGaugeError                    no positive vector proves a layer well-posed
    ├── ConvergenceError                a solver stopped before its tolerance
    ├── NotEnoughMemory                 what is to be done does not fit, however it is cut
    ├── DivergenceError                 a training run whose numbers are none any more
    └── InconsistencyError              a certificate and a counterexample for the same sample

Every message names the offending thing and says what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class VerideqError(Exception):
    """The base of everything that verideq raises on purpose."""


class InputError(VerideqError, ValueError):
    """The caller passed something that cannot be used as it is."""


class RegionError(InputError):
    """A centre, radius, norm or pixel range that makes no sense."""


class ModelError(InputError):
    """A model, or a model file, that cannot be used."""


class UnsupportedOperation(ModelError):
    """A node of a model for which no bound is known."""


class DataError(InputError):
    """A data set that cannot be read, or that does not fit the model."""


class RecipeError(InputError):
    """A training recipe with an unknown key or a value out of range."""


class ResumeError(InputError):
    """A folder that holds the results of a different run."""


class UnknownName(InputError):
    """A name that is not in a list of names; the message prints the list.

    Args:
        kind: what was asked for, e.g. ``"method"``.
        name: the name that was given.
        known: the names that exist.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        super().__init__(f"unknown {kind} {name!r}; choose one of: {', '.join(self.known)}")


class ParametrizationError(VerideqError, ValueError):
    """A weight that was assigned to a parametrization lies outside its class."""


class NoGaugeError(VerideqError):
    """No gauge was found for an equilibrium layer.

    Args:
        message: the reason, with the layer's place.
        rate: an estimate of the spectral radius of ``|W|``, the contraction rate that intervals see.
    """

    def __init__(self, message: str, rate: float) -> None:
        self.rate = rate
        super().__init__(message)


class ConvergenceError(VerideqError, RuntimeError):
    """A solver stopped before every sample had converged.

    Args:
        message: the cause and the remedy.
        worst: the largest relative residual over the batch.
        steps: the number of steps that were taken.
    """

    def __init__(self, message: str, worst: float, steps: int) -> None:
        self.worst, self.steps = worst, steps
        super().__init__(message)


class NotEnoughMemory(VerideqError):
    """What is to be done is predicted not to fit into memory, however it is cut; the message has both sizes."""


class DivergenceError(VerideqError, RuntimeError):
    """A training run whose loss or gradients are no numbers any more, or whose equilibria are not found.

    The message says in which epoch and step, which layer was the first, and what to change.
    """


class InconsistencyError(VerideqError):
    """A sample was certified and broken by an attack: one of the two has a bug, and neither may be believed.

    Args:
        message: which sample.
        evidence: its index, verdict and witness.
    """

    def __init__(self, message: str, evidence: dict[str, Any]) -> None:
        self.evidence = evidence
        super().__init__(message)
