"""Square: random search by windows, which needs no gradient (Andriushchenko et al., ECCV 2020).

What it breaks where attacks by gradient do not says that the gradients are masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.attacks.problem import Attack, Found, Problem
from verideq.errors import InputError

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The queries, of 10,000, after which the share of the window is halved."""


@dataclass(frozen=True)
class Square(Attack):
    """Random search with the margin loss. A proposal is kept where it lowers the margin; broken samples drop out.

    Images are (channels, rows, columns); inputs of another shape are one row of features.

    Args:
        queries: of a sample.
        share: of the features that the first windows cover.
    """

    queries: int = 5000
    share: float = 0.8

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.share <= 1:
            raise InputError(
                f"Square takes 1 or more queries and a share in (0, 1]; got {self.queries} and {self.share}"
            )

    @property
    def name(self) -> str:
        return f"Square-{self.queries}"

    def search(self, problem: Problem) -> Found:
        shape = tuple(problem.region.center.shape[1:])
        size = shape if len(shape) == 3 else (1, 1, math.prod(shape))
        start = _stripes(problem, size) if problem.region.norm == "linf" else _tiles(problem, size)
        found = Found.nothing(problem)
        found.note(problem.region.center, problem.judge(problem.region.center))
        current = problem.region.project(start)
        margins = problem.judge(current)
        found.note(current, margins)
        for query in range(self.queries if problem.movable else 0):
            active = found.open()
            if not len(active) or problem.stop():
                break
            part = problem[active]
            propose = _window if problem.region.norm == "linf" else _exchange
            proposal = part.region.project(propose(part, current[active], size, self._cover(query), query))
            value = part.judge(proposal)
            better = (value < margins[active]).nonzero().flatten()
            at = active[better]
            current[at], margins[at] = proposal[better], value[better]
            found.note(proposal[better], value[better], at)
        return found

    def _cover(self, query: int) -> float:
        """The share of the features in a window at a query, by the schedule for 10,000 queries, scaled."""
        place = query * 10_000 // self.queries
        return self.share / 2.0 ** sum(place > bound for bound in HALVINGS)


def _signs(problem: Problem, stream: int, shape: tuple[int, ...]) -> Tensor:
    return torch.where(problem.noise(stream, shape) < 0, -1.0, 1.0).to(problem.region.center)


def _stripes(problem: Problem, size: tuple[int, ...]) -> Tensor:
    """Vertical stripes of the full radius."""
    signs = _signs(problem, 0, (size[0], 1, size[2])).expand(-1, *size)
    return problem.region.center + signs.reshape_as(problem.region.center) * problem.reach()


def _places(problem: Problem, stream: int, sides: tuple[int, int], size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The rows (batch, height) and columns (batch, width) of a window by sample."""
    draw = (problem.noise(stream, (2,)) + 1) / 2
    places = []
    for axis, (side, full) in enumerate(zip(sides, size[1:], strict=True)):
        first = (draw[:, axis] * (full - side + 1)).long().clamp(max=full - side)
        places.append(first[:, None] + torch.arange(side, device=first.device))
    return places[0], places[1]


def _sides(cover: float, size: tuple[int, ...], least: int) -> tuple[int, int]:
    """Height and width of a window of a share of an image, square where the image has room."""
    side = max(round(math.sqrt(cover * size[1] * size[2])), least)
    height = min(side, size[1])
    return height, min(max(round(cover * size[1] * size[2] / height), least), size[2])


def _window(problem: Problem, x: Tensor, size: tuple[int, ...], cover: float, query: int) -> Tensor:
    """A window of every channel moved to one end of the ball."""
    rows, columns = _places(problem, 2 * query + 1, _sides(cover, size, 1), size)
    signs = _signs(problem, 2 * query + 2, (size[0], 1, 1))
    batch = torch.arange(len(x), device=x.device)
    mask = torch.zeros(len(x), 1, *size[1:], dtype=torch.bool, device=x.device)
    mask[batch[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = True
    ends = problem.region.center + signs.expand(-1, *size).reshape_as(x) * problem.reach()
    return torch.where(mask.expand(-1, *size).reshape_as(x), ends, x)


def _bumps(height: int, width: int, like: Tensor) -> Tensor:
    """Two pyramids of opposite sign side by side, of Euclidean norm one: (height, width)."""

    def pyramid(rows: int, columns: int) -> Tensor:
        down = torch.arange(rows, device=like.device).to(like) - (rows - 1) / 2
        across = torch.arange(columns, device=like.device).to(like) - (columns - 1) / 2
        rings = max(rows, columns) // 2 + 1
        apart = torch.maximum(down.abs()[:, None], across.abs()[None])
        return sum(
            (torch.where(apart <= ring + 0.5, 1.0, 0.0).to(like) / (ring + 1) ** 2 for ring in range(rings)),
            torch.zeros(rows, columns).to(like),
        )

    if height >= 2:
        bump = torch.cat((pyramid(height // 2, width), -pyramid(height - height // 2, width)))
    elif width >= 2:
        bump = torch.cat((pyramid(height, width // 2), -pyramid(height, width - width // 2)), 1)
    else:
        bump = torch.ones(1, 1).to(like)
    norm: Tensor = bump.norm()
    return bump / norm


def _tiles(problem: Problem, size: tuple[int, ...]) -> Tensor:
    """A fifth of the image by a fifth: bumps of random signs, scaled to the radius."""
    height, width = max(size[1] // 5, 1), max(size[2] // 5, 1)
    down, across = -(-size[1] // height), -(-size[2] // width)
    bump = _bumps(height, width, problem.region.center)
    signs = _signs(problem, 0, (size[0], down, across))
    tiles = torch.kron(signs.flatten(0, 1), bump).view(len(problem), size[0], down * height, across * width)
    shift = tiles[:, :, : size[1], : size[2]].reshape_as(problem.region.center)
    return problem.region.center + _scaled(problem, shift)


def _scaled(problem: Problem, shift: Tensor) -> Tensor:
    """A shift of the full radius in its own direction, by the weights of the region."""
    size = shift.flatten(1).norm(dim=1).clamp(min=1e-12)
    return shift / problem.broadcast(size) * problem.reach()


def _exchange(problem: Problem, x: Tensor, size: tuple[int, ...], cover: float, query: int) -> Tensor:
    """The mass of one window moved to another, as a bump on what is there (Algorithm 3 of the paper)."""
    region = problem.region
    weights = torch.ones_like(x[0]) if region.weights is None else region.weights
    shift = torch.where(weights > 0, (x - region.center) / weights.clamp(min=1e-300), 0.0).view(-1, *size)
    sides = _sides(cover, size, min(3, size[1], size[2]))
    batch = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(size[0], device=x.device)[None, :, None, None]
    (rows, columns), (other_rows, other_columns) = (
        _places(problem, 3 * query + 1 + part, sides, size) for part in (0, 1)
    )
    here = (batch, channel, rows[:, None, :, None], columns[:, None, None, :])
    there = (batch, channel, other_rows[:, None, :, None], other_columns[:, None, None, :])
    mass = shift.square().flatten(1).sum(1).view(-1, 1, 1, 1)
    both = torch.zeros_like(shift)
    both[here], both[there] = 1.0, 1.0
    taken = (shift * both).square().sum((2, 3), keepdim=True)
    free = (region.radii_down().view(-1, 1, 1, 1) ** 2 - mass).clamp(min=0) / size[0]
    signs = _signs(problem, 3 * query + 3, (size[0], 1, 1))
    old = shift[here]
    fresh = _bumps(*sides, x) * signs + old / (1e-12 + old.square().sum((2, 3), keepdim=True).sqrt())
    fresh = fresh / (1e-12 + fresh.square().sum((2, 3), keepdim=True).sqrt()) * (free + taken).sqrt()
    moved = shift.clone()
    moved[there] = 0.0
    moved[here] = fresh
    return region.center + _scaled(problem, moved.reshape_as(x))
