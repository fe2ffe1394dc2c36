"""Models whose trace could differ from what they compute: each is bounded as it computes, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from verideq import Equilibrium, Region, bound
from verideq.errors import VerideqError


class Model(nn.Module):
    """``forward(self, x)`` given as a function of two linear layers ``a: x -> -x`` and ``b: x -> 2 x``."""

    def __init__(self, body: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.ReLU(inplace=True)
        self.flatten = nn.Flatten()
        self.body = body
        nn.init.constant_(self.a.weight, -1.0)
        nn.init.constant_(self.b.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def unused_after_the_output(self: Model, x: Tensor) -> Tensor:
    y = self.a(x)
    self.b(x)
    return y


def unused_before_the_output(self: Model, x: Tensor) -> Tensor:
    self.b(x)
    return self.a(x)


def in_place_module(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    y = self.relu(h)
    return h + y


def in_place_module_through_a_view(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    y = self.relu(self.flatten(h))
    return h + y


def in_place_method(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    y = h.relu_()
    return h + y


def in_place_argument(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    y = nn.functional.relu(h, inplace=True)
    return h + y


def in_place_function(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    y = torch.relu_(h)
    return h + y


def in_place_sum(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    before = h
    h += self.b(x)
    return h + before


def in_place_add_method(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    y = h.add_(self.b(x))
    return h + y


def in_place_returning_the_old_name(self: Model, x: Tensor) -> Tensor:
    h = self.a(x)
    h.relu_()
    return h


def in_place_on_the_input(self: Model, x: Tensor) -> Tensor:
    y = self.relu(x)
    return x + y


BODIES = [value for name, value in list(globals().items()) if name.startswith(("unused_", "in_place_"))]


def agrees_or_is_refused(model: nn.Module, x: float) -> bool:
    """Whether the bounds at one point hold what the model computes there; true for a refusal."""
    with torch.no_grad():
        value = float(model(torch.tensor([[x]])))
    try:
        box = bound(model, Region(torch.tensor([[x]]), 0, clip=None))
    except VerideqError:
        return True
    return float(box.lower) - 1e-6 <= value <= float(box.upper) + 1e-6


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
@pytest.mark.parametrize("x", [1.0, -1.0])
def test_the_graph_is_what_the_model_computes(body: Callable[[Model, Tensor], Tensor], x: float) -> None:
    assert agrees_or_is_refused(Model(body), x)


def test_a_harmless_operation_in_place_is_supported() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(inplace=True), nn.Linear(1, 1))
    assert bound(model, Region(torch.ones(1, 1), 0)).lower.isfinite().all()


def one() -> nn.Sequential:
    """The identity on a number."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 1.0)
    return model


def test_hooks_and_patched_forwards_are_seen_wherever_they_are() -> None:
    def hooked(module: nn.Module) -> nn.Module:
        module.register_forward_hook(lambda module, inputs, output: -output)
        return module

    def prehooked(module: nn.Module) -> nn.Module:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + inputs[0],))
        return module

    def patched(module: nn.Module) -> nn.Module:
        module.forward = lambda x: x + x  # type: ignore[method-assign]  # what is tested
        return module

    for change in (hooked, prehooked, patched):
        assert agrees_or_is_refused(change(one()), 1.0)  # the whole model
        assert agrees_or_is_refused(nn.Sequential(change(one())), 1.0)  # a container in it
        assert agrees_or_is_refused(nn.Sequential(change(one()[0])), 1.0)  # a leaf in it
        fusion = nn.Linear(1, 1, bias=False)
        nn.init.constant_(fusion.weight, -0.5)
        assert agrees_or_is_refused(Equilibrium(fusion, change(one())), 1.0)  # an injection
        assert agrees_or_is_refused(change(Equilibrium(fusion, one())), 1.0)


def test_a_negative_divisor_turns_a_box_around() -> None:
    pool, conv = nn.AvgPool2d(2, divisor_override=-4), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    box = bound(nn.Sequential(pool, conv), Region(torch.ones(1, 1, 2, 2), "1/10", clip=None))
    assert float(box.lower) <= -1.0999999 and float(box.upper) >= -0.9000001
