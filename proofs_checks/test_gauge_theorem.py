"""The gauge theorem (docs/theory.md), parts 1 to 4 and the transformed layer, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from verideq.equilibrium import Convolution
from verideq.testing.exact import ZERO, equilibrium, exact, is_equilibrium, matrix, relu, select, solve_linear, zeros
from verideq.testing.strategies import PADDINGS, fusions

checked = settings(max_examples=150, deadline=None, derandomize=True)
ONE = Fraction(1)


def identity(size: int) -> np.ndarray:
    return select(np.eye(size, dtype=bool), ONE, ZERO)


def solved(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``W̃ = (I - diag W)⁻¹ offdiag W`` and the factor ``1 / (1 - diag W)``."""
    factor = 1 / (ONE - np.diag(W))
    return (W - np.diag(np.diag(W))) * factor[:, None], factor


def gauge_of(W: np.ndarray) -> np.ndarray | None:
    """``u`` with ``(I - |W|) u = 1`` if it is positive: a gauge of slack 1."""
    u = solve_linear(identity(len(W)) - abs(W), np.full(len(W), ONE, dtype=object))
    return u if u is not None and bool((u > 0).all()) else None


def norm(x: np.ndarray, u: np.ndarray) -> Fraction:
    """``max |x_i| / u_i``."""
    return max(abs(x) / u)


def interval_map(W: np.ndarray, lower: np.ndarray, upper: np.ndarray, v: tuple[np.ndarray, np.ndarray]) -> tuple:
    """``G(l, h)``."""
    plus, minus = relu(W), -relu(-W)
    return relu(plus @ lower + minus @ upper + v[0]), relu(plus @ upper + minus @ lower + v[1])


@st.composite
def systems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with a gauge, signed or not, and that gauge; every other time an arbitrary slack."""
    units = draw(st.integers(1, 5))
    W = exact(draw(fusions(units, units)))
    if gauge_of(W) is None:
        W, _ = solved(W)  # a large negative diagonal
    u = gauge_of(W)
    assume(u is not None)
    assert u is not None
    if draw(st.booleans()):  # any u > 0 with u - |W| u > 0 will do: push the one of slack 1 towards the others
        u = u + draw(vectors(units, 0)) / 8
        assume(bool((u - abs(W) @ u > 0).all()))
    return W, u


def vectors(size: int, low: int = -8) -> st.SearchStrategy[np.ndarray]:
    """Fractions from -4 to 4."""
    values = st.lists(st.integers(low, 8).map(lambda k: Fraction(k, 2)), min_size=size, max_size=size)
    return values.map(lambda drawn: np.array(drawn, dtype=object))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``W, u``, two injections (the ends of a box), and a point ``ẑ``."""
    W, u = draw(systems())
    a, b = draw(vectors(len(u))), draw(vectors(len(u)))
    return W, u, np.minimum(a, b), np.maximum(a, b), draw(vectors(len(u)))


@checked
@given(problems())
def test_1_the_layer_contracts_and_its_equilibrium_is_unique(problem: tuple) -> None:
    W, u, v, other, z = problem
    q = max((abs(W) @ u) / u)
    assert q < 1

    def F(x: np.ndarray) -> np.ndarray:
        return relu(W @ x + v)

    assert norm(F(z) - F(other), u) <= q * norm(z - other, u)
    truth = equilibrium(W, v)
    iterate, start = zeros(len(u)), norm(truth, u)
    for step in range(1, 5):
        iterate = F(iterate)
        assert norm(iterate - truth, u) <= q**step * start
    # Every active set that solves the equations gives the same point.
    for bits in range(2 ** len(u)):
        active = [i for i in range(len(u)) if bits >> i & 1]
        part = solve_linear(identity(len(active)) - W[np.ix_(active, active)], v[active]) if active else v[active]
        candidate = zeros(len(u))
        candidate[active] = part
        assert not is_equilibrium(W, v, candidate) or bool((candidate == truth).all())


@checked
@given(problems(), st.data())
def test_1_the_interval_map_contracts_at_the_same_rate(problem: tuple, data: st.DataObject) -> None:
    W, u, low, high, z = problem
    q = max((abs(W) @ u) / u)
    other = data.draw(vectors(len(u)))
    one, two = (np.minimum(z, other), np.maximum(z, other)), (low, high)
    a, b = interval_map(W, *one, (low, high)), interval_map(W, *two, (low, high))
    distance = max(norm(one[k] - two[k], u) for k in (0, 1))
    assert max(norm(a[k] - b[k], u) for k in (0, 1)) <= q * distance


@checked
@given(problems())
def test_2_any_point_is_within_t_u_of_the_equilibrium(problem: tuple) -> None:
    W, u, v, _, guess = problem
    t = max(abs(guess - relu(W @ guess + v)) / (u - abs(W) @ u))
    assert bool((abs(equilibrium(W, v) - guess) <= t * u).all())


def test_2_is_sharp() -> None:
    W, v = np.array([[Fraction(9, 10)]], dtype=object), np.array([ONE], dtype=object)
    assert equilibrium(W, v)[0] == 10  # from 0: residual 1, slack 1/10, and the error is 10


@checked
@given(problems(), st.data())
def test_3_a_box_moved_out_by_t_u_maps_into_itself_and_holds_every_equilibrium(
    problem: tuple, data: st.DataObject
) -> None:
    W, u, low, high, z = problem
    other = data.draw(vectors(len(u)))
    lower, upper = relu(np.minimum(z, other)), relu(np.maximum(z, other))
    below, above = interval_map(W, lower, upper, (low, high))
    t = max(ZERO, max(np.maximum(above - upper, lower - below) / (u - abs(W) @ u)))
    lower, upper = relu(lower - t * u), upper + t * u
    below, above = interval_map(W, lower, upper, (low, high))
    assert bool((below >= lower).all() and (above <= upper).all())
    for bits in range(2 ** len(u)):
        v = select(np.array([bool(bits >> i & 1) for i in range(len(u))]), high, low)
        truth = equilibrium(W, v)
        assert bool((lower <= truth).all() and (truth <= upper).all())


@checked
@given(problems())
def test_4_the_anytime_solver_is_sound_after_every_step(problem: tuple) -> None:
    W, u, low, high, _ = problem
    t = max(relu(high) / (u - abs(W) @ u))
    lower, upper = zeros(len(u)), t * u
    truths = [equilibrium(W, v) for v in (low, high, (low + high) / 2)]
    for _ in range(4):
        below, above = interval_map(W, lower, upper, (low, high))
        assert bool((below >= lower).all() and (above <= upper).all())
        for truth in truths:
            assert bool((lower <= truth).all() and (truth <= upper).all())
        lower, upper = np.maximum(lower, below), np.minimum(upper, above)


@checked
@given(problems(), st.lists(st.integers(-40, 1), min_size=5, max_size=5))
def test_rows_solved_for_their_own_unknowns_have_the_same_equilibria(problem: tuple, diagonal: list[int]) -> None:
    W, u, v, _, _ = problem
    W = W - np.diag(np.diag(W)) + np.diag(np.array([Fraction(d, 4) for d in diagonal[: len(u)]], dtype=object))
    tilde, factor = solved(W)
    assume(gauge_of(tilde) is not None)
    truth = equilibrium(tilde, v * factor)
    assert is_equilibrium(W, v, truth)


@checked
@given(systems())
def test_a_gauge_of_the_layer_is_one_of_the_solved_layer(system: tuple) -> None:
    W, u = system
    tilde, _ = solved(W)
    assert bool((abs(tilde) @ u < u).all())


def test_a_signed_diagonal_in_the_error_bound_is_false() -> None:
    # W = -10, v = 1, ẑ = 1: with diag(W) + |offdiag W| the slack would be 11, and the bound 1/11; the error is 10/11.
    W, v = np.array([[Fraction(-10)]], dtype=object), np.array([ONE], dtype=object)
    residual = abs(1 - relu(W @ v + v)[0])
    assert residual / (1 - W[0, 0]) == Fraction(1, 11) < abs(equilibrium(W, v)[0] - 1) == Fraction(10, 11)


def test_a_self_map_without_a_gauge_proves_nothing() -> None:
    W, v = np.array([[Fraction(2)]], dtype=object), np.array([-ONE], dtype=object)
    below, above = interval_map(W, zeros(1), zeros(1), (v, v))
    assert below[0] == above[0] == 0  # [0, 0] maps into itself
    assert is_equilibrium(W, v, np.array([ONE], dtype=object))  # and yet
    assert gauge_of(W) is None


def test_a_crossed_box_passes_the_containment_test() -> None:
    W, v = np.array([[Fraction(-10)]], dtype=object), np.array([ONE], dtype=object)
    lower, upper = np.array([ONE], dtype=object), zeros(1)
    below, above = interval_map(W, lower, upper, (v, v))
    assert below[0] >= lower[0] and above[0] <= upper[0] and equilibrium(W, v)[0] == Fraction(1, 11)


@pytest.mark.parametrize("mode", PADDINGS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_gauge_by_channel_serves_every_padding_and_size(mode: str, data: st.DataObject) -> None:
    channels, kernel = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3]))
    weight = data.draw(fusions(channels, channels, kernel, kernel))
    u = gauge_of(abs(exact(weight)).sum((2, 3)))
    assume(u is not None)
    assert u is not None
    operator = Convolution(weight, (kernel // 2,) * 4, mode=mode)
    for shape in ((channels, 2, 2), (channels, 2, 3)):
        W = abs(matrix(operator, shape))  # of the merged entries: |a + b| <= |a| + |b|
        spread = np.repeat(u, shape[1] * shape[2])
        assert bool((W @ spread < spread).all())


def test_a_gauge_by_channel_is_not_necessary_for_zero_padding() -> None:
    # The taps sum to 1.2, but on an image of 2x1 only two of the three are ever read at once.
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weight[0, 0, :, 1] = 0.4
    assert gauge_of(abs(exact(weight)).sum((2, 3))) is None
    assert gauge_of(matrix(Convolution(weight, (1, 1, 1, 1)), (1, 2, 1))) is not None
