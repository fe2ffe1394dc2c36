"""What a verdict can be (`Status`), and what a solver can report (`Convergence`). The two are never mixed."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The six verdicts on a sample; only the first is a claim of robustness."""

    CERTIFIED = "CERTIFIED"
    """Every point of the region has the property: proved."""
    FALSIFIED = "FALSIFIED"
    """A point of the region lacks it: proved, and kept as the witness."""
    MISCLASSIFIED = "MISCLASSIFIED"
    """The centre of the region lacks it already."""
    UNKNOWN = "UNKNOWN"
    """Neither was proved; the reason says what to try next."""
    TIMEOUT = "TIMEOUT"
    """The clock ran out before either was proved."""
    ERROR = "ERROR"
    """Something broke; the sample counts as not certified, and the run ends with exit code 1."""


class Convergence(StrEnum):
    """How a fixed-point iteration ended. The value is the message: cause, then remedy."""

    CONVERGED = "the residual is below the tolerance"
    MAX_STEPS = (
        "the step limit was reached before the tolerance; raise max_steps, loosen tol, or use a layer whose "
        "gauge contracts faster (`verideq inspect` prints the rate)"
    )
    NONFINITE = (
        "the iteration produced NaN or infinity; check the weights and the input, and use a parametrization "
        "with a gauge (`verideq inspect` says whether the layer has one)"
    )
