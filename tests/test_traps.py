"""Cases in which a plausible verifier certifies something false, and inputs that are never certified."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from verideq import Box, Equilibrium, Gauge, Region, Status, bound, gauge
from verideq.certify import certify, prepare
from verideq.certify.bound import elide
from verideq.certify.enclosure import enclose
from verideq.certify.interval import Arithmetic
from verideq.equilibrium import Auto
from verideq.errors import InputError, ModelError, NoGaugeError, RegionError, VerideqError
from verideq.parametrizations import IBPMonDEQ
from verideq.testing.exact import exact, outside

SOLVERS = [Auto(max_steps=k, tol=1e-13) for k in (1, 2, 5, 20, 100, 1000)]
TINY = 2.0**-1022


def layer(W: list[list[float]], v: list[float] | None = None, dtype: torch.dtype = torch.float64) -> Equilibrium:
    """``z = relu(W z + x + v)``."""
    units = len(W)
    fusion, injection = nn.Linear(units, units, bias=False), nn.Linear(units, units)
    module = Equilibrium(fusion, injection).to(dtype)
    with torch.no_grad():
        fusion.weight.copy_(torch.tensor(W, dtype=torch.float64))
        injection.weight.copy_(torch.eye(units))
        injection.bias.copy_(torch.tensor(v or [0.0] * units, dtype=torch.float64))
    return module


def linear(weight: list[list[float]], dtype: torch.dtype = torch.float64) -> nn.Linear:
    """``x -> A x``."""
    module = nn.Linear(len(weight[0]), len(weight), bias=False).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight, dtype=torch.float64))
    return module


def point(*values: float) -> Box:
    """One sample, known exactly."""
    x = torch.tensor([values], dtype=torch.float64)
    return Box(x, x)


def naive(w: float, low: float, high: float, tol: float) -> tuple[float, int]:
    """The upper end of the interval fixed point by the papers' code: float32, relative step stop, no inflation."""
    weight, ends = torch.tensor(w), torch.tensor([low, high])
    z, count = torch.zeros(2), 0
    while True:
        after, count = torch.relu(weight * z + ends), count + 1
        error, z = (after - z).norm() / (1e-6 + after.norm()), after
        if error <= tol:
            return float(z[1]), count


# ------------------------------------------------------------------------------------------------ unconverged and slow


def test_the_stopped_iteration_certifies_what_is_false_and_we_do_not() -> None:
    high, _ = naive(0.99, 0.9, 1.1, 1e-3)
    assert 105 - high > 4, "the trap is gone: the naive answer does not certify"
    slow = layer([[0.99]], dtype=torch.float32)
    slow.pixel_range = (0.0, 2.0)  # type: ignore[assignment]  # the attribute that a user sets
    truth = Fraction(1.1) / (1 - exact(slow.fusion.weight)[0, 0])
    assert truth > 105
    for steps in (1, 5, 100, 5000):
        (verdict,) = certify(
            slow, torch.ones(1, 1), None, "0.1", C=-torch.ones(1, 1), rhs=torch.tensor([-105.0]), max_steps=steps
        )
        assert verdict.status in (Status.UNKNOWN, Status.FALSIFIED)  # the property is false
        assert verdict.margin is None or verdict.margin <= -5
    (verdict,) = certify(
        slow, torch.ones(1, 1), None, "0.1", C=-torch.ones(1, 1), rhs=torch.tensor([-105.0]), attack="pgd"
    )
    assert verdict.status is Status.FALSIFIED and verdict.witness is not None
    witness = Fraction(float(verdict.witness[0]))
    assert witness / (1 - exact(slow.fusion.weight)[0, 0]) > 105
    assert abs(witness - 1) <= Fraction(1, 10)


@pytest.mark.parametrize(("power", "stuck"), [(12, 5119.0), (16, 81664.0)])
def test_float32_stagnates_with_a_residual_of_zero_and_the_box_still_holds_the_equilibrium(
    power: int, stuck: float
) -> None:
    w, truth = 1 - 2.0**-power, 1.25 * 2**power
    if power == 12:  # the other takes a million steps
        assert naive(w, 1.0, 1.25, 0.0)[0] == stuck < truth
    module = layer([[w]], dtype=torch.float32)
    center = torch.tensor([[1.125]])
    for steps in (1, 20, 1000):
        box = bound(module, Region(center, 0.125, clip=None), max_steps=steps)
        assert float(box.lower) <= 2**power and float(box.upper) >= truth
    assert float(bound(module, Region(center, 0.125, clip=None)).upper) <= truth * (1 + 1e-6)


# --------------------------------------------------------------------------------------------- self-maps prove nothing


def test_a_box_that_maps_into_itself_is_no_proof_without_a_gauge() -> None:
    two = layer([[2.0]], [-1.0])  # z = 0 and z = 1 are both equilibria; [0, 0] maps into itself
    with pytest.raises(NoGaugeError, match="no gauge"):
        gauge(two)
    with pytest.raises(NoGaugeError, match="slack"):
        enclose(two, Gauge(torch.ones(1)), point(-1.0), Auto())
    with pytest.raises(NoGaugeError):
        bound(two, point(0.0))
    two.pixel_range = None  # type: ignore[assignment]  # the attribute that a user sets
    (verdict,) = certify(two, torch.zeros(1, 1), None, 0, C=-torch.ones(1, 1), rhs=-torch.ones(1))
    assert verdict.status is Status.UNKNOWN and verdict.margin is None and "no gauge" in verdict.reason


def test_a_large_negative_diagonal_is_enclosed_and_never_by_a_crossed_box() -> None:
    negative = layer([[-10.0]], [1.0])
    found = gauge(negative)
    assert found.transformed
    for solver in SOLVERS:
        box = enclose(negative, found, point(1.0), solver).box
        assert float(box.lower) <= float(box.upper)
        assert outside(np.array([Fraction(1, 11)]), box.lower[0], box.upper[0]) == []
    with pytest.raises(RegionError, match="crossed"):
        bound(negative, Box(torch.ones(1, 1), torch.zeros(1, 1)))


@pytest.mark.parametrize("u", [[1.0, -1.0], [1.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0, 1e-3]])
def test_a_vector_that_is_no_gauge_is_refused(u: list[float]) -> None:
    module = layer([[0.5, 0.25], [0.25, 0.5]])
    with pytest.raises(NoGaugeError):
        enclose(module, Gauge(torch.tensor(u, dtype=torch.float64)), point(1.0, 1.0), Auto())


def test_a_rate_of_one_and_a_rate_that_rounds_to_one_have_no_gauge() -> None:
    for rate in (1.0, 1 - 2.0**-53, 1 + 2.0**-52):
        with pytest.raises(NoGaugeError):
            gauge(layer([[0.0, rate], [rate, 0.0]]))


# ------------------------------------------------------------------------------------------------------- fail closed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.fusion.weight", "0.injection.bias", "1.weight"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    model = nn.Sequential(layer([[0.5]]), linear([[1.0], [0.0]]))
    with torch.no_grad():
        model.get_parameter(name).fill_(value)
    with pytest.raises(ModelError, match="NaN or infinite"):
        certify(model, torch.ones(1, 1), torch.tensor([0]), 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    model = nn.Sequential(layer([[0.5]]), linear([[1.0], [0.0]]))
    for clip in ((0.0, 1.0), None):
        model.pixel_range = clip  # type: ignore[assignment]  # the attribute that a user sets
        with pytest.raises(InputError):
            certify(model, torch.tensor([[value]]), torch.tensor([0]), 0.1)
    with pytest.raises(RegionError, match="NaN"):
        bound(model, Box(torch.full((1, 1), torch.nan), torch.full((1, 1), torch.nan)))


def test_an_infinite_box_of_inputs_gives_infinite_bounds() -> None:
    infinity = torch.full((1, 1), torch.inf)
    box = bound(nn.Sequential(layer([[0.5]]), linear([[1.0]])), Box(-infinity, infinity))
    assert float(box.lower) == -torch.inf and float(box.upper) == torch.inf


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_solver_that_was_stopped_certifies_nothing_false(steps: int) -> None:
    # z = relu(.999 z + x) is 1000 at x = 1: 1001 - z has a margin of 1 there, and of less than 0 from x = 1.002 on.
    slow = layer([[0.999]])
    slow.pixel_range = None  # type: ignore[assignment]  # the attribute that a user sets
    (verdict,) = certify(
        slow, torch.ones(1, 1), None, "0.01", C=-torch.ones(1, 1), rhs=torch.tensor([-1001.0]), max_steps=steps
    )
    assert verdict.status in (Status.UNKNOWN, Status.FALSIFIED)  # the property is false


def test_a_sample_without_time_is_not_certified() -> None:
    model = nn.Sequential(layer([[0.5]]), linear([[1.0], [0.0]]))
    (verdict,) = certify(model, torch.ones(1, 1), torch.tensor([0]), 0.1)
    assert verdict.certified
    (verdict,) = certify(model, torch.ones(1, 1), torch.tensor([0]), 0.1, timeout=1e-9)
    assert verdict.status is Status.TIMEOUT and not verdict.certified


def test_a_margin_of_exactly_zero_is_no_margin() -> None:
    model = linear([[1.0], [1.0]])
    (verdict,) = certify(model, torch.ones(1, 1), torch.tensor([0]), 0)
    assert verdict.status is Status.UNKNOWN and verdict.margin is not None and verdict.margin <= 0


def test_the_margin_of_a_verdict_is_a_lower_bound_after_rhs_is_taken_off() -> None:
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(0.75 * 2.0**-52)
    (verdict,) = certify(model, torch.ones(1, 1), None, 0, C=torch.ones(1, 1), rhs=-torch.ones(1))
    assert verdict.certified and verdict.margin is not None
    assert Fraction(verdict.margin) <= 1 + Fraction(0.75 * 2.0**-52)


# ---------------------------------------------------------------------------------------- overflow, underflow, flushing


def test_a_sum_that_overflows_on_its_way_says_nothing() -> None:
    # In exact arithmetic -1e308; in float64 1e308 + 1e308 is infinity, and nothing brings it back.
    weight = [[1e308, 1e308, -1.5e308, -1.5e308]]
    ones = point(1.0, 1.0, 1.0, 1.0)
    for signed in (weight, [[-w for w in weight[0]]]):
        truth = sum(Fraction(w) for w in signed[0])
        plain = bound(linear(signed), ones)
        assert outside(np.array([truth]), plain.lower[0], plain.upper[0]) == []
        rectified = bound(nn.Sequential(linear(signed), nn.ReLU()), ones)
        assert outside(np.array([max(truth, Fraction(0))]), rectified.lower[0], rectified.upper[0]) == []
        elided = bound(linear(signed), ones, C=torch.ones(1, 1))
        assert outside(np.array([truth]), elided.lower[0], elided.upper[0]) == []


def test_products_that_underflow_are_still_positive() -> None:
    box = bound(linear([[2.0**-600]]), point(2.0**-600))
    assert float(box.upper) > 0
    solved = layer([[-(2.0**600), 2.0**-500], [0.0, 0.0]], [0.0, 1.0])  # W̃ = 2^-1100 is no float64
    box = bound(nn.Sequential(solved, linear([[2.0**1000, 0.0]])), point(0.0, 2.0**100))
    truth = Fraction(2) ** 1000 * Fraction(2.0**-500) * (Fraction(2) ** 100 + 1) / (1 + Fraction(2) ** 600)
    assert outside(np.array([truth]), box.lower[0], box.upper[0]) == []


@pytest.fixture
def flushing() -> Iterator[None]:
    """Denormals are zero, in and out."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    yield
    torch.set_flush_denormal(False)


def denormal(*shape: int) -> Tensor:
    """About 1.4e-40 in float32, made from its bits."""
    return torch.full(shape, 100_000, dtype=torch.int32).view(torch.float32)


def test_flushed_products_are_covered(flushing: None) -> None:
    box = bound(linear([[2.0**1020] * 4]), Box(*(torch.full((1, 4), 2.0**-1022, dtype=torch.float64),) * 2))
    assert float(box.lower) <= 1.0 <= float(box.upper)
    # (2^-1030 * 2^1020) * 4 = .0039 where the inputs read as zero
    small = torch.full((1, 4), 1 << 44, dtype=torch.int64).view(torch.float64)
    try:
        box = bound(linear([[2.0**1020] * 4]), Box(small, small))
    except RegionError:
        return  # refusing is as good
    assert float(box.lower) <= 4 * 2.0**-10 <= float(box.upper)


def test_flushed_margin_rows_are_covered(flushing: None) -> None:
    size = 0.995 * 2.0**-511  # its square is denormal
    features, C = torch.ones(1, 100, dtype=torch.float64), torch.full((1, 1, 100), size, dtype=torch.float64)
    box = elide(Box(features, features), C, torch.full((100, 100), size, dtype=torch.float64), None)
    assert float(box.upper) >= 9_900 * TINY


def test_flushed_sums_are_covered(flushing: None) -> None:
    low = torch.full((1, 1), -(1 << 63) + (1 << 51), dtype=torch.int64).view(torch.float64)  # -2^-1023
    total = Arithmetic({}).add(Box(low, -low), Box(low, -low))
    assert float(total.lower) <= -TINY and float(total.upper) >= TINY


def test_weights_that_would_be_read_as_zero_are_refused(flushing: None) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data = denormal(1, 1)
    with pytest.raises(VerideqError, match="denormal"):
        bound(model, point(1e38))


def test_pixels_that_would_be_read_as_zero_are_refused(flushing: None) -> None:
    model = linear([[1e38]], torch.float32)
    with pytest.raises(VerideqError, match="denormal"):
        bound(model, Region(denormal(1, 1), 0, clip=None))
    with pytest.raises(VerideqError, match="denormal"):
        bound(model, Box(denormal(1, 1), denormal(1, 1)))


def test_a_layer_whose_row_factor_would_be_flushed_is_not_believed(flushing: None) -> None:
    # z_0 = relu(-1e308 z_0 + 1e308 z_1) is nearly z_1 = 1; the factor 1 / (1 + 1e308) is denormal.
    module = layer([[-1e308, 1e308], [0.0, 0.0]])
    try:
        box = bound(module, point(0.0, 1.0))
    except VerideqError:
        return
    assert float(box.upper[0, 0]) >= 0.999 or not float(box.upper[0, 0]) < torch.inf


# --------------------------------------------------------------------------------------------------- batch invariance


def mondeq(inputs: int = 12, units: int = 24, classes: int = 4) -> nn.Sequential:
    """Untrained, by IBP-MonDEQ, scaled so that verdicts of every kind occur."""
    torch.manual_seed(3)
    fusion = IBPMonDEQ.apply(nn.Linear(units, units, bias=False), m=0.2)
    return nn.Sequential(Equilibrium(fusion, nn.Linear(inputs, units)), nn.Linear(units, classes))


def test_no_verdict_depends_on_batch_mates() -> None:
    model = mondeq()
    images = torch.rand(64, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % 4
    reference = certify(model, images, labels, "1/100", attack="pgd", batch_size=64)
    assert {v.status for v in reference} >= {Status.CERTIFIED, Status.MISCLASSIFIED, Status.FALSIFIED}
    # What an attack breaks is bounded by intervals alone, so that without one its margin is another.
    plain = certify(model, images, labels, "1/100", batch_size=64)
    assert [v.certified for v in plain] == [v.certified for v in reference]
    for size, count, attack in ((1, 64, "none"), (7, 64, "none"), (7, 16, "pgd")):
        verdicts = certify(model, images[:count], labels[:count], "1/100", attack=attack, batch_size=size)
        for ours, theirs in zip(verdicts, plain if attack == "none" else reference, strict=False):
            assert ours.margin == pytest.approx(theirs.margin, abs=1e-9)
            assert (ours.status, ours.prediction, ours.attacked) == (theirs.status, theirs.prediction, theirs.attacked)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    # The attack's noise goes by the index, which shuffling changes.
    shuffled = certify(model, images[order], labels[order], "1/100", batch_size=7)
    for ours, theirs in zip(shuffled, [plain[i] for i in order.tolist()], strict=True):
        assert ours.margin == pytest.approx(theirs.margin, abs=1e-9)
        assert ours.certified == theirs.certified


def test_a_sample_that_overflows_does_not_take_its_batch_mates_along() -> None:
    model = nn.Sequential(linear([[1e200], [0.0]]), linear([[1e200, 0.0], [0.0, 1.0]]))
    model.pixel_range = None  # type: ignore[assignment]  # the attribute that a user sets
    images = torch.tensor([[1.0], [1e-300], [1e200]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0])
    together, alone = certify(model, images, labels, 0), certify(model, images, labels, 0, batch_size=1)
    assert [v.status for v in together] == [v.status for v in alone]
    assert together[1].certified and not together[0].certified and not together[2].certified
    assert together[1].margin == pytest.approx(alone[1].margin)


def test_a_huge_specification_does_not_widen_the_margins_of_batch_mates() -> None:
    prepared, x = prepare(mondeq()), torch.full((2, 12), 0.5)
    C = torch.eye(4, dtype=torch.float64).expand(2, 4, 4).clone()
    C[1] *= 1e306
    box, alone = bound(prepared, Region(x, 0.01), C=C), bound(prepared, Region(x[:1], 0.01), C=C[:1])
    assert torch.allclose(box.lower[0], alone.lower[0], rtol=0, atol=1e-9)
