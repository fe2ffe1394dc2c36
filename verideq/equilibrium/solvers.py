"""Fixed-point solvers: every sample on its own, whatever its batch-mates do.

A solver iterates a map ``x -> step(x)`` on states of shape (parts, batch, *features): one part for a point ``z``, two
for a centre and a radius, which are accelerated jointly. A sample has converged when its residual

    sum over the parts of  ‖step(x) - x‖₂ / ‖step(x)‖₂

is at most the tolerance; its answer is then fixed, and depends on no other sample.

The default (`Auto`) is undamped Picard iteration, which under a gauge converges always. A sample for which the observed
rate promises more than three further steps goes over to Anderson acceleration, whose window fills up to 3 as steps are
taken and empties when the residual grows (Walker & Ni, SIAM J. Numer. Anal. 2011, type II, in difference form). Where
that does not pay it goes back to Picard for good, so that the theorem's convergence is never lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from verideq.clock import tick
from verideq.equilibrium.broyden import broyden
from verideq.errors import ConvergenceError, InputError
from verideq.status import Convergence

Step = Callable[[Tensor], Tensor]

SYNC = 4
"""Steps between two looks at the residuals where a look stalls the device."""
WINDOW = 3
"""The Anderson window of `Auto`."""
PATIENCE = 20
"""A sample whose residual has not halved in so many steps goes back to Picard, which a gauge makes sure of."""


@dataclass(frozen=True)
class Solver:
    """When to stop, whatever the method.

    Args:
        tol: relative residual; ``None``: 1e-5 in float32, 1e-10 in float64.
        max_steps: applications of the layer.
    """

    tol: float | None = None
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if self.tol is not None and not 0 <= self.tol < math.inf:
            raise InputError(f"tol {self.tol} is no tolerance; give a number of 0 or more")
        if self.max_steps < 1:
            raise InputError(f"max_steps {self.max_steps} is too few; give 1 or more")

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual to reach in this dtype."""
        if self.tol is not None:
            return self.tol
        return 1e-10 if dtype is torch.float64 else 1e-5


@dataclass(frozen=True)
class Auto(Solver):
    """Picard that widens to Anderson, sample by sample: the default. Solves the rows for their own unknowns first."""


@dataclass(frozen=True)
class Picard(Solver):
    """Undamped Picard iteration of the layer as it is."""


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration of a fixed window, of the layer as it is."""

    window: int = 3

    def __post_init__(self) -> None:
        Solver.__post_init__(self)
        if self.window < 1:
            raise InputError(f"Anderson window {self.window} is too small; give 1 or more")


@dataclass(frozen=True)
class ForwardBackward(Solver):
    """Damped forward-backward splitting ``z <- relu((1-α) z + α (W z + v))`` (Winston & Kolter, NeurIPS 2020).

    For a monotone ``I - W`` with ``I - sym W ⪰ m I`` it converges for ``0 < α < 2m / ‖I - W‖²``.

    Args:
        alpha: ``α``; ``None``: a step under which a factored monotone ``W`` (`MonDEQ`), which states its ``m``,
            contracts, and 0.125 for any other.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        Solver.__post_init__(self)
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise InputError(f"alpha {self.alpha} is no damping; give a number in (0, 1]")

    def tolerance(self, dtype: torch.dtype) -> float:
        return damped(self, DAMPING if self.alpha is None else self.alpha, dtype)


@dataclass(frozen=True)
class PeacemanRachford(Solver):
    """Peaceman-Rachford splitting (Winston & Kolter, NeurIPS 2020), for monotone layers without a gauge.

    Every step multiplies by ``(I + α (I - W))⁻¹``, which is computed once a snapshot of ``W``: for a dense ``W``, or a
    factored convolution that is circular or works on a small image. It converges for every ``α > 0``; the residual is
    that of the splitting's own state.

    Args:
        alpha: ``α``; ``None``: from the norms of ``I - W``.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        Solver.__post_init__(self)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"alpha {self.alpha} is no step; give a positive number")


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's method from the start, the forward solver of general DEQs (see `verideq.equilibrium.broyden`).

    A sample's answer is its iterate of lowest residual, the start no candidate: what stops early stays usable.

    Args:
        tol: relative residual; ``None``: 1e-3, as in the papers; 0: every step is taken.
        max_steps: iterates after the start; one application of the map more than that.
    """

    max_steps: int = 8

    def tolerance(self, dtype: torch.dtype) -> float:
        return 1e-3 if self.tol is None else self.tol


DAMPING = 0.125
"""The damping of `ForwardBackward` where nothing is known of ``W``."""


def damped(solver: Solver, alpha: float, dtype: torch.dtype) -> float:
    """The tolerance on a damped step, which moves ``α`` times as far, that is the solver's on the layer's residual.

    By default no smaller than what the dtype resolves.
    """
    if solver.tol is not None:
        return alpha * solver.tol
    return max(alpha * Solver.tolerance(solver, dtype), 4 * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Solution:
    """A solver's answer.

    Args:
        value: (batch, *features), or (2, batch, *features) for a centre and a radius.
        residual: (batch,), relative, of the iteration that was run.
        steps: (batch,), applications of the layer until the sample converged.
        convergence: the worst over the batch; ``converged`` has it by sample.
        converged: (batch,), bool.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    convergence: Convergence
    converged: Tensor

    def check(self, place: str = "the equilibrium") -> Solution:
        """Itself, if every sample converged.

        Raises:
            ConvergenceError: with the number of samples, the worst residual and the remedy.
        """
        if self.convergence is Convergence.CONVERGED:
            return self
        failed, worst = int((~self.converged).sum()), float(self.residual.nan_to_num(math.inf).max())
        steps = int(self.steps.max())
        raise ConvergenceError(
            f"{place} did not converge for {failed} of {len(self.converged)} samples after {steps} steps (worst "
            f"relative residual {worst:.3g}): {self.convergence.value}",
            worst,
            steps,
        )


def by_sample(values: Tensor, like: Tensor) -> Tensor:
    """(batch,) shaped to broadcast over (parts, batch, *features)."""
    return values.view(-1, *[1] * (like.dim() - 2))


def fixed_point(step: Step, start: Tensor, solver: Solver) -> Solution:
    """Iterate `step` from `start` until every sample has converged or the steps are used up.

    Args:
        step: the map, on (parts, batch, *features).
        start: the first iterate. With two parts the second is a radius, kept nonnegative.
        solver: tolerance, step limit and method.
    """
    if isinstance(solver, Broyden):
        return _quasi_newton(step, start, solver)
    batch, tol = start.shape[1], solver.tolerance(start.dtype)
    acceleration = _Acceleration.of(solver, start, tol)
    # The residual is looked at every step where that is free, and every few where it would stall the device.
    interval = 1 if start.device.type == "cpu" else SYNC
    x, value, mixed = start, start, False
    converged = torch.zeros(batch, dtype=torch.bool, device=start.device)
    residual = torch.full((batch,), math.inf, dtype=start.dtype, device=start.device)
    steps = torch.zeros(batch, dtype=torch.long, device=start.device)
    for count in range(1, solver.max_steps + 1):
        tick()
        image = step(x)
        # A mixed iterate belongs to this loop: its memory serves again.
        change = torch.sub(image, x, out=x) if mixed else image - x
        error = _norms(change).div_(_norms(image).add_(torch.finfo(start.dtype).tiny)).sum(0)
        last = count == solver.max_steps
        if count % interval == 0 or last:
            small = error <= tol
            ending = ~converged if last else small & ~converged
            if last or bool(ending.any()):
                value = torch.where(by_sample(ending, image), image, value)
                residual, steps = torch.where(ending, error, residual), torch.where(ending, count, steps)
                converged = converged | small
                if last or bool(converged.all()):
                    break
        x = image if acceleration is None else acceleration.next(image, change, error, count)
        mixed = x is not image
    return Solution(value, residual, steps, _outcome(residual, converged), converged)


def _outcome(residual: Tensor, converged: Tensor) -> Convergence:
    if bool(converged.all()):
        return Convergence.CONVERGED
    return Convergence.MAX_STEPS if bool(residual.isfinite().all()) else Convergence.NONFINITE


def _quasi_newton(step: Step, start: Tensor, solver: Broyden) -> Solution:
    """`fixed_point` by Broyden's method: the parts of a sample are one vector of unknowns."""
    tol = solver.tolerance(start.dtype)
    steps = torch.zeros(start.shape[1], dtype=torch.long, device=start.device)
    residual = torch.full((start.shape[1],), math.inf, dtype=start.dtype, device=start.device)
    value, converged = start, steps > 0
    radii = len(start) == 2  # a step that overshoots makes a radius negative, where the map has no meaning

    def admissible(z: Tensor) -> Tensor:
        return torch.stack((z[0], z[1].clamp(min=0))) if radii else z

    iterates = broyden(lambda z: step(admissible(z.movedim(1, 0))).movedim(0, 1), start.movedim(0, 1))
    for count, iterate in enumerate(islice(iterates, 1, solver.max_steps + 1), start=2):
        z, change = iterate.value.movedim(1, 0), iterate.change.movedim(1, 0)
        error = (_norms(change) / _norms(z + change).add(torch.finfo(start.dtype).tiny)).sum(0)
        # The first iterate is taken whatever it is, so that a state that is not finite shows.
        better = ~converged & ((error < residual) | (count == 2))
        value = torch.where(by_sample(better, z), z, value)
        residual, steps = torch.where(better, error, residual), torch.where(converged, steps, count)
        converged = converged | (error <= tol)
        if bool(converged.all()):
            break
    return Solution(admissible(value), residual, steps, _outcome(residual, converged), converged)


def _norms(x: Tensor) -> Tensor:
    """(parts, batch) Euclidean norms."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(2), dim=2)
    return norms


class _Acceleration:
    """Anderson mixing that every sample enters, and restarts, by its own residuals.

    With ``f = step(x) - x`` and the last differences ``Δf``, ``Δg`` of residuals and images, the next iterate is
    ``g - Σ θ Δg``, ``θ`` the least-squares solution of ``Σ θ Δf = f``. The differences are those of the whole batch; a
    sample uses the newest `usable` of them, none while it iterates by Picard. Whatever has an axis of differences holds
    the newest last.
    """

    def __init__(self, start: Tensor, tol: float, window: int, adaptive: bool) -> None:
        batch = start.shape[1]
        self.tol, self.window, self.adaptive = tol, window, adaptive
        self.interval = 1 if start.device.type == "cpu" else SYNC
        self.active = start.new_full((batch,), 0.0 if adaptive else 1.0)
        self.entered = 0 if adaptive else batch  # how many samples are active
        self.usable = start.new_zeros(batch)  # differences since the sample's entry or restart
        self.best = start.new_full((batch,), math.inf)
        self.goal = start.new_full((batch,), math.inf)  # what the residual has to reach by the next look at progress
        self.barred = torch.zeros(batch, dtype=torch.bool, device=start.device)
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        self.images: list[Tensor] = []  # one more than there are differences
        self.differences: list[Tensor] = []
        self.gram = start.new_zeros(batch, window, window)  # inner products of the differences,
        self.right = start.new_zeros(batch, window)  # and of each with the newest residual
        self.products = torch.empty_like(start.flatten(2))
        # A relative ridge keeps nearly parallel differences from blowing up; a huge one switches a difference off.
        eps = torch.finfo(start.dtype).eps
        self.ridge = start.new_full((), 1 + 10 * eps), start.new_full((), eps**-2)
        self.age = torch.arange(window, 0, -1, device=start.device)
        # θ to the weights of the images, in which Σ θ Δg is written out; the newest has 1 more.
        identity = torch.eye(window + 1, dtype=start.dtype, device=start.device)
        self.newest, self.spread = identity[-1], identity[:-1] - identity[1:]

    @staticmethod
    def of(solver: Solver, start: Tensor, tol: float) -> _Acceleration | None:
        if isinstance(solver, Auto):
            return _Acceleration(start, tol, WINDOW, adaptive=True)
        if isinstance(solver, Anderson):
            return _Acceleration(start, tol, solver.window, adaptive=False)
        return None

    def next(self, image: Tensor, change: Tensor, error: Tensor, count: int) -> Tensor:
        """The next iterate, (parts, batch, *features). Takes possession of `image` and `change`."""
        last, self.last = self.last, (image, change, error)
        if last is None:
            return image
        self.best = torch.minimum(self.best, error)
        if self.adaptive and count % self.interval == 0 and (self.entered < len(error) or count % PATIENCE == 0):
            self._enter(error, last[2], count)
        if self.entered == 0:
            return image
        # A residual that has grown starts the sample's history anew.
        self.usable = (self.usable + 1).mul_(self.active).mul_(error <= 5 * self.best)
        self.images = [*(self.images or [last[0]]), image][-self.window - 1 :]
        self._extend(torch.sub(change, last[1], out=last[1]), change)
        weights = torch.addmm(self.newest, self._coefficients(), self.spread)[:, -len(self.images) :]
        mixed = torch.zeros_like(image)
        for weight, old in zip(weights.unbind(1), self.images, strict=True):
            mixed.addcmul_(by_sample(weight, image), old)
        if len(mixed) == 2:
            mixed[1].clamp_(min=0)  # a radius
        return mixed

    def _enter(self, error: Tensor, before: Tensor, count: int) -> None:
        """Let samples into acceleration, and send those that it does not serve back to Picard for good."""
        if count % PATIENCE == 0:
            self.barred |= ~(self.best <= self.goal)
            self.goal = self.best / 2
        # More than three further Picard steps: at the observed rate the third leaves more than the tolerance.
        slow = error * (error / before).clamp_(max=1) ** 3 > self.tol
        self.active.logical_or_(slow).mul_(~self.barred)
        self.entered = int(self.active.sum())

    def _extend(self, difference: Tensor, change: Tensor) -> None:
        """One more difference of residuals, the newest of which is `change`."""
        self.differences = [*self.differences, difference][-self.window :]
        row = torch.stack([self._dot(d, difference) for d in self.differences], 1)
        first = -len(self.differences)
        self.gram, self.right = self.gram.roll((-1, -1), (1, 2)), self.right.roll(-1, 1)
        self.gram[:, -1, first:] = row
        self.gram[:, first:, -1] = row
        # The residual has moved by the difference: no old product need be taken again.
        self.right[:, first:] += row
        self.right[:, -1] = self._dot(difference, change)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(batch,) inner products over parts and features."""
        return torch.mul(a.flatten(2), b.flatten(2), out=self.products).sum((0, 2))

    def _coefficients(self) -> Tensor:
        """``θ``, (batch, window); zero for a difference that the sample does not use."""
        keep = self.age <= self.usable[:, None]
        gram = self.gram.clone()
        gram.diagonal(dim1=1, dim2=2).mul_(torch.where(keep, *self.ridge)).add_(torch.finfo(gram.dtype).tiny)
        theta: Tensor = torch.linalg.solve_ex(gram, self.right)[0]
        return theta.mul_(keep).nan_to_num_(0.0, 0.0, 0.0)
