"""MNIST and CIFAR-10 from the folder that ``VERIDEQ_DATA`` names, as NumPy files or as torchvision lays them out."""

from __future__ import annotations

import gzip
import os
import sys
import zlib
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from verideq.data.dataset import Array, Dataset, image_tensor, label_tensor
from verideq.errors import DataError, UnknownName

Pair = tuple[Array, Array]

_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
_LAYOUTS = {
    "mnist": (
        "mnist/{train,test}_{images,labels}.npy (uint8, images (N, 1, 28, 28)), or MNIST/raw/ with the four original "
        "*-ubyte files, packed (.gz) or not"
    ),
    "cifar10": (
        "cifar10/{train,test}_{images,labels}.npy (uint8, images (N, 3, 32, 32)), or cifar-10-batches-bin/ (the binary "
        "version), or cifar-10-batches-py/ with torchvision installed"
    ),
}


def load_folder(name: str, split: str) -> Dataset:
    """One split of ``mnist`` or ``cifar10``: images (N, channels, height, width), uint8.

    Raises:
        UnknownName: a split other than ``train`` and ``test``.
        DataError: `VERIDEQ_DATA` is not set, or its folder holds no such data, or damaged data.
    """
    if split not in ("train", "test"):
        raise UnknownName(f"split of {name}", split, ("train", "test"))
    root = _root(name)
    found = _from_npy(root / name, split)
    if found is None and name == "mnist":
        found = _from_idx(root / "MNIST" / "raw", split)
    if found is None and name == "cifar10":
        found = _from_binary(root / "cifar-10-batches-bin", split) or _from_torchvision(root, split)
    if found is None:
        raise DataError(f"no {name} {split} data in VERIDEQ_DATA={root}; it should hold {_LAYOUTS[name]}")
    images, labels = found
    where = f"{name} {split} in {root}"
    if images.dtype != np.uint8 or images.shape[1:] != _SHAPES[name]:
        expected = ", ".join(map(str, _SHAPES[name]))
        raise DataError(f"{where}: images are {images.dtype} {images.shape}; store uint8 (N, {expected})")
    pixels = image_tensor(images, (0.0, 1.0), f"{where}: images")
    return Dataset(name, split, pixels, label_tensor(labels, len(pixels), f"{where}: labels", classes=10), classes=10)


def _root(name: str) -> Path:
    value = os.environ.get("VERIDEQ_DATA")
    if not value:
        raise DataError(f"{name} needs its files: set VERIDEQ_DATA to a folder that holds {_LAYOUTS[name]}")
    root = Path(value)
    if not root.is_dir():
        raise DataError(f"VERIDEQ_DATA={value} is no folder; set it to one that holds {_LAYOUTS[name]}")
    return root


def _from_npy(folder: Path, split: str) -> Pair | None:
    if not (folder / f"{split}_images.npy").is_file():
        return None
    return _npy(folder / f"{split}_images.npy"), _npy(folder / f"{split}_labels.npy")


def _npy(path: Path) -> Array:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises several types on a damaged or foreign file
        raise DataError(f"{path}: not a readable .npy file ({error}); write it with np.save") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: holds several arrays; write one array with np.save")
    return array


def _from_idx(folder: Path, split: str) -> Pair | None:
    stem = "train" if split == "train" else "t10k"
    files = [_packed_or_not(folder / f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    if not files[0].is_file():
        return None
    return read_idx(files[0], 3)[:, None], read_idx(files[1], 1)


def _packed_or_not(path: Path) -> Path:
    return path if path.is_file() else path.with_name(path.name + ".gz")


def read_idx(path: Path, axes: int) -> Array:
    """An IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The header: two zero bytes, 8 for unsigned bytes, the number of axes; then each length, big-endian, 32 bits.

    Raises:
        DataError: it cannot be read, another kind of file, or not as long as its header says.
    """
    raw = _bytes(path)
    magic = bytes([0, 0, 8, axes])
    if raw[:4] != magic or len(raw) < 4 + 4 * axes:
        raise DataError(f"{path}: starts with {raw[:4].hex(' ')}, not {magic.hex(' ')}; put the original file there")
    shape = [int(n) for n in np.frombuffer(raw, ">u4", count=axes, offset=4)]
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    if data.size != prod(shape):
        raise DataError(
            f"{path}: holds {data.size} bytes, not the {prod(shape)} of its header; replace the damaged file"
        )
    return data.reshape(shape)


def _from_binary(folder: Path, split: str) -> Pair | None:
    if not folder.is_dir():
        return None
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    rows = np.concatenate([_records(folder / name) for name in names])
    return rows[:, 1:].reshape(-1, *_SHAPES["cifar10"]), rows[:, 0]


def _records(path: Path) -> Array:
    """Records of CIFAR-10's binary version: a label byte, then 3072 pixels by channel, row and column."""
    raw = _bytes(path)
    if not raw or len(raw) % 3073:
        raise DataError(f"{path}: {len(raw)} bytes, not a multiple of 3073; replace the damaged file")
    return np.frombuffer(raw, np.uint8).reshape(-1, 3073)


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); put the original file there") from None


def _from_torchvision(root: Path, split: str) -> Pair | None:
    """CIFAR-10's Python version is a pickle: torchvision opens it, after comparing the MD5 sums of its files."""
    folder = root / "cifar-10-batches-py"
    if not folder.is_dir():
        return None
    try:
        data = _import_datasets().CIFAR10(str(root), train=split == "train", download=False)
    except ImportError as error:
        raise DataError(
            f"{folder} holds pickles, which only torchvision may open, and it cannot be imported ({error}); "
            f"install verideq[vision], or bring another layout: {_LAYOUTS['cifar10']}"
        ) from None
    except RuntimeError as error:
        raise DataError(f"{folder}: torchvision refuses it ({error}); put the original files there") from None
    return np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.asarray(data.targets)


def _import_datasets() -> ModuleType:
    """``torchvision.datasets``, also where torchvision's compiled operators do not fit this build of torch.

    They do not load with the CPU build of torch, and the import then fails on the first operator that it describes;
    with that operator declared it goes through. They are declared only after a failure: a torchvision that does fit
    declares them itself, and a second declaration would break it.
    """
    try:
        return import_module("torchvision.datasets")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # Half-imported submodules would be missing from the fresh package.
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    return import_module("torchvision.datasets")
