"""What every attack is handed: a batch to break, what decides, and what to climb.

An attack works on the rows ``C @ outputs - rhs`` of a linear specification, all of which have to be positive. With
``C`` the differences to the label's output, ``0`` and ``-rows`` are the outputs up to a constant, so that
cross-entropy, margin and the ratios of AutoAttack are functions of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verideq.attacks.noise import uniform_noise
from verideq.equilibrium.dynamics import Dynamics
from verideq.equilibrium.surrogates import Final, Slope, Surrogate
from verideq.region import Region

RowLoss = Callable[[Tensor], Tensor]
"""From rows, (batch, rows), to a loss by sample, (batch,), to go up."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Problem:
    """A batch of samples to break.

    Args:
        dynamics: the model, opened up.
        region: where to look.
        C: (batch, rows, outputs).
        rhs: (batch, rows).
        indices: (batch,) of the samples in their data set: with `seed` they fix the noise.
        surrogate: whose gradients are climbed.
        decide: what has to be broken, from inputs to outputs without gradient; ``None``: the model as it stands.
        seed: see `uniform_noise`.
        stream: sets the noise of one attack apart from that of another.
        stop: asked before every step; true ends an attack early with the best so far.
    """

    dynamics: Dynamics
    region: Region
    C: Tensor
    rhs: Tensor
    indices: Tensor
    surrogate: Surrogate = field(default_factory=Final)
    decide: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    stream: int = 0
    stop: Callable[[], bool] = _never

    def __len__(self) -> int:
        return len(self.region)

    def __getitem__(self, index: Tensor) -> Problem:
        rows = index.to(self.C.device)
        return replace(
            self,
            region=self.region[rows],
            C=self.C[rows],
            rhs=self.rhs[rows],
            indices=self.indices[index.to(self.indices.device)],
        )

    @property
    def exact(self) -> bool:
        """Whether the surrogate's outputs are what decides."""
        return self.surrogate.exact and self.decide is None

    def rows(self, outputs: Tensor) -> Tensor:
        """``C @ outputs - rhs``, (batch, rows)."""
        rows: Tensor = (self.C @ outputs[:, :, None])[:, :, 0] - self.rhs
        return rows

    @torch.no_grad()
    def judge(self, x: Tensor) -> Tensor:
        """The smallest row of what decides, (batch,); NaN counts as broken by nobody."""
        outputs = self.dynamics.outputs(x) if self.decide is None else self.decide(x)
        return self.rows(outputs).amin(1).nan_to_num(torch.inf, torch.inf, -torch.inf)

    def slope(self, x: Tensor, loss: RowLoss) -> Slope:
        """The surrogate's losses and gradients at the inputs."""
        return self.surrogate.slope(self.dynamics, x, lambda outputs: loss(self.rows(outputs)))

    def climb(self, x: Tensor, loss: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and gradients of the surrogate, and the margins of what decides, (batch,), at the inputs."""
        slope = self.slope(x, loss)
        margins = self.rows(slope.outputs).amin(1) if self.exact else self.judge(x)
        return slope.losses, slope.gradient, margins.nan_to_num(torch.inf, torch.inf, -torch.inf)

    def noise(self, stream: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """Uniform numbers in [-1, 1], (batch, *shape), by seed, sample and radius; of the input's shape by default."""
        center = self.region.center
        shape = tuple(center.shape[1:]) if shape is None else shape
        return uniform_noise(self.seed, self.indices, self.region.radii, self.stream + stream, shape).to(center)

    def broadcast(self, values: Tensor) -> Tensor:
        """(batch,) shaped to broadcast over (batch, *features)."""
        return values.view(-1, *[1] * (self.region.center.dim() - 1))

    @property
    def movable(self) -> bool:
        """Whether any sample has a radius above 0."""
        return any(self.region.radii)

    def reach(self) -> Tensor:
        """How far each feature may move, (batch, *features)."""
        radii, weights = self.region.spread(self.region.radii_down()), self.region.weights
        return (radii if weights is None else radii * weights).expand_as(self.region.center)

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest direction of the norm, scaled by the weights of the region."""
        weights = self.region.weights
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if weights is not None:
            gradient = gradient * weights
        flat = gradient.flatten(1)
        if self.region.norm == "l2":
            direction = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
        else:
            # A gradient that is zero up to rounding has no sign: it would depend on the batch.
            direction = flat.sign() * (flat.abs() > 1e-9 * flat.abs().amax(1, keepdim=True))
        shaped: Tensor = direction.view_as(gradient)
        return shaped if weights is None else shaped * weights

    def random_start(self, stream: int) -> Tensor:
        """A uniform point of the ball, projected."""
        noise = self.noise(stream)
        return self.region.project(self.region.center + noise * self.reach())


@dataclass(frozen=True)
class Found:
    """What an attack has found.

    Args:
        points: (batch, *features), all in the region: of every sample the one with the smallest margin.
        margins: (batch,), of what decides; negative is broken.
        vanished: (batch,), whether every gradient that was asked for was zero or not finite; ``None``: none was.
    """

    points: Tensor
    margins: Tensor
    vanished: Tensor | None = None

    @staticmethod
    def nothing(problem: Problem) -> Found:
        """The centres, with infinite margins."""
        center = problem.region.center
        return Found(center.clone(), torch.full((len(center),), torch.inf, dtype=center.dtype, device=center.device))

    def note(self, points: Tensor, margins: Tensor, at: Tensor | None = None) -> None:
        """Keep what is better than before; `at`: the samples that these are."""
        at = torch.arange(len(self.margins), device=self.margins.device) if at is None else at
        better = margins < self.margins[at]
        self.points[at[better]], self.margins[at[better]] = points[better], margins[better]

    def open(self) -> Tensor:
        """The samples that are not broken, as indices."""
        return (~(self.margins < 0)).nonzero().flatten()


class Attack(ABC):
    """A search for points with a negative margin."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How reports call it."""

    @abstractmethod
    def search(self, problem: Problem) -> Found:
        """Attack a batch; no sample's result depends on another."""


def nearest_rows(problem: Problem) -> Tensor:
    """Every sample's rows, smallest first, as what decides has them at the centre: (batch, rows)."""
    with torch.no_grad():
        outputs = (problem.decide or problem.dynamics.outputs)(problem.region.center)
    return problem.rows(outputs).argsort(dim=1, stable=True)


def vanishing(gradient: Tensor) -> Tensor:
    """Whether a gradient is zero or not finite, (batch,)."""
    size = gradient.flatten(1).abs().amax(1)
    return ~((size > 0) & size.isfinite())


def margin_loss(rows: Tensor) -> Tensor:
    """``-min_k rows_k``."""
    return -rows.amin(1)


def cross_entropy(rows: Tensor) -> Tensor:
    """The cross-entropy of the outputs ``0, -rows`` with label 0: ``log(1 + Σ exp(-rows))``."""
    return torch.logsumexp(_outputs(rows), 1)


def ratio_loss(rows: Tensor) -> Tensor:
    """The difference-of-logits ratio (Croce & Hein, ICML 2020, equation 6); of two classes the margin."""
    if rows.shape[1] < 2:
        return margin_loss(rows)
    ranked = _outputs(rows).topk(3, 1).values
    return -rows.amin(1) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def targeted_ratio_loss(targets: Tensor) -> RowLoss:
    """The targeted ratio (equation 7 there), towards one row a sample, (batch,).

    Of three classes it has the denominator of `ratio_loss`, of two it is the row itself.
    """

    def loss(rows: Tensor) -> Tensor:
        own = -rows.gather(1, targets[:, None])[:, 0]
        if rows.shape[1] < 2:
            return own
        ranked = _outputs(rows).topk(min(4, rows.shape[1] + 1), 1).values
        return own / (ranked[:, 0] - ranked[:, 2:].mean(1) + 1e-12)

    return loss


def row_loss(targets: Tensor) -> RowLoss:
    """``-rows_t`` for one row a sample, (batch,)."""
    return lambda rows: -rows.gather(1, targets[:, None])[:, 0]


def _outputs(rows: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(rows[:, :1]), -rows), 1)
