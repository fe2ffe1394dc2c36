"""Data sets: the digits that come with scikit-learn, MNIST and CIFAR-10 from a folder, and any ``.npz`` file.

Nothing is downloaded and no pickle is opened by this package; every value is checked first.
"""

from __future__ import annotations

from verideq.data.dataset import Dataset
from verideq.data.digits import load_digits
from verideq.data.folder import load_folder
from verideq.data.indices import parse_indices
from verideq.data.npz import load_npz
from verideq.errors import UnknownName

__all__ = ["NAMES", "Dataset", "load", "parse_indices"]

NAMES = ("digits", "mnist", "cifar10")
"""The data sets that have a name; everything else is a path that ends in ``.npz``."""


def load(name_or_path: str, split: str = "test") -> Dataset:
    """Read one split of a data set.

    Args:
        name_or_path: one of `NAMES`, or a path that ends in ``.npz``.
        split: ``"train"`` or ``"test"``; a ``.npz`` file has the splits that its keys name.

    Returns:
        The split, in the order of its source.

    Raises:
        UnknownName: no such data set, or no such split.
        DataError: files that are missing, damaged, or hold values that make no sense.

    >>> load("digits").input_shape
    (1, 8, 8)
    """
    if name_or_path.endswith(".npz"):
        return load_npz(name_or_path, split)
    if name_or_path not in NAMES:
        raise UnknownName("data set", name_or_path, (*NAMES, "a path that ends in .npz"))
    return load_digits(split) if name_or_path == "digits" else load_folder(name_or_path, split)
