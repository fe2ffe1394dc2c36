"""The exact answer for a small network, by integer programming (HiGHS); and a proof of it, by branch and bound.

What HiGHS says is no proof: it computes in floating point, to its own tolerances. So its minimisers are tried on the
model, which ends the matter where a row is broken; and what it says to hold is proved by branch and bound, which is
complete for ReLUs and equilibria, and knows how far it has to go. What is not proved in time is not certified.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.adjoint import adjoint_refined, scene_of
from verideq.certify.branching import branch_and_bound
from verideq.certify.leaf import LIMIT
from verideq.certify.method import Bounds, Method, Prepared, Query
from verideq.certify.program import Encoding, Outcome, Program, encode, fits
from verideq.certify.quadratic import form_of, quadratic
from verideq.certify.quadratic_tree import quadratic_branching
from verideq.clock import OutOfTime, share, until
from verideq.errors import NoGaugeError

GAP = 1e-5
"""How close to HiGHS's answer a bound without a goal is proved, of what goes into a row there."""


@dataclass(frozen=True)
class Minimum:
    """The least value of every row, as HiGHS finds it.

    Args:
        values: (samples, rows), of the model at `points`: the truth is at most this.
        claims: (samples, rows), what HiGHS says that nothing is below; ``-inf`` where it says nothing.
        points: (samples, rows, *features); the centre of the box where HiGHS has none.
        outcomes: by sample and row.
        binaries: variables that are 0 or 1, by sample.
    """

    values: Tensor
    claims: Tensor
    points: Tensor
    outcomes: list[list[Outcome]]
    binaries: list[int]


@torch.no_grad()
def minimum(prepared: Prepared, query: Query, limit: int = LIMIT) -> Minimum:
    """The least value of every row of a query over its region, and where: true to HiGHS's tolerances, and no proof.

    Args:
        limit: of binary variables of a sample: with more, nothing is tried.

    Raises:
        InputError: an operation that has no program.
        NoGaugeError: a layer of which nothing is known.
    """
    C = rows_of(prepared, query)
    values, claims = torch.full_like(C[:, :, 0], torch.inf), torch.full_like(C[:, :, 0], -torch.inf)
    points = query.box.center[:, None].expand(-1, C.shape[1], *query.box.lower.shape[1:]).clone()
    outcomes, binaries = [], []
    encoding: Encoding | None = None
    for i in range(len(query)):
        own = query.select(torch.tensor([i], device=C.device))
        scene, _ = scene_of(prepared, own, [[]])
        size = sum(int(known.unstable.sum()) for known in scene.relaxed.values())
        program = None
        if size <= limit and fits(scene):
            encoding = encode(scene) if encoding is None else encoding
            program = Program(encoding, scene, 0, integer=True)
            size = program.binaries
        binaries.append(size)
        ends = []
        for k in range(C.shape[1]):
            if program is None or size > limit:
                ends.append(Outcome.TOO_LARGE)
                continue
            left = (len(query) - i) * C.shape[1] - k
            answer = program.least(C[i, k], share(query.deadline, left))
            ends.append(answer.outcome)
            claims[i, k] = answer.least
            if answer.point is not None:
                x = answer.point[None].to(C)
                points[i, k] = (x if own.region is None else own.region.project(x))[0]
        outcomes.append(ends)
        values[i] = (C[i] * prepared.graph(points[i])).sum(1)
    return Minimum(values, claims, points, outcomes, binaries)


def rows_of(prepared: Prepared, query: Query) -> Tensor:
    """The rows to bound from below, (samples, rows, outputs)."""
    if query.C is not None:
        return query.C
    outputs = prepared.graph.check_input(query.box.lower)[0]
    return torch.eye(outputs).to(query.box.lower).expand(len(query), outputs, outputs)


def bounds_for(prepared: Prepared, query: Query) -> tuple[Method, Method]:
    """The bound that fits a network, and branch and bound over it: linear, or quadratic where there is no gauge."""
    whole = query.region is None or query.region.norm == "linf" or query.region.weights is None
    if prepared.monotone and whole:
        try:
            form_of(prepared, query.box.lower)
            return quadratic, quadratic_branching
        except NoGaugeError:
            pass  # not one equilibrium between affine maps
    return adjoint_refined, branch_and_bound


def branched(prepared: Prepared, query: Query) -> Bounds:
    """Branch and bound over whichever bound fits the network."""
    return bounds_for(prepared, query)[1](prepared, query)


@torch.no_grad()
def exact(prepared: Prepared, query: Query) -> Bounds:
    """What holds by integer programming, proved by branch and bound; minimisers that break a row are witnesses.

    A sample with more than `LIMIT` binary variables is left at the plain bound, with a note that says so.
    """
    if query.upper:
        C = rows_of(prepared, query)
        low, high = (exact(prepared, replace(query, C=sign * C, rhs=None, upper=False)) for sign in (1, -1))
        return replace(low, box=Box(low.box.lower, -high.box.lower), steps=torch.maximum(low.steps, high.steps))
    plain, tree = bounds_for(prepared, query)
    C, found = rows_of(prepared, query), plain(prepared, query)
    left = (~query.closed(found.box.lower)).nonzero().flatten()
    points = query.box.center[:, None].expand(-1, C.shape[1], *query.box.lower.shape[1:]).clone()
    witnesses, notes = dict(found.witnesses), dict[int, str]()
    for part, own in query.parts(left, 1):
        i = int(part)
        # Rows that hold already need no program.
        rows = torch.arange(C.shape[1], device=C.device)
        if own.rhs is not None:
            rows = (~(found.box.lower[i] > own.rhs[0])).nonzero().flatten()
        asked = replace(own, C=C[part][:, rows], rhs=None if own.rhs is None else own.rhs[:, rows])
        with suppress(OutOfTime), until(own.deadline):
            least = minimum(prepared, replace(asked, deadline=share(own.deadline, 2)), LIMIT)
            points[i, rows] = least.points[0]
            if Outcome.TOO_LARGE in least.outcomes[0]:
                notes[i] = (
                    f"the integer program has {least.binaries[0]} binary variables, and more than {LIMIT} take too "
                    "long; use --method branch-and-bound"
                )
            elif asked.rhs is None:
                terms = (C[part].abs() * prepared.graph(least.points[0]).abs()).sum(2)
                goal = torch.minimum(least.values, least.claims) - GAP * (terms + least.values.abs())
                if bool(goal.isfinite().all()):
                    found = found.replaced(part, tree(prepared, replace(own, C=C[part], rhs=goal)))
            elif bool((least.values < asked.rhs).any()):
                witnesses[i] = least.points[0, int((least.values - asked.rhs)[0].argmin())]
            else:
                notes[i] = _word(least, asked.rhs)
                decided = tree(prepared, replace(own, C=C[part]))
                found = found.replaced(part, decided)
                if 0 in decided.witnesses:
                    witnesses[i] = decided.witnesses[0]
    return replace(found, points=points, witnesses=witnesses, notes=notes)


def _word(least: Minimum, rhs: Tensor) -> str:
    """What HiGHS says of one sample, if it is not proved."""
    ends, claims = least.outcomes[0], least.claims - rhs
    size = f"{least.binaries[0]} binary variables"
    if all(end is Outcome.OPTIMAL for end in ends):
        margin = f"HiGHS finds no margin below {float(claims.min()):.6g} ({size}), which is its word and no proof"
        return f"{margin}; branch and bound did not prove it"
    return f"the integer program ({size}): {next(end for end in ends if end is not Outcome.OPTIMAL)}"
