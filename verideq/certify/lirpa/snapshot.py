"""One evaluation of an equilibrium's ``W``, and the gradients of what is solved with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from verideq.equilibrium import Auto, Equilibrium, FactoredFusion, Gauge, Implicit, Operator, gauge
from verideq.equilibrium.gradients import differentiable
from verideq.errors import NoGaugeError

TIGHT, FINE = Auto(1e-13, 500), Auto(1e-10, 500)
"""The solvers of a float64 model's boxes, and of its multipliers and gradients."""
NARROW, COARSE = Auto(1e-8, 500), Auto(1e-5, 500)
"""The same of any other model: no wider than it resolves, and what its solvers are asked for."""
Step = Callable[[Tensor], Tensor]


class _Given(FactoredFusion):
    """A ``W`` that is there already."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self._operator = operator

    def operator(self) -> Operator:
        return self._operator


@dataclass(frozen=True)
class Snapshot:
    """One evaluation of ``W``, in float64 and tracked by autograd if its tensors are.

    Args:
        operator: ``W``.
        layer: the same, cut off from autograd, as a layer of its own.
        gauge: of that layer.
        exact: the model is in float64.
        throw: raise where an adjoint, of a gradient, does not converge.
    """

    operator: Operator
    layer: Equilibrium
    gauge: Gauge
    exact: bool
    throw: bool = True

    @staticmethod
    def of(operator: Operator, *, throw: bool = True) -> Snapshot:
        """From the layer's own operator.

        Raises:
            NoGaugeError: without a gauge there are no interval bounds, and so no linear ones.
        """
        tracked = operator.map(lambda t: t.to(torch.float64))
        layer = Equilibrium(_Given(tracked.map(Tensor.detach)), nn.Identity())
        try:
            return Snapshot(tracked, layer, gauge(layer), operator.dtype is torch.float64, throw)
        except NoGaugeError as error:
            raise NoGaugeError(f"auto_LiRPA cannot bound this equilibrium: {error}", error.rate) from error

    @property
    def solver(self) -> Auto:
        return FINE if self.exact else COARSE

    @cached_property
    def solved(self) -> tuple[Operator, Tensor]:
        """``W̃`` and the factor that takes ``v`` to ``ṽ``."""
        return self.operator.solved()

    def map(self, change: Callable[[Tensor], Tensor]) -> Snapshot:
        """The same with every tensor of ``W`` changed."""
        return Snapshot(self.operator.map(change), self.layer, self.gauge, self.exact, self.throw)

    def attach(self, value: Tensor, step: Step, frozen: Step) -> Tensor:
        """A fixed point, (parts, batch, *features), with the gradient of the map that has it."""
        if not torch.is_grad_enabled():
            return value
        implicit = Implicit(self.solver)
        return carry(value, differentiable(value, step, frozen, implicit, self.throw))


def carry(value: Tensor, tracked: Tensor) -> Tensor:
    """The numbers of one tensor with the gradient of another."""
    return value.detach() + (tracked - tracked.detach()) if tracked.requires_grad else value.detach()
