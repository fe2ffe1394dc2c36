"""`Task`: a batch of questions to decide, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verideq.certify.bound import margin_rows
from verideq.certify.method import Prepared
from verideq.errors import InputError
from verideq.region import Region


@dataclass(frozen=True)
class Task:
    """A batch of questions: is ``C @ model(x) > rhs`` on the region?

    Args:
        region: (batch,).
        labels: (batch,), or ``None``.
        C: (batch, rows, outputs).
        rhs: (batch, rows).
        indices: (batch,) in the data set.
        by_label: ``C`` and ``rhs`` say that the label's output is the largest, and nothing else.
    """

    region: Region
    labels: Tensor | None
    C: Tensor
    rhs: Tensor
    indices: Tensor
    by_label: bool

    def __len__(self) -> int:
        return len(self.region)

    def __getitem__(self, index: slice | Tensor) -> Task:
        labels = None if self.labels is None else self.labels[index]
        return Task(self.region[index], labels, self.C[index], self.rhs[index], self.indices[index], self.by_label)

    def to(self, device: torch.device) -> Task:
        """The same questions on another device."""
        return replace(self, region=self.region.to(device), C=self.C.to(device), rhs=self.rhs.to(device))


def specification(
    prepared: Prepared, images: Tensor, labels: Tensor | None, C: Tensor | None, rhs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``C`` and ``rhs`` of a batch, checked: (batch, rows, outputs) and (batch, rows), float64."""
    shape = prepared.graph.check_input(images)
    if len(shape) != 1:
        raise InputError(f"the model gives outputs of shape {shape}; a specification needs a vector")
    outputs = shape[0]
    if C is None:
        if labels is None:
            raise InputError("give labels, or a specification C")
        if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype is torch.bool:
            raise InputError(
                f"labels are one integer an image ({len(images)} images); got {tuple(labels.shape)} {labels.dtype}"
            )
        C = margin_rows(labels.cpu().long(), outputs)
    C = C.detach().to("cpu", torch.float64)
    C = C.expand(len(images), *C.shape) if C.dim() == 2 else C
    rhs = torch.zeros(C.shape[:2], dtype=torch.float64) if rhs is None else rhs.detach().to("cpu", torch.float64)
    rhs = rhs.expand(len(images), *rhs.shape) if rhs.dim() == 1 else rhs
    if C.dim() != 3 or C.shape[::2] != (len(images), outputs) or C.shape[1] == 0 or rhs.shape != C.shape[:2]:
        raise InputError(
            f"C has shape {tuple(C.shape)} and rhs {tuple(rhs.shape)}; expected (batch, rows, outputs) and "
            f"(batch, rows) with batch {len(images)}, outputs {outputs}, and one row or more"
        )
    if not bool(C.isfinite().all()) or not bool(rhs.isfinite().all()):
        raise InputError("C and rhs have to be finite")
    return C, rhs
