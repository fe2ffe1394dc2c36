"""Equilibrium layers inside auto_LiRPA: as tight as verideq's own bounds, sound, trainable, in two forms."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from auto_lirpa_shims import auto_lirpa, installed
from torch import Tensor, nn
from torch.func import functional_call

from verideq import Box, Equilibrium, Normalize, Region, bound, gauge, load_model
from verideq.certify import lirpa, margin_rows, prepare
from verideq.certify.adjoint import rows_of, rules, scene_of
from verideq.certify.method import Query
from verideq.data import load
from verideq.errors import InputError, NoGaugeError, UnsupportedOperation
from verideq.graph import trace
from verideq.models import BUNDLED
from verideq.models.zoo import PARAMETRIZATIONS, initialise
from verideq.parametrizations import IBPMonDEQ, MonDEQ, RowGauge, set_m
from verideq.training.loss import certified_loss

AL: Any = auto_lirpa()
ROOT = Path(__file__).resolve().parent.parent
# Those of auto_LiRPA and of torch's exporter, which it calls; verideq's own are errors as everywhere.
pytestmark = pytest.mark.filterwarnings("ignore:::auto_LiRPA", "ignore:::torch.jit", "ignore:::torch.onnx")

METHODS = ("IBP", "forward", "CROWN-IBP", "CROWN")
LINF = (math.inf, 0.1)
L2 = (2.0, 0.4)
Shape = tuple[int, ...]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """float64, which auto_LiRPA takes from torch's default; and afterwards nothing is registered."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    yield
    torch.set_default_dtype(torch.float32)
    Equilibrium.recorder = None


def dense(inputs: int, units: int) -> Equilibrium:
    return Equilibrium(IBPMonDEQ.apply(nn.Linear(units, units, bias=False), m=0.1), nn.Linear(inputs, units))


def conv(inputs: int, channels: int, stride: int = 1) -> Equilibrium:
    fusion = RowGauge.apply(nn.Conv2d(channels, channels, 3, padding=1, bias=False), m=0.2)
    return Equilibrium(fusion, nn.Conv2d(inputs, channels, 3, stride=stride, padding=1))


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def flat(channels: int, side: int) -> tuple[nn.Module, nn.Module]:
    return nn.Flatten(), nn.Linear(channels * side * side, 3)


VECTOR, IMAGE = (8,), (1, 4, 4)
ARCHITECTURES: dict[str, tuple[Shape, Callable[[], nn.Module]]] = {
    "deq, linear": (VECTOR, lambda: nn.Sequential(dense(8, 7), nn.Linear(7, 3))),
    "linear, relu, deq": (VECTOR, lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), dense(6, 7), nn.Linear(7, 3))),
    "deq, linear, relu": (
        VECTOR, lambda: nn.Sequential(dense(8, 7), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))),
    "deq, deq": (VECTOR, lambda: nn.Sequential(dense(8, 7), dense(7, 6), nn.Linear(6, 3))),
    "deq, relu, deq": (
        VECTOR, lambda: nn.Sequential(dense(8, 7), nn.Linear(7, 6), nn.ReLU(), dense(6, 5), nn.Linear(5, 3))),
    "ends in a deq": (VECTOR, lambda: nn.Sequential(nn.Linear(8, 6), dense(6, 3))),
    "residual": (
        VECTOR, lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Residual(dense(6, 6)), nn.Linear(6, 3))),
    "conv, deq": (
        IMAGE, lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), dense(32, 7),
                                     nn.Linear(7, 3))),
    "conv deq": (IMAGE, lambda: nn.Sequential(conv(1, 2), *flat(2, 4))),
    "conv, conv deq": (
        IMAGE, lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), conv(2, 2, 2), *flat(2, 2))),
    "conv deq, conv": (
        IMAGE, lambda: nn.Sequential(conv(1, 2), nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.ReLU(), *flat(2, 2))),
    "conv residual": (
        IMAGE, lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(),
                                     Residual(conv(2, 2), nn.Conv2d(2, 2, 3, padding=1)), nn.ReLU(), *flat(2, 4))),
}  # fmt: skip


def wrapped(model: nn.Module, x: Tensor, *, split: bool = True, **options: Any) -> Any:
    """The model as a `BoundedModule`."""
    lirpa.register(split=split)
    return AL.BoundedModule(model, x, bound_opts=options)


def ball(x: Tensor, norm: float = math.inf, eps: float = 0.1) -> Any:
    return AL.BoundedTensor(x, AL.PerturbationLpNorm(norm=norm, eps=eps))


def bounds(module: Any, x: Any, method: str, C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lower, upper = module.compute_bounds(x=(x,), C=C, method=method)
    return lower.detach().flatten(1), upper.detach().flatten(1)


def spread(model: nn.Module, x: Tensor, norm: float, eps: float) -> tuple[Tensor, Tensor]:
    """The least and the largest outputs that points of the ball were found to have: samples, corners and an attack."""
    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(300, *x.shape, generator=draw)
    if norm == math.inf:
        noise = torch.cat((noise.sign(), noise.clamp(-1, 1)))
    else:
        noise = noise / noise.flatten(2).norm(dim=2).view(300, len(x), *[1] * (x.dim() - 1))
    with torch.no_grad():
        y = model((x + eps * noise).flatten(0, 1)).view(len(noise), len(x), -1)
    low, high = y.amin(0), y.amax(0)
    outputs = low.shape[1]
    goal = torch.cat((torch.eye(outputs), -torch.eye(outputs))).repeat_interleave(len(x), 0)
    many = x.repeat(2 * outputs, *[1] * (x.dim() - 1))
    e = torch.zeros_like(many)
    for step in range(8):
        e.requires_grad_()
        (gradient,) = torch.autograd.grad((model(many + eps * e) * goal).sum(), e)
        if norm == math.inf:
            e = (e - 0.5 / (1 + step) * gradient.sign()).detach().clamp(-1, 1)
        else:
            e = (e - gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-9).view(-1, *[1] * (x.dim() - 1))).detach()
            e = e / e.flatten(1).norm(dim=1).clamp(min=1).view(-1, *[1] * (x.dim() - 1))
        y = model(many + eps * e).detach().view(2 * outputs, len(x), outputs)
        low, high = torch.minimum(low, y.amin(0)), torch.maximum(high, y.amax(0))
    return low, high


@pytest.mark.parametrize(("norm", "eps"), [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_point_of_a_ball_lies_outside_and_each_method_is_tighter(name: str, norm: float, eps: float) -> None:
    shape, make = ARCHITECTURES[name]
    model, x = make().eval(), torch.randn(2, *shape)
    low, high = spread(model, x, norm, eps)
    widths: dict[tuple[bool, str], float] = {}
    for split in (False, True):
        module = wrapped(model, x, split=split, optimize_bound_args={"iteration": 3})
        torch.testing.assert_close(module(ball(x, norm, eps)), model(x), rtol=0, atol=1e-9)
        found = {}
        for method in (*METHODS, "alpha-CROWN"):
            lower, upper = found[method] = bounds(module, ball(x, norm, eps), method)
            assert float((lower - low).max()) <= 1e-9, (method, split)
            assert float((high - upper).max()) <= 1e-9, (method, split)
            widths[split, method] = float((upper - lower).mean())
        (lower, upper), (lower_alpha, upper_alpha) = found["CROWN"], found["alpha-CROWN"]
        if not any(isinstance(part, nn.ReLU) for part in model.modules()):
            # Optimised slopes of auto_LiRPA's own ReLUs may start elsewhere than CROWN's, so that a row can be looser.
            assert float((lower - lower_alpha).max()) <= 1e-9
            assert float((upper_alpha - upper).max()) <= 1e-9
        assert widths[split, "alpha-CROWN"] <= widths[split, "CROWN"] * (1 + 1e-9)
        # In the last one rows are units: their slopes are at their best before the first step.
        assert widths[split, "alpha-CROWN"] < widths[split, "CROWN"] or name == "ends in a deq"
    for method in METHODS:
        assert widths[True, method] <= widths[False, method] * (1 + 1e-9)
    assert widths[True, "CROWN"] <= widths[True, "CROWN-IBP"] <= widths[True, "IBP"]


def own(model: nn.Module, x: Tensor, eps: str, C: Tensor | None = None) -> Tensor:
    """verideq's lower bounds by the adjoint with adaptive slopes, and nothing else."""
    prepared = prepare(model)
    query = Query(Region(x, eps, clip=None).box(), None, C, upper=False)
    scene, _ = scene_of(prepared, query)
    rows = rows_of(query, scene)
    return scene.least({scene.output: rows.flatten(0, 1)}, rules(scene, "adaptive"))[0]


@pytest.mark.parametrize("name", ["deq, linear", "deq, linear, relu", "deq, deq", "conv deq", "conv, conv deq"])
def test_the_same_as_verideqs_own(name: str) -> None:
    shape, make = ARCHITECTURES[name]
    model, x = make().eval(), torch.randn(2, *shape)
    C = margin_rows(torch.tensor([0, 2]), 3)
    single, split = wrapped(model, x, split=False), wrapped(model, x)
    for rows in (None, C):
        given = Region(x, "0.1", clip=None)
        box, adjoint = bound(model, given, C=rows), own(model, x, "0.1", rows)
        for module in (single, split):
            lower, upper = bounds(module, ball(x), "IBP", rows)
            torch.testing.assert_close(lower, box.lower, rtol=0, atol=1e-5)
            torch.testing.assert_close(upper, box.upper, rtol=0, atol=1e-5)
            # Pre-activations by intervals, as the adjoint has them.
            torch.testing.assert_close(bounds(module, ball(x), "CROWN-IBP", rows)[0], adjoint, rtol=0, atol=1e-4)
        if name == "deq, linear":
            torch.testing.assert_close(bounds(single, ball(x), "CROWN", rows)[0], adjoint, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [*PARAMETRIZATIONS], ids=str)
def test_every_class_of_weights(kind: str) -> None:
    fusion = PARAMETRIZATIONS[kind].apply(nn.Linear(6, 6, bias=False))
    if kind == "mondeq":
        for parameter in fusion.parameters():
            parameter.data.mul_(0.2)  # so that it has a gauge, its `m` being 1
    if kind == "nemon":
        fusion.weight = fusion.weight.detach() - 4 * torch.eye(6)
    layer = Equilibrium(fusion, nn.Linear(4, 6))
    assert gauge(layer).transformed == (kind == "nemon")
    model, x = nn.Sequential(layer, nn.Linear(6, 3)), torch.randn(2, 4)
    low, high = spread(model, x, *LINF)
    for split in (False, True):
        module = wrapped(model, x, split=split)
        box = bound(model, Region(x, "0.1", clip=None))
        torch.testing.assert_close(bounds(module, ball(x), "IBP")[0], box.lower, rtol=0, atol=1e-5)
        for method in METHODS:
            lower, upper = bounds(module, ball(x), method)
            assert bool((lower <= low + 1e-9).all()) and bool((upper >= high - 1e-9).all())
    bounds_of = module.compute_bounds(x=(ball(x),), method="CROWN")
    (bounds_of[1] - bounds_of[0]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fusion.parameters())


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A dense digits model that no bound was used to train, and test samples."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), dense(64, 32), nn.Linear(32, 10))
    train = load("digits", split="train")
    images, labels = train.scaled().float(), train.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(8):
        for part in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    test = load("digits")
    return model.eval(), test.scaled(slice(0, 60)).float(), test.labels[:60]


def test_what_the_split_form_is_worth_on_a_model_trained_for_accuracy() -> None:
    model, x, labels = digits()
    C = margin_rows(labels, 10).float()
    shares = {}
    for split in (False, True):
        module = wrapped(model, x, split=split)
        for method in ("IBP", "CROWN"):
            lower = bounds(module, ball(x, eps=0.05), method, C)[0]
            shares[split, method] = float((lower > 0).all(1).double().mean())
    assert shares[False, "IBP"] == shares[True, "IBP"] < shares[False, "CROWN"] < shares[True, "CROWN"]


def test_the_bundled_model_file_in_float32() -> None:
    """A `Graph`, convolutional, batch norm and all; with margins as verideq's own."""
    torch.set_default_dtype(torch.float32)
    model, data = load_model(BUNDLED), load("digits")
    x, labels = data.scaled(slice(0, 3)).float(), data.labels[:3]
    C = margin_rows(labels, 10)
    theirs = bounds(wrapped(model, x, split=False), ball(x, eps=0.05), "IBP", C.float())[0]
    ours = bound(model, Region(x, "0.05", clip=None), C=C).lower
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["conv deq, conv", "conv residual", "conv, conv deq"])
def test_matrices_and_patches_give_the_same(name: str) -> None:
    shape, make = ARCHITECTURES[name]
    model, x = make().eval(), torch.randn(3, *shape)
    modules = [wrapped(model, x, conv_mode=mode) for mode in ("patches", "matrix")]
    for method in ("CROWN-IBP", "CROWN"):
        patches, matrix = (bounds(module, ball(x), method)[0] for module in modules)
        torch.testing.assert_close(patches, matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_gradients_of_bounds(kind: str, split: bool, method: str) -> None:
    """By differences, for every parameter: of W, of the injection, of what comes after."""
    if kind == "dense":
        model, x = nn.Sequential(dense(4, 4), nn.Linear(4, 2)), torch.rand(2, 4)
    else:
        model, x = nn.Sequential(conv(1, 2), nn.Flatten(), nn.Linear(8, 2)), torch.rand(1, 1, 2, 2)
    model[0].injection.bias.data += 0.3  # few units are off
    module = wrapped(model, x, split=split)
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    # Nodes hold parameters by a name of their own, and give them out by the model's.
    own = {f"{name}.param": node.param for name, node in module._modules.items() if hasattr(node, "param")}

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        call = {"method_opt": "compute_bounds", "x": (ball(x),), "method": method}
        lower, upper = functional_call(module, dict(zip(own, values, strict=True)), (), call)
        return lower, upper

    values = tuple(p.detach().clone().requires_grad_() for p in own.values())
    lower, upper = run(*values)
    slopes = torch.autograd.grad((upper - 0.7 * lower).sum(), values)
    assert all(bool(slope.any()) for slope in slopes)
    # Equilibria are solved to 1e-10, and differences divide that by the step; fast: along random directions.
    assert torch.autograd.gradcheck(run, values, eps=1e-5, atol=1e-4, rtol=1e-4, fast_mode=True)


def test_training_by_auto_lirpa_comes_to_what_training_by_verideq_comes_to() -> None:
    torch.set_default_dtype(torch.float32)
    train, test = load("digits", split="train"), load("digits")
    images, labels = train.scaled().float(), train.labels
    shares = []
    for native in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), dense(64, 24), nn.Linear(24, 10))
        initialise(model, "ibp")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        graph = trace(model)
        lirpa.register()
        module = AL.BoundedModule(model, images[:2])
        steps, count = 8 * (len(labels) // 96), 0
        for _ in range(8):
            for part in torch.randperm(len(labels), generator=torch.Generator().manual_seed(count)).split(96):
                if len(part) < 96:
                    continue
                eps = 0.05 * min(1.0, count / (0.6 * steps))
                x, y = images[part], labels[part]
                if native:
                    loss = certified_loss(graph, x, Box(x - eps, x + eps), y, 0.0)[0]
                else:
                    C = margin_rows(y, 10).float()
                    lower, _ = module.compute_bounds(x=(ball(x, eps=eps),), C=C, method="IBP", bound_upper=False)
                    loss = F.cross_entropy(-torch.cat((torch.zeros(len(y), 1), lower), 1), torch.zeros_like(y))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                count += 1
        region = Region(test.scaled(), "0.05", clip=None)
        lower = bound(model, region, C=margin_rows(test.labels, 10)).lower
        shares.append(float((lower > 0).all(1).double().mean()))
    assert shares[0] > 0.6
    assert shares[1] == pytest.approx(shares[0], abs=0.02)


def test_a_schedule_of_m_reaches_the_bounds() -> None:
    model, x = nn.Sequential(dense(4, 4), nn.Linear(4, 2)), torch.rand(2, 4)
    module = wrapped(model, x)
    before = bounds(module, ball(x), "IBP")
    set_m(model, 0.8)
    after = bounds(module, ball(x), "IBP")
    torch.testing.assert_close(after[0], bound(model, Region(x, "0.1", clip=None)).lower, rtol=0, atol=1e-9)
    assert not torch.allclose(before[0], after[0], rtol=0, atol=1e-2)


def test_registering_twice_and_custom_ops() -> None:
    model, x = nn.Sequential(dense(4, 4), nn.Linear(4, 2)), torch.rand(2, 4)
    lirpa.register()
    lirpa.register()
    once = bounds(AL.BoundedModule(model, x), ball(x), "CROWN")[0]
    for name in lirpa.custom_ops():
        AL.bound_op_map.unregister_custom_op(name)
    with pytest.raises(NotImplementedError, match="unsupported"):
        AL.BoundedModule(model, x)
    module = AL.BoundedModule(model, x, custom_ops=lirpa.custom_ops())
    assert torch.equal(bounds(module, ball(x), "CROWN")[0], once)
    kinds = {split: [type(n).__name__ for n in wrapped(model, x, split=split)._modules.values()] for split in (0, 1)}
    assert kinds[0].count("BoundEquilibrium") == 1
    assert kinds[1].count("BoundEquilibriumPre") == kinds[1].count("BoundEquilibriumRelu") == 1


def test_a_layer_is_recorded_only_where_it_is_traced() -> None:
    layer, x = dense(4, 4), torch.rand(2, 4)
    plain = layer(x)
    lirpa.register()
    assert torch.equal(layer(x), plain)


def test_two_calls_of_one_layer_share_its_weights() -> None:
    layer = dense(4, 4)
    model, x = nn.Sequential(layer, layer, nn.Linear(4, 2)), torch.rand(2, 4)
    module = wrapped(model, x)
    low, high = spread(model, x, *LINF)
    lower, upper = bounds(module, ball(x), "CROWN")
    assert bool((lower <= low + 1e-9).all()) and bool((upper >= high - 1e-9).all())
    assert len(list(module.parameters())) == len(list(model.parameters()))


class TwoInputs(nn.Module):
    """An equilibrium of one input, added to what the other one gives; the same layer on both, if asked."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.one, self.last = dense(4, 4), nn.Linear(4, 2)
        self.other = self.one if shared else nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.one(x) + self.other(y))


@pytest.mark.parametrize("both", [False, True], ids=["one perturbed", "both perturbed"])
@pytest.mark.parametrize("shared", [False, True], ids=["two layers", "one layer"])
def test_models_of_two_inputs(shared: bool, both: bool) -> None:
    model, x, y = TwoInputs(shared), torch.rand(3, 4), torch.rand(3, 4)
    lirpa.register()
    module = AL.BoundedModule(model, (x, y))
    draw = torch.Generator().manual_seed(0)
    corners = [torch.randint(2, (300, *x.shape), generator=draw) * 0.2 - 0.1 for _ in range(2)]
    if not both:
        corners[1].zero_()
    with torch.no_grad():
        values = model((x + corners[0]).flatten(0, 1), (y + corners[1]).flatten(0, 1)).view(300, 3, 2)
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        asked = (ball(x), ball(y) if both else y)
        lower, upper = (side.detach() for side in module.compute_bounds(x=asked, method=method))
        assert bool((lower <= values.amin(0) + 1e-9).all()) and bool((upper >= values.amax(0) - 1e-9).all()), method


@pytest.mark.parametrize("name", ["deq, linear", "ends in a deq", "deq, deq", "conv deq, conv"])
def test_a_ball_of_radius_zero_and_a_batch_of_one(name: str) -> None:
    shape, make = ARCHITECTURES[name]
    model, x = make().eval(), torch.randn(1, *shape)
    for split in (False, True):
        module = wrapped(model, x, split=split)
        for method in METHODS:
            for side in bounds(module, ball(x, eps=0.0), method):
                torch.testing.assert_close(side, model(x).detach(), rtol=0, atol=1e-9)
        low, high = spread(model, x, *LINF)
        both = bounds(module, ball(x), "CROWN")
        assert bool((both[0] <= low + 1e-9).all()) and bool((both[1] >= high - 1e-9).all())
        for number, side in enumerate(("lower", "upper")):
            off = {f"bound_{'upper' if side == 'lower' else 'lower'}": False}
            found = module.compute_bounds(x=(ball(x),), method="CROWN", **off)[number]
            torch.testing.assert_close(found.detach(), both[number], rtol=0, atol=1e-12)


def test_layers_without_a_gauge_and_perturbed_weights_are_refused() -> None:
    x = torch.rand(2, 4)
    monotone = nn.Sequential(Equilibrium(MonDEQ.apply(nn.Linear(6, 6, bias=False), m=1.0), nn.Linear(4, 6)))
    for parameter in monotone[0].fusion.parameters():
        parameter.data.mul_(4)
    with pytest.raises(NoGaugeError, match="cannot bound this equilibrium"):
        bounds(wrapped(monotone, x), ball(x), "IBP")
    module = wrapped(nn.Sequential(dense(4, 4)), x)
    for node in module._modules.values():
        if type(node).__name__ == "BoundParams" and "fusion" in node.ori_name:
            node.perturbation = AL.PerturbationLpNorm(norm=math.inf, eps=0.01)
    with pytest.raises(UnsupportedOperation, match="weights W of an equilibrium are perturbed"):
        bounds(module, ball(x), "IBP")


def test_numbers_that_overflow_are_refused() -> None:
    x = torch.rand(2, 4)
    module = wrapped(nn.Sequential(dense(4, 4), nn.Linear(4, 2)), x)
    for method in ("IBP", "CROWN"):
        with pytest.raises(InputError, match="NaN or infinity"):
            bounds(module, ball(x, eps=math.inf), method)


def test_the_calls_of_newer_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.7.1 hands every node the rows that it is about, as unit numbers or as (channel, row, column), and shapes."""
    model, x = nn.Sequential(conv(1, 2), *flat(2, 4)), torch.randn(2, *IMAGE)
    module = wrapped(model, x, split=False)
    bounds(module, ball(x), "CROWN")
    (node,) = [n for n in module._modules.values() if type(n).__name__ == "BoundEquilibrium"]
    A = torch.eye(32).view(32, 1, 2, 4, 4).expand(32, 2, 2, 4, 4)
    node.init_opt_parameters([("start", (2, 4, 4), None, False), ("final", 3, None, True)])
    assert node.alpha["start"].shape == (2, 32, 2, 2, 4, 4)
    assert node.alpha["final"].shape == (2, 3, 2, 2, 4, 4)
    draw = torch.Generator().manual_seed(0)
    node.alpha["start"] = torch.rand(node.alpha["start"].shape, generator=draw)
    node.opt_start()
    start = type("Start", (), {"name": "start", "output_shape": (2, 2, 4, 4)})()
    calls = {"start_node": start, "start_shape": (2, 4, 4)}
    (_, upper), *_ = node.bound_backward(None, A, *node.inputs, unstable_idx=None, **calls)[0]
    places = torch.tensor([3, 17, 30])
    for some in (places, (places // 16, places // 4 % 4, places % 4)):
        result, lower_constant, _ = node.bound_backward(None, A[places], *node.inputs, unstable_idx=some, **calls)
        assert lower_constant == 0
        torch.testing.assert_close(result[0][1], upper[places], rtol=0, atol=1e-8)
    # More than 512 unstable units: one set of slopes a channel.
    every, node.alpha["start"] = node.alpha["start"], node.alpha["start"][:, ::16]
    for some in (places, (places // 16, places // 4 % 4, places % 4)):
        assert torch.equal(node.chosen(1, A[places], start, some), every[1][places // 16 * 16])
    node.alpha["start"] = every.fill_(1.5)
    node.clip_alpha()
    assert float(node.alpha["start"].max()) == 1
    # A convolution in patches mode asks how many slopes it shall have, whatever its patches are by now.
    monkeypatch.setattr(sys.modules["verideq.certify.lirpa.nodes"], "OLD", False)
    node.patch_size, start.mode = {}, "patches"
    node.bound_backward(None, A, *node.inputs, unstable_idx=None, **calls)
    assert node.patch_size == {"start": (2, 2, 4, 4, 2, 4, 4)}
    # A subset of a batch, and rows of which nothing is said.
    node.alpha_beta_update_mask = torch.tensor([True, False])
    assert node.chosen(0, A[:, :1], start, None).shape == (32, 1, 2, 4, 4)
    assert node.chosen(0, A[:5], start, None) is None


# --- where auto_LiRPA itself is wrong ---------------------------------------------------------------------------------


def outside(model: nn.Module, x: Tensor, norm: float, eps: float, method: str) -> float:
    """By how much a point of the ball lies outside auto_LiRPA's bounds."""
    low, high = spread(model, x, norm, eps)
    lower, upper = bounds(AL.BoundedModule(model, x), ball(x, norm, eps), method)
    return max(float((lower - low).max()), float((high - upper).max()))


class RawResidual(nn.Module):
    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x) + x)


def test_auto_lirpa_is_wrong_for_an_l2_ball_that_intervals_meet_in_a_residual_add() -> None:
    """No equilibrium in it: the centre of the ball is added as if it were the ball."""
    x = torch.randn(2, 8)
    model = RawResidual(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), 8)
    assert outside(model, x, *L2, "IBP") > 1e-3
    assert outside(model, x, *L2, "CROWN") <= 1e-9
    assert outside(model, x, *LINF, "IBP") <= 1e-9


def test_verideq_refuses_what_comes_of_it() -> None:
    x = torch.randn(2, 8)
    after = nn.Sequential(Residual(nn.Linear(8, 8), nn.ReLU()), dense(8, 6), nn.Linear(6, 3))
    scaled = nn.Sequential(Normalize(0.5, 0.25), dense(8, 6), nn.Linear(6, 3))
    for model in (after, scaled):
        module = wrapped(model, x, conv_mode="matrix")
        for method in ("IBP", "CROWN-IBP"):
            with pytest.raises(UnsupportedOperation, match="takes the centre of this ball for the ball"):
                bounds(module, ball(x, *L2), method)
        low, high = spread(model, x, *L2)
        lower, upper = bounds(module, ball(x, *L2), "CROWN")
        assert bool((lower <= low + 1e-9).all()) and bool((upper >= high - 1e-9).all())
    bare = Equilibrium(IBPMonDEQ.apply(nn.Linear(8, 8, bias=False), m=0.1), nn.Identity())
    module = wrapped(nn.Sequential(bare, nn.Linear(8, 3)), x)
    for method in ("IBP", "CROWN"):
        with pytest.raises(UnsupportedOperation, match="takes the centre of this ball for the ball"):
            bounds(module, ball(x, *L2), method)
        bounds(module, ball(x), method)


def test_auto_lirpa_is_wrong_for_unflatten_before_a_convolution_in_patches_mode() -> None:
    """With a batch of more than one, and no equilibrium in it (0.7.1; 0.3 refuses `Unflatten`). Matrices are right."""
    body = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 5)]
    model, images = nn.Sequential(nn.Unflatten(1, (1, 3, 4)), *body), nn.Sequential(*body)
    x = torch.randn(3, 12)

    def wrong(model: nn.Module, x: Tensor, mode: str) -> float:
        low, high = spread(model, x, *LINF)
        lower, upper = bounds(AL.BoundedModule(model, x, bound_opts={"conv_mode": mode}), ball(x), "CROWN")
        return max(float((lower - low).max()), float((high - upper).max()))

    assert wrong(images, x.view(3, 1, 3, 4), "patches") <= 1e-9
    if str(installed()).startswith("0.3"):
        with pytest.raises(NotImplementedError, match="unsupported"):
            wrong(model, x, "patches")
    else:
        assert wrong(model, x, "patches") > 1e-3
        assert wrong(model, x, "matrix") <= 1e-9


# --- what users read --------------------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "auto-lirpa.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    exec(compile(code, "auto-lirpa.md", "exec"), {"__name__": "pasted"})  # the project's own page
    assert "certified" in capsys.readouterr().out


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "auto_lirpa_shims.py"), str(ROOT / "examples" / "auto_lirpa.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    shares = [int(n) for n in re.findall(r"certified (\d+) of 100", done.stdout)]
    assert len(shares) == 4
    assert shares == sorted(shares) and shares[3] > shares[0]
    proved = re.search(r"verideq: (\d+) of 100 are proved; CERTIFIED", done.stdout)
    assert proved is not None and int(proved[1]) >= 0.9 * shares[3]


def test_the_page_names_this_version() -> None:
    page = (ROOT / "docs" / "auto-lirpa.md").read_text(encoding="utf-8")
    assert str(installed()) in page
