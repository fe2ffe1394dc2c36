"""Clean values, interval bounds and margins of one training pass, and the two plain losses (Wei & Kolter, section 4).

None of this is a bound to certify with: it is plain arithmetic in the model's own dtype, its rounding ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from verideq.box import Box
from verideq.certify.interval import RULES, Arithmetic
from verideq.distributed import ALONE, World
from verideq.equilibrium import Equilibrium
from verideq.errors import ConvergenceError, ModelError
from verideq.graph import INPUT, Graph, Node

Map = Callable[[Tensor], Tensor]
HALVES = ("conv2d", "linear")
"""Operations that mixed precision computes in bfloat16: neither equilibria, whose solver would stall above its
tolerance, nor batch norm, whose statistics would lose their digits, nor the last layer, from which margins are read."""


class Ball(Box):
    """A box that is kept as its centre and radius, in which layer follows layer without a detour."""

    __slots__ = ("_ball",)
    _ball: tuple[Tensor, Tensor]

    def __init__(self, center: Tensor, radius: Tensor) -> None:
        object.__setattr__(self, "_ball", (center, radius))

    @property
    def lower(self) -> Tensor:
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        return self.center + self.radius

    @property
    def center(self) -> Tensor:
        return self._ball[0]

    @property
    def radius(self) -> Tensor:
        return self._ball[1]


class Pass(Arithmetic):
    """One training pass through a graph: the clean values first, then as many boxes and points as a loss wants.

    The rules are those of the interval bound, in plain arithmetic with gradients. Batch norm takes its statistics from
    the clean batch, for the clean values, boxes and points alike (Wei & Kolter; Shi et al., NeurIPS 2021).

    Args:
        graph: of the model.
        world: the processes that share a batch: its statistics are those of the whole.
        mixed: compute `HALVES` in bfloat16.
    """

    def __init__(self, graph: Graph, world: World = ALONE, *, mixed: bool = False) -> None:
        super().__init__({})
        self.graph, self.world, self.mixed = graph, world, mixed
        self.last = graph.nodes[-1]
        self.clean: dict[str, Tensor] = {}
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, images: Tensor) -> Tensor:
        """The clean values of a batch, kept in `clean`; returns the outputs."""
        self.clean = {INPUT: images}
        for node in self.graph.nodes:
            arguments = [self.clean[name] for name in node.inputs]
            if _normalises(node) and node.module.training:
                self.statistics[node.name] = self._measure(node.module, arguments[0])
            self.clean[node.name] = self._value(node, arguments)
        return self.clean[self.last.name]

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs of other points, with the statistics of the clean batch."""
        values = {INPUT: x}
        for node in self.graph.nodes:
            values[node.name] = self._value(node, [values[name] for name in node.inputs])
        return values[self.last.name]

    def enclosed(self, box: Box) -> dict[str, Box]:
        """The box of every value up to the input of the last layer, by node name."""
        boxes = {INPUT: box}
        for node in self.graph.nodes[:-1]:
            with self._at(node), self._precision(node):
                boxes[node.name] = RULES[node.operation.kind](self, node, [boxes[name] for name in node.inputs])
        return boxes

    def margins(self, boxes: dict[str, Box], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Centres and radii of ``f_y - f_j`` over the boxes, (batch, classes) each, zero at the label.

        Raises:
            ModelError: the model does not end in a linear layer.
        """
        module = self.last.module
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"certified training elides the last linear layer; the model ends in {self.last.operation.kind}"
            )
        return margin_ball(boxes[self.last.inputs[0]], module.weight, module.bias, labels)

    def affine(
        self, box: Box, apply: Map, absolute: Map, constants: Tensor | None, terms: int, *factors: Tensor
    ) -> Box:
        return Ball(apply(box.center).to(box.center), absolute(box.radius).to(box.radius))

    def add(self, a: Box, b: Box) -> Box:
        return Ball(a.center + b.center, a.radius + b.radius)

    def batch_norm(self, node: Node, box: Box) -> Box:
        scale, shift = self._standard(node)
        return Ball(torch.addcmul(shift, box.center, scale), box.radius * scale.abs())

    def equilibrium(self, node: Node, layer: Equilibrium, box: Box) -> Box:
        return Ball(*layer.equilibrate_ball(box.center, box.radius))

    def _value(self, node: Node, arguments: list[Tensor]) -> Tensor:
        if _normalises(node):
            scale, shift = self._standard(node)
            return torch.addcmul(shift, arguments[0], scale)
        # An equilibrium's injection is a part of the graph, so its node reads v.
        run = node.module.equilibrate if isinstance(node.module, Equilibrium) else node.module
        with self._at(node), self._precision(node):
            result: Tensor = run(*arguments).to(arguments[0])
        return result

    def _measure(self, module: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of a batch by channel, which the running ones take up as torch's batch norm does."""
        axes = [0, *range(2, values.dim())]
        variance, mean = self.world.var_mean(values, axes)
        with torch.no_grad():
            count = self.world.size * values.numel() / values.shape[1]
            module.num_batches_tracked += 1
            share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean, share)
            module.running_var.lerp_(variance * (count / max(count - 1, 1)), share)
        return mean, variance

    def _standard(self, node: Node) -> tuple[Tensor, Tensor]:
        """Factor and summand of batch norm, shaped to broadcast."""
        module: Any = node.module
        mean, variance = self.statistics.get(node.name, (module.running_mean, module.running_var))
        scale = (variance + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        shift = -mean * scale if module.bias is None else module.bias - mean * scale
        shape = [1, -1, *[1] * (self.clean[node.inputs[0]].dim() - 2)]
        return scale.view(shape), shift.view(shape)

    @contextmanager
    def _precision(self, node: Node) -> Iterator[None]:
        halved = self.mixed and node.operation.kind in HALVES and node is not self.last
        with torch.autocast(self.clean[INPUT].device.type, torch.bfloat16, enabled=halved):
            yield

    @contextmanager
    def _at(self, node: Node) -> Iterator[None]:
        try:
            yield
        except ConvergenceError as error:
            raise ConvergenceError(f"{node.name}: {error}", error.worst, error.steps) from error


def _normalises(node: Node) -> bool:
    return isinstance(node.module, (nn.BatchNorm1d, nn.BatchNorm2d))


def margin_ball(features: Box, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii of ``f_y - f_j`` for ``f = V z + b`` and ``z`` in a box: (batch, classes), zero at the label.

    The radius of a margin is ``|V_y - V_j| r``: for all pairs of classes one product with ``K (K-1) / 2`` rows, instead
    of a (batch, K, features) tensor.

    Args:
        features: (batch, features).
        weight: ``V``, (classes, features).
        bias: (classes,) or ``None``.
        labels: (batch,).
    """
    classes = len(weight)
    first, second = torch.triu_indices(classes, classes, 1, device=weight.device)
    logits = F.linear(features.center, weight, bias)
    pairs = features.radius @ (weight[first] - weight[second]).abs().T
    place = torch.zeros(classes, classes, dtype=torch.long, device=weight.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=weight.device)
    radius = pairs.gather(1, place[labels]) * (torch.arange(classes, device=weight.device) != labels[:, None])
    return logits.gather(1, labels[:, None]) - logits, radius


def margins(features: Box, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Lower bounds of `margin_ball`'s margins."""
    center, radius = margin_ball(features, weight, bias, labels)
    return center - radius


def bounded_margins(graph: Graph, images: Tensor, box: Box, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One training pass: clean outputs, (batch, classes), and interval-bounded margins, (batch, classes).

    Every parametrization is evaluated once for both.

    Raises:
        ModelError: the model does not end in a linear layer.
    """
    with parametrize.cached():
        one = Pass(graph)
        outputs = one.run(images)
        center, radius = one.margins(one.enclosed(box), labels)
    return outputs, center - radius


def uncertified(lower: Tensor, labels: Tensor) -> Tensor:
    """Whether some margin of a sample, (batch, classes), is not positive; NaN is not."""
    others = F.one_hot(labels, lower.shape[1]).bool()
    return ~(lower.masked_fill(others, torch.inf) > 0).all(1)


def standard_loss(graph: Graph, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``CE(outputs)``, the mean over the batch, and for every sample whether it was classified wrongly."""
    with parametrize.cached():
        outputs = Pass(graph).run(images)
    return F.cross_entropy(outputs, labels), outputs.argmax(1) != labels


def certified_loss(
    graph: Graph, images: Tensor, box: Box, labels: Tensor, clean_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(1-κ) CE(-margins) + κ CE(outputs)``, the mean over the batch.

    Args:
        box: the perturbed inputs.
        clean_weight: ``κ`` in [0, 1].

    Returns:
        the loss, and for every sample whether it was classified wrongly and whether it was not certified.
    """
    outputs, lower = bounded_margins(graph, images, box, labels)
    loss = F.cross_entropy(-lower, labels)
    if clean_weight:
        loss = (1 - clean_weight) * loss + clean_weight * F.cross_entropy(outputs, labels)
    return loss, outputs.argmax(1) != labels, uncertified(lower, labels)
