"""What the papers' figures show of a model: bounds against depth and solver step, and the singular values of ``W``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from verideq.box import Box
from verideq.equilibrium import System
from verideq.graph import INPUT, trace
from verideq.training.loss import Pass

STEPS = 20
"""Solver steps that are looked at."""
SAMPLES = 64
"""Samples that bounds are averaged over."""


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, box: Box) -> dict[str, Any]:
    """Three figures of a model as numbers, batch norm with the statistics of these samples.

    Args:
        model: left as it is.
        images: (batch, *features).
        box: around them.

    Returns:
        JSON-ready: ``depth``: by node, the mean radius of its values over that of the input (CerDEQ, Figure 3; Wei &
        Kolter, Figure 2); ``steps``: by equilibrium, the mean width of the interval iterates after 0, 1, ... steps of
        the plain iteration from 0, ``null`` beyond float32; ``singular``: by equilibrium, the singular values of the
        stored ``W`` as a matrix with a row a channel, over the largest (CerDEQ, Figure 2).
    """
    # A copy of an observer would be one of all that it knows.
    observers = (getattr(module, "observer", None) for module in model.modules())
    graph = trace(copy.deepcopy(model, {id(observer): None for observer in observers}).train())
    for _, layer in graph.equilibria():
        layer.throw, layer.observer = False, None
    with parametrize.cached():
        one = Pass(graph)
        one.run(images)
        boxes = one.enclosed(box)
        width = box.radius.mean()
        steps, singular = {}, {}
        for node in graph.nodes:
            if node.operation.kind != "equilibrium":
                continue
            layer, v = dict(graph.equilibria())[node.name], boxes[node.inputs[0]]
            pair = torch.stack((v.center, v.radius))
            step = System(layer.operator(), pair, activation=layer.activation).stepper()
            x, widths = torch.zeros_like(pair), [0.0]
            for _ in range(STEPS):
                x = step(x)
                widths.append(float(2 * x[1].mean()))
            steps[node.name] = [_finite(value) for value in widths]
            weight = getattr(layer.fusion, "weight", None)
            if isinstance(weight, Tensor):
                values = torch.linalg.svdvals(weight.detach().double().flatten(1))
                singular[node.name] = (values / values[0]).tolist()
    depth = {name: _finite(float(b.radius.mean() / width)) for name, b in boxes.items() if name != INPUT}
    return {"depth": depth, "steps": steps, "singular": singular}


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
