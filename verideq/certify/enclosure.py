"""A box that is sure to hold every equilibrium: any solver, one inflation along the gauge (docs/theory.md).

Let ``u`` be a gauge with slack ``s``, and ``G`` the interval map of the layer, rounded outward. For any ``l <= h`` in
the range of the activation, moved out by ``t u`` with ``t = max_i max(0, G_h - h, l - G_l)_i / s_i``,

    G([l - t u, h + t u])  ⊆  [l - t|W|u + ..., ...]  ⊆  [l - t u, h + t u]

so that by Brouwer and uniqueness the moved box holds ``z*(v)`` for every ``v`` of the box of injections, however
early the solver was stopped; and so does its part in the range, which ``G`` never leaves. When it was stopped early the
box is cut with ``[0, t₀ u]``, ``t₀ = max_i (v_u)_i⁺ / s_i``, which maps into itself as well, and ``B <- B ∩ G(B)`` only
tightens from there.

Everything is done with ``W̃``, every row solved for its own unknown: a gauge of ``W`` is one of ``W̃``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.box import TINY, Box, gamma, outward, spread, underflow
from verideq.equilibrium import Equilibrium, Gauge, Monotone, Operator, Solver, System, fixed_point
from verideq.equilibrium.gauge import slack
from verideq.equilibrium.splitting import Splitting, is_monotone
from verideq.errors import NoGaugeError

REFINEMENTS = 20
"""Anytime-sound steps after a solver that was stopped early."""
SPARE = 2.0**-44
"""By how much a box is mapped into its inside, relative to its upper end."""
FLOOR = 2.0**-1000
"""And by how much at least, where products underflow: far above `TINY`, far below any margin."""


@dataclass(frozen=True)
class Enclosure:
    """What is known of an equilibrium over a box of injections.

    Args:
        box: (batch, *features); it holds every equilibrium. NaN where nothing is known.
        steps: (batch,) solver steps.
        converged: (batch,) whether the solver reached its tolerance: tight if so, sound either way.
    """

    box: Box
    steps: Tensor
    converged: Tensor


@torch.no_grad()
def enclose(layer: Equilibrium, gauge: Gauge, injection: Box, solver: Solver) -> Enclosure:
    """Enclose the equilibria of a float64 layer for every injection of a box.

    Args:
        layer: float64; only its stored ``W`` is read.
        gauge: of ``W`` or of ``W̃``; its slack is checked here again.
        injection: float64, (batch, *features).
        solver: tolerance and step limit of the search for the pair.

    Raises:
        NoGaugeError: the slack of the gauge is not positive.
    """
    operator, factor = layer.operator().solved()
    u = gauge.u.to(injection.lower)
    room = slack(operator, u)
    if not bool((room > 0).all()):
        raise NoGaugeError("the vector given as a gauge has a slack that is not positive", float((1 - room / u).max()))
    u, room = operator.spread_units(u), operator.spread_units(room)
    center, radius = _solved(injection, factor)
    activation = layer.activation
    system = System(operator, torch.stack((center, radius)), activation=activation)
    solution = fixed_point(system.stepper(), system.start(), solver)
    middle, half = solution.value
    guess = activation.box(Box(middle - half, middle + half))

    absolute, units = operator.absolute(), operator.absolute_units()

    def image(box: Box) -> Box:
        return activation.box(_rows(operator, absolute, units, center, radius, box))

    box = activation.box(_inflate(guess, image(guess), u, room))
    if not bool(solution.converged.all()):
        top = (center + radius).clamp_(min=0)
        reach = (_most(top / room) * u * (1 + 2.0**-51)).expand_as(top)
        reach = torch.nextafter(reach, torch.full_like(reach, torch.inf))
        anytime = box.intersect(activation.box(Box(torch.zeros_like(top), reach)))
        for _ in range(REFINEMENTS):
            anytime = anytime.intersect(image(anytime))
        anytime = activation.box(_inflate(anytime, image(anytime), u, room))
        late = solution.converged.view(-1, *[1] * (middle.dim() - 1))
        box = Box(torch.where(late, box.lower, anytime.lower), torch.where(late, box.upper, anytime.upper))
    return Enclosure(box, solution.steps, solution.converged)


@torch.no_grad()
def enclose_monotone(layer: Equilibrium, m: float, injection: Box, solver: Solver) -> tuple[Enclosure, Tensor]:
    """A box around the equilibria of a layer with ``I - sym W ⪰ m I``, and the point that it is around.

    ``‖z*(v) - ẑ‖₂ <= (‖v - v_c‖₂ + ‖δ‖₂) / m`` for any ``ẑ >= 0``, ``δ_i = ẑ_i - p_i`` where ``ẑ_i > 0`` and
    ``-max(p_i, 0)`` elsewhere, ``p = W ẑ + v_c`` (docs/theory.md). Wide: one length for all units.

    Args:
        layer: float64.
        m: proved, positive.
        injection: float64, (batch, *features).
        solver: of the equilibria at the centre.
    """
    operator = layer.operator()
    center, radius = injection.ball()
    state, steps, converged = settled(layer, center, solver)
    terms = operator.terms + 3
    g, units = gamma(terms), operator.absolute().apply(state)
    p = operator.apply(state) + center
    error = g * (units + center.abs() + state) * (1 + g) + underflow(terms, state, center, state)
    off = torch.where(state > 0, (state - p).abs() + error, (p + error).clamp(min=0))
    reach = (_length(off) + _length(radius)) / m * (1 + 2.0**-45) + FLOOR
    reach = reach.view(-1, *[1] * (state.dim() - 1))
    moved = outward(state, reach.expand_as(state))
    return Enclosure(Box(moved.lower.clamp(min=0), moved.upper), steps, converged), state


def settled(layer: Equilibrium, v: Tensor, solver: Solver) -> tuple[Tensor, Tensor, Tensor]:
    """An approximate equilibrium, 0 or more, the steps that it took, and whether it converged, by sample."""
    operator = layer.operator()
    split = isinstance(operator, Monotone) or is_monotone(operator)
    splitting = Splitting.of(operator, tuple(v.shape[1:])) if split else None
    if splitting is None:
        steps = torch.zeros(len(v), dtype=torch.long)
        return layer.equilibrate(v).clamp(min=0), steps, torch.ones_like(steps, dtype=torch.bool)
    solution = splitting.solve(v[None], solver)
    return solution.value[0].clamp(min=0), solution.steps, solution.converged


def _length(x: Tensor) -> Tensor:
    """The Euclidean length of each sample, rounded up: (batch,)."""
    flat = x.flatten(1)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=TINY)
    return (flat / scale).square().sum(1).sqrt() * scale[:, 0] * (1 + gamma(flat.shape[1] + 8))


@torch.no_grad()
def pre_activations(layer: Equilibrium, injection: Box, box: Box) -> Box:
    """``(Σ_{j≠i} W_ij z_j + v_i) / (1 - W_ii)`` for every ``z`` and ``v`` of two boxes, (batch, *features)."""
    operator, factor = layer.operator().solved()
    center, radius = _solved(injection, factor)
    return _rows(operator, operator.absolute(), operator.absolute_units(), center, radius, box)


def _solved(injection: Box, factor: Tensor) -> tuple[Tensor, Tensor]:
    """``v / (1 - diag W)`` as a ball: three roundings, on both sides of the product."""
    center, radius = injection.ball()
    return center * factor, spread(center, radius, 4) * factor + underflow(1, center, radius, factor)


def _rows(operator: Operator, absolute: Operator, units: Tensor, center: Tensor, radius: Tensor, box: Box) -> Box:
    """``W̃ box`` with the injection ``center ± radius``, rounded outward."""
    middle, half = box.ball()
    terms = operator.terms + 3  # a stored row of W̃ is three roundings away from the exact one
    g = gamma(terms)
    pushed = absolute.apply(spread(middle, half, terms))
    lost = underflow(terms, middle, half, units)
    total = pushed + radius * (1 + g) + g * center.abs() + lost
    return outward(operator.apply(middle) + center, total)


def _most(excess: Tensor) -> Tensor:
    """The largest entry of each sample, a little more than rounded up, shaped to broadcast."""
    most = excess.flatten(1).amax(1).mul(1 + 2.0**-49)
    return most.view(-1, *[1] * (excess.dim() - 1))


def _inflate(guess: Box, image: Box, u: Tensor, room: Tensor) -> Box:
    excess = torch.maximum(image.upper - guess.upper, guess.lower - image.lower).clamp(min=0)
    # Room for another rounding of the same map: a checker has its own.
    excess = excess + (guess.upper * SPARE + FLOOR)
    reach = _most(excess / room) * u * (1 + 2.0**-51)
    infinity = torch.full((), torch.inf, dtype=reach.dtype, device=reach.device)
    lower = torch.nextafter(guess.lower - reach, -infinity)
    return Box(lower, torch.nextafter(guess.upper + reach, infinity))
