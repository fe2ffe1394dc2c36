"""The model file: what is written is what is read, and no bad file gives anything but one clear `ModelError`."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from verideq.equilibrium import Equilibrium
from verideq.errors import ModelError
from verideq.graph import Normalize, load_model, model_hash, save_model
from verideq.parametrizations import IBPMonDEQ

X = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))

BUILD = """
import sys, torch
from torch import nn
from verideq.equilibrium import Equilibrium
from verideq.graph import Normalize, save_model
from verideq.parametrizations import IBPMonDEQ
torch.manual_seed(0)
fusion = IBPMonDEQ.apply(nn.Linear(6, 6, bias=False), m=0.2)
model = nn.Sequential(Normalize(0.5, 0.25), nn.Flatten(), Equilibrium(fusion, nn.Linear(16, 6)), nn.Linear(6, 3))
save_model(model, sys.argv[1], input_shape=(1, 4, 4))
"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    fusion = IBPMonDEQ.apply(nn.Linear(6, 6, bias=False), m=0.2)
    return nn.Sequential(Normalize(0.5, 0.25), nn.Flatten(), Equilibrium(fusion, nn.Linear(16, 6)), nn.Linear(6, 3))


@pytest.fixture
def path(model: nn.Module, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model.safetensors", input_shape=(1, 4, 4))
    return tmp_path / "model.safetensors"


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()["verideq"]), load_file(path)


def rewrite(path: Path, architecture: object, tensors: dict[str, Tensor]) -> None:
    text = architecture if isinstance(architecture, str) else json.dumps(architecture)
    save_file(tensors, path, metadata={"verideq": text})


def refusal(path: Path) -> str:
    """The message of the one error that a bad file may give: one line that names the file."""
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- good files -------------------------------------------------------------------------------------------------------


def test_round_trip(model: nn.Module, path: Path) -> None:
    loaded = load_model(path)
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
    assert (loaded.input_shape, loaded.pixel_range, loaded.classes) == ((1, 4, 4), (0.0, 1.0), 3)
    assert not loaded.training
    again = path.with_name("again.safetensors")
    assert save_model(loaded, again) == model_hash(loaded) == model_hash(load_model(again))


def test_the_hash_covers_architecture_and_every_tensor(model: nn.Module, path: Path) -> None:
    architecture, tensors = contents(path)
    original = model_hash(load_model(path))
    for name, tensor in tensors.items():
        flat = tensor.flatten().clone()
        flat[-1] = flat[-1] + 2.0**-20
        rewrite(path, architecture, {**tensors, name: flat.view_as(tensor)})
        assert model_hash(load_model(path)) != original, name
    rewrite(path, {**architecture, "pixel_range": [0, 2]}, tensors)
    assert model_hash(load_model(path)) != original
    rewrite(path, architecture, {name: tensor.double() for name, tensor in tensors.items()})
    assert model_hash(load_model(path)) != original


def test_the_returned_hash_is_that_of_the_file(model: nn.Module, tmp_path: Path) -> None:
    digest = save_model(model, tmp_path / "m.safetensors", input_shape=(1, 4, 4), pixel_range=(0.0, 2.0))
    loaded = load_model(tmp_path / "m.safetensors")
    assert digest == model_hash(loaded)
    assert loaded.pixel_range == (0.0, 2.0)


def test_saved_twice_the_bytes_are_the_same_in_another_process_too(model: nn.Module, path: Path) -> None:
    here, there = path.with_name("here.safetensors"), path.with_name("there.safetensors")
    save_model(model, here, input_shape=(1, 4, 4))
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", BUILD, str(there)], check=True, env=environment)
    assert here.read_bytes() == path.read_bytes()
    assert there.read_bytes() == path.read_bytes()
    with safe_open(path, framework="pt") as handle:
        assert list(handle.metadata()) == ["verideq"], "safetensors orders several keys at random"


def test_nothing_is_left_beside_the_file(path: Path) -> None:
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_parametrized_weight_is_stored_as_it_is(model: nn.Module, path: Path) -> None:
    architecture, tensors = contents(path)
    assert torch.equal(tensors["2/fusion.weight"], model[2].fusion.weight)
    assert not any("original" in name for name in tensors)
    node = next(node for node in architecture["nodes"] if node["operation"] == "equilibrium")
    assert node["parametrizations"] == ["IBPMonDEQ"]
    free = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        free.weight.copy_(model[2].fusion.weight)
    plain = nn.Sequential(model[0], model[1], Equilibrium(free, model[2].injection), model[3])
    assert model_hash(plain) == model_hash(model), "the hash is of what is computed, not of where it came from"


def test_every_length_of_header_is_read(tmp_path: Path) -> None:
    """A header of 0x80 bytes modulo 256 begins like a pickle does."""
    seen = set()
    for length in range(0, 256, 4):
        model = nn.Sequential()
        model.add_module("n" * (length + 1), nn.Linear(2, 2))
        save_model(model, tmp_path / "m.safetensors")
        seen.add((tmp_path / "m.safetensors").read_bytes()[0])
        load_model(tmp_path / "m.safetensors")
    assert 0x80 in seen


def test_a_model_without_a_gauge_loads(tmp_path: Path) -> None:
    fusion = nn.Linear(3, 3, bias=False)
    nn.init.constant_(fusion.weight, 5.0)
    save_model(Equilibrium(fusion, nn.Linear(2, 3)), tmp_path / "wild.safetensors")
    assert [name for name, _ in load_model(tmp_path / "wild.safetensors").equilibria()] == ["equilibrium"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"linear/(bias|weight) is b?float16"):
        save_model(nn.Linear(2, 2).to(dtype), tmp_path / "half.safetensors")
    assert not (tmp_path / "half.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(ModelError, match=r"linear\.weight\[0, 0\] is nan"):
        save_model(layer, tmp_path / "nan.safetensors")
    assert not (tmp_path / "nan.safetensors").exists()


# --- bad files --------------------------------------------------------------------------------------------------------


def test_missing_empty_and_a_folder(path: Path) -> None:
    assert "there is no model file" in refusal(path.with_name("nowhere.safetensors"))
    path.write_bytes(b"")
    assert "truncated" in refusal(path)
    assert "is a folder" in refusal(path.parent)


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    "data", [b"\x00" * 64, b"hello world, this is text\n", b"\xff" * 100, b"\x89PNG\r\n\x1a\n" + b"0" * 50]
)
def test_foreign_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert "no safetensors file" in refusal(path)


def test_foreign_safetensors(path: Path) -> None:
    path.write_bytes(save({"weight": torch.zeros(3)}))
    assert "not a verideq model" in refusal(path)
    path.write_bytes(save({"weight": torch.zeros(3)}, metadata={"format": "pt"}))
    assert "save one with verideq.save_model" in refusal(path)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "pickle 2", "pickle 4", "pickle 5", "zip"])
def test_a_pickle_is_refused_without_being_opened(path: Path, kind: str) -> None:
    trace = path.with_name("executed")
    if "torch" in kind:
        torch.save(Bomb(trace), path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps(Bomb(trace)))
    else:
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=int(kind[-1])))
    message = refusal(path)
    assert "is a pickle" in message
    assert "--weights" in message
    assert not trace.exists()


def test_a_pickle_that_poses_as_safetensors_is_not_opened_either(path: Path) -> None:
    trace = path.with_name("executed")
    data = pickle.dumps(Bomb(trace), protocol=0)
    path.write_bytes(data)
    refusal(path)
    path.write_bytes(b"\x80\x04\x95\x00\x00\x00\x00\x00{" + pickle.dumps(Bomb(trace), protocol=4)[2:])
    refusal(path)
    assert not trace.exists()


def change_node(architecture: dict[str, Any], index: int, **changes: object) -> dict[str, Any]:
    nodes = list(architecture["nodes"])
    nodes[index] = {**nodes[index], **changes}
    return {**architecture, "nodes": nodes}


LINEAR = {"in_features": 6, "out_features": 3}
GARBAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not json": (lambda a: "{{", "architecture cannot be read"),
    "a list": (lambda a: [1, 2], "architecture cannot be read"),
    "a number": (lambda a: 7, "architecture cannot be read"),
    "deep": (lambda a: "[" * 100_000, "architecture cannot be read"),
    "no format": (lambda a: {}, "architecture cannot be read"),
    "future format": (lambda a: {**a, "format": 2}, "format 2; this version reads format 1"),
    "no nodes": (lambda a: {**a, "nodes": []}, "no operations"),
    "nodes null": (lambda a: {**a, "nodes": None}, "can read"),
    "node no object": (lambda a: {**a, "nodes": [3]}, "can read"),
    "unknown operation": (lambda a: change_node(a, 4, operation="tanh"), "tanh"),
    "operation no string": (lambda a: change_node(a, 4, operation=[1]), "can read"),
    "attributes a list": (lambda a: change_node(a, 4, attributes=[1]), "can read"),
    "attributes missing": (lambda a: change_node(a, 4, attributes={}), "linear takes the arguments"),
    "attributes unknown": (lambda a: change_node(a, 4, attributes={**LINEAR, "x": 1}), "linear takes the arguments"),
    "attributes huge": (lambda a: change_node(a, 4, attributes={**LINEAR, "in_features": 10**30}), "can read"),
    "attributes negative": (lambda a: change_node(a, 4, attributes={**LINEAR, "in_features": -6}), "linear"),
    "attributes text": (lambda a: change_node(a, 4, attributes={**LINEAR, "in_features": "6"}), "linear"),
    "unknown fusion": (
        lambda a: change_node(a, 3, attributes={"activation": "relu", "fusion": {"operation": "lstm"}}),
        "lstm",
    ),
    "another activation": (
        lambda a: change_node(a, 3, attributes={**a["nodes"][3]["attributes"], "activation": "tanh"}),
        "activation",
    ),
    "reads what is not there": (lambda a: change_node(a, 4, inputs=["nowhere"]), "nowhere"),
    "inputs a number": (lambda a: change_node(a, 4, inputs=5), "can read"),
    "a name twice": (lambda a: change_node(a, 4, name="1"), "can read"),
    "no input shape": (lambda a: {k: v for k, v in a.items() if k != "input_shape"}, "input_shape"),
    "pixel range of text": (lambda a: {**a, "pixel_range": ["a", "b"]}, "can read"),
    "pixel range of one": (lambda a: {**a, "pixel_range": [0]}, "can read"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_bad_architecture(path: Path, case: str) -> None:
    change, message = GARBAGE[case]
    architecture, tensors = contents(path)
    rewrite(path, change(architecture), tensors)
    assert re.search(message, refusal(path))


def test_a_wrong_shape_a_missing_and_a_further_tensor(path: Path) -> None:
    architecture, tensors = contents(path)
    rewrite(path, architecture, {**tensors, "3/weight": torch.zeros(3, 5)})
    assert "weight has shape (3, 5), expected (3, 6)" in refusal(path)
    rewrite(path, architecture, {name: tensor for name, tensor in tensors.items() if name != "3/weight"})
    assert "3/weight" in refusal(path)
    rewrite(path, architecture, {**tensors, "extra": torch.zeros(1)})
    assert "tensors that no operation uses: extra" in refusal(path)


@pytest.mark.parametrize("operation", ["linear", "equilibrium"])
def test_an_operation_without_its_weight(path: Path, operation: str) -> None:
    architecture, tensors = contents(path)
    index, node = next((i, n) for i, n in enumerate(architecture["nodes"]) if n["operation"] == operation)
    weight = next(name for name in node["tensors"] if name.endswith("weight"))
    del tensors[f"{node['name']}/{weight}"]
    rewrite(path, change_node(architecture, index, tensors=[t for t in node["tensors"] if t != weight]), tensors)
    assert operation in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(path: Path, value: float) -> None:
    architecture, tensors = contents(path)
    tensors["3/weight"][1, 2] = value
    rewrite(path, architecture, tensors)
    assert f"3.weight[1, 2] is {value}" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64])
def test_other_dtypes(path: Path, dtype: torch.dtype) -> None:
    architecture, tensors = contents(path)
    rewrite(path, architecture, {**tensors, "3/weight": tensors["3/weight"].to(dtype)})
    message = refusal(path)
    assert "3/weight" in message
    assert str(dtype).removeprefix("torch.") in message


def test_flipped_bits_give_a_model_error_or_another_model(model: nn.Module, path: Path) -> None:
    data, draw = path.read_bytes(), random.Random(0)
    original, expected = model_hash(load_model(path)), load_model(path)(X)
    outcomes = {"refused": 0, "other": 0, "same": 0}
    header = 8 + int.from_bytes(data[:8], "little")
    # Most mistakes are to be made in the header: half of the flips go there.
    positions = [draw.randrange(header) for _ in range(200)] + [draw.randrange(header, len(data)) for _ in range(150)]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_model(path)
        except ModelError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        if model_hash(loaded) != original:
            outcomes["other"] += 1
        else:
            assert torch.equal(loaded(X), expected), f"one hash, two models: byte {position}"
            outcomes["same"] += 1
    assert outcomes["refused"] > 50
    assert outcomes["other"] > 50
