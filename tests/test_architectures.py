"""The papers' architectures: parameter counts, places of batch norm, explicit twins, initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from verideq.equilibrium import Equilibrium, gauge
from verideq.graph import load_model, save_model, trace
from verideq.models.zoo import ARCHITECTURES, cerdeq, conv_deq, deq_3, deq_7, initialise, linear_deq
from verideq.parametrizations import LBEN, CerDEQ, SpectralNorm, WeightNorm
from verideq.training.recipe import make_recipe
from verideq.training.train import build

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
SMALLER: dict[str, dict[str, int]] = {"deq-7": {"units": 12}, "7layer": {"units": 12}, "cerdeq": {"units": 12}}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("3layer", MNIST, 212_106),
        ("deq-3", MNIST, 212_106),
        ("3layer", CIFAR, 233_610),
        ("deq-3", CIFAR, 233_610),
        ("7layer", MNIST, 13_259_338),
        ("deq-7", MNIST, 13_259_338),
        ("7layer", CIFAR, 17_192_650),
        ("deq-7", CIFAR, 17_192_650),
        ("cerdeq", CIFAR, 17_190_070),
    ],
)
def test_parameters_are_as_many_as_the_papers_have(name: str, shape: tuple[int, ...], expected: int) -> None:
    assert count(ARCHITECTURES[name](shape, 10)) == expected


def test_lben_adds_a_scale_a_channel() -> None:
    assert count(deq_7(CIFAR, 10, LBEN.apply)) == 17_192_650 + 64
    assert count(deq_3(MNIST, 10, LBEN.apply)) == 212_106 + 128


def test_four_equilibria_for_tiny_imagenet() -> None:
    model = cerdeq((3, 64, 64), 200, width=8, stages=3, units=20)
    layers = [module for module in model if isinstance(module, Equilibrium)]
    assert [layer.fusion.weight.shape[0] for layer in layers] == [8, 16, 32, 20]
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 200)
    assert model[-2].injection[0].in_features == 32 * 8 * 8


def kinds(model: nn.Module) -> list[str]:
    return [node.operation.kind for node in trace(model).nodes]


def test_what_stands_where() -> None:
    """Batch norm after every linear layer but the last, and on the output of the equilibrium (Wei & Kolter)."""
    head = ["conv2d", "batch_norm2d", "relu"]
    tail = ["avg_pool2d", "flatten", "linear"]
    assert kinds(deq_3(MNIST, 10, width=4)) == [*head, "normalize", "equilibrium", "batch_norm2d", *tail]
    twin = kinds(deq_3(MNIST, 10, width=4, explicit=True))
    assert twin == [*head, "conv2d", "normalize", "batch_norm2d", "relu", *tail]
    dense = ["flatten", "linear", "batch_norm1d", "relu", "linear"]
    deq = [*head, "normalize", "equilibrium", "batch_norm2d", *(3 * head), *dense]
    assert kinds(deq_7(MNIST, 10, width=4, units=6)) == deq
    stage = ["conv2d", "batch_norm2d", "normalize", "equilibrium"]
    linear = ["flatten", "linear", "batch_norm1d", "normalize", "equilibrium", "linear"]
    assert kinds(cerdeq(CIFAR, 10, width=4, units=6)) == [*stage, *stage, *linear]


@pytest.mark.parametrize("make", [linear_deq, conv_deq, deq_3, deq_7])
def test_a_twin_has_as_many_parameters_and_computes_one_application(make: Any) -> None:
    sizes = {"units": 6} if make is deq_7 else {}
    torch.manual_seed(0)
    model, twin = (make(MNIST, 10, width=4, explicit=explicit, **sizes).eval() for explicit in (False, True))
    assert count(model) == count(twin)
    assert not list(trace(twin).equilibria())
    x = torch.rand(3, *MNIST)
    if make is conv_deq:
        conv, norm, _, fusion, after = twin[:5]
        expected = after(fusion(norm(conv(x)).relu())).relu()
        assert torch.allclose(twin[:6](x), expected)


def test_a_twin_keeps_the_parametrization_when_it_is_told_to() -> None:
    base = {"architecture": "conv-deq", "parametrization": "cerdeq", "options": {"width": 4}, "explicit": True}
    data = _blank()
    for constrained in (False, True):
        twin = build(make_recipe(base | {"constrained": constrained}), data)
        found = [module for module in twin.modules() if isinstance(module, CerDEQ)]
        assert len(found) == constrained


def _blank() -> Any:
    from verideq.data import Dataset

    pixels = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    return Dataset("blank", "train", pixels, torch.tensor([0, 1, 2, 3]), 10)


def test_the_free_bias_of_an_equilibrium_is_added_stored_and_trained(tmp_path: Any) -> None:
    model = deq_3(MNIST, 10, width=4).eval()
    bias = model[0].injection[3].mean
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        bias.copy_(torch.tensor([-1.0, -2.0, 0.0, 3.0]))  # b = -mean
    x = torch.rand(2, *MNIST)
    inner = model[0].injection[:3](x)
    expected = inner + torch.tensor([1.0, 2.0, 0.0, -3.0])[:, None, None]
    assert torch.allclose(model[0].injection(x), expected)
    model.train()(x).sum().backward()
    assert bias.grad is not None and float(bias.grad.abs().sum()) > 0
    model.eval()
    model.input_shape = MNIST  # type: ignore[assignment]  # as a trainer sets it
    save_model(model, tmp_path / "model.safetensors")
    assert torch.allclose(load_model(tmp_path / "model.safetensors")(x), model(x), atol=1e-5)


def test_initialisations() -> None:
    def drawn(kind: str) -> nn.Sequential:
        torch.manual_seed(0)
        model = cerdeq(MNIST, 10, width=16, stages=1, units=32)
        initialise(model, kind)
        return model

    plain, ibp, own = drawn("torch"), drawn("ibp"), drawn("cerdeq")
    fan_in = 16 * 14 * 14
    for model, sigma in ((ibp, math.sqrt(2 * math.pi)), (own, math.sqrt(math.pi / 2))):
        weight = model[2].injection[0].weight
        assert float(weight.detach().std()) * fan_in == pytest.approx(sigma, rel=0.02)
        assert not model[2].injection[0].bias.any()
    assert torch.equal(own[3].weight, plain[3].weight)
    assert not torch.equal(ibp[3].weight, plain[3].weight)
    assert torch.equal(ibp[0].fusion.weight, plain[0].fusion.weight), "what a parametrization draws stays"


@pytest.mark.parametrize("kind", [CerDEQ, WeightNorm, SpectralNorm, LBEN])
def test_every_equilibrium_of_a_stack_has_a_gauge(kind: Any) -> None:
    model = cerdeq(MNIST, 10, kind.apply, width=4, units=6)
    for module in model:
        if isinstance(module, Equilibrium):
            assert float(gauge(module).slack(module).min()) > 0
