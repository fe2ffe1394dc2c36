"""Ways to read a DEQ that are meant to be harder to attack, and the entropies that speak for one of them.

States on the way to the equilibrium serve as well as the equilibrium (Yang et al., NeurIPS 2022, section 5.2): an early
one, or the mean of all. Entropy reduction moves the input while the states are computed (Yang et al., "Improving
Adversarial Robustness of DEQs with Explicit Regulations Along the Neural Dynamics", ICML 2023, Algorithm 1). Whoever
claims robustness for one of them has to attack it by `transfer` from all, and read the pointwise worst.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from verideq.attacks.ball import Ball
from verideq.attacks.problem import Problem
from verideq.attacks.suites import READY_MADE, STATES, Suite
from verideq.equilibrium import Broyden, Solver
from verideq.equilibrium.broyden import Inverse
from verideq.equilibrium.dynamics import TRACK, Dynamics, path
from verideq.errors import InputError, UnknownName
from verideq.region import check_norm


class Defence(ABC):
    """From inputs to outputs, without gradient."""

    @property
    @abstractmethod
    def name(self) -> str:
        """On the command line."""

    @property
    def reads(self) -> tuple[int, ...]:
        """The states before the final one that it reads: an attack that knows the defence looks at them."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """Its name and what it was made with, as JSON has it."""
        return {"name": self.name} | {key: value for key, value in vars(self).items() if key != "track"}

    @abstractmethod
    def outputs(self, dynamics: Dynamics, x: Tensor) -> Tensor:
        """(batch, outputs); a sample's depend on no other sample."""


@dataclass(frozen=True)
class FinalState(Defence):
    """None: the model as it stands."""

    @property
    def name(self) -> str:
        return "final"

    def outputs(self, dynamics: Dynamics, x: Tensor) -> Tensor:
        return dynamics.outputs(x)


@dataclass(frozen=True)
class EarlyState(Defence):
    """The solver is left at the state ``z_n``.

    Args:
        state: ``n``, from 1.
        track: the forward path.
    """

    state: int
    track: Solver = field(default=TRACK, repr=False)

    def __post_init__(self) -> None:
        if self.state < 1:
            raise InputError(f"states along a forward pass are numbered from 1; got {self.state}")

    @property
    def name(self) -> str:
        return f"early:{self.state}"

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.state,)

    @torch.no_grad()
    def outputs(self, dynamics: Dynamics, x: Tensor) -> Tensor:
        injected = dynamics.inject(x)
        return dynamics.head(path(dynamics, injected, self.track, self.state).states[-1], injected)


@dataclass(frozen=True)
class StateEnsemble(Defence):
    """The mean of the states ``z_1 ... z_N`` and the final one.

    Args:
        states: ``N``.
        track: the forward path.
    """

    states: int = STATES
    track: Solver = field(default=TRACK, repr=False)

    @property
    def name(self) -> str:
        return "ensemble"

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple(range(1, self.states + 1))

    @torch.no_grad()
    def outputs(self, dynamics: Dynamics, x: Tensor) -> Tensor:
        injected = dynamics.inject(x)
        states = path(dynamics, injected, self.track, self.states).states
        total = states.sum(0) + dynamics.final(injected).detach()
        return dynamics.head(total / (self.states + 1), injected)


@dataclass(frozen=True)
class EntropyReduction(Defence):
    """Every few states, steps of the input down the entropy of the prediction (Algorithm 1).

    After each `every` states, `updates` times, with the state ``z`` held::

        x <- x - β sign ∇_x H(head(f(z; x)))

    within `radius` of the input that was received, then the state again from the one before it. The sign is that of
    the authors' code; equation 8 prints the gradient itself. For l2 it is the gradient over its length. Their code
    patches Broyden's last pair instead of solving again.

    Args:
        beta: ``β``, in pixel units.
        updates: ``R``.
        every: ``T_f``.
        radius: in pixel units.
        states: ``N``.
        clip: the pixel range, or ``None``.
        norm: of the radius and of a step, ``linf`` or ``l2``.
        track: the forward path.
    """

    beta: float = 2 / 255
    updates: int = 10
    every: int = 2
    radius: float = 8 / 255
    states: int = STATES
    clip: tuple[float, float] | None = (0.0, 1.0)
    norm: str = "linf"
    track: Solver = field(default=TRACK, repr=False)

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if min(self.updates, self.every, self.states) < 1 or not (self.beta > 0 and self.radius >= 0):
            raise InputError(
                "entropy reduction takes 1 or more updates and states, a positive step and a radius of 0 or more; got "
                f"{self}"
            )

    @property
    def name(self) -> str:
        return "entropy"

    def outputs(self, dynamics: Dynamics, x: Tensor) -> Tensor:
        states, injected = self.states_of(dynamics, x)
        with torch.no_grad():
            return dynamics.head(states[-1], injected)

    def states_of(self, dynamics: Dynamics, x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The states ``z_1 ... z_N`` under the moving input, and what the last input injects."""
        inverse, quasi = Inverse(), isinstance(self.track, Broyden)
        now, states = x.detach(), []
        with torch.no_grad():
            injected = dynamics.inject(now)
            z = dynamics.start(injected)
            change = dynamics.step(z, injected) - z
        for count in range(1, self.states + 1):
            moved = -inverse.apply(change.flatten(1)).view_as(z)
            if count % self.every == 0:
                now = self._reduce(dynamics, now, x, z + moved)
                with torch.no_grad():
                    injected = dynamics.inject(now)
                    change = dynamics.step(z, injected) - z
                moved = -inverse.apply(change.flatten(1)).view_as(z)
            with torch.no_grad():
                z = z + moved
                fresh = dynamics.step(z, injected) - z
            if quasi:
                inverse.update(moved.flatten(1), (fresh - change).flatten(1), z.flatten(1))
            change = fresh
            states.append(z)
        return torch.stack(states), injected

    def _reduce(self, dynamics: Dynamics, now: Tensor, x: Tensor, z: Tensor) -> Tensor:
        ball = Ball(self.radius, self.norm, self.clip)
        for _ in range(self.updates):
            with torch.enable_grad():
                at = now.detach().requires_grad_()
                injected = dynamics.inject(at)
                high = entropy(dynamics.head(dynamics.step(z, injected), injected)).sum()
                (gradient,) = torch.autograd.grad(high, at)
            now = ball.project(now - self.beta * ball.direction(gradient.nan_to_num(0.0, 0.0, 0.0)), x)
        return now


@dataclass(frozen=True)
class Deciding:
    """A defence of a model as what decides: the `decide` of a `Problem`."""

    defence: Defence
    dynamics: Dynamics

    def __call__(self, x: Tensor) -> Tensor:
        return self.defence.outputs(self.dynamics, x)


def entropy(outputs: Tensor) -> Tensor:
    """The entropy of the softmax of outputs, in nats: (batch,)."""
    logs = outputs.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


@torch.no_grad()
def entropy_curve(dynamics: Dynamics, x: Tensor, track: Solver = TRACK) -> Tensor:
    """``H(z_n)`` along the forward pass, (steps, batch)."""
    injected = dynamics.inject(x)
    return torch.stack([entropy(dynamics.head(z, injected)) for z in path(dynamics, injected, track).states])


@dataclass(frozen=True)
class Entropies:
    """Entropies of clean inputs against attacked ones (equations 12 and 13 of the second paper).

    Args:
        share: ``P``, of the samples whose clean entropy is the lower one.
        difference: ``ΔH``, the mean of clean minus attacked.
    """

    share: float
    difference: float


def entropies(clean: Tensor, attacked: Tensor) -> Entropies:
    """``P`` and ``ΔH`` of entropies (batch,)."""
    return Entropies(float((clean < attacked).double().mean()), float((clean - attacked).mean()))


def choose_early(
    problem: Problem, labels: Tensor, states: int = STATES, track: Solver = TRACK, batch_size: int = 64
) -> EarlyState:
    """The early state with the highest accuracy under the ready-made PGD-10, which attacks the final state.

    Args:
        problem: of a validation split, never of what is reported.
        labels: (batch,).
        states: how many to choose from; the first of equals.
        track: the forward path.
        batch_size: samples at a time.
    """
    right = [0] * states
    for rows in torch.split(torch.arange(len(problem)), batch_size):
        points = READY_MADE.search(replace(problem[rows], decide=None)).points
        for n in range(states):
            outputs = EarlyState(n + 1, track).outputs(problem.dynamics, points)
            right[n] += int((outputs.argmax(1) == labels[rows].to(points.device)).sum())
    return EarlyState(right.index(max(right)) + 1, track)


def transfer(problem: Problem, defences: Sequence[Defence], suite: Suite) -> dict[str, dict[str, Tensor]]:
    """Attacks crafted against every defence, tried on every defence.

    Args:
        problem: what to break; its `decide` is not used.
        defences: of one model.
        suite: run against each, on every sample, looking where it reads; every point that a stage of it ends with is
            handed on.

    Returns:
        by defence, by the defence that the attack was crafted against, which samples survive, (batch,); and under
        ``ALL`` the pointwise worst over the sources.
    """
    table: dict[str, dict[str, Tensor]] = {defence.name: {} for defence in defences}
    for source in defences:
        whole = replace(suite, prune=False).looking_at(source.reads)
        report = whole.run(replace(problem, decide=Deciding(source, problem.dynamics)))
        for defence in defences:
            judged = replace(problem, decide=Deciding(defence, problem.dynamics))
            survives = torch.ones(len(problem), dtype=torch.bool, device=report.margins.device)
            for tried in report.tried:
                survives &= ~(judged.judge(tried.found.points) < 0)
            table[defence.name][source.name] = survives
    for row in table.values():
        row["ALL"] = torch.stack(list(row.values())).all(0)
    return table


def defence_named(name: str, *, radius: float, clip: tuple[float, float] | None, norm: str = "linf") -> Defence:
    """A defence by its name: ``final``, ``early:N``, ``ensemble``, ``entropy``.

    Args:
        radius: of the attack, which entropy reduction takes for its own.
        clip: the pixel range.
        norm: of the attack, likewise.

    Raises:
        UnknownName: another name.
    """
    kind, colon, state = name.partition(":")
    if kind == "early" and colon and state.isdecimal():
        return EarlyState(int(state))
    simple: dict[str, Defence] = {
        "final": FinalState(),
        "ensemble": StateEnsemble(),
        "entropy": EntropyReduction(beta=max(radius, 1e-9) / 4, radius=radius, clip=clip, norm=norm),
    }
    if name not in simple:
        raise UnknownName("defence", name, ("final", "early", "early:N", "ensemble", "entropy"))
    return simple[name]
