"""The linear bounds that auto_LiRPA's nodes are made of, without auto_LiRPA: sound for anything a solver returns."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from verideq import Box, Equilibrium, solve
from verideq.certify.lirpa import coefficients, custom_ops, recording, register, relaxation, snapshot
from verideq.certify.lirpa.coefficients import dense, refuse_balls
from verideq.certify.lirpa.relaxation import Relaxation
from verideq.certify.lirpa.snapshot import Snapshot
from verideq.equilibrium import Auto, Convolution, Dense, Operator
from verideq.errors import InputError, NoGaugeError, UnsupportedOperation

ROUNDING = 1e-12
"""What a sampled equilibrium, and a bound that nobody rounds outward, may be off by."""
STATES = {"dense": (7,), "conv": (2, 4, 3), "replicate": (2, 4, 3)}


def operator(kind: str, dtype: torch.dtype = torch.float64) -> Operator:
    """With own entries, signs, and a contraction rate of 0.9."""
    draw = torch.Generator().manual_seed(3)
    if kind == "dense":
        weight = torch.randn(7, 7, generator=draw, dtype=torch.float64)
        weight = 0.9 * weight / weight.abs().sum(1, keepdim=True)
        weight[0, 0] = -3.0
        return Dense(weight.to(dtype))
    weight = torch.randn(2, 2, 3, 3, generator=draw, dtype=torch.float64)
    weight = 0.9 * weight / weight.abs().sum((1, 2, 3), keepdim=True)
    return Convolution(weight.to(dtype), (1, 1, 1, 1), mode="zeros" if kind == "conv" else kind)


def injections(state: tuple[int, ...], radius: float = 0.6) -> Box:
    center = torch.randn(3, *state, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Box(center - radius, center + radius)


def equilibria(taken: Snapshot, v: Box, count: int = 400) -> tuple[Tensor, Tensor]:
    """Points and corners of a box, and what they lead to: (samples, batch, *state) both."""
    draw = torch.Generator().manual_seed(7)
    unit = torch.rand(count, *v.lower.shape, generator=draw, dtype=torch.float64)
    unit[: count // 2] = unit[: count // 2].round()
    points = v.lower + unit * v.width
    exact = solve(taken.layer, points.flatten(0, 1), tol=1e-14, throw=False)
    return points, exact.value.view_as(points)


def rows(state: tuple[int, ...], count: int = 6) -> Tensor:
    return torch.randn(count, 3, *state, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def value(A: Tensor, z: Tensor) -> Tensor:
    """(samples, rows, batch)."""
    return torch.einsum("rbi,sbi->srb", A.flatten(2), z.flatten(2))


def gap(known: Relaxation, v: Box, *, pre: bool = False, alpha: Tensor | None = None) -> float:
    """By how much a sampled value stays above the bound, at worst; negative for a bound that is wrong."""
    points, z = equilibria(known.snapshot, v)
    A = rows(tuple(v.lower.shape[1:]))
    on_v, constants = known.least(A, alpha, torch.float64, pre=pre)
    solved, factor = known.snapshot.solved
    what = solved.apply(z.flatten(0, 1)).view_as(z) + points * factor if pre else z
    return float((value(A, what) - value(on_v, points) - constants).min())


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_no_sampled_equilibrium_lies_below_a_bound(kind: str, pre: bool) -> None:
    v = injections(STATES[kind])
    known = Relaxation.over(Snapshot.of(operator(kind)), v)
    assert bool(known.unstable.any())
    assert -ROUNDING <= gap(known, v, pre=pre) < 0.4
    for alpha in (torch.zeros(1), torch.ones(1), torch.rand(6, 3, *STATES[kind], dtype=torch.float64)):
        assert gap(known, v, pre=pre, alpha=alpha) >= -ROUNDING


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", STATES)
def test_a_solver_that_stops_early_makes_bounds_looser_and_never_wrong(
    kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = injections(STATES[kind])
    good = gap(Relaxation.over(Snapshot.of(operator(kind)), v), v)
    for name in ("TIGHT", "FINE"):
        monkeypatch.setattr(snapshot, name, Auto(0.0, steps))
    monkeypatch.setattr(relaxation, "TIGHT", Auto(0.0, steps))
    early = Relaxation.over(Snapshot.of(operator(kind)), v)
    assert gap(early, v) >= -ROUNDING
    assert gap(early, v, pre=True) >= -ROUNDING
    if steps == 1:
        assert gap(early, v) > good


@pytest.mark.parametrize("twin", ["flat chord", "all inactive", "narrow box", "all active", "no transpose"])
def test_wrong_twins_are_caught(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v = injections(STATES["dense"])
    known = Relaxation.over(Snapshot.of(operator("dense")), v)
    if twin == "flat chord":
        slope = known.slope
        monkeypatch.setattr(Relaxation, "slope", property(lambda self: torch.where(self.unstable, 0.9 * slope, slope)))
    elif twin == "all inactive":
        known = replace(known, pre=Box(known.pre.lower, known.pre.upper.clamp(max=0))).tidied()
    elif twin == "narrow box":
        middle, half = known.pre.center, known.pre.width / 4
        known = replace(known, pre=Box(middle - half, middle + half)).tidied()
    elif twin == "all active":
        known = replace(known, pre=Box(known.pre.lower.clamp(min=0), known.pre.upper.clamp(min=0)))
    else:
        monkeypatch.setattr(Dense, "transpose", lambda self: self)
    assert gap(known, v) < -1e-3


def test_any_multipliers_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(13)
    v = injections(STATES["dense"])
    known = Relaxation.over(Snapshot.of(operator("dense")), v)
    for scale in (0.0, 0.1, 1.0, 30.0):
        monkeypatch.setattr(
            Relaxation, "respond", lambda self, q, alpha, s=scale: s * torch.randn(q.shape, generator=draw).to(q)
        )
        assert gap(known, v) >= -ROUNDING
        assert gap(known, v, pre=True) >= -ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_in_float32_are_rounded_before_the_constants_are_made(dtype: torch.dtype) -> None:
    v = injections(STATES["dense"])
    known = Relaxation.over(Snapshot.of(operator("dense", torch.float32)), v)
    points, z = equilibria(known.snapshot, v)
    A = rows(STATES["dense"])
    on_v, constants = known.least(A, None, dtype)
    assert on_v.dtype is constants.dtype is dtype
    # Only the constant itself is rounded once more.
    slack = 2.0**-23 * float(constants.abs().max()) if dtype is torch.float32 else 0.0
    assert float((value(A, z) - value(on_v.double(), points) - constants.double()).min()) >= -slack


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_forward_lines_hold_and_hold_when_stopped_early(kind: str, pre: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``v = center + radius e``: the lines of ``v`` in ``e`` are exact, those of ``z`` bounds."""
    v = injections(STATES[kind], 0.15)
    size = math.prod(STATES[kind])
    lines = torch.cat((torch.diag_embed(v.width.flatten(1) / 2), v.center.flatten(1)[:, None]), 1)
    lines = lines.view(3, size + 1, *STATES[kind])
    taken = Snapshot.of(operator(kind))
    points, z = equilibria(taken, v)
    e = torch.cat((((points - v.center) / (v.width / 2)).flatten(2), torch.ones_like(points.flatten(2)[..., :1])), 2)
    solved, factor = taken.solved
    what = solved.apply(z.flatten(0, 1)).view_as(z) + points * factor if pre else z
    widths = []
    for steps in (500, 3, 1):
        monkeypatch.setattr(snapshot, "FINE", Auto(1e-10, steps))
        below, above = Relaxation.over(taken, v).forward(lines, lines, pre=pre)
        ends = [torch.einsum("sbt,btu->sbu", e, side.flatten(2)).view_as(z) for side in (below, above)]
        assert float((what - ends[0]).min()) >= -ROUNDING
        assert float((ends[1] - what).min()) >= -ROUNDING
        widths.append(float((ends[1] - ends[0]).mean()))
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_gradients_of_boxes_and_of_linear_bounds(kind: str) -> None:
    whole = operator(kind)
    v, A = injections(STATES[kind]), rows(STATES[kind], 2)
    assert isinstance(whole, (Dense, Convolution))
    # No slope of the lower line changes on the way.
    alpha = torch.full((2, 1, *[1] * len(STATES[kind])), 0.3, dtype=torch.float64, requires_grad=True)

    def bounds(weight: Tensor, lower: Tensor, upper: Tensor, A: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        known = Relaxation.over(Snapshot.of(replace(whole, weight=weight)), Box(lower, upper))
        lines = torch.stack((lower, upper - lower), 1)
        return (
            known.z.lower, known.z.upper, known.pre.lower, known.pre.upper,
            *known.least(A, alpha, torch.float64), *known.least(A, alpha, torch.float64, pre=True),
            *known.forward(lines, lines + 0.1),
        )  # fmt: skip

    inputs = [t.detach().clone().requires_grad_() for t in (whole.weight, v.lower, v.upper, A)]
    assert torch.autograd.gradcheck(bounds, (*inputs, alpha), atol=1e-4, rtol=1e-3, fast_mode=True)


def test_rows_are_solved_a_chunk_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    v = injections(STATES["dense"])
    known = Relaxation.over(Snapshot.of(operator("dense")), v)
    A, alpha = rows(STATES["dense"]), torch.rand(6, 3, 7, dtype=torch.float64)
    whole = known.least(A, alpha, torch.float64)
    monkeypatch.setattr(relaxation, "ELEMENTS", 2 * A[0].numel())
    for part, other in zip(known.least(A, alpha, torch.float64), whole, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_and_not_passed_on(bad: float) -> None:
    v = injections(STATES["dense"])
    taken = Snapshot.of(operator("dense"))
    lower = v.lower.clone()
    lower[1, 2] = -bad
    with pytest.raises(InputError, match="NaN or infinity"):
        Relaxation.over(taken, Box(lower, v.upper))
    A = rows(STATES["dense"])
    A[0, 0, 0] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        Relaxation.over(taken, v).least(A, None, torch.float64)


def test_ends_that_crossed_by_rounding_are_turned_round() -> None:
    v = injections(STATES["dense"], 0.4)
    crossed = Relaxation.over(Snapshot.of(operator("dense")), Box(v.upper, v.lower))
    assert bool(crossed.z.sound().all())
    assert gap(crossed, v) >= -ROUNDING


def test_pre_activations_that_miss_the_box_are_not_believed() -> None:
    v = injections(STATES["dense"])
    known = Relaxation.over(Snapshot.of(operator("dense")), v)
    beside = known.narrowed(Box(known.pre.upper + 1, known.pre.upper + 2))
    assert torch.equal(beside.pre.lower, known.pre.lower)
    assert gap(beside, v) >= -ROUNDING


def test_a_layer_without_a_gauge_is_refused() -> None:
    with pytest.raises(NoGaugeError, match="auto_LiRPA cannot bound this equilibrium: no gauge") as caught:
        Snapshot.of(Dense(torch.full((2, 2), 0.6)))
    assert caught.value.rate == pytest.approx(1.2, rel=1e-3)


def test_coefficients_in_their_four_forms() -> None:
    def made(kind: str, **fields: object) -> object:
        return type(kind, (SimpleNamespace,), {})(**fields)

    A = torch.rand(2, 3, 4)
    assert dense(None, (4,)) is None
    assert dense(A, (4,)) is A
    eye = dense(made("eyeC", shape=(4, 3, 2, 2), device="cpu"), (2, 2))
    assert eye is not None and eye.shape == (4, 3, 2, 2)
    assert torch.equal(eye[:, 1].reshape(4, 4), torch.eye(4))
    places = torch.tensor([[1, 3, 0], [2, 2, 2]])
    hot = dense(made("OneHotC", shape=(2, 3, 4), device="cpu", index=places, coeffs=None), (4,))
    assert hot is not None and torch.equal(hot.argmax(2), places) and float(hot.sum()) == 6
    scaled = dense(made("OneHotC", shape=(2, 3, 4), device="cpu", index=places, coeffs=A[..., 0]), (4,))
    assert scaled is not None
    torch.testing.assert_close(scaled.sum(2), A[..., 0])
    patches = made("Patches", patches=A, stride=2, inserted_zeros=0, output_padding=0)
    for field, bad in (("stride", (2, 1)), ("inserted_zeros", 1), ("output_padding", (0, 1, 0, 0)), ("patches", None)):
        strange = made("Patches", **{**vars(patches), field: bad})
        with pytest.raises(UnsupportedOperation, match="conv_mode': 'matrix'"):
            dense(strange, (4,))


def node(kind: str, *inputs: object, norm: float | None = None, perturbed: bool = True) -> SimpleNamespace:
    made = type(kind, (SimpleNamespace,), {})(inputs=list(inputs), perturbed=perturbed)
    if kind in ("BoundRelu", "BoundTanh"):
        made.requires_input_bounds = [0]
    if norm is not None:
        made.perturbation = SimpleNamespace(norm=norm, eps=0.1)
    return made  # type: ignore[no-any-return]  # a class of its own, for its name


def test_balls_that_auto_lirpa_takes_for_their_centres_are_refused() -> None:
    ball, weight = node("BoundInput", norm=2.0), node("BoundParams", perturbed=False)
    straight = node("BoundLinear", node("BoundReshape", ball), weight)
    scaled = node("BoundLinear", node("BoundDiv", ball), weight)
    added = node("BoundLinear", node("BoundAdd", ball, node("BoundRelu", straight)), weight)
    for interval in (True, False):
        refuse_balls(straight, interval=interval)
        refuse_balls(node("BoundRelu", straight), interval=interval)
        counted = node("BoundInput")
        counted.perturbation = type("PerturbationL0Norm", (SimpleNamespace,), {})(eps=2)
        deep = node("BoundLinear", node("BoundTanh", ball), weight)
        for bad in (ball, node("BoundReshape", ball), node("BoundRelu", ball), deep, counted):
            with pytest.raises(UnsupportedOperation, match="takes the centre of this ball for the ball"):
                refuse_balls(bad, interval=interval)
    for mixed in (scaled, added):
        refuse_balls(mixed, interval=False)
        with pytest.raises(UnsupportedOperation, match="begin with a Linear or Conv2d"):
            refuse_balls(mixed, interval=True)
    refuse_balls(node("BoundInput", norm=math.inf), interval=True)
    assert coefficients.AFFINE == ("BoundLinear", "BoundConv")


def test_without_auto_lirpa_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "auto_LiRPA", None)
    for call in (register, custom_ops):
        with pytest.raises(ImportError, match=r"pip install --no-deps git\+https"):
            call()
    assert Equilibrium.recorder is None


def test_a_recorded_layer_takes_its_tensors_from_outside() -> None:
    layer = Equilibrium(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    nn.init.constant_(layer.fusion.weight, 0.1)  # type: ignore[arg-type]  # torch types attributes loosely
    other = torch.full((2, 2), 0.2, requires_grad=True)
    recorded = recording.Recorded(layer)
    assert isinstance(recorded.operator([other]), Dense)
    assert recorded.operator([other]).absolute_units().detach()[0, 0] == pytest.approx(0.2)
    recorded.equilibrate(torch.ones(1, 2), [other]).sum().backward()
    assert other.grad is not None and bool((other.grad > 0).all())
    assert layer.fusion.weight.grad is None
    assert float(layer.operator().absolute_units()[0, 0].detach()) == pytest.approx(0.1)
