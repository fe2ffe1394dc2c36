"""The losses of adversarial training against references of their own: what is crafted, by whom, and what is drawn."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from verideq.equilibrium import DEQ, Broyden, Implicit, Phantom
from verideq.equilibrium.dynamics import Injected
from verideq.equilibrium.solvers import Solution
from verideq.training.adversarial import LOSSES, AdversarialLoss, Adversary, pgd_at_loss, trades_loss

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Watched(nn.Module):
    """A network that writes down what it is shown, and in which mode."""

    def __init__(self, inputs: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8)
        layers = (nn.Linear(inputs, 8), self.norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.net = nn.Sequential(*layers).double()
        with torch.no_grad():  # statistics that no batch of these tests has
            self.norm.running_mean.normal_()  # type: ignore[union-attr]  # tracked
            self.norm.running_var.uniform_(0.3, 0.6)  # type: ignore[union-attr]  # tracked
        self.trained: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        (self.trained if self.training else self.evaluated).append(x.detach().clone())
        outputs: Tensor = self.net(x)
        return outputs


def batch(features: int = 5) -> Tensor:
    return torch.rand(6, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entropy(outputs: Tensor) -> Tensor:
    """Of the labels, the mean."""
    return torch.logsumexp(outputs, 1).sub(outputs[torch.arange(6), LABELS]).mean()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p ‖ q)`` of the softmax of outputs, the mean of the batch."""
    ratio = torch.softmax(p, 1).log() - torch.softmax(q, 1).log()
    return (torch.softmax(p, 1) * ratio).sum() / len(p)


def climbed(loss: Callable[[Tensor], Tensor], images: Tensor, start: Tensor, adversary: Adversary) -> Tensor:
    """Projected gradient ascent, sample by sample in its geometry."""
    eps, step = adversary.eps, adversary.step or adversary.eps / 4

    def inside(x: Tensor) -> Tensor:
        rows = []
        for own, image in zip(x, images, strict=True):
            shift = own - image
            if adversary.norm == "linf":
                shift = shift.clamp(-eps, eps)
            elif float(shift.norm()) > eps:
                shift = shift * eps / shift.norm()
            rows.append(image + shift if adversary.clip is None else (image + shift).clamp(*adversary.clip))
        return torch.stack(rows)

    x = inside(start)
    for _ in range(adversary.steps):
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(at), at)
        assert float(slope.abs().min()) > 1e-9  # no sign is a matter of rounding
        linf = adversary.norm == "linf"
        x = inside(x + step * torch.stack([g.sign() if linf else g / g.norm() for g in slope]))
    return x


def assert_same(loss: Tensor, model: nn.Module, wanted: Tensor, twin: nn.Module) -> None:
    """The values and the gradients of all parameters."""
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    found = torch.autograd.grad(loss, list(model.parameters()))
    for mine, other in zip(found, torch.autograd.grad(wanted, list(twin.parameters())), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
        assert float(mine.abs().max()) > 1e-4 or mine.shape == (8,)  # a bias before a batch norm has none


ADVERSARIES = [Adversary(0.1, 5), Adversary(0.1, 3, step=0.05, clip=None), Adversary(0.1, 6, norm="l2")]


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=["linf", "two steps a radius", "l2"])
def test_pgd_at_is_the_entropy_of_what_its_adversary_climbs_to(adversary: Adversary) -> None:
    model, images = Watched().train(), batch()
    twin = copy.deepcopy(model)
    loss = pgd_at_loss(model, images, LABELS, adversary, draw(), crafted=model)
    assert len(model.evaluated) == adversary.steps
    assert bool((model.evaluated[0] != images).any())
    found = climbed(lambda x: entropy(twin.eval()(x)), images, model.evaluated[0], adversary)
    torch.testing.assert_close(model.trained, [found], rtol=0, atol=1e-10)
    assert_same(loss, model, entropy(twin.train()(found)), twin)


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=["linf", "two steps a radius", "l2"])
def test_trades_weighs_the_divergence_that_its_adversary_climbs(adversary: Adversary) -> None:
    model, images = Watched().train(), batch()
    twin = copy.deepcopy(model)
    loss = trades_loss(model, images, LABELS, adversary, draw(), crafted=model, weight=3.0)
    shown, start = model.evaluated[:2]
    assert len(model.evaluated) == adversary.steps + 1
    assert torch.equal(shown, images)
    target = twin.eval()(images).detach()
    found = climbed(lambda x: divergence(target, twin.eval()(x)), images, start, adversary)
    torch.testing.assert_close(model.trained, [images, found], rtol=0, atol=1e-10)
    clean = twin.train()(images)
    assert_same(loss, model, entropy(clean) + 3.0 * divergence(clean, twin(found)), twin)


LOSS_OF = {"pgd-at": pgd_at_loss, "trades": trades_loss}


@pytest.mark.parametrize("kind", LOSS_OF)
def test_what_is_random_in_training_is_none_of_the_adversarys_business(kind: str) -> None:
    images, found = batch(), []
    for seed in (1, 2):
        model = Watched(dropout=0.5).train()
        model.net[0].eval()  # frozen by whoever trains
        torch.manual_seed(seed)
        LOSS_OF[kind](model, images, LABELS, Adversary(0.1, 4), draw(), crafted=model)
        found.append(model.trained[-1])
        assert int(model.norm.num_batches_tracked) == len(model.trained) == (1 if kind == "pgd-at" else 2)  # type: ignore[arg-type]  # tracked
        assert model.training and model.norm.training and not model.net[0].training
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", LOSS_OF)
def test_an_adversary_starts_from_noise(kind: str) -> None:
    """Uniform in the ball for PGD-AT, a thousandth of normal noise for TRADES; one step that hardly moves."""
    images, points = batch(300), []
    for seed in (0, 0, 1):
        model = Watched(300).train()
        adversary = Adversary(0.1, 1, step=1e-9, clip=None)
        LOSS_OF[kind](model, images, LABELS, adversary, draw(seed), crafted=model)
        points.append(model.trained[-1])
    assert torch.equal(points[0], points[1])
    assert not torch.allclose(points[0], points[2], atol=1e-5)
    noise = (points[0] - images) / (0.1 if kind == "pgd-at" else 1e-3)
    deviation, farthest = (3**-0.5, (0.98, 1.0 + 1e-6)) if kind == "pgd-at" else (1.0, (2.5, 6.0))
    assert abs(float(noise.mean())) < 0.1
    assert float(noise.std()) == pytest.approx(deviation, rel=0.1)
    for side in (noise, -noise):
        assert farthest[0] < float(side.max()) <= farthest[1]


# At random


class Counted(DEQ):
    """A general DEQ that writes down after how many steps its solver was stopped."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(5, 4), lambda z, v: torch.tanh(0.6 * z + v), nn.Linear(4, 3), solver=Broyden(max_steps=20)
        )
        self.double()
        self.trained: list[int] = []
        self.evaluated: list[int] = []

    def solve(self, injected: Injected) -> Solution:
        (self.trained if self.training else self.evaluated).append(self.solver.max_steps)
        return super().solve(injected)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_forward_pass_stops_at_a_state_of_its_own(kind: str) -> None:
    model, generator, calls = Counted().train(), draw(), 60
    loss = AdversarialLoss(kind, Adversary(0.1, 2), random_states=5)
    for _ in range(calls):
        loss(model, batch(), LABELS, generator)
    passes = {"clean": (1, 0), "pgd-at": (1, 2), "trades": (2, 3)}[kind]
    for seen, count in zip((model.trained, model.evaluated), passes, strict=True):
        assert len(seen) == calls * count
        if not count:
            continue
        times = Counter(seen)
        assert sorted(times) == [1, 2, 3, 4, 5]
        assert min(times.values()) > calls * count / 5 / 3
    if model.evaluated:
        by_call = [
            {*model.trained[i * passes[0] : (i + 1) * passes[0]], *model.evaluated[i * passes[1] : (i + 1) * passes[1]]}
            for i in range(calls)
        ]
        assert sum(len(states) > 1 for states in by_call) > calls / 2
    assert model.solver == Broyden(max_steps=20)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_jacobian_penalty_is_paid_in_its_share_of_the_steps(share: float) -> None:
    model, generator, calls = Counted().train(), draw(), 240
    plain = float(AdversarialLoss("clean", Adversary(0.1))(model, batch(), LABELS, generator).detach())
    loss = AdversarialLoss("clean", Adversary(0.1), jacobian=0.5, jacobian_share=share)
    added = [float(loss(model, batch(), LABELS, generator).detach()) - plain for _ in range(calls)]
    paid = [value for value in added if abs(value) > 1e-9]
    assert abs(len(paid) / calls - share) < (0.1 if 0 < share < 1 else 1e-9)
    if paid:
        injected = model.inject(batch())
        with torch.no_grad():
            slopes = 0.6 * (1 - model.step(model.settle(injected), injected) ** 2)  # of a diagonal
        assert sum(paid) / len(paid) == pytest.approx(0.5 * float(slopes.square().mean()), rel=0.2)


@pytest.mark.parametrize("kind", ["pgd-at", "trades"])
def test_an_adversary_climbs_the_gradient_that_it_believes(kind: str) -> None:
    torch.manual_seed(0)
    W = 3 * torch.randn(8, 8, dtype=torch.float64)
    model = DEQ(nn.Linear(5, 8), lambda z, v: torch.tanh(z @ W + v), nn.Linear(8, 3), gradient=Phantom(2, 0.5)).double()
    believed, seen = Implicit(Broyden(max_steps=3)), Counter[tuple[bool, object]]()
    model.register_forward_pre_hook(lambda *_: seen.update([(model.training, model.gradient)]))
    adversary = Adversary(0.1, 3)
    loss = AdversarialLoss(kind, adversary, climbed=believed)(model, batch(), LABELS, draw())
    loss.backward()  # through the model's own
    assert set(seen) == {(False, believed), (True, model.gradient)} and model.gradient == Phantom(2, 0.5)
    plain = AdversarialLoss(kind, adversary)(model, batch(), LABELS, draw())
    assert float(loss.detach()) != float(plain.detach())
