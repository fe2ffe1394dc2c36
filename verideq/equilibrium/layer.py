"""`Equilibrium`: the layer ``z* = relu(W z* + v)``, ``v`` the output of its injection; and `solve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.equilibrium.gradients import Gradient, Implicit, Phantom, differentiable
from verideq.equilibrium.operators import Operator, operator_of
from verideq.equilibrium.solvers import Anderson, Auto, ForwardBackward, Picard, Solution, Solver, fixed_point
from verideq.errors import ModelError, UnknownName

relu = F.relu
SOLVERS: dict[str, Solver] = {
    "auto": Auto(),
    "picard": Picard(),
    "anderson": Anderson(),
    "forward-backward": ForwardBackward(),
}
GRADIENTS: dict[str, Gradient] = {"implicit": Implicit(), "phantom": Phantom()}
_RELUS: tuple[object, ...] = (F.relu, torch.relu, torch.relu_, nn.ReLU, "relu")


@dataclass(frozen=True)
class System:
    """One equilibrium problem: an operator, what is injected, and how a step is damped.

    Args:
        operator: ``W``.
        injection: (1, batch, *features), a point ``v``; or (2, batch, *features), a centre and a radius of ``v``.
        alpha: damping of the forward-backward step; 1 is Picard.
    """

    operator: Operator
    injection: Tensor
    alpha: float = 1.0

    def start(self) -> Tensor:
        """The first iterate: what the layer gives for ``z = 0``."""
        return self._rectify(self.injection)

    def map(self, change: Callable[[Tensor], Tensor]) -> System:
        """The same problem with every tensor changed."""
        return replace(self, operator=self.operator.map(change), injection=change(self.injection))

    def solved(self) -> System:
        """Every row solved for its own unknown: the same equilibria, a faster contraction (see `Operator.solved`)."""
        operator, factor = self.operator.solved()
        return replace(self, operator=operator, injection=self.injection * factor)

    def stepper(self) -> Callable[[Tensor], Tensor]:
        """The map ``F`` for a point, the interval map ``G`` for a pair; ``|W|`` is formed once, here.

        ``G`` takes two products in centre-radius form: ``p = W c + v_c``, ``q = |W| r + v_r``,
        ``[relu(p - q), relu(p + q)]``.
        """
        operators = (self.operator, self.operator.absolute())[: len(self.injection)]

        def step(x: Tensor) -> Tensor:
            mapped = [op.apply(part).add_(v) for op, part, v in zip(operators, x, self.injection, strict=True)]
            if self.alpha != 1:
                mapped = [torch.lerp(part, image, self.alpha) for part, image in zip(x, mapped, strict=True)]
            return self._rectify(torch.stack(mapped)) if len(mapped) == 1 else _rectify_pair(*mapped)

        return step

    @staticmethod
    def _rectify(x: Tensor) -> Tensor:
        return F.relu(x) if len(x) == 1 else _rectify_pair(*x)


def _rectify_pair(center: Tensor, radius: Tensor) -> Tensor:
    """Centre and radius of relu over ``center ± radius``, without a difference of ends: a radius far below the rounding
    of its centre keeps its digits.

    Active: as it was. Inactive: zero. Between: ``[0, c + r]``, half of it twice.
    """
    half = (center + radius).mul_(0.5).relu_()
    return torch.stack((torch.maximum(half, center), torch.minimum(half, radius)))


class Equilibrium(nn.Module):
    """A deep equilibrium layer: ``forward(x)`` is the ``z*`` with ``z* = relu(W z* + injection(x))``.

    Args:
        fusion: ``W``: a square `Linear`, or a stride-1 "same" `Conv2d`, without bias; its weight may be parametrized.
        injection: any supported module that maps the input to the shape of ``z``; its bias is the layer's ``b``.
        activation: ReLU, in any of torch's spellings.
        solver: how the equilibrium is found; `Auto`, `Picard`, `Anderson` or `ForwardBackward`, or one of the names
            ``auto``, ``picard``, ``anderson`` and ``forward-backward`` for their defaults.
        gradient: `Implicit` (exact, constant memory) or `Phantom`; or ``implicit`` or ``phantom``.
        throw: raise when a sample does not converge; otherwise the last iterate is returned.

    Raises:
        ModelError: a fusion that is no ``W``, or another activation.
        UnknownName: a solver or gradient that does not exist.
        ConvergenceError: in a call, when `throw` is set and the solver stopped early.

    >>> layer = Equilibrium(nn.Linear(3, 3, bias=False), nn.Linear(2, 3))
    >>> _ = nn.init.constant_(layer.fusion.weight, -0.2)
    >>> layer(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        fusion: nn.Module,
        injection: nn.Module,
        activation: Any = relu,
        solver: Solver | str = Auto(),
        *,
        gradient: Gradient | str = Implicit(),
        throw: bool = True,
    ) -> None:
        super().__init__()
        if activation not in _RELUS and not isinstance(activation, nn.ReLU):
            raise ModelError(f"the activation of an equilibrium is relu; got {activation!r}")
        operator_of(fusion)
        self.fusion, self.injection = fusion, injection
        self.activation = nn.ReLU()
        self.solver: Solver = _named("solver", solver, SOLVERS)
        self.gradient: Gradient = _named("gradient", gradient, GRADIENTS)
        self.throw = throw

    def operator(self) -> Operator:
        """A snapshot of ``W``: the parametrization is evaluated here and nowhere else."""
        return operator_of(self.fusion)

    def forward(self, x: Tensor) -> Tensor:
        return self.equilibrate(self.injection(x))

    def equilibrate(self, v: Tensor) -> Tensor:
        """The equilibrium for an injection ``v``, (batch, *features)."""
        return self._run(v[None])[0]

    def equilibrate_ball(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and radius of the interval fixed point for all injections in ``center ± radius``: the layer of a
        certified training loss. A solver's word, no proof: bounds come from `verideq.bound`.
        """
        solved = self._run(torch.stack((center, radius)))
        return solved[0], solved[1]

    def system(self, injection: Tensor) -> System:
        """The problem as the chosen solver takes it: `Auto` solves the rows for their own unknowns first.

        Args:
            injection: (parts, batch, *features), see `System`.

        Raises:
            ModelError: the injection does not have the shape of a state.
        """
        system = System(self.operator(), injection)
        given, wanted = tuple(injection.shape[2:]), system.operator.shape
        if len(given) != len(wanted) or any(w is not None and w != g for g, w in zip(given, wanted, strict=True)):
            shape = ", ".join("any" if w is None else str(w) for w in wanted)
            raise ModelError(
                f"the injection gives {given} a sample, and W takes a state of shape ({shape}); change the "
                "injection's output"
            )
        if isinstance(self.solver, ForwardBackward):
            return replace(system, alpha=self.solver.alpha)
        return system.solved() if isinstance(self.solver, Auto) else system

    def _run(self, injection: Tensor) -> Tensor:
        system = self.system(injection)
        frozen = system.map(Tensor.detach)
        solution = self._solve(frozen, self.solver)
        if self.throw:
            solution.check()
        tracked = injection.requires_grad or any(p.requires_grad for p in self.fusion.parameters())
        if not (torch.is_grad_enabled() and tracked):
            return solution.value
        return differentiable(solution.value, system.stepper(), frozen.stepper(), self.gradient, self.throw)

    @staticmethod
    @torch.no_grad()
    def _solve(system: System, solver: Solver) -> Solution:
        return fixed_point(system.stepper(), system.start(), solver)

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"


def _named(kind: str, choice: Any, known: Mapping[str, Any]) -> Any:
    """The choice itself, or the one of that name."""
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise UnknownName(kind, choice, known)
    return known[choice]


def solve(
    layer: Equilibrium,
    x: Tensor,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
) -> Solution:
    """Solve one layer for the inputs `x`, without gradients.

    Args:
        layer: the equilibrium layer.
        x: the layer's input, (batch, ...).
        tol: relative residual; ``None``: the layer's own.
        max_steps: step limit; ``None``: the layer's own.
        throw: raise if a sample did not converge; otherwise look at the solution's `convergence`.

    Returns:
        the `Solution`, its value (batch, *features).

    Raises:
        ConvergenceError: a sample did not converge, and `throw` is set.
    """
    solver = replace(
        layer.solver,
        tol=layer.solver.tol if tol is None else tol,
        max_steps=layer.solver.max_steps if max_steps is None else max_steps,
    )
    with torch.no_grad():
        solution = Equilibrium._solve(layer.system(layer.injection(x)[None]), solver)
    solution = replace(solution, value=solution.value[0])
    return solution.check() if throw else solution
