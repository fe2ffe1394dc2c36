"""Adversarial training: PGD-AT, TRADES, losses at random intermediate states, Jacobian regularisation.

Of networks without an equilibrium, of models with a gauge and of general ones alike. The papers': Madry et al. (ICLR
2018), Zhang et al. (ICML 2019), Yang et al. (NeurIPS 2022 and ICML 2023), Bai, Koltun & Kolter (ICML 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.attacks.ball import Ball
from verideq.equilibrium import DEQ, Broyden, Equilibrium, Gradient
from verideq.errors import InputError, UnknownName
from verideq.region import check_norm

Outputs = Callable[[Tensor], Tensor]
LOSSES = ("pgd-at", "trades", "clean")


@dataclass(frozen=True)
class Adversary:
    """How adversarial images are crafted while training: by steps of the norm, the model in evaluation mode.

    Args:
        eps: the radius, in pixel units.
        steps: of an attack.
        step: the size of one; by default a quarter of eps.
        clip: the pixel range, or ``None``.
        norm: ``linf``, by the gradient's signs, or ``l2``, by its direction.
    """

    eps: float
    steps: int = 10
    step: float = 0.0
    clip: tuple[float, float] | None = (0.0, 1.0)
    norm: str = "linf"

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if not self.eps > 0 or self.steps < 1 or self.step < 0:
            raise InputError(f"an adversary has a positive eps, 1 or more steps and a step of 0 or more; got {self}")

    def craft(self, outputs: Outputs, images: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Climb a loss of the outputs, summed over the batch, from a start.

        Args:
            outputs: of the model, in evaluation mode.
            images: (batch, *features).
            start: likewise.
            loss: of outputs, a number.
        """
        step, ball = self.step or self.eps / 4, Ball(self.eps, self.norm, self.clip)
        x = ball.project(start, images)
        for _ in range(self.steps):
            at = x.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(outputs(at)), at)
            x = ball.project(x + step * ball.direction(gradient), images)
        return x.detach()


def pgd_at_loss(
    model: nn.Module, images: Tensor, labels: Tensor, adversary: Adversary, draw: torch.Generator, *, crafted: Outputs
) -> Tensor:
    """The cross-entropy on adversarial images alone.

    Args:
        model: in training mode.
        adversary: starts at uniform noise of its radius, projected into the ball.
        draw: of the start, on the CPU.
        crafted: the outputs that the adversary climbs.
    """
    noise = _uniform(images, draw) * adversary.eps
    with _evaluating(model):
        found = adversary.craft(crafted, images, images + noise, lambda f: F.cross_entropy(f, labels, reduction="sum"))
    outputs: Tensor = model(found)
    return F.cross_entropy(outputs, labels)


def trades_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    adversary: Adversary,
    draw: torch.Generator,
    *,
    crafted: Outputs,
    weight: float = 6.0,
) -> Tensor:
    """``CE(clean) + λ KL(clean ‖ adversarial) / batch``, gradients through both; the adversary climbs the divergence.

    Args:
        weight: ``λ``; the others as in `pgd_at_loss`. The start is a thousandth of normal noise.
    """
    noise = 1e-3 * torch.randn(images.shape, generator=draw).to(images)
    with _evaluating(model):
        with torch.no_grad():
            target = crafted(images).log_softmax(1)

        def divergence_of(f: Tensor) -> Tensor:
            return F.kl_div(f.log_softmax(1), target, reduction="sum", log_target=True)

        found = adversary.craft(crafted, images, images + noise, divergence_of)
    clean = model(images)
    moved = model(found).log_softmax(1)
    divergence = F.kl_div(moved, clean.log_softmax(1), reduction="sum", log_target=True) / len(images)
    return F.cross_entropy(clean, labels) + weight * divergence


def jacobian_penalty(model: nn.Module, images: Tensor, draw: torch.Generator, probes: int = 2) -> Tensor:
    """Hutchinson's estimate of ``‖∂f/∂z‖²_F / units`` at the equilibria: the mean of ``(vᵀ J)²``, ``v`` normal.

    Of a `DEQ` at its own state; of other models summed over their equilibrium layers.

    Args:
        draw: of ``v``, on the CPU.
        probes: the number of ``v``.
    """
    opened: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    if isinstance(model, DEQ):
        injected = model.inject(images)
        opened.append((lambda z: model.step(z, injected), model.settle(injected)))
    else:
        opened += _layers(model, images)
    total = images.new_zeros(())
    for step, z in opened:
        at = z.detach().requires_grad_()
        image = step(at)
        for _ in range(probes):
            v = torch.randn(image.shape, generator=draw).to(image)
            (pulled,) = torch.autograd.grad((image * v).sum(), at, create_graph=True)
            total = total + pulled.square().mean() / probes
    if not opened:
        raise InputError("Jacobian regularisation needs a model with an equilibrium")
    return total


def _layers(model: nn.Module, images: Tensor) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The step and the state of every equilibrium layer, by watching a forward pass."""
    seen: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, Equilibrium):
            v = layer.injection(inputs[0])
            operator = layer.operator()
            seen.append((lambda z: layer.activation(operator.apply(z) + v), output))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, Equilibrium)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def truncated_outputs(model: DEQ, images: Tensor, layers: int = 8) -> Tensor:
    """The outputs of the weight-tied network of so many layers from zero, differentiated through: for pre-training."""
    injected = model.inject(images)
    z = model.start(injected)
    for _ in range(layers):
        z = model.step(z, injected)
    return model.head(z, injected)


@contextmanager
def stopped_at(model: nn.Module, steps: int) -> Iterator[None]:
    """Every equilibrium of the model solved by so many Broyden steps and no more: the state that they end in is random
    over a training run, which is the loss at random intermediate states (Yang et al. 2023, equation 10).
    """
    owners = [m for m in model.modules() if isinstance(m, (DEQ, Equilibrium))]
    before = [(m.solver, getattr(m, "throw", None)) for m in owners]
    try:
        for m in owners:
            m.solver = Broyden(tol=0.0, max_steps=steps)
            if isinstance(m, Equilibrium):
                m.throw = False
        yield
    finally:
        for m, (solver, throw) in zip(owners, before, strict=True):
            m.solver = solver
            if isinstance(m, Equilibrium):
                m.throw = bool(throw)


@contextmanager
def climbed_by(model: nn.Module, gradient: Gradient) -> Iterator[None]:
    """Every equilibrium of the model differentiated in this way: what an adversary sees who believes in it."""
    owners = [m for m in model.modules() if isinstance(m, (DEQ, Equilibrium))]
    before = [m.gradient for m in owners]
    try:
        for m in owners:
            m.gradient = gradient
        yield
    finally:
        for m, own in zip(owners, before, strict=True):
            m.gradient = own


@dataclass(frozen=True)
class AdversarialLoss:
    """One step of adversarial training.

    Args:
        kind: ``pgd-at``, ``trades`` or ``clean``.
        adversary: of both.
        trades: the weight of the divergence.
        random_states: the ``N`` of the loss at random intermediate states, drawn anew for every forward pass of the
            batch, adversarial ones too; 0: the model's own state.
        jacobian: the weight of the Jacobian penalty.
        jacobian_share: of the steps that have it.
        climbed: the gradient that the adversary climbs; ``None``: the model's own.
    """

    kind: str
    adversary: Adversary
    trades: float = 6.0
    random_states: int = 0
    jacobian: float = 0.0
    jacobian_share: float = 1.0
    climbed: Gradient | None = None

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise UnknownName("adversarial loss", self.kind, LOSSES)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        """The loss of a batch; `draw` is on the CPU."""
        shown: nn.Module = _Random(model, self.random_states, draw) if self.random_states else model

        def crafted(x: Tensor) -> Tensor:
            with nullcontext() if self.climbed is None else climbed_by(model, self.climbed):
                outputs: Tensor = shown(x)
            return outputs

        if self.kind == "clean":
            loss = F.cross_entropy(shown(images), labels)
        elif self.kind == "pgd-at":
            loss = pgd_at_loss(shown, images, labels, self.adversary, draw, crafted=crafted)
        else:
            loss = trades_loss(shown, images, labels, self.adversary, draw, crafted=crafted, weight=self.trades)
        if self.jacobian and float(torch.rand((), generator=draw)) < self.jacobian_share:
            loss = loss + self.jacobian * jacobian_penalty(model, images, draw)
        return loss


class _Random(nn.Module):
    """A model every forward pass of which ends at a state of its own."""

    def __init__(self, model: nn.Module, states: int, draw: torch.Generator) -> None:
        super().__init__()
        self.model, self.states, self.draw = model, states, draw
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        with stopped_at(self.model, int(torch.randint(1, self.states + 1, (), generator=self.draw))):
            outputs: Tensor = self.model(x)
        return outputs


def cosine(step: int, total: int, first: float, last: float = 1e-6) -> float:
    """A learning rate that falls along half a cosine, step by step.

    >>> cosine(0, 10, 1.0), round(cosine(10, 10, 1.0), 9)
    (1.0, 1e-06)
    """
    return last + (first - last) * (1 + math.cos(math.pi * min(step, total) / total)) / 2


def _uniform(images: Tensor, draw: torch.Generator) -> Tensor:
    return (2 * torch.rand(images.shape, generator=draw) - 1).to(images)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients for the parameters."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for p, want in wanted:
            p.requires_grad_(want)
