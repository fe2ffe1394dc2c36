"""Attacked points for training: projected gradient ascent on the cross-entropy, and the small boxes of SABR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from verideq.box import Box
from verideq.graph import Graph
from verideq.graph.operations import evaluating
from verideq.training.loss import Pass
from verideq.training.tables import AttackTable


def attacked(
    graph: Graph, box: Box, labels: Tensor, table: AttackTable, noise: Tensor, *, mixed: bool = False
) -> Tensor:
    """The point of every box at which the cross-entropy is highest, of those that the steps find.

    Signed gradient ascent from uniform points of the box (Madry et al., ICLR 2018), the model in evaluation mode: batch
    norm takes its running statistics, and they do not move.

    Args:
        graph: of the model.
        box: where to look.
        labels: (batch,).
        table: how hard to look.
        noise: (restarts, batch, *features), uniform in [-1, 1].
        mixed: see `Pass`.
    """
    center, radius = box.center, box.radius
    best = center
    highest = torch.full((len(labels),), -torch.inf, dtype=center.dtype, device=center.device)
    free = [p for p in graph.parameters() if p.requires_grad]
    for p in free:  # gradients of the input alone
        p.requires_grad_(False)
    try:
        with evaluating(graph), parametrize.cached():
            for start in noise:
                x = center + start * radius
                for step in range(table.steps + 1):
                    x = x.detach().requires_grad_()
                    losses = F.cross_entropy(Pass(graph, mixed=mixed).run(x), labels, reduction="none")
                    higher = losses.detach() > highest
                    best = torch.where(higher.view(-1, *[1] * (x.dim() - 1)), x.detach(), best)
                    highest = torch.where(higher, losses.detach(), highest)
                    if step < table.steps:
                        (gradient,) = torch.autograd.grad(losses.sum(), x)
                        moved = x.detach() + table.step_size * radius * gradient.sign()
                        x = torch.minimum(torch.maximum(moved, box.lower), box.upper)
    finally:
        for p in free:
            p.requires_grad_(True)
    return best


def small_box(box: Box, point: Tensor, share: float) -> Box:
    """A box of `share` of the radius inside `box`, as near to being around `point` as fits (SABR, section 3)."""
    radius = share * box.radius
    center = torch.minimum(torch.maximum(point, box.lower + radius), box.upper - radius)
    return Box(center - radius, center + radius)
