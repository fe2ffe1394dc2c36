"""How an equilibrium is written into a traced graph: as an operation of its own, never as the steps of its solver.

The operation reads the injection and the free tensors of ``W``; the parametrization stays inside. Traced, it would be
arithmetic that auto_LiRPA takes for layers (a division by a root, for a layer norm). The graph holds a number in place
of the layer, which `layer_of` turns back while the layer lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from verideq.equilibrium import Equilibrium, Operator
from verideq.errors import UnsupportedOperation

WHOLE = "verideq::Equilibrium"
"""``(v, *free) -> z``."""
PRE = "verideq::EquilibriumPre"
"""``(v, *free) -> P``, what `pre_activation` gives at the equilibrium."""
RELU = "verideq::EquilibriumRelu"
"""``(P, v, *free) -> z``, which is ``relu(P)``."""

_LAYERS: WeakValueDictionary[int, Equilibrium] = WeakValueDictionary()
_NUMBERS = count()


def record(layer: Equilibrium, v: Tensor, *, split: bool) -> Tensor:
    """A call of a layer in a model that is being traced: `Equilibrium.recorder`.

    Args:
        layer: called.
        v: its injection, (batch, *features).
        split: see `verideq.certify.lirpa.custom_ops`.

    Raises:
        UnsupportedOperation: the layer is no ReLU equilibrium.
    """
    if layer.activation.name != "relu":
        raise UnsupportedOperation(
            f"auto_LiRPA's nodes are for ReLU equilibria; this one is {layer.activation.name}: bound the model with "
            "verideq.bound"
        )
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    free = tuple(layer.fusion.parameters())
    if not split:
        return _apply(_Whole, number, v, *free)
    return _apply(_Relu, number, _apply(_Pre, number, v, *free), v, *free)


@dataclass(frozen=True)
class Recorded:
    """A layer whose free tensors of ``W`` are handed in, by whoever holds them now.

    Buffers (the ``m`` of a schedule, say) are the layer's own: auto_LiRPA keeps copies of buffers, which no schedule
    reaches.
    """

    layer: Equilibrium

    def operator(self, free: Sequence[Tensor]) -> Operator:
        """``W``, evaluated once."""
        operator: Operator = self._with(free, Equilibrium.operator)
        return operator

    def equilibrate(self, v: Tensor, free: Sequence[Tensor]) -> Tensor:
        """The equilibrium of an injection, (batch, *features), by the layer's own solver and gradient."""
        z: Tensor = self._with(free, lambda layer: layer.equilibrate(v))
        return z

    def _with(self, free: Sequence[Tensor], run: Callable[[Equilibrium], Any]) -> Any:
        names = [f"layer.fusion.{name}" for name, _ in self.layer.fusion.named_parameters()]
        return functional_call(_Holder(self.layer), dict(zip(names, free, strict=True)), (run,))


class _Holder(nn.Module):
    """A layer as a part, for `functional_call` to put tensors into."""

    def __init__(self, layer: Equilibrium) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, run: Callable[[Equilibrium], Any]) -> Any:
        return run(self.layer)


def layer_of(number: int) -> Recorded:
    """The layer that a graph means by a number."""
    return Recorded(_LAYERS[number])


def pre_activation(operator: Operator, v: Tensor, z: Tensor) -> Tensor:
    """``P = W̃ z + v / (1 - diag W)``, each row solved for its own unknown: ``z = relu(P)`` at the equilibrium."""
    solved, factor = operator.solved()
    return solved.apply(z) + v * factor


@contextmanager
def _untraced() -> Iterator[None]:
    """A stretch of a trace that leaves nothing in the graph."""
    tracer: Any = torch._C  # its stub leaves the setter out
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


def _apply(function: Any, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


# The copies that the functions return are recorded; a value that is not has no place in the graph.


class _Whole(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, number: int, v: Any, *free: Any) -> Any:
        return g.op(WHOLE, v, *free, layer_i=number).setType(v.type())

    @staticmethod
    def forward(ctx: Any, number: int, v: Tensor, *free: Tensor) -> Tensor:
        with _untraced():
            z = _LAYERS[number].equilibrate(v)
        return z.clone()


class _Pre(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, number: int, v: Any, *free: Any) -> Any:
        return g.op(PRE, v, *free, layer_i=number).setType(v.type())

    @staticmethod
    def forward(ctx: Any, number: int, v: Tensor, *free: Tensor) -> Tensor:
        layer = _LAYERS[number]
        with _untraced():
            p = pre_activation(layer.operator(), v, layer.equilibrate(v))
        return p.clone()


class _Relu(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, number: int, p: Any, v: Any, *free: Any) -> Any:
        return g.op(RELU, p, v, *free, layer_i=number).setType(v.type())

    @staticmethod
    def forward(ctx: Any, number: int, p: Tensor, v: Tensor, *free: Tensor) -> Tensor:
        return p.relu()
