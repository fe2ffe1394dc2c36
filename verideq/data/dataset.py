"""`Dataset`, and the checks that every array passes before it becomes part of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from verideq.errors import DataError, RegionError
from verideq.region import check_images

Array = NDArray[Any]
Clip = tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set. `load` makes it and has checked every field.

    Args:
        name: the name or the file name that it was loaded by.
        split: ``"train"``, ``"test"``, ...
        images: (N, *features); uint8 where the source is (one unit is 1/255), otherwise float64 in pixel units.
        labels: (N,), int64, in ``0 .. classes - 1``.
        classes: the number of classes; for a ``.npz`` file, one more than its largest label.
        clip: the valid range of `scaled`, or ``None`` for no range.
        eps_weights: (*features), float64: feature ``i`` may move by ``eps * eps_weights[i]``; ``None``: by eps.
    """

    name: str
    split: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: int
    clip: Clip = (0.0, 1.0)
    eps_weights: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.images.shape[1:])

    def scaled(self, index: slice | list[int] | Tensor = slice(None)) -> Tensor:
        """The images that `index` selects, in pixel units: a new float64 tensor (n, *features).

        A byte ``k`` becomes the float64 that is nearest to ``k / 255``.
        """
        images = self.images[index].to(torch.float64, copy=True)
        return images.div_(255) if self.images.dtype == torch.uint8 else images

    def subset(self, indices: Sequence[int]) -> Dataset:
        """The samples at `indices`, in that order.

        Raises:
            DataError: an index outside ``0 .. N - 1``.
        """
        for i in indices:
            if not 0 <= i < len(self):
                raise DataError(f"index {i} is outside {self.name} {self.split}; give 0 to {len(self) - 1}")
        chosen = torch.tensor(indices, dtype=torch.int64)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the content: dtype, shape and bytes of images, labels and weights, and the range.

        Neither the name nor the split enters, so that a renamed or moved file keeps its hash.
        """
        digest = hashlib.sha256()
        clip = None if self.clip is None else torch.tensor(self.clip, dtype=torch.float64)
        for key, tensor in (
            ("images", self.images),
            ("labels", self.labels),
            ("eps_weights", self.eps_weights),
            ("clip", clip),
        ):
            if tensor is None:
                digest.update(f"{key} none\n".encode())
                continue
            array = tensor.numpy()
            # Header and shape fix how many bytes follow: no two contents give one stream.
            digest.update(f"{key} {array.dtype.name} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()


def image_tensor(array: Array, clip: Clip, where: str) -> Tensor:
    """Checked images from an array of the same shape: uint8 stays, float16/32/64 becomes float64 (exactly).

    Args:
        array: (N, *features).
        clip: the valid range in pixel units.
        where: file and key, for the messages.

    Raises:
        DataError: another dtype, no samples or features, or a value that is not finite or lies outside `clip`.
    """
    if array.dtype != np.uint8 and (array.dtype.kind != "f" or array.dtype.itemsize > 8):
        raise DataError(
            f"{where} has dtype {array.dtype}; store uint8 (0..255, read as k/255) or float32 or float64 in pixel units"
        )
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{where} has shape {array.shape}; store (N, *features), one sample and one feature or more")
    if array.dtype == np.uint8:
        images = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        # A byte lies in 0..1 by construction; only an unusual range needs a look at the values.
        if clip is None or (clip[0] == 0.0 and clip[1] == 1.0):
            return images
        if not 0.0 <= clip[0] <= clip[1] <= 1.0:
            raise DataError(f"{where} is uint8, read as k/255, but clip is {clip}; give clip in units where white is 1")
        values = images.to(torch.float64).div_(255)
    else:
        images = values = torch.from_numpy(np.require(array, dtype=np.float64, requirements=["C", "W"]))
    try:
        check_images(values, clip)
    except RegionError as error:
        raise DataError(f"{where}: {error}; or correct that value in the file") from None
    return images


def label_tensor(array: Array, samples: int, where: str, classes: int | None = None) -> Tensor:
    """Checked labels, int64 (N,).

    Args:
        array: (N,), of any integer dtype.
        samples: the number of images.
        where: file and key, for the messages.
        classes: the number of classes, where it is known.

    Raises:
        DataError: no integers, another length, or a label below 0 or outside the classes.
    """
    if array.dtype.kind not in "iu":
        raise DataError(f"{where} has dtype {array.dtype}; store integers, e.g. labels.astype(np.int64)")
    if array.shape != (samples,):
        raise DataError(f"{where} has shape {array.shape}, but there are {samples} images; store one label an image")
    limit = np.iinfo(np.int64).max if classes is None else classes
    bad = np.flatnonzero((array < 0) | (array >= limit))
    if bad.size:
        span = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise DataError(f"{where}[{bad[0]}] is {array[bad[0]]}; labels are class indices, {span}")
    return torch.from_numpy(array.astype(np.int64))
