"""Gradients with respect to the input at any state of a DEQ: what a white-box attack climbs.

A forward pass by a solver hides its states from autograd, so that ready-made attacks see only the last one (Yang et
al., "A Closer Look at the Adversarial Robustness of Deep Equilibrium Models", NeurIPS 2022). Their four kinds of
gradient, and a fifth that they do not have, which leaves an unconverged solver nothing to hide:

* `Final` with `Implicit`: exact, by the adjoint equation at the equilibrium (equations 2 and 3).
* `Final` with `Phantom`: through damped steps from the equilibrium (equations 4 to 6).
* `Simultaneous`: an adjoint that moves along with Broyden's iterates and reuses their inverse (equations 9 to 11).
* `Unrolled`: through damped steps from an intermediate state (equations 13 to 16).
* `Through`: through Broyden's iterations themselves, their inverse included.

`Simultaneous` and `Unrolled` take several states at once: the sum of their gradients (equation 17), every state with
the weight one. (In the authors' code the gradient is not reset between the states, so that early ones weigh more.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from verideq.equilibrium.broyden import broyden, iterates
from verideq.equilibrium.dynamics import TRACK, Dynamics, Injected, path
from verideq.equilibrium.gradients import Gradient, Implicit
from verideq.equilibrium.solvers import Solver
from verideq.errors import InputError

Loss = Callable[[Tensor], Tensor]
"""From outputs, (batch, outputs), to a loss by sample, (batch,)."""


@dataclass(frozen=True)
class Slope:
    """A loss and where it rises.

    Args:
        losses: (batch,), as the surrogate sees them: the sum over its states.
        gradient: with respect to the input, (batch, *features).
        outputs: (batch, outputs), the mean over its states.
    """

    losses: Tensor
    gradient: Tensor
    outputs: Tensor


class Surrogate(ABC):
    """A way to differentiate a model that is solved, not unrolled."""

    exact = False
    """Whether its outputs are those of the model as it stands."""

    @abstractmethod
    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        """The gradient of a loss at the inputs (batch, *features); a sample's depends on no other sample."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How reports call it."""


@dataclass(frozen=True)
class Final(Surrogate):
    """At the state that the model hands to its head.

    Args:
        gradient: `Implicit` or `Phantom`; ``None``: the model's own.
    """

    gradient: Gradient | None = None
    exact = True

    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            injected = dynamics.inject(at)
            outputs = dynamics.head(dynamics.final(injected, self.gradient), injected)
            return _slope(loss(outputs), at, outputs)

    @property
    def name(self) -> str:
        if self.gradient is None:
            return "final"
        if isinstance(self.gradient, Implicit):
            return "final exact"
        return f"final phantom k={self.gradient.steps} λ={self.gradient.damping:g}"


@dataclass(frozen=True)
class Unrolled(Surrogate):
    """From intermediate states ``z_n``, `steps` damped iterations ``z <- (1-λ) z + λ f(z)``, and backpropagation.

    Args:
        states: the ``n``, from 0: ``z_0`` is the start, from which the steps are those of a model that stops after
            `steps` of them.
        steps: ``k``, the paper's ``K_a``.
        damping: ``λ`` in (0, 1].
        track: the forward path, whose states these are.
    """

    states: tuple[int, ...]
    steps: int = 1
    damping: float = 1.0
    track: Solver = field(default=TRACK, repr=False)

    def __post_init__(self) -> None:
        _check_states(self.states, 0)
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise InputError(
                f"an unrolling takes 1 or more steps and a damping in (0, 1]; got {self.steps} and {self.damping}"
            )

    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            injected = dynamics.inject(at)
            last = max(self.states)
            states = [dynamics.start(injected).detach()]
            states += path(dynamics, injected, self.track, last).states if last else []
            losses, means = [], []
            for n in self.states:
                z = states[n]
                for _ in range(self.steps):
                    z = (1 - self.damping) * z + self.damping * dynamics.step(z, injected)
                outputs = dynamics.head(z, injected)
                losses.append(loss(outputs))
                means.append(outputs.detach())
            return _slope(torch.stack(losses).sum(0), at, torch.stack(means).mean(0))

    @property
    def name(self) -> str:
        return f"unrolled {_places(self.states)} k={self.steps} λ={self.damping:g}"


@dataclass(frozen=True)
class Simultaneous(Surrogate):
    """An adjoint state that is updated along the forward pass, with Broyden's inverse of the forward system.

    From ``u_0 = 0``, with ``J = ∂f/∂z`` at ``z_n``::

        v_n     = Jᵀ u_n + ∇_z L(z_n) - u_n
        u_{n+1} = u_n - β Bᵀ_n v_n

    and the gradient at ``z_n`` is ``(∂f(z_n)/∂x)ᵀ u_{n+1}``, the strongest in the paper's figure 4. The system of ``u``
    is that of ``Jᵀ - I``, so the inverse that belongs to it is ``Bᵀ``; the paper, whose Jacobians are transposed,
    prints ``B``. Under a gauge ``u_n`` converges to the exact adjoint.

    Args:
        states: the ``n``, from 1.
        beta: ``β``, the step of the adjoint.
        lag: ``z_n`` is attacked with ``u_{n + lag}``.
    """

    states: tuple[int, ...]
    beta: float = 1.0
    lag: int = 1

    def __post_init__(self) -> None:
        _check_states(self.states)
        if not 0 < self.beta <= 1 or self.lag < 0:
            raise InputError(
                f"a simultaneous adjoint takes a step in (0, 1] and a lag of 0 or more; got {self.beta} and {self.lag}"
            )

    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        with torch.no_grad():
            fixed = dynamics.inject(x)
            iterates = broyden(lambda z: dynamics.step(z, fixed), dynamics.start(fixed))
        states: dict[int, Tensor] = {}
        adjoints: dict[int, Tensor] = {}
        u: Tensor | None = None
        for n, iterate in enumerate(islice(iterates, max(self.states) + max(self.lag, 1))):
            states[n], z = iterate.value, iterate.value
            u = torch.zeros_like(z) if u is None else u
            adjoints[n] = u
            with torch.enable_grad():
                tracked = z.detach().requires_grad_()
                value = (dynamics.step(tracked, fixed) * u).sum() + loss(dynamics.head(tracked, fixed)).sum()
            (pulled,) = torch.autograd.grad(value, tracked)
            residual = (pulled - u).flatten(1)
            u = adjoints[n + 1] = u - self.beta * iterate.inverse.transpose(residual).view_as(u)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            injected = dynamics.inject(at)
            losses, means, pairing = [], [], []
            for n in self.states:
                outputs = dynamics.head(states[n], injected)
                losses.append(loss(outputs))
                means.append(outputs.detach())
                pairing.append((dynamics.step(states[n], injected) * adjoints[n + self.lag]).flatten(1).sum(1))
            total = torch.stack(losses).sum(0)
            # A head that reads the input as well adds its own part.
            (gradient,) = torch.autograd.grad((torch.stack(pairing).sum(0) + total).sum(), at)
        return Slope(total.detach(), gradient, torch.stack(means).mean(0))

    @property
    def name(self) -> str:
        return f"simultaneous {_places(self.states)}"


@dataclass(frozen=True)
class Through(Surrogate):
    """Through the iterations of Broyden's method: backpropagation through everything that they do.

    Of a model that stops after so many iterations it is the gradient, whether they have converged or not; where they
    have, it is that of `Final`.

    Args:
        states: the ``n``, from 1, whose mean is read; none: the state at which the model stops, that of the lowest
            residual, and what the model makes of it (`Dynamics.finish`).
    """

    states: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.states:
            _check_states(self.states)

    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            injected = dynamics.inject(at)
            if self.states:
                every = _states(dynamics, injected, max(self.states))
                z = torch.stack([every[n] for n in self.states]).mean(0)
            else:
                z = dynamics.finish(self._stopped(dynamics, injected), injected)
            outputs = dynamics.head(z, injected)
            return _slope(loss(outputs), at, outputs)

    @staticmethod
    def _stopped(dynamics: Dynamics, injected: Injected) -> Tensor:
        """Every sample's own last iterate. Nothing behind it is computed, which need not be finite."""
        solver = dynamics.track
        residuals = path(dynamics, injected, solver).residuals.nan_to_num(torch.inf, torch.inf)
        settled = residuals <= solver.tolerance(residuals.dtype)
        last = torch.where(settled.any(0), (settled.cumsum(0) == 0).sum(0), residuals.argmin(0)) + 1
        z = dynamics.start(injected)
        for n in torch.unique(last).tolist():
            rows = (last == n).nonzero().flatten()
            own = {name: tensor[rows] for name, tensor in injected.items()}
            z = z.index_put((rows,), _states(dynamics, own, n)[n])
        return z

    @property
    def name(self) -> str:
        return f"through {_places(self.states) if self.states else 'all'}"


def _states(dynamics: Dynamics, injected: Injected, last: int) -> list[Tensor]:
    """``z_0 ... z_last`` of Broyden's method, differentiable."""
    every = iterates(lambda z: dynamics.step(z, injected), dynamics.start(injected))
    return [iterate.value for iterate in islice(every, last + 1)]


def _slope(losses: Tensor, at: Tensor, outputs: Tensor) -> Slope:
    """Of losses that need not depend on the inputs."""
    gradient = torch.zeros_like(at)
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), at, allow_unused=True, materialize_grads=True)
    return Slope(losses.detach(), gradient, outputs.detach())


def _check_states(states: tuple[int, ...], least: int = 1) -> None:
    if not states or min(states) < least:
        raise InputError(f"states along a forward pass are numbered from {least} here; got {states}")


def _places(states: tuple[int, ...]) -> str:
    return f"z{states[0]}" if len(states) == 1 else f"z{states[0]}-{states[-1]}"
