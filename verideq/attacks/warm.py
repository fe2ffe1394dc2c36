"""Exact gradients whose solves begin where those of the step before ended: what makes PGD on an equilibrium cheap."""

from __future__ import annotations

import torch
from torch import Tensor

from verideq.attacks.opened import GraphDynamics
from verideq.equilibrium import Auto, Solver
from verideq.equilibrium.dynamics import Dynamics
from verideq.equilibrium.solvers import Step, fixed_point
from verideq.equilibrium.surrogates import Final, Loss, Slope, Surrogate

_FIRST = Auto(tol=1e-3, max_steps=200)


class Warm(Surrogate):
    """`Final` with implicit gradients, equilibrium and adjoint each moved on a few steps from where they were.

    The first call solves both; the steps of an attack are close to each other, so that few suffice from there. A margin
    that decides is always measured by a solve of its own. One object serves one attack: a batch of another size starts
    anew. Of a model that is no graph with an equilibrium it is `Final`.

    Args:
        steps: of the equilibrium and of the adjoint, a call.
        first: solves both in the first call.
    """

    # Its outputs are off by its tolerance, so that they do not decide.
    exact = False

    def __init__(self, steps: int = 2, first: Solver = _FIRST) -> None:
        self.steps, self.first = steps, first
        self.last: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        return "final"

    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        if not isinstance(dynamics, GraphDynamics):
            return Final().slope(dynamics, x, loss)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            injected = dynamics.inject(at)
            system = dynamics.layer.system(injected[dynamics.node.inputs[0]][None])
        frozen = system.map(Tensor.detach)
        last = self.last
        if last is not None and last[0].shape != frozen.injection.shape:
            last = None
        z = self._solve(frozen.stepper(), None if last is None else last[0], frozen.start())
        with torch.enable_grad():
            state = z[0].detach().requires_grad_()
            outputs = dynamics.head(state, injected)
            losses = loss(outputs)
            upstream, direct = torch.autograd.grad(losses.sum(), (state, at), allow_unused=True, materialize_grads=True)
        active = dynamics.layer.activation.active(z[0]).to(z)
        transposed, alpha = frozen.operator.transpose(), frozen.alpha

        def pull(y: Tensor) -> Tensor:
            gated = y[0] * active
            image = transposed.apply(gated)
            image = image if alpha == 1 else torch.lerp(gated, image, alpha)
            return (image + upstream)[None]

        y = self._solve(pull, None if last is None else last[1], upstream[None])
        self.last = z, y
        (gradient,) = torch.autograd.grad(system.injection, at, alpha * active[None] * y)
        return Slope(losses.detach(), gradient + direct, outputs.detach())

    @torch.no_grad()
    def _solve(self, step: Step, last: Tensor | None, start: Tensor) -> Tensor:
        if last is None:
            return fixed_point(step, start.clone(), self.first).value
        for _ in range(self.steps):
            last = step(last)
        return last
