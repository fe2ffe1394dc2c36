"""The losses: by interval bounds with gradients, the last linear layer elided (Wei & Kolter, section 4), and clean."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from verideq.box import Box
from verideq.certify.interval import Arithmetic, propagate
from verideq.equilibrium import Equilibrium
from verideq.errors import ModelError
from verideq.graph import Graph, Node

Map = Callable[[Tensor], Tensor]


class TrainingArithmetic(Arithmetic):
    """The rules of the interval bound in plain arithmetic: any dtype, with gradients, rounding ignored. No proof.

    Args:
        clean: the values of the clean pass by node name: batch norm takes its statistics from them while it trains,
            for the clean branch and the bounds alike.
    """

    def __init__(self, clean: Mapping[str, Tensor]) -> None:
        super().__init__({})
        self.clean = clean

    def affine(
        self, box: Box, apply: Map, absolute: Map, constants: Tensor | None, terms: int, *factors: Tensor
    ) -> Box:
        center, radius = apply(box.center), absolute(box.radius)
        return Box(center - radius, center + radius)

    def add(self, a: Box, b: Box) -> Box:
        return Box(a.lower + b.lower, a.upper + b.upper)

    def batch_norm(self, node: Node, box: Box) -> Box:
        if not node.module.training:
            return super().batch_norm(node, box)
        values = self.clean[node.inputs[0]]
        axes = [0, *range(2, values.dim())]
        module: nn.BatchNorm2d = node.module  # type: ignore[assignment]  # the node's rule is batch norm's
        return self.standardize(box, values.mean(axes), values.var(axes, correction=0), module)

    def equilibrium(self, node: Node, layer: Equilibrium, box: Box) -> Box:
        center, radius = layer.equilibrate_ball(box.center, box.radius)
        return Box(center - radius, center + radius)


def margins(features: Box, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Lower bounds of ``f_y - f_j`` for ``f = V z + b`` and ``z`` in a box: (batch, classes), zero at the label.

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
    return logits.gather(1, labels[:, None]) - logits - radius


def bounded_margins(graph: Graph, images: Tensor, box: Box, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One training pass: clean outputs, (batch, classes), and interval-bounded margins, (batch, classes).

    Every parametrization is evaluated once for both.

    Raises:
        ModelError: the model does not end in a linear layer.
    """
    last = graph.nodes[-1]
    if not isinstance(last.module, nn.Linear):
        raise ModelError(f"certified training elides the last linear layer; the model ends in {last.operation.kind}")
    with parametrize.cached():
        clean = graph.values(images)
        features = propagate(graph, box, TrainingArithmetic(clean), until=last)
        return clean[last.name], margins(features, last.module.weight, last.module.bias, labels)


def standard_loss(graph: Graph, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``CE(outputs)``, the mean over the batch, and for every sample whether it was classified wrongly."""
    with parametrize.cached():
        outputs = graph.values(images)[graph.nodes[-1].name]
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
    others = F.one_hot(labels, lower.shape[1]).bool()
    return loss, outputs.argmax(1) != labels, ~(lower.masked_fill(others, torch.inf) > 0).all(1)
