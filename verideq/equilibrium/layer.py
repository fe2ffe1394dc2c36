"""`Equilibrium`: the layer ``z* = σ(W z* + v)``, ``v`` the output of its injection; and `solve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from verideq.equilibrium.activations import RELU, Activation, activation_of
from verideq.equilibrium.gradients import Gradient, Implicit, Phantom, differentiable, settled_value
from verideq.equilibrium.monotone import Monotone
from verideq.equilibrium.operators import Convolution, Dense, Operator, operator_of
from verideq.equilibrium.solvers import (
    DAMPING,
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    PeacemanRachford,
    Picard,
    Solution,
    Solver,
    damped,
    fixed_point,
)
from verideq.equilibrium.splitting import Splitting, is_monotone
from verideq.errors import ModelError, UnknownName
from verideq.status import Convergence

relu = F.relu
Matrix = Tensor | NDArray[np.floating[Any]]
SOLVERS: dict[str, Solver] = {
    "auto": Auto(),
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(max_steps=100),
    "forward-backward": ForwardBackward(),
    "peaceman-rachford": PeacemanRachford(),
}
GRADIENTS: dict[str, Gradient] = {"implicit": Implicit(), "phantom": Phantom()}


@dataclass(frozen=True)
class System:
    """One equilibrium problem: an operator, what is injected, and how a step is damped.

    Args:
        operator: ``W``.
        injection: (1, batch, *features), a point ``v``; or (2, batch, *features), a centre and a radius of ``v``.
        alpha: damping of the forward-backward step; 1 is Picard.
        activation: ``σ``.
    """

    operator: Operator
    injection: Tensor
    alpha: float = 1.0
    activation: Activation = RELU

    def start(self) -> Tensor:
        """The first iterate: what the layer gives for ``z = 0``."""
        return self.activation.parts(self.injection)

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
        ``[σ(p - q), σ(p + q)]``.
        """
        operators = (self.operator,) if len(self.injection) == 1 else (self.operator, self.operator.absolute())

        def step(x: Tensor) -> Tensor:
            mapped = [op.apply(part).add_(v) for op, part, v in zip(operators, x, self.injection, strict=True)]
            if self.alpha != 1:
                mapped = [torch.lerp(part, image, self.alpha) for part, image in zip(x, mapped, strict=True)]
            return self.activation.parts(torch.stack(mapped)) if len(mapped) == 1 else self.activation.pair(*mapped)

        return step


class Equilibrium(nn.Module):
    """A deep equilibrium layer: ``forward(x)`` is the ``z*`` with ``z* = σ(W z* + injection(x))``.

    Args:
        fusion: ``W``: a square `Linear`, or a stride-1 "same" `Conv2d`, without bias, whose weight may be parametrized;
            or a factored one, of `MonDEQ` or a `FeedbackFusion`.
        injection: any supported module that maps the input to the shape of ``z``; its bias is the layer's ``b``.
        activation: ``σ``: ReLU, in any of torch's spellings, or the hard sigmoid ``clip(a, 0, 1)``, as ``hard-sigmoid``
            or ``nn.Hardtanh(0, 1)``; the attribute is an `Activation`.
        solver: how the equilibrium is found; `Auto`, `Picard`, `Anderson`, `Broyden`, `ForwardBackward` or
            `PeacemanRachford`, or one of the names ``auto``, ``picard``, ``anderson``, ``broyden``,
            ``forward-backward`` and ``peaceman-rachford`` for their defaults.
        gradient: `Implicit` (exact, constant memory) or `Phantom`; or ``implicit`` or ``phantom``.
        throw: raise when a sample does not converge; otherwise the last iterate is returned.

    The attribute `observer`, ``None`` at first, may be a function: it is shown every `Solution` of a call.

    Raises:
        ModelError: a fusion that is no ``W``, or another activation.
        UnknownName: a solver or gradient that does not exist.
        ConvergenceError: in a call, when `throw` is set and the solver stopped early.

    `recorder` is how a call is written into a graph that `torch.jit` traces, if it is not to be the solver's steps:
    `verideq.certify.lirpa` sets it.

    >>> layer = Equilibrium(nn.Linear(3, 3, bias=False), nn.Linear(2, 3))
    >>> _ = nn.init.constant_(layer.fusion.weight, -0.2)
    >>> layer(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    recorder: ClassVar[Callable[[Equilibrium, Tensor], Tensor] | None] = None

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
        operator_of(fusion)
        self.fusion, self.injection = fusion, injection
        self.activation = activation_of(activation)
        self.solver: Solver = _named("solver", solver, SOLVERS)
        self.gradient: Gradient = _named("gradient", gradient, GRADIENTS)
        self.throw = throw
        self.observer: Callable[[Solution], None] | None = None

    @classmethod
    def from_matrices(cls, W: Matrix, U: Matrix, b: Matrix | None = None, **options: Any) -> Equilibrium:
        """The layer ``z* = relu(W z* + U x + b)`` from dense arrays of one dtype, float32 or float64, which are copied.

        Args:
            W: (units, units).
            U: (units, inputs).
            b: (units,); ``None`` for no bias.
            options: solver, gradient and throw, as the class takes them.

        Raises:
            ModelError: shapes that do not fit, or another dtype.

        >>> layer = Equilibrium.from_matrices(-0.2 * torch.eye(3), torch.ones(3, 2), torch.zeros(3))
        >>> layer(torch.ones(1, 2)).detach().round(decimals=4)
        tensor([[1.6667, 1.6667, 1.6667]])
        """
        given = {name: torch.as_tensor(x) for name, x in (("W", W), ("U", U), ("b", b)) if x is not None}
        shapes = {name: tuple(x.shape) for name, x in given.items()}
        units = shapes["W"][:1]
        fits = shapes["W"] == 2 * units and len(shapes["U"]) == 2 and shapes["U"][:1] == units
        if not fits or shapes.get("b", units) != units:
            wanted = "W (units, units), U (units, inputs) and b (units,)"
            raise ModelError(f"a dense equilibrium takes {wanted}; got {shapes}")
        dtypes = {x.dtype for x in given.values()}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ModelError(f"the matrices of an equilibrium are all float32 or all float64; got {names}")
        fusion = linear(given["W"], None)
        return cls(fusion, linear(given["U"], given.get("b")), **options)

    def operator(self) -> Operator:
        """A snapshot of ``W``: the parametrization is evaluated here and nowhere else."""
        return operator_of(self.fusion)

    def forward(self, x: Tensor) -> Tensor:
        return self.equilibrate(self.injection(x))

    def equilibrate(self, v: Tensor) -> Tensor:
        """The equilibrium for an injection ``v``, (batch, *features)."""
        if Equilibrium.recorder is not None and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch's
            return Equilibrium.recorder(self, v)
        return self._run(v[None])[0]

    def equilibrate_ball(self, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and radius of the interval fixed point for all injections in ``center ± radius``: the layer of a
        certified training loss. A solver's word, no proof: bounds come from `verideq.bound`.
        """
        solved = self._run(torch.stack((center, radius)))
        return solved[0], solved[1]

    def system(self, injection: Tensor) -> System:
        """The problem as the chosen solver iterates it: `Auto` solves the rows for their own unknowns first, or damps
        the step of a factored monotone ``W``.

        Args:
            injection: (parts, batch, *features), see `System`.

        Raises:
            ModelError: the injection does not have the shape of a state.
        """
        return _posed(self._problem(injection), self.solver)

    def _problem(self, injection: Tensor) -> System:
        """The layer as it is, its shapes checked."""
        system = System(self.operator(), injection, activation=self.activation)
        given, wanted = tuple(injection.shape[2:]), system.operator.shape
        if len(given) != len(wanted) or any(w is not None and w != g for g, w in zip(given, wanted, strict=True)):
            shape = ", ".join("any" if w is None else str(w) for w in wanted)
            raise ModelError(
                f"the injection gives {given} a sample, and W takes a state of shape ({shape}); change the "
                "injection's output"
            )
        return system

    def _run(self, injection: Tensor) -> Tensor:
        given = self._problem(injection)
        solution, system, splitting = _settle(given, self.solver)
        if self.observer is not None:
            self.observer(solution)
        if self.throw:
            solution.check()
        tracked = injection.requires_grad or any(p.requires_grad for p in self.fusion.parameters())
        if not (torch.is_grad_enabled() and tracked):
            return solution.value
        gradient = self.gradient
        if isinstance(gradient, Phantom):
            # Undamped steps of a layer that needed a splitting may lead away from its equilibrium.
            system = system if splitting is None else replace(system, alpha=_damping(system.operator))
        else:
            splitting = splitting or _split(given, gradient.solver)
            system = system if splitting is None else given
            gradient = replace(gradient, solver=_rescaled(gradient.solver, system))
            operator = system.operator
            rectified = self.activation == RELU  # whose derivative can be read off a pair
            if splitting is None and system.alpha == 1 and rectified and isinstance(operator, (Dense, Convolution)):
                operators = (operator,) if len(injection) == 1 else (operator, operator.absolute())
                return settled_value(solution.value, system.injection, operators, gradient, self.throw)
        frozen = system.map(Tensor.detach)
        pull = None if splitting is None else splitting.pull
        return differentiable(solution.value, system.stepper(), frozen.stepper(), gradient, self.throw, pull)

    def extra_repr(self) -> str:
        return f"activation={self.activation.name}, solver={self.solver}, gradient={self.gradient}"


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A `Linear` that holds copies of these tensors, in their dtype and on their device."""
    with torch.device("meta"):  # nothing is drawn
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _split(given: System, solver: Solver) -> Splitting | None:
    """The splitting by which a solver solves a point, if that is how it solves this ``W``."""
    wanted = isinstance(solver, PeacemanRachford)
    monotone = isinstance(solver, Auto) and isinstance(given.operator, Monotone)
    if len(given.injection) > 1 or not (wanted or monotone):
        return None
    alpha = solver.alpha if isinstance(solver, PeacemanRachford) else None
    shape = tuple(given.injection.shape[2:])
    splitting = Splitting.of(given.operator.map(Tensor.detach), shape, alpha, given.activation)
    if splitting is None and wanted:
        raise ModelError(
            "PeacemanRachford inverts I - W, which is dense, or a factored convolution (MonDEQ) that is circular or "
            "works on a small image; use another solver"
        )
    return splitting


def _posed(given: System, solver: Solver) -> System:
    """The problem as a solver iterates it where it does not split it."""
    if isinstance(solver, ForwardBackward):
        return replace(given, alpha=_damping(given.operator) if solver.alpha is None else solver.alpha)
    if not isinstance(solver, (Auto, PeacemanRachford)):
        return given
    if len(given.injection) == 1 and isinstance(given.operator, Monotone):
        return replace(given, alpha=_damping(given.operator))
    return given.solved()


def _damping(operator: Operator) -> float:
    """A damping under which the step of a monotone layer contracts; `DAMPING` where nothing is known."""
    return operator.damping() if isinstance(operator, Monotone) else DAMPING


def _rescaled(solver: Solver, system: System) -> Solver:
    """The solver with its tolerance taken from the damped step to the layer itself."""
    if isinstance(solver, ForwardBackward):
        return replace(solver, alpha=system.alpha)
    if system.alpha == 1:
        return solver
    return replace(solver, tol=damped(solver, system.alpha, system.injection.dtype))


def _settle(given: System, solver: Solver) -> tuple[Solution, System, Splitting | None]:
    """The solution, the problem whose map has it for a fixed point, and the splitting that found it, if one did."""
    splitting = _split(given, solver)
    if splitting is not None:
        return splitting.solve(given.injection.detach(), solver), given, splitting
    system = _posed(given, solver)
    solution = _iterate(system.map(Tensor.detach), solver)
    failed = isinstance(solver, Auto) and solution.convergence is not Convergence.CONVERGED
    if failed and len(given.injection) == 1 and is_monotone(given.operator):
        # Without a gauge Picard need not converge; a dense W that is monotone all the same can be split.
        again = replace(PeacemanRachford(), tol=solver.tol, max_steps=solver.max_steps)
        return _settle(given, again)
    return solution, system, None


@torch.no_grad()
def _iterate(system: System, solver: Solver) -> Solution:
    return fixed_point(system.stepper(), system.start(), _rescaled(solver, system))


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
        solution, _, _ = _settle(layer._problem(layer.injection(x)[None]), solver)
    solution = replace(solution, value=solution.value[0])
    return solution.check() if throw else solution
