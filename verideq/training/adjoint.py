"""The adjoint bound of a training pass: `verideq.certify.backward` in plain arithmetic, with gradients.

The same rules as a proof's, with the batch statistics of the pass for batch norm. Multipliers of an equilibrium are a
fixed point that is found without gradients and then applied once more with them: every multiplier is sound, so that
what is lost is a part of the gradient, not of the bound.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from verideq.box import Box
from verideq.certify.backward import Relaxed, Rule, Scene, crown, inner
from verideq.equilibrium import Equilibrium
from verideq.graph import INPUT, Graph, Node
from verideq.training.loss import Pass


class _Relaxed(Relaxed):
    """Slopes whose gradient is finite everywhere: that of a quotient of zeros is not, even where nothing takes it."""

    @staticmethod
    def _chord(rise: Tensor, width: Tensor, kinked: Tensor) -> Tensor:
        return torch.where(kinked, rise / torch.where(kinked, width, 1.0), 1.0)


class _Scene(Scene):
    """Boxes whose ends have gradients of their own."""

    def over_box(self, rows: Tensor, box: Box) -> Tensor:
        return inner(self.by_sample(rows), box, rigorous=False)


def _rule(steps: int) -> Rule:
    search = crown("adaptive", tol=1e-3, max_steps=steps)

    def rule(known: Relaxed, q: Tensor) -> Tensor:
        lower, upper = (side[:, None] / known.divisor() for side in known.slopes("adaptive"))
        if known.operator is not None:
            with torch.no_grad():
                g = search(known, q).flatten(0, 1)
            own = known.operator.diagonal()
            q = q + (known.operator.transpose().apply(g) - own * g).view_as(q)
        return torch.where(q > 0, lower, upper) * q

    return rule


def _fixed(node: Node, one: Pass) -> Node:
    """Batch norm with the statistics of the pass in place of the running ones."""
    if node.name not in one.statistics:
        return node
    module = node.module
    with torch.device("meta"):
        stand_in = type(module)(module.num_features, module.eps, affine=False)
    stand_in.running_mean, stand_in.running_var = one.statistics[node.name]
    for name in ("weight", "bias"):
        stand_in._parameters[name] = getattr(module, name)  # the model's own
    return Node(node.name, stand_in.eval(), node.inputs)


def adjoint_least(one: Pass, boxes: Mapping[str, Box], rows: Tensor, steps: int) -> Tensor:
    """Lower bounds of ``rows @ features`` for the input of the last layer: (batch, rows).

    Args:
        one: after `Pass.run`.
        boxes: of `Pass.enclosed`.
        rows: (batch, rows, features).
        steps: of the adjoint fixed point, at most.
    """
    nodes = [_fixed(node, one) for node in one.graph.nodes[:-1]]
    place = one.last.inputs[0]
    if place == INPUT:
        nodes = []
    relaxed: dict[str, Relaxed] = {}
    for node in nodes:
        box = boxes[node.inputs[0]]
        if isinstance(node.module, nn.ReLU):
            relaxed[node.name] = _Relaxed(node, box, boxes[node.name])
        elif isinstance(node.module, Equilibrium):
            # Rows are solved for their own unknowns, as in a proof.
            operator, z = node.module.operator(), boxes[node.name]
            solved, factor = operator.solved()
            center = solved.apply(z.center) + factor * box.center
            radius = solved.absolute().apply(z.radius) + factor * box.radius
            pre, ceiling = Box(center - radius, center + radius), node.module.activation.ceiling
            relaxed[node.name] = _Relaxed(node, pre, z, operator, ceiling=ceiling)
    if not nodes:
        q = boxes[INPUT]
        least: Tensor = (rows @ q.center[:, :, None] - rows.abs() @ q.radius[:, :, None])[:, :, 0]
        return least
    graph = Graph(nodes)
    scene = _Scene(graph, boxes, relaxed, rigorous=False)
    wanted = rows.reshape(-1, *boxes[place].lower.shape[1:])
    bound, _ = scene.least({place: wanted}, dict.fromkeys(relaxed, _rule(steps)))
    return bound


def adjoint_margins(one: Pass, boxes: Mapping[str, Box], labels: Tensor, steps: int) -> Tensor:
    """Lower bounds of ``f_y - f_j``, (batch, classes), zero at the label: a row a class."""
    weight, bias = _last(one)
    rows = weight[labels][:, None] - weight[None]
    bound = adjoint_least(one, boxes, rows, steps)
    if bias is not None:
        bound = bound + bias[labels][:, None] - bias
    own = torch.arange(len(weight), device=labels.device) == labels[:, None]
    return torch.where(own, 0.0, bound)


def adjoint_sum(
    one: Pass, boxes: Mapping[str, Box], labels: Tensor, center: Tensor, radius: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """An upper bound of ``S = Σ_j exp(f_j - f_y)`` by one row a sample (loss fusion; Xu et al., NeurIPS 2020).

    Over ``d_j = f_j - f_y ∈ [L_j, U_j]`` each exponential is below its chord, ``e^L + a (d - L)``, so that the adjoint
    bound of the one row ``Σ_j a_j (C_j - C_y)`` is enough. ``exp`` is taken after a shift by the largest ``U``.

    Args:
        center: of the interval margins ``f_y - f_j``, (batch, classes).
        radius: theirs.

    Returns:
        ``log S`` from above, by the adjoint bound and by intervals alone, both as (the bound of ``S``) after the shift,
        and the shift: ``(2, batch)`` and ``(batch,)``.
    """
    weight, bias = _last(one)
    upper, lower = radius - center, -center - radius
    shift = upper.detach().amax(1)
    high, low = (upper - shift[:, None]).exp(), (lower - shift[:, None]).exp()
    width = 2 * radius
    narrow = width < 1e-4  # there the chord's slope is the exponential itself
    slope = torch.where(narrow, high, (high - low) / torch.where(narrow, 1.0, width))
    own = torch.arange(len(weight), device=labels.device) == labels[:, None]
    slope = torch.where(own, 0.0, slope)
    row = (slope.sum(1, keepdim=True) * weight[labels] - slope @ weight)[:, None]
    least = adjoint_least(one, boxes, row, steps)[:, 0]
    if bias is not None:
        least = least + slope.sum(1) * bias[labels] - slope @ bias
    # Below the chord, and from a slope that is too steep where the interval is narrow nothing is lost but its width.
    start = torch.where(own, low, low - slope * lower).sum(1)
    return torch.stack((start - least, high.sum(1))), shift


def _last(one: Pass) -> tuple[Tensor, Tensor | None]:
    module = one.last.module
    weight: Tensor = module.weight  # type: ignore[assignment]  # `Pass.margins` has seen that it is linear
    bias: Tensor | None = module.bias  # type: ignore[assignment]  # likewise
    return weight, bias
