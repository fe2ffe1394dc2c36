"""Gradients of an equilibrium: implicit (exact) and phantom (truncated).

**Implicit differentiation.** For ``z* = F(z*, θ)`` the gradient of a loss is ``∂F/∂θᵀ y``, where ``y`` solves the
adjoint equation ``y = g + (∂F/∂z)ᵀ y``. Under a gauge that map contracts in ``Σ u_i |y_i|`` at the layer's own rate.
Only the equilibrium is kept for the backward pass, so memory does not grow with the number of steps.

**Phantom gradient** (Geng et al., "On training implicit models", NeurIPS 2021). From the detached equilibrium, `steps`
tracked iterations ``z <- (1-λ) z + λ F(z)`` and plain backpropagation through them.

Both serve a point (one part) and an interval pair (two parts) alike: they see only the map ``F``. Of a monotone layer,
whose ``F`` need not contract, the adjoint equation of a point is solved by splitting, as the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from verideq.equilibrium.operators import Convolution, Dense
from verideq.equilibrium.solvers import Auto, Solution, Solver, Step, fixed_point
from verideq.errors import InputError


@dataclass(frozen=True)
class Implicit:
    """Exact gradients by the adjoint equation.

    Args:
        solver: how the adjoint is solved; any but `ForwardBackward`, whose damping belongs to the layer.
        steps: products with ``(∂F/∂z)ᵀ`` at most, the last iterate then being the gradient: exact up to what the next
            one would add, a phantom gradient without its memory. 0: until the solver's tolerance.
    """

    solver: Solver = Auto()
    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"an implicit gradient takes 0 or more steps; got {self.steps}")


@dataclass(frozen=True)
class Phantom:
    """Gradients of `steps` damped iterations from the equilibrium.

    Args:
        steps: tracked iterations; memory grows with them.
        damping: ``λ`` in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise InputError(
                f"a phantom gradient takes 1 or more steps and a damping in (0, 1]; got {self.steps} and {self.damping}"
            )

    def damped(self, step: Step, z: Tensor) -> Tensor:
        """``z <- (1 - λ) z + λ f(z)``, `steps` times."""
        for _ in range(self.steps):
            z = (1 - self.damping) * z + self.damping * step(z)
        return z


Gradient = Implicit | Phantom
Pull = Callable[[Tensor, Tensor, Solver], Solution]
"""The adjoint of an equilibrium from its value, the upstream gradient and a solver (`Splitting.pull`)."""


def differentiable(
    value: Tensor, step: Step, frozen: Step, gradient: Gradient, throw: bool = True, splitting: Pull | None = None
) -> Tensor:
    """The solved `value` with a gradient attached.

    Args:
        value: the equilibrium, (parts, batch, *features), detached.
        step: the map ``F`` with its parameters tracked.
        frozen: the same map with its parameters detached.
        gradient: which kind.
        throw: raise in the backward pass if the adjoint does not converge; otherwise its last iterate is the gradient.
        splitting: how to solve the adjoint of a point where its fixed-point iteration need not converge.
    """
    if isinstance(gradient, Phantom):
        return gradient.damped(step, value)

    solver = replace(gradient.solver, max_steps=gradient.steps) if gradient.steps else gradient.solver
    throw = throw and not gradient.steps

    def adjoint(upstream: Tensor) -> Tensor:
        if splitting is not None:
            return _checked(splitting(value, upstream, solver), throw).value
        with torch.enable_grad():
            at = value.detach().requires_grad_()
            image = frozen(at)

        def pull(y: Tensor) -> Tensor:
            (pulled,) = torch.autograd.grad(image, at, y[0].movedim(1, 0), retain_graph=True)
            return (pulled + upstream).movedim(0, 1)[None]

        # A gradient has no radius to keep nonnegative: centre and radius are solved as one part.
        solution = fixed_point(pull, upstream.movedim(0, 1)[None], solver)
        return _checked(solution, throw).value[0].movedim(1, 0)

    result: Tensor = _Adjoint.apply(step(value), adjoint)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def settled_value(
    value: Tensor, injection: Tensor, operators: tuple[Dense | Convolution, ...], gradient: Implicit, throw: bool
) -> Tensor:
    """What `differentiable` gives for an undamped ReLU layer whose ``W`` is stored as it is, for fewer products.

    The derivative of the last step is read off the solution: a unit of a point is active or not; one of a pair is
    active (``c > r``), inactive (0), or cut by zero (``c = r``, half of the upper end). So no step is taken again for
    the sake of its derivative; a step of the adjoint is one product a part, and so is the gradient of the weights.

    Args:
        value: the equilibrium, (parts, batch, *features), detached.
        injection: likewise, tracked.
        operators: ``W``, and for a pair ``|W|`` too, tracked.
        gradient: how to solve the adjoint.
        throw: see `differentiable`.
    """

    def adjoint(upstream: Tensor, weights: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        stored = [op.map(lambda _, w=w: w) for op, w in zip(operators, weights, strict=True)]  # type: ignore[misc]  # a default argument
        transposed = [op.transpose() for op in stored]

        def pull(y: Tensor) -> Tensor:
            parts = _rectified(value, y)
            return torch.stack([t.apply(part) for t, part in zip(transposed, parts, strict=True)]).add_(upstream)

        y = upstream
        if gradient.steps:
            for _ in range(gradient.steps):
                y = pull(y)
        else:
            # A gradient has no radius to keep nonnegative: centre and radius are solved as one part.
            def joint(y: Tensor) -> Tensor:
                return pull(y[0].movedim(1, 0)).movedim(0, 1)[None]

            solution = fixed_point(joint, upstream.movedim(0, 1)[None], gradient.solver)
            y = _checked(solution, throw).value[0].movedim(1, 0)
        g = _rectified(value, y)
        parts = zip(stored, value, g, wanted, strict=True)
        return (torch.stack(g), *(op.weight_gradient(z, part) if want else None for op, z, part, want in parts))

    weights = [op.weight for op in operators]
    result: Tensor = _Settled.apply(value, adjoint, injection, *weights)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def _rectified(value: Tensor, y: Tensor) -> list[Tensor]:
    """The derivative of the ReLU at the solution, transposed, part by part."""
    if len(value) == 1:
        return [torch.where(value[0] > 0, y[0], 0.0)]
    center, radius = value
    active = center > radius
    # Where the upper end alone is positive, it is the sum of both, and each part is its half.
    half = (y[0] + y[1]).mul_(0.5).mul_((center == radius) & (center > 0))
    return [torch.where(active, part, half) for part in y]


def _checked(solution: Solution, throw: bool) -> Solution:
    return solution.check("the adjoint (backward pass)") if throw else solution


class _Settled(torch.autograd.Function):
    """A solved value as a function of its injection and its weights."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, adjoint: Any, injection: Tensor, *weights: Tensor) -> Tensor:
        ctx.adjoint = adjoint
        ctx.save_for_backward(*weights)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second()
        return (None, None, *ctx.adjoint(upstream, ctx.saved_tensors, ctx.needs_input_grad[3:]))


def _refuse_second() -> None:
    if torch.is_grad_enabled():  # torch's once_differentiable lets this pass where an input is a leaf
        raise RuntimeError(
            "an implicit gradient cannot be differentiated twice (create_graph=True); use a Phantom gradient"
        )


class _Adjoint(torch.autograd.Function):
    """The identity, whose backward pass solves the adjoint equation."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        _refuse_second()
        return ctx.adjoint(upstream), None
