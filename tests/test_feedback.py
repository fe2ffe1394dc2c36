"""Blocks that are coupled to the next one and back: the operator, its gauge, the class that has one, its file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from verideq import gauge, load_model, save_model
from verideq.cli.inspect import describe
from verideq.equilibrium import Coupling, Equilibrium, Feedback, FeedbackFusion
from verideq.errors import ModelError, NoGaugeError, ParametrizationError
from verideq.graph import OPERATIONS, Embed, model_hash, trace
from verideq.parametrizations import FeedbackGauge, scaled_couplings, set_m
from verideq.parametrizations.feedback import totals
from verideq.testing.exact import exact, matrix

Patch = pytest.MonkeyPatch
Made = tuple[list[tuple[int, ...]], list[nn.Module]]


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def conv(*arguments: object, **options: object) -> nn.Conv2d:
    return nn.Conv2d(*arguments, bias=False, **options)  # type: ignore[arg-type]  # whatever the case says


MAKES: dict[str, Callable[[], Made]] = {
    "dense": lambda: ([(3,), (4,), (2,)], [linear(3, 4), linear(4, 2)]),
    "stride 2": lambda: ([(2, 6, 6), (3, 3, 3)], [conv(2, 3, 4, 2, 1)]),
    "a stride that leaves pixels": lambda: ([(1, 7, 5), (2, 3, 2)], [conv(1, 2, 2, (2, 3))]),
    "a stride above the kernel": lambda: ([(2, 7, 4), (2, 3, 2)], [conv(2, 2, 1, (3, 2))]),
    "uneven": lambda: ([(2, 6, 5), (3, 3, 6), (4,)], [conv(2, 3, (2, 4), (3, 1), (1, 2)), linear(54, 4)]),
    "images by a matrix": lambda: ([(2, 2, 2), (3, 2, 1)], [linear(8, 6)]),
    "same and valid": lambda: (
        [(1, 4, 4), (2, 4, 4), (2, 2, 2)],
        [conv(1, 2, 3, padding="same"), conv(2, 2, 3, padding="valid")],
    ),
}
CASES = pytest.mark.parametrize("name", MAKES)


def fusion(name: str, dtype: torch.dtype = torch.float64) -> FeedbackFusion:
    torch.manual_seed(0)
    shapes, couplings = MAKES[name]()
    return FeedbackFusion(shapes, couplings).to(dtype)


def dense(operator: Feedback) -> Tensor:
    """``W`` as a matrix."""
    size = operator.shape[0]
    return operator.apply(torch.eye(size, dtype=operator.dtype)).detach().T if size else torch.empty(0)


@CASES
def test_the_operator_is_the_exact_matrix(name: str) -> None:
    operator = fusion(name).operator()
    W = matrix(operator, (operator.shape[0] or 0,))
    assert (W == W.T).all() and not W.diagonal().any()
    assert torch.allclose(dense(operator), torch.from_numpy(W.astype(float)), atol=1e-15)
    assert (exact(dense(operator.absolute())) == abs(exact(dense(operator)))).all()
    assert operator.transpose() is operator and operator.solved()[0] is operator
    largest = int((W != 0).sum(1).max())
    assert largest <= operator.terms


@CASES
def test_the_sums_by_channel_bound_every_unit_and_some_attain_them(name: str) -> None:
    operator = fusion(name).operator()
    u = torch.rand(sum(shape[0] for shape in operator.blocks), dtype=torch.float64)
    rows = dense(operator).abs() @ operator.spread_units(u)
    bounds = operator.spread_units(operator.absolute_units() @ u).detach()
    assert bool((rows <= bounds * (1 + 1e-14)).all())
    if name in ("dense", "stride 2", "a stride that leaves pixels"):
        # Every tap is read inside, and the phase that is worst for one channel is worst for all.
        first = operator.blocks[0]
        assert float((rows / bounds).max()) == pytest.approx(1.0), first


def test_a_phase_may_be_worse_than_the_others() -> None:
    # Stride 2, kernel 4: a pixel reads the taps of its own parity, four of sixteen.
    weight = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    weight[0, 0, 1::2, ::2] = 1.0
    up, down = Coupling(weight, (1, 8, 8), (1, 4, 4), (2, 2), (1, 1)).sums()
    assert (float(up), float(down)) == (4.0, 4.0)  # a quarter of 16 taps would be 1
    W = dense(Feedback((Coupling(weight, (1, 8, 8), (1, 4, 4), (2, 2), (1, 1)),)))
    assert float(W[:64].abs().sum(1).max()) == 4.0


def broken_mean(self: Coupling) -> tuple[Tensor, Tensor]:
    size = self.weight.abs().sum((2, 3))
    return size, size.T / (self.stride[0] * self.stride[1])


def broken_first(self: Coupling) -> tuple[Tensor, Tensor]:
    size = self.weight.abs()
    return size.sum((2, 3)), size[:, :, :: self.stride[0], :: self.stride[1]].sum((2, 3)).T


def broken_signs(self: Coupling) -> tuple[Tensor, Tensor]:
    return self.weight.sum((2, 3)), self.weight.sum((2, 3)).T


@pytest.mark.parametrize("twin", [broken_mean, broken_first, broken_signs])
def test_broken_sums_are_seen(twin: object, monkeypatch: Patch) -> None:
    operator = fusion("stride 2").operator()
    monkeypatch.setattr(Coupling, "sums", twin)
    rows = dense(operator).abs().sum(1)
    assert not bool((rows <= operator.spread_units(operator.absolute_units().sum(1)) * (1 + 1e-14)).all())


def test_a_forgotten_transpose_is_seen(monkeypatch: Patch) -> None:
    operator = fusion("dense").operator()
    monkeypatch.setattr(Coupling, "down", lambda self, y: torch.zeros(len(y), self.weight.shape[1]).to(y))
    assert not torch.equal(dense(operator), dense(operator).T)


def test_gradients_reach_every_coupling() -> None:
    module = fusion("uneven")
    z = torch.rand(2, 118, dtype=torch.float64, requires_grad=True)
    weights = [c.weight for c in module.couplings]
    assert torch.autograd.gradcheck(lambda *_: module(z).square(), (z, *weights), fast_mode=True)


def layer_of(module: FeedbackFusion, first: int) -> Equilibrium:
    units = module.operator().shape[0] or 0
    injection = nn.Sequential(nn.Linear(3, first), Embed(torch.randn(units - first)))
    return Equilibrium(module, injection, "hard-sigmoid").to(module.operator().dtype)


def test_implicit_gradients_through_the_class() -> None:
    layer = layer_of(FeedbackGauge.apply(fusion("uneven"), 0.3), 60)
    x = torch.rand(2, 3, dtype=torch.float64)
    loss = layer(x).square().sum()
    loss.backward()
    weight = layer.fusion.get_submodule("couplings.0").weight
    gradient = weight.grad.clone()  # type: ignore[union-attr]  # after a backward pass
    step = torch.zeros_like(weight)
    step[1, 1, 1, 2] = 1e-6
    with torch.no_grad():
        weight += step
        up = layer(x).square().sum()
        weight -= 2 * step
        down = layer(x).square().sum()
    assert float((up - down) / 2e-6) == pytest.approx(float(gradient[1, 1, 1, 2]), rel=1e-4)


# --- the class that always has a gauge --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0.5, 0.1, 1e-3, 1e-9])
@CASES
def test_stored_weights_have_a_gauge(name: str, m: float, dtype: torch.dtype) -> None:
    module = FeedbackGauge.apply(fusion(name, dtype), m)
    with torch.no_grad():
        for k, raw in enumerate(module.couplings.parameters()):
            raw.mul_(10.0 ** (8 * k - 4))
    operator = module.operator()
    u = torch.cat(totals(module.raw())).sqrt()
    stored = operator.map(lambda weight: weight.detach().double())
    rows = dense(stored).abs() @ stored.spread_units(u)
    assert bool((rows <= (1 - m) * stored.spread_units(u)).all())
    assert torch.equal(dense(stored), dense(stored).T)
    assert gauge(layer_of(module, module.shapes[0][0] * 1 if len(module.shapes[0]) == 1 else 1)).u.min() > 0


def test_without_the_guard_float32_leaves_the_class(monkeypatch: Patch) -> None:
    monkeypatch.setattr("verideq.parametrizations.feedback.safety", lambda weight: 0.0)
    worst = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        module = FeedbackGauge.apply(FeedbackFusion([(30,), (20,)], [linear(30, 20)]), 1e-9)
        u = torch.cat(totals(module.raw())).sqrt()
        stored = module.operator().map(lambda weight: weight.detach().double())
        worst = max(worst, float((dense(stored).abs() @ u / u).max().detach()))
    assert worst > 1 - 1e-9


def test_the_pure_function_is_what_the_fusion_does() -> None:
    module = FeedbackGauge.apply(fusion("uneven"), 0.25)
    raw = [c.weight for c in module.raw()]
    found = scaled_couplings(raw, module.shapes, [(3, 1), 1], 0.25)
    assert all(torch.equal(a, c.weight) for a, c in zip(found, module.operator().couplings, strict=True))
    # One number for all couplings changes nothing, and each is differentiable in all of them.
    for a, b in zip(found, scaled_couplings([7 * w for w in raw], module.shapes, [(3, 1), 1], 0.25), strict=True):
        assert torch.allclose(a, b, rtol=1e-14)
    (gradient,) = torch.autograd.grad(found[0].square().sum(), raw[1])
    assert bool(gradient.abs().sum() > 0)
    assert torch.autograd.gradcheck(
        lambda *kernels: tuple(scaled_couplings(kernels, module.shapes, [(3, 1), 1], 0.25)), raw, fast_mode=True
    )


def test_channels_without_weights() -> None:
    module = fusion("stride 2", torch.float32)
    with torch.no_grad():
        module.couplings[0].weight[1].zero_()  # type: ignore[union-attr, operator]  # a convolution's
    FeedbackGauge.apply(module, 0.1)
    loss = module.operator().couplings[0].weight.square().sum()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
    assert gauge(layer_of(module, 72)).u.min() > 0


def test_the_strength_is_a_buffer_that_a_schedule_sets() -> None:
    module = FeedbackGauge.apply(fusion("dense"), 0.1)
    before = dense(module.operator())
    set_m(module, 0.55)
    assert torch.allclose(dense(module.operator()), before * 0.5, rtol=1e-12)
    twin = copy.deepcopy(module)
    assert torch.equal(dense(twin.operator()), dense(module.operator()))
    for m in (0.0, 1.0, -1.0):
        with pytest.raises(ParametrizationError, match="outside"):
            FeedbackGauge.apply(fusion("dense"), m)
        with pytest.raises(ParametrizationError, match="outside"):
            scaled_couplings([torch.ones(2, 3)], [(3,), (2,)], [1], m)
    for other in (module, linear(3, 3)):
        with pytest.raises(ParametrizationError, match="FeedbackFusion that is not scaled"):
            FeedbackGauge.apply(other, 0.1)


def test_a_network_without_a_gauge_is_told_by_how_much() -> None:
    module = fusion("stride 2")
    with torch.no_grad():
        module.couplings[0].weight.mul_(5)  # type: ignore[union-attr, operator]  # a convolution's
    layer = layer_of(module, 72)
    radius = float(torch.linalg.eigvalsh(dense(module.operator()).abs()).max())
    with pytest.raises(NoGaugeError, match=r"spectral radius of \|W\| is about .*FeedbackGauge") as error:
        gauge(layer)
    assert error.value.rate > 1 and radius <= error.value.rate * (1 + 1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Made], str]] = {
    "no coupling": (lambda: ([(3,)], []), "two or more"),
    "too many blocks": (lambda: ([(3,), (2,), (2,)], [linear(3, 2)]), "1 couplings lead"),
    "a bias": (lambda: ([(3,), (2,)], [nn.Linear(3, 2)]), "without bias"),
    "another layer": (lambda: ([(3,), (3,)], [nn.ReLU()]), "Linear or a Conv2d"),
    "a shape of two axes": (lambda: ([(3, 2), (2,)], [linear(6, 2)]), "block has a shape"),
    "an empty block": (lambda: ([(0,), (2,)], [linear(1, 2)]), "block has a shape"),
    "a matrix of another size": (lambda: ([(3,), (2,)], [linear(4, 2)]), "does not map a block"),
    "a convolution of another size": (lambda: ([(1, 4, 4), (1, 4, 4)], [conv(1, 1, 3)]), "does not map a block"),
    "other channels": (lambda: ([(2, 4, 4), (1, 2, 2)], [conv(1, 1, 3)]), "does not map a block"),
    "a convolution of a vector": (lambda: ([(4,), (1, 2, 2)], [conv(4, 1, 1)]), "does not map a block"),
    "groups": (lambda: ([(2, 4, 4), (2, 2, 2)], [conv(2, 2, 3, groups=2)]), "groups 1"),
    "dilation": (lambda: ([(2, 5, 5), (2, 1, 1)], [conv(2, 2, 3, dilation=2)]), "no dilation"),
    "a circle": (
        lambda: ([(1, 4, 4), (1, 4, 4)], [conv(1, 1, 3, padding=1, padding_mode="circular")]),
        "zero padding",
    ),
    "an even kernel, same": (lambda: ([(1, 4, 4), (1, 4, 4)], [conv(1, 1, 2, padding="same")]), "odd kernel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_couples_nothing_is_refused(name: str) -> None:
    make, reason = WRONG[name]
    with pytest.raises(ModelError, match=reason):
        FeedbackFusion(*make())


def test_an_embedding_takes_a_vector() -> None:
    with pytest.raises(ModelError, match="a vector"):
        Embed(torch.zeros(2, 3))


# --- its file ---------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_w_is_made_of(tmp_path: Path) -> None:
    module = FeedbackGauge.apply(fusion("uneven", torch.float32), 0.2)
    weight_norm(module.couplings[1])
    model = nn.Sequential(layer_of(module, 60), nn.Linear(118, 3)).eval()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    x = torch.rand(4, 3)
    assert torch.allclose(loaded(x), model(x), atol=1e-5) and model_hash(loaded) == model_hash(model)
    (_, layer), (_, own) = next(iter(loaded.equilibria())), next(iter(trace(model).equilibria()))
    assert layer.activation == own.activation and isinstance(layer.fusion, FeedbackFusion)
    assert layer.fusion.scaling is None and not parametrize.is_parametrized(layer.fusion.couplings[1])
    for a, b in zip(layer.operator().couplings, own.operator().couplings, strict=True):  # type: ignore[attr-defined]  # Feedback's
        assert torch.equal(a.weight, b.weight)


CHANGED: dict[str, Callable[[dict[str, object]], object]] = {
    "another field": lambda a: a.update(other=1),
    "no shapes": lambda a: a.pop("shapes"),
    "other shapes": lambda a: a.update(shapes=[[3], [4], [3]]),
    "one coupling": lambda a: a.update(couplings=a["couplings"][:1], shapes=[[3], [4]]),  # type: ignore[index]  # a list
    "another kind": lambda a: a["couplings"][0].update(operation="relu", attributes={}),  # type: ignore[index]  # likewise
    "other features": lambda a: a["couplings"][0]["attributes"].update(in_features=4),  # type: ignore[index]  # likewise
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_description_that_does_not_fit_is_refused(name: str) -> None:
    operation = OPERATIONS["equilibrium"]
    layer = layer_of(fusion("dense"), 3)
    described = copy.deepcopy(operation.describe(layer))
    described["fusion"]["attributes"]["couplings"] = list(described["fusion"]["attributes"]["couplings"])
    CHANGED[name](described["fusion"]["attributes"])
    with pytest.raises(ModelError):
        operation.create(described, operation.state(layer))


def test_inspect_names_the_activation_and_the_class() -> None:
    module = FeedbackGauge.apply(fusion("uneven"), 0.2)
    facts = describe(nn.Sequential(layer_of(module, 60), nn.Linear(118, 3).double()).eval(), "mine", {})
    (layer,) = facts["equilibria"]
    assert layer["activation"] == "hard-sigmoid" and layer["class"] == "FeedbackGauge" and layer["guarantee"] == "gauge"
    assert layer["rate"] < 1 and layer["units"] == 9
