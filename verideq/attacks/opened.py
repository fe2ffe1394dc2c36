"""Models opened up for attacks and defences that look inside: see `verideq.equilibrium.dynamics`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from verideq.equilibrium import DEQ, Auto, Dynamics, Equilibrium, Gradient, Implicit, System
from verideq.equilibrium.dynamics import Injected
from verideq.graph import INPUT, Graph, Node, trace, unsupported


class GraphDynamics(Dynamics):
    """A graph, opened at its last equilibrium. The layers before it are solved, with exact gradients.

    Args:
        graph: a frozen copy (`Graph.frozen`): its weights are read once.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        place = max(i for i, node in enumerate(graph.nodes) if isinstance(node.module, Equilibrium))
        self.node = graph.nodes[place]
        self.layer: Equilibrium = self.node.module  # type: ignore[assignment]  # an equilibrium's node
        self.before, self.after = graph.nodes[:place], graph.nodes[place + 1 :]
        self.operator = self.layer.operator().map(Tensor.detach)

    def inject(self, x: Tensor) -> Injected:
        return _run(self.before, {INPUT: x})

    def start(self, injected: Injected) -> Tensor:
        return torch.zeros_like(self._v(injected))

    def step(self, z: Tensor, injected: Injected) -> Tensor:
        system = System(self.operator, self._v(injected)[None], activation=self.layer.activation)
        return system.stepper()(z[None])[0]

    def head(self, z: Tensor, injected: Injected) -> Tensor:
        values = _run(self.after, {**injected, self.node.name: z})
        return values[self.graph.nodes[-1].name]

    def settle(self, injected: Injected) -> Tensor:
        with torch.no_grad():
            return self.layer.equilibrate(self._v(injected))

    def final(self, injected: Injected, gradient: Gradient | None = None) -> Tensor:
        layer = self.layer
        if gradient is not None:
            layer = copy.copy(layer)
            layer.gradient = gradient
        return layer.equilibrate(self._v(injected))

    def _v(self, injected: Injected) -> Tensor:
        return injected[self.node.inputs[0]]


class PlainDynamics(Dynamics):
    """A model without an equilibrium: its one state is its outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def inject(self, x: Tensor) -> Injected:
        return {"outputs": self.model(x)}

    def start(self, injected: Injected) -> Tensor:
        return torch.zeros_like(injected["outputs"])

    def step(self, z: Tensor, injected: Injected) -> Tensor:
        return injected["outputs"]

    def head(self, z: Tensor, injected: Injected) -> Tensor:
        return z

    def settle(self, injected: Injected) -> Tensor:
        return injected["outputs"].detach()

    def final(self, injected: Injected, gradient: Gradient | None = None) -> Tensor:
        return injected["outputs"]


def is_opaque(model: nn.Module) -> bool:
    """Whether a model can only be attacked as it stands: no general DEQ, and not of supported operations."""
    return not isinstance(model, DEQ) and bool(unsupported(model))


def has_states(model: nn.Module) -> bool:
    """Whether there is an equilibrium to look into."""
    return isinstance(model, DEQ) or (not is_opaque(model) and any(True for _ in trace(model).equilibria()))


def open_model(
    model: nn.Module, *, device: torch.device | str = "cpu", tol: float = 1e-6, backward_tol: float = 1e-3
) -> Dynamics:
    """A frozen float64 copy of a model, opened up; its parameters are no longer tracked.

    Args:
        model: a `DEQ`, which keeps its own solver, any module of supported operations, or any other module that can be
            copied: of the last nothing but the outputs is looked at.
        device: where the copy lives.
        tol: relative, of the equilibria of a supported model: an attack needs a direction and not the last digit.
        backward_tol: likewise, of the adjoint.
    """
    if isinstance(model, DEQ) or is_opaque(model):
        opened = copy.deepcopy(model).to(device, torch.float64).eval().requires_grad_(False)
        return opened if isinstance(opened, DEQ) else PlainDynamics(opened)
    graph = model if isinstance(model, Graph) else trace(model)
    graph = graph.frozen(
        device=device, solver=Auto(tol=tol), gradient=Implicit(Auto(tol=backward_tol)), throw=False
    ).requires_grad_(False)
    return GraphDynamics(graph) if any(True for _ in graph.equilibria()) else PlainDynamics(graph)


def _run(nodes: Sequence[Node], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`Graph.values` for a part of a graph."""
    for node in nodes:
        run = node.module.equilibrate if isinstance(node.module, Equilibrium) else node.module
        values[node.name] = run(*(values[name] for name in node.inputs))
    return values
