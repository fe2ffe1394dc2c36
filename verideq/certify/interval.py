"""Interval bounds through a graph: one rule an operation, each in centre-radius form.

The same rules serve two masters. A *proof* (`Arithmetic`, float64) rounds every result outward and encloses equilibria
with their gauge. A *training step* (`verideq.training`) takes the rules in plain arithmetic, with gradients. What
differs between the two is the `Arithmetic` that a rule is handed, never the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.box import TINY, Box, gamma, outward, spread, underflow
from verideq.certify.balls import Balls
from verideq.certify.enclosure import enclose, enclose_monotone
from verideq.equilibrium import Auto, Equilibrium, Gauge, Solver
from verideq.errors import NoGaugeError
from verideq.graph import INPUT, Graph, Node

Map = Callable[[Tensor], Tensor]


class Arithmetic:
    """Proofs: outward rounding, float64.

    Args:
        gauges: a gauge for every equilibrium that has one, by node name.
        solver: how the pairs are searched for.
        tolerance: of the deployed solver: what it hands on is within ``tolerance * u`` of the equilibrium.
        monotone: a proved ``m`` for the others.

    Afterwards `steps` holds the solver steps by sample, and by node name `boxes` the enclosures along a gauge, `states`
    the points that monotone ones are around, and `drifts` how far what is handed on may be from an equilibrium, (1,
    *state), where a tolerance was given.
    """

    def __init__(
        self,
        gauges: Mapping[str, Gauge],
        solver: Solver = Auto(tol=1e-13),
        tolerance: float = 0.0,
        monotone: Mapping[str, float] | None = None,
    ) -> None:
        self.gauges, self.solver, self.tolerance, self.monotone = gauges, solver, tolerance, monotone or {}
        self.steps: Tensor | None = None
        self.boxes: dict[str, Box] = {}
        self.drifts: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.balls = Balls(lambda node, centers: RULES[node.operation.kind](self, node, centers))

    def follow(self, node: Node, boxes: list[Box]) -> Box:
        """The box of a node's output; cut by its ball where the inputs are in balls."""
        return self.balls.meet(node, RULES[node.operation.kind](self, node, boxes))

    def affine(
        self, box: Box, apply: Map, absolute: Map, constants: Tensor | None, terms: int, *factors: Tensor
    ) -> Box:
        """The image of a box under ``x -> A x + b``.

        Args:
            apply: ``A x + b``, computed with at most `terms` roundings in a row.
            absolute: ``|A| r``.
            constants: the magnitude of everything that is added, shaped to broadcast; ``None`` for nothing.
            terms: see `apply`.
            factors: tensors whose largest entries bound the entries of ``A``.
        """
        center, radius = box.ball()
        moved = absolute(spread(center, radius, terms)) + underflow(terms, center, radius, *factors)
        if constants is not None:
            moved = moved + gamma(terms) * constants
        return outward(apply(center), moved)

    def add(self, a: Box, b: Box) -> Box:
        """The sum of two boxes."""
        total = Box(a.lower + b.lower, a.upper + b.upper)
        infinity = torch.full((), torch.inf, dtype=total.lower.dtype, device=total.lower.device)
        lower, upper = torch.nextafter(total.lower, -infinity), torch.nextafter(total.upper, infinity)
        return Box(lower - 8 * TINY, upper + 8 * TINY)  # flushed denormals, as in `Box.ball`

    def batch_norm(self, node: Node, box: Box) -> Box:
        """Batch normalisation as in evaluation."""
        module: Any = node.module
        return self.standardize(box, module.running_mean, module.running_var, module)

    def standardize(self, box: Box, mean: Tensor, variance: Tensor, module: nn.BatchNorm2d) -> Box:
        """Batch normalisation with the given statistics, (channels,)."""
        shape = [1, -1, *[1] * (box.lower.dim() - 2)]
        deviation = (variance + module.eps).sqrt()
        scale: Tensor = deviation.reciprocal() if module.weight is None else module.weight / deviation
        shift: Tensor = torch.zeros_like(mean) if module.bias is None else module.bias
        mean, scale, shift = mean.view(shape), scale.view(shape), shift.view(shape)
        constants = mean.abs() * scale.abs() + shift.abs()
        return self.affine(box, lambda c: (c - mean) * scale + shift, lambda r: r * scale.abs(), constants, 8, scale)

    def equilibrium(self, node: Node, layer: Equilibrium, box: Box) -> Box:
        """The equilibria for all injections of a box."""
        if node.name not in self.gauges:
            ball = self.balls.known.get(node.inputs[0])
            m, v = self.monotone[node.name], box if ball is None else ball.center
            enclosure, self.states[node.name] = enclose_monotone(layer, m, v, self.solver)
            self.steps = enclosure.steps if self.steps is None else torch.maximum(self.steps, enclosure.steps)
            if self.tolerance:
                raise NoGaugeError(
                    f"{node.name}: a tolerance of the deployed solver is charged along a gauge", math.nan
                )
            return enclosure.box if ball is None else self.balls.settled(node, m, enclosure.box)
        enclosure = enclose(layer, self.gauges[node.name], box, self.solver)
        self.steps = enclosure.steps if self.steps is None else torch.maximum(self.steps, enclosure.steps)
        self.boxes[node.name] = enclosure.box
        if not self.tolerance:
            return enclosure.box
        u = layer.operator().spread_units(self.gauges[node.name].u.to(box.lower))
        drift = (u * self.tolerance * (1 + 2.0**-50) + TINY).expand(1, *box.lower.shape[1:])
        self.drifts[node.name] = drift
        return self.add(enclosure.box, Box(-drift, drift))


Rule = Callable[[Arithmetic, Node, list[Box]], Box]


def _linear(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    module: Any = node.module
    weight, bias = module.weight, module.bias
    return arithmetic.affine(
        boxes[0],
        lambda c: F.linear(c, weight, bias),
        lambda r: F.linear(r, weight.abs()),
        None if bias is None else bias.abs(),
        weight.shape[1] + 1,
        weight,
    )


def _conv2d(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    module: Any = node.module
    weight, bias = module.weight, module.bias
    return arithmetic.affine(
        boxes[0],
        lambda c: module._conv_forward(c, weight, bias),
        lambda r: module._conv_forward(r, weight.abs(), None),
        None if bias is None else bias.abs()[:, None, None],
        weight[0].numel() + 1,
        weight,
    )


def _average(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    # Weights of one sign (negative for a negative divisor_override), none above 1.
    pixels = boxes[0].lower.shape[-1] * boxes[0].lower.shape[-2]
    return arithmetic.affine(boxes[0], node.module, lambda r: node.module(r).abs(), None, pixels + 2)


def _monotone(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    """Operations that select or keep values without rounding: ReLU, maxima, reshaping."""
    return Box(node.module(boxes[0].lower), node.module(boxes[0].upper))


def _normalize(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    module: Any = node.module
    shape = [1, -1, *[1] * (boxes[0].lower.dim() - 2)]
    mean, std = module.mean.view(shape), module.std.view(shape)
    return arithmetic.affine(
        boxes[0], lambda c: (c - mean) / std, lambda r: r / std, mean.abs() / std, 4, std, std.reciprocal()
    )


def _equilibrium(arithmetic: Arithmetic, node: Node, boxes: list[Box]) -> Box:
    layer: Any = node.module
    return arithmetic.equilibrium(node, layer, boxes[0])


RULES: dict[str, Rule] = {
    "normalize": _normalize,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm1d": lambda arithmetic, node, boxes: arithmetic.batch_norm(node, boxes[0]),
    "batch_norm2d": lambda arithmetic, node, boxes: arithmetic.batch_norm(node, boxes[0]),
    "relu": _monotone,
    "avg_pool2d": _average,
    "adaptive_avg_pool2d": _average,
    "max_pool2d": _monotone,
    "flatten": _monotone,
    "embed": _monotone,
    "add": lambda arithmetic, node, boxes: arithmetic.add(*boxes),
    "equilibrium": _equilibrium,
}
"""The rule of every operation, by kind."""


def propagate(graph: Graph, box: Box, arithmetic: Arithmetic, *, until: Node | None = None) -> Box:
    """The box of the graph's output, or of the input of the node `until`.

    Args:
        graph: its parameters in the dtype of the box.
        box: of inputs, (batch, *features).
        arithmetic: how to round and how to solve.
        until: stop before this node, which has one input.
    """
    boxes = {INPUT: box}
    for node in graph.nodes:
        if node is until:
            return boxes[node.inputs[0]]
        boxes[node.name] = arithmetic.follow(node, [boxes[name] for name in node.inputs])
    return boxes[graph.nodes[-1].name]
