"""The 1,797 digits (8 by 8) that scikit-learn carries, with a split that no library can change.

Within each class the samples are ranked by a hash of the seed and their index, and the first ones are the test samples;
the number a class gives is its share of 360, by largest remainders. Integer arithmetic alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from importlib import import_module

import numpy as np

from verideq.data.dataset import Array, Dataset, image_tensor, label_tensor
from verideq.errors import DataError, UnknownName

SPLIT_SEED = 2022
"""Fixed: another seed is another data set."""
TEST_SIZE = 360
_MASK = 2**64 - 1


def load_digits(split: str) -> Dataset:
    """The ``train`` (1,437) or ``test`` (360) digits: images (N, 1, 8, 8) in sixteenths, exact in float64.

    Raises:
        UnknownName: another split.
        DataError: scikit-learn's copy is not the 1,797 digits that the split was made for.
    """
    if split not in ("train", "test"):
        raise UnknownName("split of digits", split, ("train", "test"))
    images, labels = _source()
    test = stratified_choice(labels.tolist())
    chosen = np.array(test if split == "test" else sorted(set(range(len(labels))) - set(test)))
    where = "scikit-learn's digits"
    return Dataset(
        name="digits",
        split=split,
        images=image_tensor(images[chosen], (0.0, 1.0), where),
        labels=label_tensor(labels[chosen], len(chosen), where, classes=10),
        classes=10,
    )


@cache
def _source() -> tuple[Array, Array]:
    # Imported here: scikit-learn takes a second, and most commands never need it.
    source = import_module("sklearn.datasets").load_digits()
    if source.images.shape != (1797, 8, 8):
        raise DataError(
            f"scikit-learn's digits have shape {source.images.shape}, not (1797, 8, 8); "
            "install a release of scikit-learn that carries the original ones"
        )
    return source.images[:, None] / 16.0, source.target


def stratified_choice(labels: Sequence[int], size: int = TEST_SIZE, seed: int = SPLIT_SEED) -> list[int]:
    """A stratified choice of `size` samples, ascending; it depends on the three arguments and nothing else."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    share = {label: Fraction(size * len(group), len(labels)) for label, group in members.items()}
    counts = {label: int(quota) for label, quota in share.items()}
    by_remainder = sorted(share, key=lambda label: (counts[label] - share[label], label))
    for label in by_remainder[: size - sum(counts.values())]:
        counts[label] += 1
    start = splitmix64(seed)
    return sorted(
        index
        for label, group in members.items()
        for index in sorted(group, key=lambda i: splitmix64(start ^ i))[: counts[label]]
    )


def splitmix64(state: int) -> int:
    """One output of the SplitMix64 generator (Steele, Lea & Flood, OOPSLA 2014): a bijection of 64-bit integers."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
