"""A user's own data: a ``.npz`` file with ``images`` and ``labels`` (docs/data.md describes the format)."""

from __future__ import annotations

from difflib import get_close_matches
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from verideq.data.dataset import Array, Clip, Dataset, image_tensor, label_tensor
from verideq.errors import DataError, UnknownName

_OPTIONAL = ("clip", "eps_weights")


def load_npz(path: str, split: str) -> Dataset:
    """One split of a ``.npz`` file.

    Args:
        path: the file. Keys ``images`` and ``labels`` make the split ``test``, ``<split>_images`` and
            ``<split>_labels`` any other. ``clip`` (2,) and ``eps_weights`` (*features) are optional and hold for all.
        split: the split to read.

    Raises:
        UnknownName: the file has no such split.
        DataError: a file, a key or a value that cannot be used.
    """
    arrays, keys = _read(path)
    if split not in keys:
        raise UnknownName(f"split of {path}", split, sorted(keys))
    # The classes of every split count, so that train and test agree on their number.
    classes = 1 + max(_labels(path, arrays, *pair).max().item() for pair in keys.values())
    images_key, labels_key = keys[split]
    clip = _clip(arrays["clip"], f"{path}: clip") if "clip" in arrays else (0.0, 1.0)
    images = image_tensor(arrays[images_key], clip, f"{path}: {images_key}")
    weights = arrays.get("eps_weights")
    return Dataset(
        name=Path(path).name,
        split=split,
        images=images,
        labels=_labels(path, arrays, images_key, labels_key),
        classes=int(classes),
        clip=clip,
        eps_weights=None if weights is None else _weights(weights, images.shape[1:], f"{path}: eps_weights"),
    )


def _read(path: str) -> tuple[dict[str, Array], dict[str, tuple[str, str]]]:
    """The arrays of the keys that mean something here, and the keys of each split."""
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file; give the path of a .npz file")
    key = ""
    try:
        with Path(path).open("rb") as stream:  # opened here, because np.load leaves a damaged zip file open
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: a single array, not a .npz file; write it with np.savez")
            keys = _splits(path, archive.files)
            arrays: dict[str, Array] = {}
            for key in [*chain(*keys.values()), *(name for name in _OPTIONAL if name in archive.files)]:
                arrays[key] = np.asanyarray(archive[key])
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types on a damaged or foreign file
        why = "it needs a pickle, and none is ever opened" if "pickle" in str(error) else str(error)
        raise DataError(
            f"{path}: {key or 'the file'} cannot be read ({why}); "
            "write plain numeric arrays with np.savez(path, images=..., labels=...)"
        ) from None
    return arrays, keys


def _splits(path: str, names: list[str]) -> dict[str, tuple[str, str]]:
    """The keys of images and labels of each split."""
    keys: dict[str, tuple[str, str]] = {}
    for name in names:
        if name == "images" or name.endswith("_images"):
            split = name.removesuffix("images").removesuffix("_") or "test"
            if split in keys:
                raise DataError(f"{path}: images and test_images are both the split 'test'; keep one of them")
            keys[split] = (name, name.removesuffix("images") + "labels")
    if not keys:
        raise DataError(f"{path}: no images among its keys ({', '.join(names) or 'none'}); store images and labels")
    for _, labels in keys.values():
        if labels not in names:
            raise DataError(f"{path}: {labels} is missing; its keys are {', '.join(names)}; store one label an image")
    for name in sorted(set(names).difference(*keys.values(), _OPTIONAL)):
        # A misspelt option would change what is certified, in silence.
        if near := get_close_matches(name, _OPTIONAL, n=1, cutoff=0.75):
            raise DataError(f"{path}: unknown key {name!r}; rename it to {near[0]}, or remove it")
    return keys


def _labels(path: str, arrays: dict[str, Array], images: str, labels: str) -> Tensor:
    samples = arrays[images].shape[:1]
    if samples in ((), (0,)):
        raise DataError(f"{path}: {images} has shape {arrays[images].shape}; store (N, *features) with N of 1 or more")
    return label_tensor(arrays[labels], samples[0], f"{path}: {labels}")


def _clip(array: Array, where: str) -> Clip:
    if array.size == 0:
        return None
    if array.dtype.kind not in "iuf" or array.shape != (2,):
        raise DataError(f"{where} is {array.dtype} {array.shape}; store two numbers [low, high], or [] for no range")
    low, high = float(array[0]), float(array[1])
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise DataError(f"{where} is [{low:g}, {high:g}]; store finite low < high, or [] for no range")
    return low, high


def _weights(array: Array, shape: torch.Size, where: str) -> Tensor:
    if array.dtype.kind not in "iuf":
        raise DataError(f"{where} has dtype {array.dtype}; store float64")
    if array.shape != tuple(shape):
        raise DataError(f"{where} has shape {array.shape}, the features {tuple(shape)}; store one weight a feature")
    weights = array.astype(np.float64)
    bad = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        index = tuple(bad[0].tolist())
        raise DataError(f"{where}{list(index)} is {weights[index]:g}; store finite weights, 0 or more")
    return torch.from_numpy(weights)
