"""From the bounds of a batch to margins and to the records that a checker reads."""

from __future__ import annotations

from fractions import Fraction

import torch

from verideq.certify.certificate import record
from verideq.certify.method import Bounds, Prepared
from verideq.certify.task import Task


def margins_of(bounds: Bounds, part: Task) -> list[float]:
    """The smallest ``lower - rhs`` of every sample, rounded down; its sign is exact."""
    rows = bounds.box.lower - part.rhs
    rows = torch.where(part.rhs == 0, rows, torch.nextafter(rows, torch.full_like(rows, -torch.inf)))
    lower: list[float] = rows.amin(1).tolist()
    return lower


def written(prepared: Prepared, part: Task, k: int, bounds: Bounds, margin: float, tolerance: Fraction) -> bytes:
    """The record of the `k`-th sample of a batch, which says that its margin is about this."""
    return record(
        prepared.checker.hash,
        int(part.indices[k]),
        part.region,
        k,
        bounds.proof(k),
        label=int(part.labels[k]) if part.by_label and part.labels is not None else None,
        C=part.C[k].cpu().numpy(),
        rhs=part.rhs[k].cpu().numpy(),
        margin=margin,
        tolerance=tolerance,
    )
