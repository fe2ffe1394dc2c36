"""`Graph`: a model as a list of supported operations in single-assignment form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from verideq.equilibrium import Auto, Equilibrium, Gradient, Implicit, Solver
from verideq.errors import ModelError
from verideq.graph.operations import Add, Operation, evaluating, operation_of

INPUT = "input"
"""The name of the graph's input among the values."""


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    Args:
        name: unique, from the place of the module in the user's model (``features.0``).
        module: an instance of a supported operation; its parameters are the user's own.
        inputs: the names of the nodes that it reads, or `INPUT`.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]

    @property
    def operation(self) -> Operation:
        operation = operation_of(self.module)
        if operation is None:  # the tracer and the file reader let none through
            raise ModelError(f"{self.name}: {type(self.module).__name__} is not a supported operation")
        return operation


class Graph(nn.Module):
    """A model that verideq understands: `trace` makes one from a module, `load_model` reads one from a file.

    It computes what the module computes, and is a module itself.

    Args:
        nodes: in an order in which every node comes after its inputs; the last one is the output.
        input_shape: (*features) without the batch, where it is known.
        pixel_range: the valid range of inputs, or ``None`` for no range.

    Raises:
        ModelError: a node reads a name that is not defined before it, or a name is defined twice.
    """

    def __init__(
        self,
        nodes: list[Node],
        *,
        input_shape: tuple[int, ...] | None = None,
        pixel_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        known = {INPUT}
        for node in nodes:
            missing = [name for name in node.inputs if name not in known]
            if missing or node.name in known:
                raise ModelError(
                    f"node {node.name!r} reads {missing or 'nothing new'}: names are defined once, and before use"
                )
            known.add(node.name)
        if not nodes:
            raise ModelError("the model has no operations")
        self.nodes = nodes
        self.operations = nn.ModuleList(node.module for node in nodes)
        self.input_shape = input_shape
        self.pixel_range = pixel_range

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x)[self.nodes[-1].name]

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """Every intermediate value by node name, the input included."""
        values = {INPUT: x}
        for node in self.nodes:
            arguments = [values[name] for name in node.inputs]
            # An equilibrium's injection is a part of the graph, so its node reads v.
            run = node.module.equilibrate if isinstance(node.module, Equilibrium) else node.module
            values[node.name] = run(*arguments)
        return values

    def equilibria(self) -> Iterator[tuple[str, Equilibrium]]:
        """The equilibrium layers with their names."""
        for node in self.nodes:
            if isinstance(node.module, Equilibrium):
                yield node.name, node.module

    @property
    def classes(self) -> int | None:
        """The number of outputs, where the last operation is linear."""
        last = self.nodes[-1].module
        return last.out_features if isinstance(last, nn.Linear) else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights."""
        for node in self.nodes:
            for tensor in node.operation.state(node.module).values():
                return tensor.dtype
        return torch.get_default_dtype()

    def frozen(
        self,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        solver: Solver = Auto(tol=1e-13),
        gradient: Gradient = Implicit(),
        throw: bool = True,
    ) -> Graph:
        """A copy in evaluation mode with materialised weights: the stored numbers, exactly, in `dtype`.

        What is proved of the copy is proved of the stored weights, not of a parametrization's formula.

        Args:
            solver: for every equilibrium of the copy.
            gradient: likewise.
            throw: whether they raise when a sample does not converge.
        """
        nodes = []
        for node in self.nodes:
            operation = node.operation
            state = {name: t.to(device, dtype) for name, t in operation.state(node.module).items()}
            module = operation.create(operation.describe(node.module), state)
            if isinstance(module, Equilibrium):
                module.solver, module.gradient, module.throw = solver, gradient, throw
            nodes.append(Node(node.name, module, node.inputs))
        return Graph(nodes, input_shape=self.input_shape, pixel_range=self.pixel_range).eval()

    def check_finite(self) -> Graph:
        """Itself, if every stored weight is finite.

        Raises:
            ModelError: the first tensor with NaN or infinity, by node and name.
        """
        for node in self.nodes:
            for name, tensor in node.operation.state(node.module).items():
                bad = ~tensor.isfinite()
                if bool(bad.any()):
                    index = tuple(bad.nonzero()[0].tolist())
                    raise ModelError(
                        f"{node.name}.{name}{list(index)} is {float(tensor[index])}; a model with NaN or infinite "
                        "weights computes nothing: train it again or repair the file"
                    )
        return self

    def check_input(self, x: Tensor) -> tuple[int, ...]:
        """Refuse an input of the wrong shape before any layer does so in its own words.

        Nothing is solved: an equilibrium has the shape of what is injected.

        Args:
            x: (batch, *features).

        Returns:
            the shape of the outputs, without the batch.

        Raises:
            ModelError: the shape, the one that is expected, and the node that fails.
        """
        return self.shapes(x)[self.nodes[-1].name]

    def shapes(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """The shape of every value, without the batch, by node name; see `check_input`."""
        given = tuple(x.shape[1:])
        if self.input_shape is not None and given != tuple(self.input_shape):
            raise ModelError(f"the model takes inputs of shape {tuple(self.input_shape)}, the data have {given}")
        stored = next((t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), x)
        values: dict[str, Any] = {INPUT: torch.zeros((1, *given), dtype=stored.dtype, device=stored.device)}
        for node in self.nodes:
            arguments = [values[name] for name in node.inputs]
            layer = node.module
            try:
                with torch.no_grad(), evaluating(layer):
                    result = layer.operator().apply(*arguments) if isinstance(layer, Equilibrium) else layer(*arguments)
                if isinstance(layer, Equilibrium) and result.shape != arguments[0].shape:
                    raise RuntimeError("its state and its injection differ in shape")
                if isinstance(layer, Add) and arguments[0].shape != arguments[1].shape:
                    raise RuntimeError("a sum of two shapes, which may mix samples; make them equal")
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                shapes = ", ".join(str(tuple(a.shape[1:])) for a in arguments)
                first = str(error).partition("\n")[0]
                raise ModelError(
                    f"inputs of shape {given} do not fit the model: {node.name} ({node.operation.kind}) got {shapes}: "
                    f"{first}"
                ) from error
            values[node.name] = result
        return {name: tuple(value.shape[1:]) for name, value in values.items()}
