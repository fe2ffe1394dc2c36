"""What is added to a loss: the regularisers of Shi et al. (NeurIPS 2021), L1, and Jacobian regularisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from verideq.box import Box
from verideq.equilibrium import RELU, Equilibrium, FeedbackFusion
from verideq.errors import InputError
from verideq.graph import INPUT, Node
from verideq.training.loss import Ball, Pass


def bound_penalty(one: Pass, boxes: Mapping[str, Box], threshold: float) -> Tensor:
    """``L_tight + L_relu`` over the ``m`` ReLUs of a model, equilibria among them, from the boxes of what they rectify.

    With ``c`` and ``r`` their centres and radii, each statistic over the whole batch and all units, ``r_i = mean r``,
    ``r_0`` that of the normalised input::

        L_tight = 1/(m τ) Σ_i max(0, τ - r_0 / r_i)
        L_relu  = 1/(m τ) Σ_i max(0, τ - a_i) + max(0, τ - v_i)

    ``a`` compares the mean of the active and of the inactive units, ``v`` their spread: the smaller of ``q`` and
    ``1/q`` for ``q = Σ_{l>0} c / -Σ_{u<0} c`` and ``q = Σ_{l>0} (c - c̄)² / Σ_{u<0} (c - c̄)²``. Where one side has no
    unit the term is dropped.

    Args:
        one: after `Pass.run`.
        boxes: of `Pass.enclosed`.
        threshold: ``τ``.

    Raises:
        InputError: an equilibrium that is no ReLU.
    """
    nodes = [node for node in one.graph.nodes if isinstance(node.module, (nn.ReLU, Equilibrium))]
    first = one.graph.nodes[0]
    given = boxes[first.name if first.operation.kind == "normalize" and first.name in boxes else INPUT]
    width = _mean(one, given.radius)
    total = width.new_zeros(())
    for node in nodes:
        if isinstance(node.module, Equilibrium) and node.module.activation != RELU:
            raise InputError(
                f"the tightness and ReLU regularisers are for ReLU equilibria; {node.name} is "
                f"{node.module.activation.name}: leave them out"
            )
        box = _rectified(node, boxes)
        center, radius = box.center, box.radius
        total = total + (threshold - width / _mean(one, radius)).clamp(min=0)
        active, inactive = center > radius, center < -radius
        away = (center - _mean(one, center)).square()
        for quantity in (center.abs(), away):
            up, down = (one.world.total(torch.where(side, quantity, 0.0).sum()) for side in (active, inactive))
            both = (up > 0) & (down > 0)
            least = torch.minimum(up, down) / torch.where(both, torch.maximum(up, down), 1.0)
            total = total + torch.where(both, (threshold - least).clamp(min=0), 0.0)
    return total / (max(len(nodes), 1) * threshold)


def _mean(one: Pass, x: Tensor) -> Tensor:
    return one.world.total(x.sum()) / (x.numel() * one.world.size)


def _rectified(node: Node, boxes: Mapping[str, Box]) -> Box:
    """What a ReLU or an equilibrium rectifies: ``W z + v`` for the latter."""
    box = boxes[node.inputs[0]]
    if not isinstance(node.module, Equilibrium):
        return box
    operator, state = node.module.operator(), boxes[node.name]
    center = operator.apply(state.center) + box.center
    return Ball(center, operator.absolute().apply(state.radius) + box.radius)


def l1_penalty(one: Pass) -> Tensor:
    """The sum of the absolute weights of linear and convolutional layers, of every stored ``W`` and of couplings."""
    total = one.clean[INPUT].new_zeros(())
    for node in one.graph.nodes:
        layer = node.module.get_submodule("fusion") if isinstance(node.module, Equilibrium) else node.module
        parts = layer.operator().couplings if isinstance(layer, FeedbackFusion) else [layer]
        for part in parts:
            weight = getattr(part, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1:
                total = total + weight.abs().sum()
    return total


def jacobian_penalty(one: Pass, draw: torch.Generator) -> Tensor:
    """The mean square of ``vᵀ ∂F/∂z`` at the clean equilibria, ``v`` normal, summed over the equilibria.

    An estimate of ``‖∂F/∂z‖²_F / units`` (Bai, Koltun & Kolter, ICML 2021, equation 5, with one ``v``). The derivative
    ``D W`` is that of the layer as its weights are stored; which units are active is taken as given.

    Args:
        one: after `Pass.run`.
        draw: of ``v``, on the CPU: for the samples of all processes.
    """
    total = one.clean[INPUT].new_zeros(())
    for node in one.graph.nodes:
        if not isinstance(node.module, Equilibrium):
            continue
        z = one.clean[node.name].detach()
        shape = (one.world.size * len(z), *z.shape[1:])
        v = torch.randn(shape, generator=draw)[one.world.part(shape[0])].to(z)
        layer = node.module
        pulled = layer.operator().transpose().apply(torch.where(layer.activation.active(z), v, 0.0))
        total = total + _mean(one, pulled.square())
    return total
