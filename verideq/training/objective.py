"""The loss of one training step: interval, adjoint, attacked and clean parts as a recipe mixes them, and penalties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from verideq.box import Box
from verideq.data.dataset import Clip
from verideq.distributed import ALONE, World
from verideq.graph import INPUT, Graph
from verideq.training.adjoint import adjoint_margins, adjoint_sum
from verideq.training.loss import Pass, uncertified
from verideq.training.penalties import bound_penalty, jacobian_penalty, l1_penalty
from verideq.training.points import attacked, small_box
from verideq.training.recipe import Recipe
from verideq.training.tables import at_radius

SMALLEST = 1e-6
"""The radius of the boxes that `bound_penalty` looks at while the radius is 0 (Shi et al.)."""


@dataclass(frozen=True)
class Terms:
    """The loss of a step, and what it shows.

    Args:
        loss: its sum over the processes is the loss of the whole batch.
        parts: the parts that were computed, by name, before they are weighted: ``certified, clean, attacked, penalty``.
        wrong: (batch,) classified wrongly.
        open: (batch,) not certified by intervals at the radius of the step; ``None`` where there are no intervals.
        growth: mean radius of the features over that of the input; ``None`` likewise.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    wrong: Tensor
    open: Tensor | None
    growth: Tensor | None


@dataclass(frozen=True)
class Objective:
    """A recipe's loss on a model.

    Args:
        recipe: the weights of the parts.
        graph: of the model, in training mode.
        clip: the valid range of inputs.
        weights: (*features), radii in units of eps.
        world: the processes that share a batch.
    """

    recipe: Recipe
    graph: Graph
    clip: Clip
    weights: Tensor | None = None
    world: World = ALONE

    def box(self, images: Tensor, eps: float) -> Box:
        """The inputs within `eps` of the images."""
        reach = eps if self.weights is None else eps * self.weights.to(images)
        lower, upper = images - reach, images + reach
        return Box(lower, upper) if self.clip is None else Box(lower.clamp(*self.clip), upper.clamp(*self.clip))

    def __call__(self, images: Tensor, labels: Tensor, eps: float, draw: torch.Generator) -> Terms:
        """The loss of a batch at the radius `eps`.

        Args:
            images: (batch, *features), this process's part.
            labels: (batch,).
            eps: of this step.
            draw: on the CPU, the same in every process: what is drawn is drawn for the whole batch.
        """
        recipe, certified = self.recipe, self.recipe.loss == "interval"
        with parametrize.cached():
            one = Pass(self.graph, self.world, mixed=recipe.precision == "mixed")
            outputs = one.run(images)
            wrong = outputs.argmax(1) != labels
            parts = {"clean": F.cross_entropy(outputs, labels)}
            loss, open_, boxes = parts["clean"], wrong if certified else None, None
            growing = certified and recipe.penalty.bounds > 0 and eps < recipe.radius
            if certified and eps > 0:
                loss, open_, boxes = self._certified(one, images, labels, eps, draw, parts)
            elif growing:
                boxes = one.enclosed(self.box(images, SMALLEST))
            shared = loss.new_zeros(())  # the same in every process
            if growing and boxes is not None:
                share = recipe.penalty.bounds * (1 - eps / recipe.radius)
                shared = shared + share * bound_penalty(one, boxes, recipe.penalty.threshold)
            if recipe.penalty.l1:
                shared = shared + recipe.penalty.l1 * l1_penalty(one)
            if recipe.penalty.jacobian and float(torch.rand((), generator=draw)) < recipe.penalty.jacobian_share:
                shared = shared + recipe.penalty.jacobian * jacobian_penalty(one, draw)
        if shared.requires_grad:
            parts["penalty"] = shared
        growth = None if boxes is None else _growth(one, boxes)
        total = (loss + shared) / self.world.size
        return Terms(total, {name: part.detach() for name, part in parts.items()}, wrong, open_, growth)

    def _certified(
        self, one: Pass, images: Tensor, labels: Tensor, eps: float, draw: torch.Generator, parts: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Box]]:
        """The loss at a positive radius, what is not certified, and the boxes it was read from."""
        recipe, box, point = self.recipe, self.box(images, eps), None
        adversary, final = recipe.attack, recipe.radius
        if adversary.used:
            where = box if adversary.reach == 1 else self.box(images, eps * adversary.reach)
            shape = (adversary.restarts, self.world.size * len(images), *images.shape[1:])
            noise = (2 * torch.rand(shape, generator=draw) - 1)[:, self.world.part(shape[1])].to(images)
            point = attacked(self.graph, where, labels, adversary, noise, mixed=one.mixed)
            box = small_box(box, point, adversary.box) if adversary.box < 1 else box
        boxes = one.enclosed(box)
        center, radius = one.margins(boxes, labels)
        parts["certified"] = self._bounded(
            one, boxes, labels, center, radius, at_radius(recipe.adjoint.weight, eps, final)
        )
        loss = parts["certified"]
        share = at_radius(adversary.weight, eps, final)
        if point is not None and share:
            parts["attacked"] = F.cross_entropy(one.outputs(point), labels)
            loss = (1 - share) * loss + share * parts["attacked"]
        kappa = at_radius(recipe.clean_weight, eps, final)
        if kappa:
            loss = (1 - kappa) * loss + kappa * parts["clean"]
        return loss, uncertified((center - radius).detach(), labels), boxes

    def _bounded(
        self, one: Pass, enclosed: dict[str, Box], labels: Tensor, center: Tensor, radius: Tensor, beta: float
    ) -> Tensor:
        """The cross-entropy of the bounded margins, `beta` of it by the adjoint bound."""
        table = self.recipe.adjoint
        if not beta:
            return F.cross_entropy(radius - center, labels)
        if table.fused:
            (tight, plain), shift = adjoint_sum(one, enclosed, labels, center, radius, table.steps)
            mixed = beta * torch.minimum(tight, plain) + (1 - beta) * plain
            bound: Tensor = mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log() + shift
            return bound.mean()
        margins = beta * adjoint_margins(one, enclosed, labels, table.steps) + (1 - beta) * (center - radius)
        return F.cross_entropy(-margins, labels)


def _growth(one: Pass, boxes: Mapping[str, Box]) -> Tensor:
    features, inputs = boxes[one.last.inputs[0]].radius, boxes[INPUT].radius
    return torch.div(features.detach().mean(), inputs.mean())
