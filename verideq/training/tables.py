"""The tables of a recipe: what goes on top of the interval loss, and around it. By default all of it is off."""

from __future__ import annotations

from dataclasses import dataclass

from verideq.errors import RecipeError
from verideq.region import parse_eps

Ramped = float | tuple[float, float]
"""A number, or two: the first at radius 0, the second at the radius trained for, in between along with the radius."""


def at_radius(value: Ramped, eps: float, final: float) -> float:
    """What a `Ramped` is at the radius `eps`, of `final`.

    >>> [round(at_radius((1.0, 0.5), eps, 0.1), 3) for eps in (0.0, 0.05, 0.1)], at_radius(0.2, 0.0, 0.1)
    ([1.0, 0.75, 0.5], 0.2)
    """
    if not isinstance(value, tuple):
        return value
    share = eps / final if final else 1.0
    return value[0] + (value[1] - value[0]) * share


def ends(value: Ramped) -> tuple[float, ...]:
    """The numbers that a `Ramped` lies between."""
    return value if isinstance(value, tuple) else (value,)


def need(key: str, value: object, holds: bool, wanted: str) -> None:
    """Refuse the value of a key.

    Raises:
        RecipeError: it does not hold.
    """
    if not holds:
        shown = list(value) if isinstance(value, tuple) else value
        raise RecipeError(f"{key}: expected {wanted}; got {shown!r}")


def need_share(key: str, value: Ramped) -> None:
    """Refuse what is not in [0, 1]."""
    wanted = "numbers in [0, 1]" if isinstance(value, tuple) else "a number in [0, 1]"
    need(key, value, all(0 <= end <= 1 for end in ends(value)), wanted)


@dataclass(frozen=True)
class AdjointTable:
    """``[adjoint]``: the adjoint bound in the loss, as CROWN-IBP mixes it (Zhang et al., ICLR 2020).

    Args:
        weight: ``β``, the share of the adjoint bound against the interval bound; ``[1.0, 0.0]`` is CROWN-IBP's.
        fused: bound the whole loss by one row (loss fusion, Xu et al., NeurIPS 2020) instead of every margin by its
            own.
        steps: of the adjoint fixed point, at most.
    """

    weight: Ramped = 0.0
    fused: bool = True
    steps: int = 8

    def __post_init__(self) -> None:
        need_share("adjoint.weight", self.weight)
        need("adjoint.steps", self.steps, self.steps >= 1, "1 or more")


@dataclass(frozen=True)
class AttackTable:
    """``[attack]``: points that an attack found in the ball. Losses on them are no bounds.

    Args:
        weight: share of the cross-entropy at the attacked point against the interval loss (MTL-IBP's ``1 - α``; De
            Palma et al., ICLR 2024).
        box: the interval loss's box, around the attacked point, has this share of the ball's radius (SABR; Müller et
            al., ICLR 2023); 1 for the ball itself.
        steps: of projected gradient ascent on the cross-entropy.
        restarts: from different uniform noise; the worst point counts.
        step_size: of a step, in units of the radius.
        reach: the radius that the attack searches, in units of the step's own.
    """

    weight: Ramped = 0.0
    box: float = 1.0
    steps: int = 8
    restarts: int = 1
    step_size: float = 0.5
    reach: float = 1.0

    def __post_init__(self) -> None:
        need_share("attack.weight", self.weight)
        need("attack.box", self.box, 0 < self.box <= 1, "a number in (0, 1]")
        for key in ("steps", "restarts"):
            need(f"attack.{key}", getattr(self, key), getattr(self, key) >= 1, "1 or more")
        for key in ("step_size", "reach"):
            need(f"attack.{key}", getattr(self, key), 0 < getattr(self, key) < float("inf"), "a positive number")
        need("attack.reach", self.reach, self.box == 1 or self.reach <= 1, "1 or less where attack.box is below 1")

    @property
    def used(self) -> bool:
        """Whether any point is needed."""
        return self.box < 1 or any(ends(self.weight))


@dataclass(frozen=True)
class PenaltyTable:
    """``[penalty]``: what is added to the loss.

    Args:
        bounds: ``λ₀`` of Shi et al. (NeurIPS 2021): while the radius grows, ``λ₀ (1 - eps / final)`` times the
            tightness and ReLU regularisers.
        threshold: their ``τ``.
        l1: times the sum of all entries of linear and convolutional weights, ``W`` included, in absolute value.
        jacobian: times the mean square of ``vᵀ ∂F/∂z`` at the clean equilibria, ``v`` normal (Bai et al., ICML 2021).
        jacobian_share: of the steps in which it is added.
    """

    bounds: float = 0.0
    threshold: float = 0.5
    l1: float = 0.0
    jacobian: float = 0.0
    jacobian_share: float = 1.0

    def __post_init__(self) -> None:
        for key in ("bounds", "l1", "jacobian"):
            need(f"penalty.{key}", getattr(self, key), 0 <= getattr(self, key) < float("inf"), "0 or more")
        need("penalty.threshold", self.threshold, 0 < self.threshold < float("inf"), "a positive number")
        need_share("penalty.jacobian_share", self.jacobian_share)


@dataclass(frozen=True)
class AugmentTable:
    """``[augment]``: random changes of the training images, drawn from (seed, epoch, step).

    Args:
        flip: left to right, every second image.
        shift: in pixels, by up to so many in each direction: a crop after padding.
        fill: what is shifted in: ``edge`` repeats the border, ``zero`` is the least value of the data's range.
    """

    flip: bool = False
    shift: int = 0
    fill: str = "edge"

    def __post_init__(self) -> None:
        need("augment.shift", self.shift, self.shift >= 0, "0 or more")
        need("augment.fill", self.fill, self.fill in ("edge", "zero"), "edge or zero")

    @property
    def used(self) -> bool:
        """Whether images are changed at all."""
        return self.flip or self.shift > 0


@dataclass(frozen=True)
class ValidationTable:
    """``[validation]``: samples of the training split that are held out to watch the run. The test split is never read.

    Args:
        samples: how many; 0 for none.
        seed: which ones.
        eps: the radius at which they are bounded; empty for the radius trained for.
        every: epochs between two looks; there is one after the last epoch too.
    """

    samples: int = 0
    seed: int = 0
    eps: str = ""
    every: int = 1

    def __post_init__(self) -> None:
        need("validation.samples", self.samples, self.samples >= 0, "0 or more")
        need("validation.seed", self.seed, 0 <= self.seed < 2**32, "a seed from 0 to below 2**32")
        need("validation.every", self.every, self.every >= 1, "1 or more")
        if self.eps:
            parse_eps(self.eps, "validation.eps")


@dataclass(frozen=True)
class CheckpointTable:
    """``[checkpoint]``: when to save within an epoch; after every epoch there is one anyway.

    Args:
        minutes: between two; 0 for no clock.
        steps: between two; 0 for no count.
    """

    minutes: float = 5.0
    steps: int = 0

    def __post_init__(self) -> None:
        need("checkpoint.minutes", self.minutes, 0 <= self.minutes < float("inf"), "0 or more")
        need("checkpoint.steps", self.steps, self.steps >= 0, "0 or more")
