"""Data sets: what is read, and what is refused with which words."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import verideq
from verideq.data import Dataset, load, parse_indices
from verideq.data.digits import SPLIT_SEED, splitmix64, stratified_choice
from verideq.errors import DataError, UnknownName

DOCS = Path(__file__).parent.parent / "docs" / "data.md"
RNG = np.random.default_rng(0)


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    return {"images": np.array([[0.0, 0.25, 1.0], [0.5, 0.125, 0.75]]), "labels": np.array([2, 0])}


# The digits


def test_digits_are_sixteenths_of_the_original() -> None:
    from sklearn.datasets import load_digits

    test, train = load("digits"), load("digits", "train")
    assert (len(train), len(test), test.classes, test.clip) == (1437, 360, 10, (0.0, 1.0))
    assert test.input_shape == train.input_shape == (1, 8, 8)
    assert test.images.dtype == torch.float64 and test.labels.dtype == torch.int64
    source = load_digits()
    chosen = stratified_choice(source.target.tolist())
    assert np.array_equal(test.scaled()[:, 0].numpy() * 16, source.images[chosen])
    assert np.array_equal(test.labels.numpy(), source.target[chosen])
    rest = np.delete(np.arange(1797), chosen)
    assert np.array_equal(train.images[:, 0].numpy() * 16, source.images[rest])
    assert np.array_equal(train.labels.numpy(), source.target[rest])


def test_digits_split_is_the_documented_one() -> None:
    from sklearn.datasets import load_digits

    text = DOCS.read_text(encoding="utf-8").split("## The digits split")[1]
    documented = [int(n) for n in re.findall(r"\d+", text.split("```")[1])]
    assert documented == stratified_choice(load_digits().target.tolist())
    assert len(set(documented)) == 360
    assert f"the seed ({SPLIT_SEED})" in text


def test_digits_content_does_not_drift() -> None:
    assert load("digits").hash == "41b47b047374d065397569d0b36550eb5a52eec08269b3e2de0c5bf6caa78400"


def test_splitmix64_gives_the_published_output() -> None:
    assert splitmix64(1234567) == 6457827717110365317
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64((1234567 + 0x9E3779B97F4A7C15) % 2**64) == 3203168211198807973


def test_stratified_choice_gives_every_class_its_share() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 21
    chosen = stratified_choice(labels, size=20, seed=1)
    # Shares 9.90, 5.94, 4.16: floors 9, 5, 4, and the two left go to the largest remainders.
    assert [sum(labels[i] == c for i in chosen) for c in range(3)] == [10, 6, 4]
    assert chosen == sorted(set(chosen)) and chosen == stratified_choice(labels, size=20, seed=1)
    assert chosen != stratified_choice(labels, size=20, seed=2)
    assert chosen != list(range(10)) + list(range(50, 56)) + list(range(80, 84))


# Dataset


def test_bytes_are_scaled_to_the_nearest_float64(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", images=np.arange(256, dtype=np.uint8)[:, None], labels=np.zeros(256, int))
    data = load(path)
    assert data.images.dtype == torch.uint8
    scaled = data.scaled()
    assert scaled.dtype == torch.float64
    assert scaled[:, 0].tolist() == [float(Fraction(k, 255)) for k in range(256)]
    for index in (slice(3, 9, 2), [3, 5, 7], torch.tensor([3, 5, 7])):
        assert torch.equal(data.scaled(index), scaled[3:9:2])


def test_scaled_is_a_copy(tmp_path: Path, table: dict[str, Any]) -> None:
    data = load(save(tmp_path / "a.npz", **table))
    data.scaled().zero_()
    assert data.images.tolist() == table["images"].tolist()


def test_subset_keeps_everything_else(tmp_path: Path, table: dict[str, Any]) -> None:
    data = load(save(tmp_path / "a.npz", **table, clip=[-1.0, 2.0], eps_weights=[1.0, 0.0, 2.0]))
    part = data.subset([1])
    assert part.images.tolist() == [[0.5, 0.125, 0.75]] and part.labels.tolist() == [0]
    assert (part.name, part.split, part.classes, part.clip) == ("a.npz", "test", 3, (-1.0, 2.0))
    assert part.eps_weights is not None and part.eps_weights.tolist() == [1.0, 0.0, 2.0]
    assert data.subset([1, 0]).labels.tolist() == [0, 2]
    assert part.hash != data.hash
    for bad in (2, -1):
        with pytest.raises(DataError, match=rf"index {bad} is outside a.npz test; give 0 to 1"):
            data.subset([0, bad])


def test_hash_sees_content_and_nothing_else() -> None:
    def make(name: str = "a", split: str = "test", **change: Any) -> Dataset:
        fields: dict[str, Any] = {"images": torch.zeros(2, 4, dtype=torch.float64), "labels": torch.tensor([0, 1])}
        return Dataset(name, split, classes=2, **fields | change)

    base = make().hash
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert make(name="b", split="train").hash == base
    ones = torch.ones(4, dtype=torch.float64)
    others = [
        make(images=torch.zeros(2, 2, 2, dtype=torch.float64)),
        make(images=torch.zeros(2, 4, dtype=torch.uint8)),
        make(images=torch.full((2, 4), 2.0**-1074, dtype=torch.float64)),
        make(labels=torch.tensor([1, 0])),
        make(clip=None),
        make(clip=(0.0, 2.0)),
        make(eps_weights=ones),
        make(eps_weights=2 * ones),
    ]
    assert len({base, *(other.hash for other in others)}) == 1 + len(others)


# Names and splits


def test_unknown_names_and_splits_list_the_known_ones(tmp_path: Path, table: dict[str, Any]) -> None:
    with pytest.raises(
        UnknownName, match=r"unknown data set 'svhn'; .*digits, mnist, cifar10, a path that ends in .npz"
    ):
        load("svhn")
    for name in ("digits", "mnist", "cifar10"):
        with pytest.raises(UnknownName, match=f"unknown split of {name} 'valid'; choose one of: train, test"):
            load(name, "valid")
    with pytest.raises(UnknownName, match="'train'; choose one of: test"):
        load(save(tmp_path / "a.npz", **table), "train")


# .npz


def test_npz_table_with_weights_and_range(tmp_path: Path, table: dict[str, Any]) -> None:
    weights = np.array([1, 0, 3])
    data = load(save(tmp_path / "a.npz", **table, clip=np.array([0, 1]), eps_weights=weights))
    assert data.input_shape == (3,) and data.classes == 3 and data.clip == (0.0, 1.0)
    assert data.scaled().tolist() == table["images"].tolist()
    assert data.eps_weights is not None and data.eps_weights.dtype == torch.float64
    assert data.eps_weights.tolist() == [1.0, 0.0, 3.0]
    plain = load(save(tmp_path / "b.npz", **table))
    assert plain.clip == (0.0, 1.0) and plain.eps_weights is None


def test_npz_without_a_range_takes_any_finite_value(tmp_path: Path) -> None:
    rows = np.array([[-1e300, 5.0]])
    assert load(save(tmp_path / "a.npz", images=rows, labels=[0], clip=[])).clip is None
    with pytest.raises(DataError, match=r"a.npz: images: input 0, at \(0,\): the value -1e\+300 lies outside"):
        load(save(tmp_path / "a.npz", images=rows, labels=[0]))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", ">f8"])
def test_npz_floats_of_any_kind_become_the_same_float64(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0.0, 0.5], [0.75, 1.0]])
    data = load(
        save(tmp_path / "a.npz", images=np.asfortranarray(values.astype(dtype)), labels=np.array([0, 1], ">u2"))
    )
    assert data.images.dtype == torch.float64 and data.images.tolist() == values.tolist()
    assert data.hash == load(save(tmp_path / "b.npz", images=values, labels=[0, 1])).hash


def test_npz_splits_share_classes_and_options(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.npz",
        train_images=np.zeros((3, 2), np.float32),
        train_labels=[0, 1, 4],
        test_images=np.ones((1, 2), np.float32),
        test_labels=[1],
        eps_weights=[1.0, 2.0],
    )
    train, test = load(path, "train"), load(path)
    assert (len(train), len(test)) == (3, 1) and train.classes == test.classes == 5
    assert test.images.tolist() == [[1.0, 1.0]] and train.labels.tolist() == [0, 1, 4]
    assert train.eps_weights is not None and test.eps_weights is not None
    with pytest.raises(UnknownName, match="choose one of: test, train"):
        load(path, "valid")


IMAGES = np.full((2, 3), 0.5)
WIDE = np.dtype(np.longdouble).name == "float128"
BAD_FILES: list[tuple[dict[str, Any], str]] = [
    *([({"images": IMAGES.astype(np.longdouble)}, "images has dtype float128; store uint8")] if WIDE else []),
    ({"images": IMAGES.astype(object)}, "images cannot be read .*pickle.*plain numeric arrays"),
    ({"images": IMAGES.astype(np.int64)}, "images has dtype int64; store uint8"),
    ({"images": IMAGES.astype(complex)}, "images has dtype complex128; store uint8"),
    ({"images": np.array(["a", "b"])}, "images has dtype <U1; store"),
    ({"images": np.array([0.5, 0.5])}, r"images has shape \(2,\); store \(N, \*features\)"),
    ({"images": np.zeros((2, 0))}, r"images has shape \(2, 0\); store"),
    ({"images": np.zeros((0, 3)), "labels": np.zeros(0, int)}, r"images has shape \(0, 3\); store"),
    ({"images": np.float64(1.0)}, r"images has shape \(\); store"),
    (
        {"images": np.array([[0.5, 0.5], [np.nan, 0]])},
        r"images: input 1, at \(0,\): the value nan is not finite; .*correct",
    ),
    ({"images": np.array([[0.5, 0.5], [0, np.inf]])}, r"images: input 1, at \(1,\): the value inf is not finite"),
    ({"images": np.array([[0.5, 0.5], [0, 1.5]])}, r"images: input 1, at \(1,\): the value 1.5 lies outside .*scale"),
    (
        {"images": np.array([[9], [1]], np.uint8), "clip": [0, 255]},
        r"images is uint8.*clip is \(0.0, 255.0\); give clip",
    ),
    (
        {"images": np.array([[9], [255]], np.uint8), "clip": [0, 0.5]},
        r"images: input 1, at \(0,\): the value 1 lies outside",
    ),
    ({"labels": np.array([0.0, 1.0])}, r"labels has dtype float64; store integers"),
    ({"labels": np.array([True, False])}, "labels has dtype bool; store integers"),
    ({"labels": np.array([0, 1], dtype=object)}, "labels cannot be read .*pickle"),
    ({"labels": np.array([0, 1, 2])}, r"labels has shape \(3,\), but there are 2 images; store one label"),
    ({"labels": np.array([[0], [1]])}, r"labels has shape \(2, 1\), but there are 2 images"),
    ({"labels": np.array([0, -7])}, r"labels\[1\] is -7; labels are class indices, 0 or more"),
    ({"labels": np.array([2**64 - 1, 0], np.uint64)}, r"labels\[0\] is 18446744073709551615; labels are"),
    ({"clip": [1.0, 0.0]}, r"clip is \[1, 0\]; store finite low < high"),
    ({"clip": [np.nan, np.nan]}, r"clip is \[nan, nan\]; store finite"),
    ({"clip": [0.0, np.inf]}, r"clip is \[0, inf\]; store finite"),
    ({"clip": [0.0, 1.0, 2.0]}, r"clip is float64 \(3,\); store two numbers"),
    ({"clip": ["a", "b"]}, r"clip is <U1 \(2,\); store two numbers"),
    ({"eps_weights": [1.0, 2.0]}, r"eps_weights has shape \(2,\), the features \(3,\); store one weight a feature"),
    ({"eps_weights": [1.0, -2.0, 0.0]}, r"eps_weights\[1\] is -2; store finite weights"),
    ({"eps_weights": [1.0, 1.0, np.nan]}, r"eps_weights\[2\] is nan; store finite weights"),
    ({"eps_weights": ["a", "b", "c"]}, "eps_weights has dtype <U1; store float64"),
    ({"eps_weight": [1.0, 1.0, 1.0]}, "unknown key 'eps_weight'; rename it to eps_weights"),
    ({"test_images": IMAGES, "test_labels": [0, 0]}, "images and test_images are both the split 'test'"),
    ({"train_images": IMAGES}, "train_labels is missing; its keys are .*store one label"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD_FILES, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(BAD_FILES)]
)
def test_npz_refuses_what_makes_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "mine.npz", **{"images": IMAGES, "labels": np.array([0, 1])} | change)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_npz_needs_both_keys_and_ignores_others(tmp_path: Path, table: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"no images among its keys \(x, y\); store images and labels"):
        load(save(tmp_path / "a.npz", x=IMAGES, y=[0, 1]))
    with pytest.raises(DataError, match="labels is missing; its keys are images;"):
        load(save(tmp_path / "a.npz", images=IMAGES))
    names = np.array(["a", "b"], dtype=object)
    assert len(load(save(tmp_path / "a.npz", **table, class_names=names))) == 2


class Bomb:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_npz_damaged_or_foreign_files(tmp_path: Path, table: dict[str, Any]) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match=r"a.npz: there is no such file"):
        load(str(path))
    whole = Path(save(path, **table)).read_bytes()
    damaged = bytearray(whole)
    damaged[150] ^= 255  # in the first array's data: its checksum fails
    for content in (b"", b"nonsense", whole[: len(whole) // 2], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.npz: .* cannot be read .*np.savez"):
            load(str(path))
    with path.open("wb") as stream:
        np.save(stream, IMAGES)
    with pytest.raises(DataError, match=r"a single array, not a .npz file"):
        load(str(path))
    trap = tmp_path / "trap"
    path.write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(DataError, match=r"the file cannot be read .*pickle, and none is ever opened"):
        load(str(path))
    with pytest.raises(DataError, match=r"labels cannot be read .*pickle"):
        load(save(path, images=IMAGES, labels=np.array([Bomb(trap), Bomb(trap)])))
    assert not trap.exists()


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), {})
    assert len(blocks) == 2
    iris = load("iris.npz")
    assert (len(iris), iris.input_shape, iris.classes, iris.clip) == (150, (4,), 3, None)


# MNIST and CIFAR-10


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VERIDEQ_DATA", str(tmp_path))
    return tmp_path


def pixels(n: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_folder_says_what_to_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = rf"{name}/{{train,test}}_{{images,labels}}\.npy .*uint8"
    monkeypatch.delenv("VERIDEQ_DATA", raising=False)
    with pytest.raises(DataError, match=f"{name} needs its files: set VERIDEQ_DATA .*{layout}"):
        load(name)
    monkeypatch.setenv("VERIDEQ_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=f"none is no folder; set it to .*{layout}"):
        load(name)
    monkeypatch.setenv("VERIDEQ_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no {name} test data in VERIDEQ_DATA=.*{layout}"):
        load(name)


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_folder_of_npy_files(name: str, shape: tuple[int, ...], root: Path) -> None:
    folder = root / name
    folder.mkdir()
    content = {split: (pixels(n, *shape), np.arange(n, dtype=np.uint8)) for split, n in (("train", 4), ("test", 3))}
    for split, (images, labels) in content.items():
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    for split, (images, labels) in content.items():
        data = load(name, split)
        assert (data.name, data.split, data.classes, data.clip) == (name, split, 10, (0.0, 1.0))
        assert np.array_equal(data.images.numpy(), images) and data.images.dtype == torch.uint8
        assert data.labels.tolist() == labels.tolist()

    np.save(folder / "test_labels.npy", np.array([0, 1, 10]))
    with pytest.raises(DataError, match=rf"{name} test in .*: labels\[2\] is 10; labels are class indices, 0 to 9"):
        load(name)
    np.save(folder / "test_images.npy", pixels(3, *shape[1:]))
    with pytest.raises(DataError, match=r"images are uint8 \(3, .*\); store uint8 \(N, "):
        load(name)
    np.save(folder / "test_images.npy", pixels(3, *shape) / 255)
    with pytest.raises(DataError, match=r"images are float64 .*; store uint8"):
        load(name)
    (folder / "test_images.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match=r"test_images.npy: not a readable .npy file"):
        load(name)
    (folder / "train_labels.npy").unlink()
    with pytest.raises(DataError, match=r"train_labels.npy: not a readable .npy file .*No such file"):
        load(name, "train")


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_as_torchvision_lays_it_out(packed: bool, root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = pixels(3, 28, 28), np.array([7, 2, 1], np.uint8)
    for split, stem in (("train", "train"), ("test", "t10k")):
        for array, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            raw = idx(array)
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
        data = load("mnist", split)
        assert np.array_equal(data.images.numpy(), images[:, None]) and data.labels.tolist() == [7, 2, 1]


def test_mnist_with_a_wrong_header(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    path = folder / "t10k-images-idx3-ubyte"
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 2], np.uint8)))
    good = idx(pixels(2, 28, 28))
    for raw, message in (
        (b"", "starts with , not 00 00 08 03; put the original file there"),
        (good[:15], "starts with 00 00 08 03, not"),
        (idx(np.array([1, 2], np.uint8)), "starts with 00 00 08 01, not 00 00 08 03"),
        (good[:-1], "holds 1567 bytes, not the 1568 of its header; replace the damaged file"),
        (good + b"0", "holds 1569 bytes, not the 1568"),
        (idx(pixels(2, 14, 28)), r"images are uint8 \(2, 1, 14, 28\); store uint8 \(N, 1, 28, 28\)"),
        (idx(pixels(3, 28, 28)), r"labels has shape \(2,\), but there are 3 images"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            load("mnist")
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(DataError, match=r"ubyte.gz: cannot be read \(.*\); put the original file there"):
        load("mnist")


def test_cifar10_binary_version(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    images, labels = pixels(10, 3, 32, 32), np.arange(10, dtype=np.uint8)
    records = np.concatenate([labels[:, None], images.reshape(10, -1)], axis=1)
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(records[2 * i : 2 * i + 2].tobytes())
    train = load("cifar10", "train")
    assert np.array_equal(train.images.numpy(), images) and train.labels.tolist() == labels.tolist()
    with pytest.raises(DataError, match=r"test_batch.bin: cannot be read"):
        load("cifar10")
    (folder / "test_batch.bin").write_bytes(records[:1].tobytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch.bin: 3072 bytes, not a multiple of 3073; replace"):
        load("cifar10")


FAKE = {
    "__init__": "from . import extension, _meta_registrations, datasets\n",
    "extension": "def has_ops():\n    return False\n",
    "_meta_registrations": (
        "import torch, torchvision.extension\n"
        "torchvision.extension.has_ops()\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou: dets)\n"
    ),
    "datasets": (
        "import numpy as np\n"
        "class CIFAR10:\n"
        "    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):\n"
        "        if download or not train:\n"
        "            raise RuntimeError('Dataset not found or corrupted.')\n"
        "        self.data = np.arange(2 * 3072).astype(np.uint8).reshape(2, 32, 32, 3)\n"
        "        self.targets = [6, 9]\n"
    ),
}


def test_cifar10_python_version_goes_through_torchvision(root: Path) -> None:
    """The fake one fails as the real one does where its operators are missing: on their first description.

    In a process of its own, because a declared operator stays.
    """
    (root / "cifar-10-batches-py").mkdir()
    package = root / "site" / "torchvision"
    package.mkdir(parents=True)
    for name, code in FAKE.items():
        (package / f"{name}.py").write_text(code)
    script = """if True:
        import numpy as np, pytest
        from verideq.data import load
        from verideq.errors import DataError
        data = load("cifar10", "train")
        assert data.labels.tolist() == [6, 9]
        source = np.arange(2 * 3072).astype(np.uint8).reshape(2, 32, 32, 3)
        assert np.array_equal(data.images.numpy(), np.moveaxis(source, 3, 1))
        with pytest.raises(DataError, match="batches-py: torchvision refuses it .*corrupted.*original files"):
            load("cifar10")
    """
    paths = [str(package.parent), str(Path(verideq.__file__).parent.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cifar10_python_version_is_never_unpickled_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    trap = root / "trap"
    (folder / "test_batch").write_bytes(pickle.dumps(Bomb(trap)))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
    with pytest.raises(DataError, match=r"holds pickles, which only torchvision may open.*install verideq\[vision\]"):
        load("cifar10")
    assert not trap.exists()


REAL = {
    "mnist": (
        "5923 6742 5958 6131 5842 5421 5918 6265 5851 5949",
        "980 1135 1032 1010 982 892 958 1028 974 1009",
        "5 0 4 1 9 2 1 3 1 4",
        "7 2 1 0 4 1 4 9 5 9",
    ),
    "cifar10": (" ".join(["5000"] * 10), " ".join(["1000"] * 10), "6 9 9 4 1 1 2 7 8 3", "3 8 8 0 6 6 1 6 3 1"),
}


@pytest.mark.skipif("VERIDEQ_DATA" not in os.environ, reason="VERIDEQ_DATA is not set: no MNIST and CIFAR-10 at hand")
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_real_data_where_it_is_at_hand(name: str) -> None:
    try:
        splits = load(name, "train"), load(name, "test")
    except DataError as missing:
        pytest.skip(str(missing))
    for data, counts, first, size in zip(splits, REAL[name][:2], REAL[name][2:], (0, 10000), strict=True):
        assert len(data) == (size or (60000 if name == "mnist" else 50000))
        assert torch.bincount(data.labels).tolist() == [int(n) for n in counts.split()]
        assert data.labels[:10].tolist() == [int(n) for n in first.split()]
        assert data.images.dtype == torch.uint8 and float(data.scaled(slice(0, 100)).max()) == 1.0
    if name == "mnist":
        assert round(float(splits[0].images.float().mean()) / 255, 4) == 0.1307


# Indices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3", [0, 1, 2]),
        (":3", [0, 1, 2]),
        ("7:", [7, 8, 9]),
        (":", list(range(10))),
        ("3,5,8", [3, 5, 8]),
        ("8, 3", [8, 3]),
        ("9", [9]),
        ("9,0:2,4", [9, 0, 1, 4]),
    ],
)
def test_indices_keep_the_order_given(text: str, expected: list[int]) -> None:
    assert parse_indices(text, 10) == expected


def test_indices_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "wanted.txt"
    path.write_text("5\n\n 3 \n9\n")
    assert parse_indices(str(path), 10) == [5, 3, 9]
    for content, message in (
        ("5\n0:3\n", "'0:3' is not an index; write one integer a line"),
        ("5\n-1\n", "'-1' is not an index"),
        ("5\n2.0\n", r"'2.0' is not an index"),
        ("5\n10\n", "'10' is out of range; there are 10 samples, 0 to 9"),
        ("5\n6\n5\n", "index 5 is given twice"),
        ("\n", "no sample is selected"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=f"index file .*wanted.txt.*{message}"):
            parse_indices(str(path), 10)
    path.write_bytes(b"\xff\xfe1")
    with pytest.raises(DataError, match="no list and no readable file"):
        parse_indices(str(path), 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:11", "'0:11' is out of range; there are 10 samples, 0 to 9"),
        ("10", "'10' is out of range"),
        ("12:", "'12:' is out of range"),
        ("0:" + "9" * 17, "out of range"),
        ("3,5,3", "index 3 is given twice; give each sample once"),
        ("0:4,3", "index 3 is given twice"),
        ("5:5", "'5:5' selects no sample"),
        ("5:3", "'5:3' selects no sample"),
        ("-1", "'-1' is not an index; write a:b"),
        ("3,,5", "'' is not an index"),
        ("0:8:2", "'0:8:2' is not an index"),
        ("9" * 5000, "is not an index"),
        ("all", "'all' are no list and no readable file"),
        ("", "'' are no list and no readable file"),
    ],
)
def test_indices_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_indices(text, 10)
