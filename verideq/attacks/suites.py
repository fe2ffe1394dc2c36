"""Attacks in a row, and the worst point that any of them finds: never the average of the best attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from verideq.attacks.apgd import APGD
from verideq.attacks.fab import FAB
from verideq.attacks.opened import PlainDynamics, open_model
from verideq.attacks.pgd import PGD
from verideq.attacks.problem import Attack, Found, Problem
from verideq.attacks.square import Square
from verideq.equilibrium import Phantom, Solver
from verideq.equilibrium.dynamics import TRACK, Dynamics
from verideq.equilibrium.surrogates import Final, Simultaneous, Surrogate, Through, Unrolled
from verideq.region import Region

READY_MADE = PGD(10, 1, 0.25, decay=False, plain=True)
"""PGD-10 as the papers have it: a step of a quarter of eps, from noise, with the cross-entropy."""
STATES = 8
"""States along the forward pass that are attacked."""
STRONGEST = ((3, 5, 0.5), (1, 1, 1.0), (3, 4, 0.5), (4, 5, 0.5))
"""``(n, k, λ)`` that the papers found strongest; they go first, so that what they break is left out of the rest."""

WHOLE = (Through(), Unrolled((0,), STATES, 1.0))
"""The whole forward pass, differentiated: as Broyden takes it, and as plain steps from zero."""


@dataclass(frozen=True)
class Stage:
    """One attack by one gradient.

    Args:
        attack: how it searches.
        surrogate: what it climbs.
    """

    attack: Attack
    surrogate: Surrogate = field(default_factory=Final)

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"{self.attack.name} at {self.surrogate.name}"


@dataclass(frozen=True)
class Tried:
    """What one stage did.

    Args:
        name: of the stage.
        at: (tried,) the samples it was tried on, rows of the batch.
        found: points and margins of these.
    """

    name: str
    at: Tensor
    found: Found

    @property
    def broken(self) -> int:
        """How many samples it broke."""
        return int((self.found.margins < 0).sum())


@dataclass(frozen=True)
class Report:
    """What a suite has found on a batch.

    Args:
        points: (batch, *features), the pointwise worst over all attacks run.
        margins: (batch,), of what decides, at these points.
        first: (batch,), after the first stage; NaN where no other was tried.
        by: (batch,), the number of the stage that found the point.
        blind: (batch,), whether stages asked for gradients, and none met one.
        tried: stage by stage.
    """

    points: Tensor
    margins: Tensor
    first: Tensor
    by: Tensor
    blind: Tensor
    tried: tuple[Tried, ...]

    def name(self, sample: int) -> str:
        """The stage that found a sample's point."""
        return self.tried[int(self.by[sample])].name

    def account(self, sample: int) -> dict[str, Any]:
        """What a verdict says of it: `attack`, `attack_margin`, `first_margin`, `blind`."""
        return {
            "attack": self.name(sample) if self.tried else None,
            "attack_margin": _finite(self.margins[sample]),
            "first_margin": _finite(self.first[sample]),
            "blind": bool(self.blind[sample]),
        }

    def replaced(self, at: Tensor, other: Report, rows: Tensor, margins: Tensor) -> Report:
        """With some rows of another run of the same suite.

        Args:
            at: (some,) the samples that these are here.
            rows: (others,) which of the other's, bool.
            margins: (others,) of its points.
        """
        points, worst, by = self.points.clone(), self.margins.clone(), self.by.clone()
        points[at], worst[at], by[at.cpu()] = other.points[rows], margins[rows], other.by[rows.cpu()]
        return replace(self, points=points, margins=worst, by=by, tried=max(self.tried, other.tried, key=len))


@dataclass(frozen=True)
class Suite:
    """Stages in a row.

    Args:
        name: on the command line.
        stages: cheapest and strongest first.
        prune: a sample that is broken drops out of the stages behind; without it every stage is run on every sample, as
            tables by attack need it.
    """

    name: str
    stages: tuple[Stage, ...]
    prune: bool = True

    def run(self, problem: Problem, tell: Callable[[int, int], None] = lambda stage, count: None) -> Report:
        """Attack a batch. The problem's own surrogate is not used.

        Args:
            tell: called before every stage with its number and how many there are.
        """
        worst = Found.nothing(problem)
        first = worst.margins
        by = torch.zeros(len(problem), dtype=torch.long)
        asked, met, further = torch.zeros(3, len(problem), dtype=torch.bool, device=worst.margins.device)
        everyone = torch.arange(len(problem), device=worst.margins.device)
        tried: list[Tried] = []
        stages = self._distinct(problem.dynamics)
        for number, stage in enumerate(stages):
            active = worst.open() if self.prune else everyone
            if not len(active) or (tried and problem.stop()):
                break
            tell(number + 1, len(stages))
            part = replace(problem[active], surrogate=stage.surrogate, stream=number << 32)
            found = stage.attack.search(part)
            by[active[found.margins < worst.margins[active]].cpu()] = number
            if number > 0:
                further[active] = True
            worst.note(found.points, found.margins, active)
            if found.vanished is not None:
                asked[active], met[active] = True, met[active] | ~found.vanished
            tried.append(Tried(stage.name, active, found))
            first = worst.margins.clone() if number == 0 else first
        first = torch.where(further, first, torch.nan)
        return Report(worst.points, worst.margins, first, by, asked & ~met, tuple(tried))

    @property
    def looks_inside(self) -> bool:
        """Whether it asks for gradients of a solver's states, and so for an equilibrium."""
        return any(not isinstance(stage.surrogate, Final) for stage in self.stages)

    def looking_at(self, states: Sequence[int]) -> Suite:
        """The same, and each attack by gradient at these states too, which a defence reads; none: as it is."""
        if not states:
            return self
        stages: list[Stage] = []
        for stage in self.stages:
            stages.append(stage)
            if isinstance(stage.surrogate, Final) and not isinstance(stage.attack, Square):
                stages.append(Stage(stage.attack, Through(tuple(states))))
        return replace(self, stages=tuple(stages))

    def __call__(
        self,
        model: nn.Module,
        region: Region,
        C: Tensor,
        rhs: Tensor,
        *,
        indices: Tensor,
        seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, Tensor]:
        """The pointwise worst points and margins, as `PGD` returns them."""
        dynamics = open_model(model, device=region.center.device)
        report = self.run(Problem(dynamics, region, C, rhs, indices, seed=seed, stop=stop))
        return report.points, report.margins

    def follow(
        self,
        model: nn.Module,
        region: Region,
        C: Tensor,
        rhs: Tensor,
        points: Tensor,
        wanted: Tensor,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, Tensor]:
        """From where a bound would be attained: see `PGD.follow`."""
        return PGD().follow(model, region, C, rhs, points, wanted, stop=stop)

    def _distinct(self, dynamics: Dynamics) -> tuple[Stage, ...]:
        """Of a model without an equilibrium every state is the last one: each attack once. Of one that is run for a
        fixed number of steps, the first attack at each number of them that it names.
        """
        if not isinstance(dynamics, PlainDynamics):
            first, *others = self.stages
            unrolled = (Stage(first.attack, Unrolled((0,), steps)) for steps in dynamics.attack_steps)
            return (first, *unrolled, *others)
        return tuple({stage.attack.name: Stage(stage.attack) for stage in self.stages}.values())


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def sweep(
    states: Iterable[int] = range(1, STATES + 1),
    steps: Iterable[int] = range(1, 10),
    dampings: Iterable[float] = (0.5, 1.0),
    attack: Attack = READY_MADE,
    track: Solver = TRACK,
) -> tuple[Stage, ...]:
    """Every combination of a state ``z_n``, ``k`` unrolled steps and a damping ``λ``: by default the papers' 144."""
    every = [(n, k, damping) for n in states for k in steps for damping in dampings]
    ranked = sorted(every, key=lambda key: STRONGEST.index(key) if key in STRONGEST else len(STRONGEST))
    return tuple(Stage(attack, Unrolled((n,), k, damping, track)) for n, k, damping in ranked)


def _standard() -> tuple[Stage, ...]:
    return tuple(Stage(attack) for attack in (PGD(), APGD("ce"), APGD("t"), FAB(), Square()))


def _intermediate() -> tuple[Stage, ...]:
    every = tuple(range(1, STATES + 1))
    return (
        Stage(PGD()),
        *(Stage(READY_MADE, surrogate) for surrogate in WHOLE),
        Stage(READY_MADE, Final(Phantom(5, 0.5))),
        Stage(READY_MADE, Unrolled(every, 1, 1.0)),
        Stage(READY_MADE, Simultaneous(every)),
        *(Stage(READY_MADE, Simultaneous((n,))) for n in every),
        *sweep(),
        Stage(APGD("ce"), Unrolled(every, 1, 1.0)),
        Stage(APGD("ce"), Simultaneous(every)),
        *(Stage(APGD("ce"), surrogate) for surrogate in WHOLE),
    )


def _full() -> tuple[Stage, ...]:
    adaptive = (APGD("ce"), APGD("t"))
    every, (n, k, damping) = tuple(range(1, STATES + 1)), STRONGEST[0]
    _, *ready_made, square = _standard()
    return (
        *_intermediate(),
        *ready_made,
        Stage(APGD("ce"), Final(Phantom(5, 0.5))),
        *(Stage(attack, Unrolled((n,), k, damping)) for n, k, damping in STRONGEST for attack in adaptive),
        *(Stage(APGD("t"), surrogate) for surrogate in (*WHOLE, Unrolled(every, 1, 1.0))),
        *(Stage(FAB(), surrogate) for surrogate in (Unrolled((n,), k, damping), Unrolled(every, 1, 1.0))),
        square,  # last: what it breaks, every attack by gradient had left
    )


def warnings_of(
    broken_by: Sequence[str | None], blind: Sequence[bool], first: Sequence[float | None], last: Sequence[float]
) -> list[str]:
    """What speaks against believing that a model is robust because attacks fail (Athalye et al., ICML 2018).

    Args:
        broken_by: for every attacked sample the stage that broke it, or ``None``.
        blind: whether no gradient was met on it.
        first: its margin after the first stage; ``None`` if no other was tried on it.
        last: after all of them.
    """
    count, found = len(broken_by), []
    if count and sum(blind) > 0.01 * count:
        found.append(
            f"the gradient vanished on {sum(blind)} of {count} samples: attacks by gradient say nothing of them"
        )
    by_search = sum(name is not None and name.startswith("Square") for name in broken_by)
    if by_search > 0.002 * count:
        found.append(
            f"Square, which needs no gradient, broke {by_search} of {count} samples that every attack by gradient had "
            "left: the gradients are masked, and there may be more to break"
        )
    inside = (" at through", " at unrolled", " at simultaneous")
    hidden = sum(name is not None and any(kind in name for kind in inside) for name in broken_by)
    if hidden > 0.002 * count:
        found.append(
            f"gradients that look into the solver broke {hidden} of {count} samples that those of the final state had "
            "left: it hides gradients"
        )
    survived = [(a, b) for a, b in zip(first, last, strict=True) if a is not None and a >= 0]
    helped = sum(b < a - 1e-6 * (1 + abs(a)) for a, b in survived)
    if len(survived) >= 20 and helped < 0.05 * len(survived):
        found.append(
            f"further attacks lowered the margin of {helped} of the {len(survived)} samples that the first one left: "
            "more steps do not help, which a masked gradient would explain"
        )
    return found


SUITES: dict[str, Suite] = {
    "pgd": Suite("pgd", (Stage(PGD()),)),
    "standard": Suite("standard", _standard()),
    "intermediate": Suite("intermediate", _intermediate()),
    "full": Suite("full", _full()),
}
"""Every suite by name."""
