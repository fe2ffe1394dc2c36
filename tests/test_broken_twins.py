"""Every lemma that a proof stands on, broken on purpose: the exact comparison has to see each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from verideq import Box, Equilibrium, Region, bound, gauge
from verideq.box import TINY, gamma, outward, spread, underflow
from verideq.certify import enclosure, interval
from verideq.certify.bound import elide
from verideq.certify.enclosure import enclose
from verideq.equilibrium import Auto, Convolution, Dense
from verideq.graph import INPUT, Graph, Node
from verideq.testing.exact import ExactModel, exact, outside
from verideq.testing.strategies import points_of

Patch = pytest.MonkeyPatch
BIG = 2.0**53


def matrix(rows: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    """A linear layer of float64."""
    module = nn.Linear(len(rows[0]), len(rows), bias=bias is not None).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(rows, dtype=torch.float64))
        if bias is not None:
            module.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return module


def layer(W: list[list[float]]) -> Equilibrium:
    """``z = relu(W z + x)``, float64."""
    return Equilibrium(matrix(W), nn.Identity())


def box(lower: list[float], upper: list[float]) -> Box:
    """One sample's box."""
    return Box(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))


def leaves(W: list[list[float]], lower: list[float], upper: list[float], steps: int) -> bool:
    """Whether an exact equilibrium of a corner injection leaves the box of `enclose`."""
    module = layer(W)
    found = enclose(module, gauge(module), box(lower, upper), Auto(tol=1e-13, max_steps=steps)).box
    truth = ExactModel(Graph([Node("z", module, (INPUT,))], pixel_range=None))
    corners = np.array(np.meshgrid(*zip(lower, upper, strict=True))).T.reshape(-1, len(lower))
    return any(
        outside(truth(np.array([Fraction(float(x)) for x in corner], dtype=object)), found.lower[0], found.upper[0])
        for corner in corners
    )


def wrong(rows: list[list[float]], x: list[float], bias: list[float] | None = None) -> bool:
    """Whether the exact image of one point leaves its bound."""
    module = matrix(rows, bias)
    found = bound(module, box(x, x))
    truth = exact(module.weight) @ np.array([Fraction(value) for value in x], dtype=object)
    if bias is not None:
        truth = truth + np.array([Fraction(value) for value in bias], dtype=object)
    return bool(outside(truth, found.lower[0], found.upper[0]))


SLOW = ([[0.0, 0.99], [0.99, 0.0]], [1.0, 1.0], [1.1, 1.1])
"""An equilibrium at 100 to 110 that one step leaves at 1 to 1.1. (A single unit is solved for itself at once.)"""
OPPOSED = ([[0.0, -0.9], [-0.9, 0.0]], [1.0, 1.0], [1.5, 1.5])
"""Signs on which the two ends trade places."""
UNEVEN = ([[0.0, 0.9, 0.0], [0.9, 0.0, 0.0], [0.0, 0.0, 0.1]], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
"""Two units that converge slowly, one that does at once."""
CANCELLING = [[BIG, 1.0, -BIG, 1.0, BIG, 1.0, -BIG], [BIG, BIG, BIG, 1.0, -BIG, -BIG, -BIG]]
"""Row sums of 3 and 1, which few orders of summation find in float64."""


def twin_slack(patch: Patch) -> None:
    original = enclosure.slack
    patch.setattr(enclosure, "slack", lambda operator, u: torch.maximum(original(operator, u), u.to(torch.float64)))


def twin_no_inflation(patch: Patch) -> None:
    patch.setattr(enclosure, "_inflate", lambda guess, image, u, room: guess)


def twin_least_t(patch: Patch) -> None:
    patch.setattr(enclosure, "_most", lambda excess: excess.flatten(1).amin(1).view(-1, *[1] * (excess.dim() - 1)))


def twin_signed_weights(patch: Patch) -> None:
    patch.setattr(Dense, "absolute", lambda self: self)


def twin_no_upper_end(patch: Patch) -> None:
    original = enclosure._inflate
    patch.setattr(
        enclosure,
        "_inflate",
        lambda guess, image, u, room: Box(original(guess, image, u, room).lower, guess.upper),
    )


def twin_no_lower_end(patch: Patch) -> None:
    original = enclosure._inflate
    patch.setattr(
        enclosure,
        "_inflate",
        lambda guess, image, u, room: Box(guess.lower, original(guess, image, u, room).upper),
    )


def twin_no_injection_radius(patch: Patch) -> None:
    original = enclosure.spread
    patch.setattr(
        enclosure, "spread", lambda center, radius, terms: original(center, 0 * radius if terms == 4 else radius, terms)
    )


def twin_factor_left_out(patch: Patch) -> None:
    original = Dense.solved

    def solved(self: Dense) -> tuple[Dense, Tensor]:
        operator, factor = original(self)
        return operator, torch.ones_like(factor)

    patch.setattr(Dense, "solved", solved)


ENCLOSURES: list[tuple[Callable[[Patch], None], list[list[float]], list[float], list[float], int]] = [
    (twin_slack, *SLOW, 1),
    (twin_no_inflation, *SLOW, 1),
    (twin_no_inflation, *SLOW, 20),
    (twin_least_t, *UNEVEN, 1),
    (twin_signed_weights, *OPPOSED, 100),
    (twin_no_upper_end, *SLOW, 2),
    (twin_no_lower_end, *OPPOSED, 2),
    (twin_no_injection_radius, *SLOW, 100),
    (twin_factor_left_out, [[-10.0]], [1.0], [1.0], 100),
]


@pytest.mark.parametrize(("twin", "W", "lower", "upper", "steps"), ENCLOSURES)
def test_a_broken_enclosure_is_seen(
    monkeypatch: Patch,
    twin: Callable[[Patch], None],
    W: list[list[float]],
    lower: list[float],
    upper: list[float],
    steps: int,
) -> None:
    assert not leaves(W, lower, upper, steps)
    twin(monkeypatch)
    assert leaves(W, lower, upper, steps)


def twin_spread(patch: Patch) -> None:
    patch.setattr(interval, "spread", lambda center, radius, terms: radius)


def twin_gamma(patch: Patch) -> None:
    patch.setattr(interval, "gamma", lambda terms: 0.0)


def twin_gamma_everywhere(patch: Patch) -> None:
    patch.setattr("verideq.box.gamma", lambda terms: 0.0)
    patch.setattr(interval, "gamma", lambda terms: 0.0)


def twin_signed_affine(patch: Patch) -> None:
    original = interval.Arithmetic.affine

    def affine(self: interval.Arithmetic, box: Box, apply: interval.Map, absolute: interval.Map, *rest: object) -> Box:
        return original(self, box, apply, lambda r: apply(r) - apply(0 * r), *rest)  # type: ignore[arg-type]  # passed on

    patch.setattr(interval.Arithmetic, "affine", affine)


@pytest.mark.parametrize("twin", [twin_spread, twin_gamma_everywhere])
def test_a_rounding_error_left_out_is_seen(monkeypatch: Patch, twin: Callable[[Patch], None]) -> None:
    assert not wrong(CANCELLING, [1.0] * 7)
    twin(monkeypatch)
    assert wrong(CANCELLING, [1.0] * 7)


def test_the_rounding_error_of_a_bias_left_out_is_seen(monkeypatch: Patch) -> None:
    # 1 + 2^53 is 2^53 in float64, whatever the weights of the radius.
    assert not wrong([[1.0]], [1.0], [BIG])
    twin_gamma(monkeypatch)
    monkeypatch.setattr("verideq.box.torch.nextafter", lambda x, direction: x)
    assert wrong([[1.0]], [1.0], [BIG])


def test_signed_weights_in_an_affine_map_are_seen(monkeypatch: Patch) -> None:
    def crossed() -> bool:
        found = bound(nn.Sequential(matrix([[1.0, -1.0]]), matrix([[1.0]])), box([0.0, 0.0], [1.0, 1.0]))
        return bool(outside(np.array([Fraction(1)]), found.lower[0], found.upper[0]))

    assert not crossed()
    twin_signed_affine(monkeypatch)
    assert crossed()


def test_a_rounding_error_of_the_specification_left_out_is_seen(monkeypatch: Patch) -> None:
    C, one = torch.tensor([CANCELLING], dtype=torch.float64), box([1.0], [1.0])

    def off() -> bool:
        found = elide(one, C, torch.ones(7, 1, dtype=torch.float64), None)
        return bool(outside(np.array([Fraction(3), Fraction(1)]), found.lower[0], found.upper[0]))

    assert not off()
    monkeypatch.setattr(sys.modules[elide.__module__], "gamma", lambda terms: 0.0)  # the package hides its module
    assert off()


def test_a_region_that_is_not_rounded_outward_is_seen(monkeypatch: Patch) -> None:
    def misses() -> bool:
        center = torch.tensor([[0.1, 0.7, 0.3, 0.123456789]], dtype=torch.float64)
        region = Region(center, "1/10", clip=None)
        around = region.box()
        corners = [points_of(center[0], region.eps, None, which)[1] for which in (0, 15)]
        return any(outside(corner, around.lower[0], around.upper[0]) for corner in corners)

    assert not misses()
    monkeypatch.setattr(torch, "nextafter", lambda x, direction: x)
    assert misses()


def test_a_sum_that_is_not_rounded_outward_is_seen(monkeypatch: Patch) -> None:
    def off() -> bool:
        total = interval.Arithmetic({}).add(box([0.1], [0.1]), box([0.2], [0.2]))
        return bool(outside(np.array([Fraction(0.1) + Fraction(0.2)]), total.lower[0], total.upper[0]))

    assert not off()
    monkeypatch.setattr(torch, "nextafter", lambda x, direction: x)
    assert off()


def test_the_ends_of_a_ball_are_rounded_outward(monkeypatch: Patch) -> None:
    center, radius = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0**-60, dtype=torch.float64)

    def short() -> bool:
        found = outward(center, radius)
        ends = np.array([1 - Fraction(2) ** -60]), np.array([1 + Fraction(2) ** -60])
        return any(outside(end, found.lower[0], found.upper[0]) for end in ends)

    assert not short()
    monkeypatch.setattr(torch, "nextafter", lambda x, direction: x)
    assert short()


def test_a_ball_contains_its_box_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-300, 300, 500, dtype=torch.float64).view(-1, 1)
    ends = torch.randn(2, 500, 1, dtype=torch.float64, generator=generator) * scales
    around = Box(ends.amin(0), ends.amax(0))
    center, radius = around.ball()
    for low, high, c, r in zip(*(exact(t)[:, 0] for t in (around.lower, around.upper, center, radius)), strict=True):
        assert c - r <= low and high <= c + r
    missed = [
        not (c - r <= low and high <= c + r)
        for low, high, c, r in zip(
            *(exact(t)[:, 0] for t in (around.lower, around.upper, around.center, around.radius)), strict=True
        )
    ]
    assert any(missed), "the plain radius would do: the test sees nothing"


def test_rounding_and_underflow_are_counted_generously() -> None:
    unit = Fraction(1, 2**53)
    for terms in (1, 10, 1000, 10**6):
        n = terms + 4
        assert Fraction(gamma(terms)) >= n * unit / (1 - n * unit)
    c, r = torch.tensor([[3.0]]).double(), torch.tensor([[0.5]]).double()
    assert float(spread(c, r, 10)) >= 0.5 + gamma(10) * 3.5
    assert float(underflow(10, c, r, torch.tensor([7.0]))) >= 10 * (1 + 3.5 + 7) * TINY


def test_a_convolution_that_forgets_the_copies_of_its_padding_is_seen(monkeypatch: Patch) -> None:
    # Replicated borders read a pixel several times: with zeros around |W| the radius is too small.
    fusion = nn.Conv2d(1, 1, 3, padding="same", padding_mode="replicate", bias=False).double()
    nn.init.constant_(fusion.weight, 0.1)
    module = Equilibrium(fusion, nn.Identity())
    truth = ExactModel(Graph([Node("z", module, (INPUT,))], pixel_range=None))
    ones = torch.ones(1, 1, 2, 2, dtype=torch.float64)

    def leaves_box() -> bool:
        found = enclose(module, gauge(module), Box(ones, 2 * ones), Auto(tol=1e-13, max_steps=200)).box
        return bool(outside(truth(exact(2 * ones[0])), found.lower[0], found.upper[0]))

    assert not leaves_box()
    monkeypatch.setattr(Convolution, "absolute", lambda self: replace(self, weight=self.weight.abs(), mode="zeros"))
    assert leaves_box()
