"""Fixed-point solvers: every sample on its own, whatever its batch-mates do.

A solver iterates a map ``x -> step(x)`` on states of shape (parts, batch, *features): one part for a point ``z``, two for
a centre and a radius, which are accelerated jointly. A sample has converged when its residual

    sum over the parts of  ‖step(x) - x‖₂ / ‖step(x)‖₂

is at most the tolerance; its answer is then fixed, and depends on no other sample.

The default (`Auto`) is undamped Picard iteration, which under a gauge converges always. A sample for which the observed
rate promises more than three further steps goes over to Anderson acceleration, whose window fills up to 3 as steps are taken
and empties when the residual grows (Walker & Ni, SIAM J. Numer. Anal. 2011, type II, in difference form).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.errors import ConvergenceError, InputError
from verideq.status import Convergence

Step = Callable[[Tensor], Tensor]

SYNC = 4
"""Steps between two looks at the residuals where a look stalls the device."""
WINDOW = 3
"""The Anderson window of `Auto`."""
THETA = (-300.0, 1.0)
"""The range of a window-1 coefficient: no step back behind the last iterate, none beyond 300 steps ahead."""


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
    """

    alpha: float = 0.125

    def tolerance(self, dtype: torch.dtype) -> float:
        """A damped step moves ``α`` times as far: the same tolerance on the layer's own residual."""
        return self.alpha * super().tolerance(dtype)

    def __post_init__(self) -> None:
        Solver.__post_init__(self)
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha {self.alpha} is no damping; give a number in (0, 1]")


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
            f"{place} did not converge for {failed} of {len(self.converged)} samples after {steps} steps (worst relative "
            f"residual {worst:.3g}): {self.convergence.value}",
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
    batch, tol = start.shape[1], solver.tolerance(start.dtype)
    acceleration = _Acceleration.of(solver, start, tol)
    # The residual is looked at every step where that is free, and every few where it would stall the device.
    interval = 1 if start.device.type == "cpu" else SYNC
    x = value = start
    converged = torch.zeros(batch, dtype=torch.bool, device=start.device)
    residual = torch.full((batch,), math.inf, dtype=start.dtype, device=start.device)
    steps = torch.zeros(batch, dtype=torch.long, device=start.device)
    for count in range(1, solver.max_steps + 1):
        image = step(x)
        change = image - x
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
    if bool(converged.all()):
        outcome = Convergence.CONVERGED
    else:
        outcome = Convergence.MAX_STEPS if bool(residual.isfinite().all()) else Convergence.NONFINITE
    return Solution(value, residual, steps, outcome, converged)


def _norms(x: Tensor) -> Tensor:
    """(parts, batch) Euclidean norms."""
    return torch.linalg.vector_norm(x.flatten(2), dim=2)


class _Acceleration:
    """Anderson mixing that every sample enters, and restarts, by its own residuals.

    With ``f = step(x) - x`` and the last differences ``Δf``, ``Δg`` of residuals and images, the next iterate is
    ``g - Σ θ Δg``, ``θ`` the least-squares solution of ``Σ θ Δf = f``. The differences are those of the whole batch; a
    sample uses the newest `usable` of them, none while it iterates by Picard.
    """

    def __init__(self, start: Tensor, tol: float, window: int, adaptive: bool) -> None:
        batch, device = start.shape[1], start.device
        self.tol, self.window = tol, window
        self.interval = 1 if device.type == "cpu" else SYNC
        self.active = torch.full((batch,), not adaptive, device=device)
        self.entered = 0 if adaptive else batch  # how many samples are active
        self.usable = torch.zeros(batch, dtype=torch.long, device=device)  # differences since the sample's (re)start
        self.best = torch.full((batch,), math.inf, dtype=start.dtype, device=device)
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        self.images: list[Tensor] = []  # one more than there are differences
        self.differences: list[Tensor] = []
        self.gram = start.new_empty(batch, 0, 0)  # inner products of the differences,
        self.right = start.new_empty(batch, 0)  # and of each with the newest residual
        self.products = torch.empty_like(start.flatten(2))

    @staticmethod
    def of(solver: Solver, start: Tensor, tol: float) -> _Acceleration | None:
        if isinstance(solver, Auto):
            return _Acceleration(start, tol, WINDOW, adaptive=True)
        if isinstance(solver, Anderson):
            return _Acceleration(start, tol, solver.window, adaptive=False)
        return None

    def next(self, image: Tensor, change: Tensor, error: Tensor, count: int) -> Tensor:
        """The next iterate, (parts, batch, *features). Takes possession of `change`."""
        last, self.last = self.last, (image, change, error)
        if last is None:
            return image
        if self.entered < len(error) and count % self.interval == 0:
            # More than three further Picard steps: at the observed rate the third leaves more than the tolerance.
            self.active = self.active | (error * (error / last[2]).clamp_(max=1) ** 3 > self.tol)
            self.entered = int(self.active.sum())
        self.best = torch.minimum(self.best, error)
        if self.entered == 0:
            return image
        self.usable = torch.where(error > 5 * self.best, 0, self.usable + self.active)
        self.images = [*(self.images or [last[0]]), image][-self.window - 1 :]
        self._extend(torch.sub(change, last[1], out=last[1]), change)
        # g - Σ θ Δg, with the differences of images written out.
        theta = torch.nn.functional.pad(self._coefficients(), (1, 0))
        weights = torch.nn.functional.pad(theta, (0, 1), value=1.0).diff(dim=1)
        mixed = torch.zeros_like(image)
        for weight, old in zip(weights.unbind(1), self.images, strict=True):
            mixed.addcmul_(by_sample(weight, image), old)
        if len(mixed) == 2:
            mixed[1].clamp_(min=0)  # a radius
        return mixed

    def _extend(self, difference: Tensor, change: Tensor) -> None:
        """One more difference of residuals, the newest of which is `change`."""
        self.differences = [*self.differences, difference][-self.window :]
        older = len(self.differences) - 1
        oldest = self.right.shape[1] - older
        row = torch.stack([self._dot(d, difference) for d in self.differences], 1)
        gram = torch.cat((self.gram[:, oldest:, oldest:], row[:, None, :older]), 1)
        self.gram = torch.cat((gram, row[:, :, None]), 2)
        # The residual has moved by the difference: no old product need be taken again.
        right = self.right[:, oldest:] + row[:, :older]
        self.right = torch.cat((right, self._dot(difference, change)[:, None]), 1)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(batch,) inner products over parts and features."""
        return torch.mul(a.flatten(2), b.flatten(2), out=self.products).sum((0, 2))

    def _coefficients(self) -> Tensor:
        """``θ``, (batch, differences); zero for a difference that the sample does not use."""
        tiny, eps = torch.finfo(self.gram.dtype).tiny, torch.finfo(self.gram.dtype).eps
        age = torch.arange(len(self.differences), 0, -1, device=self.gram.device)
        keep = age <= self.usable[:, None]
        gram = self.gram * (keep[:, :, None] & keep[:, None, :])
        # A relative ridge keeps nearly parallel differences from blowing up; unused rows become the identity.
        scale = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None] + tiny
        gram = gram + torch.diag_embed(torch.where(keep, 10 * eps * scale, scale))
        theta = torch.linalg.solve_ex(gram, self.right * keep)[0]
        theta = torch.where(self.usable[:, None] == 1, theta.clamp(*THETA), theta)
        return torch.where(keep & theta.isfinite(), theta, 0.0)
