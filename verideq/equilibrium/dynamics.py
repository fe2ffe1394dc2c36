"""A model opened up: what is injected, one step of its equilibrium, what reads the state, and the states on the way.

Attacks and defences that look inside a DEQ need no more of it than `Dynamics`. `DEQ` is the general one, without a
gauge: any cell, solved by a fixed number of Broyden steps (Bai et al., NeurIPS 2019 and 2020). Nothing guarantees that
it converges, and nothing of it can be certified.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from verideq.equilibrium.broyden import broyden
from verideq.equilibrium.gradients import Gradient, Phantom, differentiable
from verideq.equilibrium.solvers import Broyden, Picard, Solution, Solver, fixed_point
from verideq.errors import InputError

Injected = Mapping[str, Tensor]
"""What an input contributes to every step, and to the outputs: tensors by name, each (batch, ...)."""
TRACK = Broyden(tol=0.0, max_steps=8)
"""The forward path of the papers: eight Broyden steps from zero."""
_SOLVER, _GRADIENT = Broyden(), Phantom()


class Dynamics(ABC):
    """A model as ``z <- step(z; injected)`` with ``outputs = head(z)``."""

    @property
    def attack_steps(self) -> tuple[int, ...]:
        """Numbers of steps from zero whose unrolled gradients attacks try besides: of a model that is run for a fixed
        number of them, and whose strongest attack sees another one.
        """
        return ()

    @property
    def track(self) -> Broyden:
        """How a model stops that does not wait for its equilibrium; of one that does any way is as good."""
        return TRACK

    def finish(self, z: Tensor, injected: Injected) -> Tensor:
        """What the model makes of the state at which its solver stopped, differentiable; the head reads that."""
        return z

    @abstractmethod
    def inject(self, x: Tensor) -> Injected:
        """What the inputs (batch, *features) inject, differentiable."""

    @abstractmethod
    def start(self, injected: Injected) -> Tensor:
        """``z_0 = 0``, (batch, *state)."""

    @abstractmethod
    def step(self, z: Tensor, injected: Injected) -> Tensor:
        """``f(z; x)``, differentiable."""

    @abstractmethod
    def head(self, z: Tensor, injected: Injected) -> Tensor:
        """The outputs (batch, outputs) of a state, differentiable."""

    @abstractmethod
    def settle(self, injected: Injected) -> Tensor:
        """The state at which the model's own solver stops, without gradient."""

    @abstractmethod
    def final(self, injected: Injected, gradient: Gradient | None = None) -> Tensor:
        """The state that the model hands to its head, with a gradient; ``None``: that of the model."""

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs of the model as it stands, without gradient."""
        with torch.no_grad():
            injected = self.inject(x)
            return self.head(self.final(injected), injected)


class DEQ(nn.Module, Dynamics):
    """A general deep equilibrium model: ``z* = cell(z*, stem(x))``, ``outputs = classifier(f(z*))``.

    Args:
        stem: from inputs to what is injected, ``v``.
        cell: called as ``cell(z, v)``.
        classifier: from the state to outputs.
        state: gives the shape of a state, without the batch, for a ``v``; ``None``: that of ``v``.
        solver: of the forward pass; its best iterate is what the model stops at, converged or not.
        gradient: `Implicit`: one more step, and the adjoint solved by its own solver, converged or not (the papers'
            exact gradient); `Phantom`: its damped steps, part of the model at inference too.

    >>> cell = nn.Bilinear(3, 3, 3)
    >>> model = DEQ(nn.Linear(5, 3), lambda z, v: torch.tanh(0.3 * z + v), nn.Linear(3, 2))
    >>> model(torch.zeros(4, 5)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        stem: nn.Module,
        cell: Callable[[Tensor, Tensor], Tensor],
        classifier: nn.Module,
        state: Callable[[Tensor], tuple[int, ...]] | None = None,
        *,
        solver: Solver = _SOLVER,
        gradient: Gradient = _GRADIENT,
    ) -> None:
        super().__init__()
        self.stem, self.cell, self.classifier = stem, cell, classifier
        self.state = state
        self.solver, self.gradient = solver, gradient

    def inject(self, x: Tensor) -> Injected:
        return {"v": self.stem(x)}

    def start(self, injected: Injected) -> Tensor:
        v = injected["v"]
        return v.new_zeros(v.shape if self.state is None else (len(v), *self.state(v)))

    def step(self, z: Tensor, injected: Injected) -> Tensor:
        return self.cell(z, injected["v"])

    def head(self, z: Tensor, injected: Injected) -> Tensor:
        outputs: Tensor = self.classifier(z)
        return outputs

    @property
    def track(self) -> Broyden:
        return self.solver if isinstance(self.solver, Broyden) else TRACK

    def finish(self, z: Tensor, injected: Injected) -> Tensor:
        if isinstance(self.gradient, Phantom):
            return self.gradient.damped(lambda z: self.step(z, injected), z)
        return self.step(z, injected)

    def solve(self, injected: Injected) -> Solution:
        """The solver's answer, (1, batch, *state), converged or not."""
        with torch.no_grad():
            return fixed_point(lambda z: self.step(z[0], injected)[None], self.start(injected)[None], self.solver)

    def settle(self, injected: Injected) -> Tensor:
        return self.solve(injected).value[0]

    def final(self, injected: Injected, gradient: Gradient | None = None) -> Tensor:
        return self.attach(self.settle(injected), injected, gradient)

    def attach(self, z: Tensor, injected: Injected, gradient: Gradient | None = None) -> Tensor:
        """What the model makes of the state `z` at which a solver stopped: its last steps, with a gradient."""

        def step(z: Tensor) -> Tensor:
            return self.step(z[0], injected)[None]

        chosen = self.gradient if gradient is None else gradient
        return differentiable(z.detach()[None], step, step, chosen, throw=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        injected = self.inject(x)
        return self.head(self.final(injected), injected)


@dataclass(frozen=True)
class Path:
    """The states along a forward pass.

    Args:
        states: ``z_1 ... z_N``, (steps, batch, *state), detached.
        residuals: ``‖f(z_n) - z_n‖ / ‖f(z_n)‖``, (steps, batch).
    """

    states: Tensor
    residuals: Tensor


def path(dynamics: Dynamics, injected: Injected, track: Solver = TRACK, steps: int | None = None) -> Path:
    """The states that a solver goes through from zero, one by one, whether they converge or not.

    Args:
        dynamics: the model.
        injected: of the inputs.
        track: `Broyden` or `Picard`; `max_steps` is the number of states, tolerances are not looked at.
        steps: another number of states.

    Raises:
        InputError: another solver, whose states are no simple sequence.
    """
    count = track.max_steps if steps is None else steps
    with torch.no_grad():
        fixed = {name: tensor.detach() for name, tensor in injected.items()}
        start = dynamics.start(fixed)
        states, residuals = [], []
        if isinstance(track, Broyden):
            for iterate in islice(broyden(lambda z: dynamics.step(z, fixed), start), 1, count + 1):
                states.append(iterate.value)
                residuals.append(_relative(iterate.change, iterate.value + iterate.change))
        elif isinstance(track, Picard):
            image = dynamics.step(start, fixed)
            for _ in range(count):
                z, image = image, dynamics.step(image, fixed)
                states.append(z)
                residuals.append(_relative(image - z, image))
        else:
            raise InputError(f"the states along a forward pass are those of Broyden or Picard; got {track}")
        return Path(torch.stack(states), torch.stack(residuals))


def _relative(change: Tensor, image: Tensor) -> Tensor:
    size = image.flatten(1).norm(dim=1).clamp(min=torch.finfo(image.dtype).tiny)
    residual: Tensor = change.flatten(1).norm(dim=1) / size
    return residual
