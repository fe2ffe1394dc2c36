"""``verideq import``: checkpoints of the MonDEQ and IBP-MonDEQ codes become model files that compute the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.io import savemat
from torch import Tensor, nn

from verideq import gauge, load_model
from verideq.cli.main import run
from verideq.equilibrium import MonotoneFusion
from verideq.graph import Graph
from verideq.models.checkpoints import read_mondeq

Arrays = dict[str, np.ndarray]


def factors(units: int = 12, inputs: int = 784, classes: int = 10, dtype: type = np.float32) -> Arrays:
    """A MonDEQ of the field's size and scale, by the letters of the formula."""
    draw = np.random.default_rng(units)
    sizes = {"A": (units, units), "B": (units, units), "U": (units, inputs), "b": (units,)}
    sizes |= {"C": (classes, units), "c": (classes,)}
    arrays = {name: draw.normal(size=size) * 3 / units**0.5 for name, size in sizes.items()}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def fused(arrays: Arrays, m: float) -> np.ndarray:
    A, B = arrays["A"].astype(np.float64), arrays["B"].astype(np.float64)
    return (1 - m) * np.eye(len(B)) - A.T @ A + B - B.T


def reference(W: np.ndarray, arrays: Arrays, x: np.ndarray) -> np.ndarray:
    """The logits, by a plain damped iteration in numpy."""
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    v = x @ wide["U"].T + wide["b"]
    step = np.linalg.eigvalsh((2 * np.eye(len(W)) - W - W.T) / 2)[0] / np.linalg.norm(np.eye(len(W)) - W, 2) ** 2
    z = np.zeros_like(v)
    for _ in range(100_000):
        old, z = z, np.maximum(0, z + step * (z @ W.T + v - z))
        if np.abs(z - old).max() < 1e-15:
            break
    return z @ wide["C"].T + wide["c"]


def state_dict(arrays: Arrays, prefix: str = "mon.") -> dict[str, Tensor]:
    names = {"A": "A.weight", "B": "B.weight", "U": "U.weight", "b": "U.bias"}
    state = {f"{prefix}linear_module.{long}": torch.from_numpy(arrays[short]) for short, long in names.items()}
    return state | {"Wout.weight": torch.from_numpy(arrays["C"]), "Wout.bias": torch.from_numpy(arrays["c"])}


def write(folder: Path, kind: str, arrays: Arrays) -> Path:
    path = folder / f"checkpoint.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "mat":
        savemat(path, {("u" if name == "b" else name): array for name, array in arrays.items()})
    else:
        torch.save(state_dict(arrays), path)
    return path


def imported(folder: Path, *arguments: str, kind: str = "mondeq") -> Graph:
    out = folder / "model.safetensors"
    assert run(["import", kind, *arguments, "--out", str(out)]) == 0
    return load_model(out)


@pytest.mark.parametrize("kind", ["pt", "pth", "npz", "mat"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_format_gives_the_same_model(kind: str, dtype: type, tmp_path: Path) -> None:
    arrays = factors(dtype=dtype)
    path = write(tmp_path, kind, arrays)
    model = imported(tmp_path, str(path), "--m", "20", "--mean", "0.1307", "--std", "0.3081")
    assert model.input_shape == (1, 28, 28) and model.pixel_range == (0.0, 1.0) and model.classes == 10
    assert [node.operation.kind for node in model.nodes] == ["normalize", "flatten", "linear", "equilibrium", "linear"]
    ((_, layer),) = model.equilibria()
    assert isinstance(layer.fusion, MonotoneFusion) and float(layer.fusion.m) == 20
    assert np.array_equal(layer.fusion.A, arrays["A"]) and np.array_equal(layer.fusion.B, arrays["B"])
    assert layer.fusion.A.dtype is (torch.float32 if dtype is np.float32 else torch.float64)
    images = np.random.default_rng(0).random((6, 1, 28, 28))
    mean, std = (np.float64(dtype(value)) for value in (0.1307, 0.3081))
    wanted = reference(fused(arrays, 20), arrays, (images.reshape(6, 784) - mean) / std)
    found = model.frozen()(torch.from_numpy(images)).numpy()
    assert np.abs(found - wanted).max() < 1e-9 * np.abs(wanted).max()
    stored = model(torch.from_numpy(images).to(layer.fusion.A.dtype)).numpy()
    assert np.array_equal(stored.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("units", [40, 87, 100, 200])
def test_the_sizes_of_the_public_models_classify(units: int, tmp_path: Path) -> None:
    arrays = factors(units)
    model = imported(tmp_path, str(write(tmp_path, "pt", arrays)), "--m", "20", "--mean", "0.1307", "--std", "0.3081")
    images = np.random.default_rng(1).random((4, 784))
    mean, std = (np.float64(np.float32(value)) for value in (0.1307, 0.3081))
    wanted = reference(fused(arrays, 20), arrays, (images - mean) / std)
    found = model.frozen()(torch.from_numpy(images).view(4, 1, 28, 28)).numpy()
    assert np.abs(found - wanted).max() < 1e-10 * max(1, np.abs(wanted).max())
    assert np.array_equal(found.argmax(1), wanted.argmax(1))


def test_a_w_without_factors_is_stored_as_it_is_with_what_is_proved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = factors(40)
    W = fused(arrays, 20).astype(np.float32)
    given = {name: array for name, array in arrays.items() if name not in "AB"} | {"W": W}
    model = imported(tmp_path, str(write(tmp_path, "npz", given)), "--mean", "0.1307", "--std", "0.3081")
    said = capsys.readouterr().out
    proved = float(said.split("I - sym W >= ")[1].split(",")[0])
    measured = float(np.linalg.eigvalsh(np.eye(40) - (W.astype(np.float64) + W.T) / 2)[0])
    assert proved == pytest.approx(measured, rel=1e-5) and proved == pytest.approx(20, rel=1e-4)
    ((_, layer),) = model.equilibria()
    assert np.array_equal(layer.fusion.get_parameter("weight"), W)
    images = np.random.default_rng(0).random((6, 784))
    mean, std = (np.float64(np.float32(value)) for value in (0.1307, 0.3081))
    wanted = reference(W.astype(np.float64), arrays, (images - mean) / std)
    found = model.frozen()(torch.from_numpy(images).view(6, 1, 28, 28)).numpy()
    assert np.abs(found - wanted).max() < 1e-8 * np.abs(wanted).max()
    assert run(["import", "mondeq", str(tmp_path / "checkpoint.npz"), "--m", "21", "--out", str(tmp_path / "x")]) == 2
    assert "leave --m out" in " ".join(capsys.readouterr().err.split())


def test_other_sizes_are_flat_vectors_and_need_no_normalisation(tmp_path: Path) -> None:
    arrays = factors(5, inputs=7, classes=3)
    model = imported(tmp_path, str(write(tmp_path, "mat", arrays)), "--m", "0.5")
    assert model.input_shape == (7,) and model.pixel_range is None
    assert [node.operation.kind for node in model.nodes] == ["linear", "equilibrium", "linear"]
    x = np.random.default_rng(0).normal(size=(4, 7))
    wanted = reference(fused(arrays, 0.5), arrays, x)
    assert np.abs(model.frozen()(torch.from_numpy(x)).numpy() - wanted).max() < 1e-8
    normalised = imported(tmp_path, str(tmp_path / "checkpoint.mat"), "--m", "0.5", "--mean", "1", "--std", "2")
    assert np.abs(normalised.frozen()(torch.from_numpy(2 * x + 1)).numpy() - wanted).max() < 1e-8


def test_the_layer_may_be_there_under_both_of_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_dict(factors(4), "") | state_dict(factors(4), "mon.")
    path = tmp_path / "both.pt"
    torch.save(state, path)
    model, _ = read_mondeq(path, 1.0)
    assert isinstance(model.get_submodule("equilibrium.fusion"), MonotoneFusion)
    torch.save(state | {"linear_module.A.weight": torch.zeros(4, 4)}, path)
    assert run(["import", "mondeq", str(path), "--m", "1", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "twice" in capsys.readouterr().err


def test_the_file_is_named_after_the_checkpoint_where_no_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "npz", factors(4))
    monkeypatch.chdir(tmp_path)
    assert run(["import", "mondeq", str(path), "--m", "1"]) == 0
    assert (tmp_path / "checkpoint.safetensors").exists()


class Trap:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch trapped",)


def altered(**changes: np.ndarray | None) -> Arrays:
    arrays = factors(6) | {name: array for name, array in changes.items() if array is not None}
    return {name: array for name, array in arrays.items() if changes.get(name, array) is not None}


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        (altered(), ["--m", "-1"], "m = -1.0 is no strength"),
        (altered(), ["--m", "nan"], "m = nan is no strength"),
        (altered(), ["--m", "0"], "m = 0.0 is no strength"),
        (altered(), [], "pass --m"),
        (altered(), ["--m", "1", "--mean", "0.1"], "go together"),
        (altered(), ["--m", "1", "--mean", "0.1", "--std", "0"], "std"),
        (altered(), ["--m", "1", "--mean", "nan", "--std", "1"], "nan"),
        (altered(A=None), ["--m", "1"], "missing: A; too many: none"),
        (altered(c=None, U=None), ["--m", "1"], "missing: U, c"),
        (altered(g=np.ones(1)), ["--m", "1"], "too many: g"),
        (altered(W=np.eye(6)), ["--m", "1"], "too many: A, B"),
        (altered(B=np.ones((6, 5), np.float32)), ["--m", "1"], "B (6, 5)"),
        (altered(A=np.ones((6, 5), np.float32)), ["--m", "1"], "A (6, 5)"),
        (altered(U=np.ones((5, 784)), b=np.ones(5)), ["--m", "1"], "its injection gives 5"),
        (altered(C=np.ones((10, 5))), ["--m", "1"], "the classifier reads 5"),
        (altered(b=np.ones(5)), ["--m", "1"], "no matrix with its bias"),
        (altered(A=np.ones((6, 6, 3, 3)), B=np.ones((6, 6, 3, 3))), ["--m", "1"], "convolutional"),
        (altered(A=np.full((6, 6), np.nan)), ["--m", "1"], "A holds"),
        (altered(A=np.ones((6, 6)) * 1j), ["--m", "1"], "A holds"),
        (altered(A=np.array(["a"])), ["--m", "1"], "weights alone"),
        (altered(A=np.array([Trap()], dtype=object)), ["--m", "1"], "weights alone"),
        (altered(A=None, B=None, W=2 * np.eye(6)), [], "the smallest eigenvalue of I - sym W is -1"),
        (altered(A=None, B=None, W=np.eye(6)), [], "no m > 0 is proved"),
        (altered(A=None, B=None, W=np.ones((6, 5))), [], "make it square"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    arrays: Arrays, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, "npz", arrays), tmp_path / "model.safetensors"
    assert run(["import", "mondeq", str(path), *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not out.exists()


def test_code_in_a_checkpoint_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"Wout.weight": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "junk.mat").write_bytes(b"junk" * 100)
    np.savez(tmp_path / "trap.npz", allow_pickle=True, W=np.array([Trap()], dtype=object))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"Wout.weight": 3.0}, tmp_path / "number.pt")
    for name in ("trap.pt", "trap.npz", "junk.pt", "junk.npz", "junk.mat", "list.pt", "number.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on a foreign file
            assert run(["import", "mondeq", name, "--m", "1"]) == 2
        said = capsys.readouterr().err
        assert "weights alone" in said and said.count("\n") == 1
    assert not (tmp_path / "trapped").exists()
    for arguments, message in (
        (["import", "mondeq", "none.pt"], "there is no checkpoint"),
        (["import", "mondeq", "model.onnx"], "ends in"),
        (["import", "other", "none.pt"], "choose one of: mondeq, ibp-mondeq"),
    ):
        assert run(arguments) == 2
        assert message in capsys.readouterr().err


# ---- IBP-MonDEQ

PREFIX = "layers.layers.1.linear_module."


def ibp_state(
    units: int = 8, inputs: int = 784, lben: bool = True, norm: bool = True, act: bool = True
) -> dict[str, Tensor]:
    torch.manual_seed(units)
    layer = nn.ModuleDict({"U": nn.ModuleDict({"M": nn.Linear(inputs, units)}), "M": nn.Linear(units, units)})
    if norm:
        module = nn.BatchNorm1d(units)
        with torch.no_grad():
            for tensor in (module.weight, module.bias, module.running_mean):
                assert tensor is not None
                tensor.normal_()
        layer["bn_U_module"] = module
    state = {f"layers.layers.1.linear_module.{name}": t for name, t in layer.state_dict().items()}
    if lben:
        state["layers.layers.1.linear_module.lben_p"] = torch.randn(units)
    if act:
        state["layers.layers.1.linear_module.U_post_act_bias"] = torch.randn(1, units)
    out = nn.Linear(units, 10)
    return state | {"Wout.weight": out.weight.detach(), "Wout.bias": out.bias.detach()}


def ibp_reference(state: dict[str, Tensor], x: Tensor, m: float, gamma: float) -> Tensor:
    """The layer as the paper's code runs it: scale, multiply, scale, 200 times."""
    t = {name.rpartition("linear_module.")[2]: tensor.double() for name, tensor in state.items()}
    v = F.linear((x.flatten(1) - 0.1307) / 0.3081, t["U.M.weight"], t["U.M.bias"])
    if "bn_U_module.weight" in t:
        mean, variance = t["bn_U_module.running_mean"], t["bn_U_module.running_var"]
        v = (v - mean) / (variance + 1e-5).sqrt() * t["bn_U_module.weight"] + t["bn_U_module.bias"]
    if "U_post_act_bias" in t:
        v = F.relu(v) + t["U_post_act_bias"]
    M = t["M.weight"]
    d = (M.abs() @ torch.ones(len(M)).double() + M.abs().T @ torch.ones(len(M)).double()) / 2 / (1 - m) + 1e-8
    scale = (1 - 1 / gamma) * torch.sigmoid(t["lben_p"]) + 1 / gamma if "lben_p" in t else torch.ones(len(M)).double()
    z = torch.zeros_like(v)
    for _ in range(200):
        z = F.relu(d**-0.5 * ((d**-0.5 * (scale * z)) @ M.T) / scale + v)
    return F.linear(z, t["Wout.weight"], t["Wout.bias"])


@pytest.mark.parametrize(
    ("lben", "norm", "act"), [(True, True, True), (False, True, True), (True, False, False), (False, False, True)]
)
def test_a_dense_ibp_mondeq_computes_what_its_code_does(lben: bool, norm: bool, act: bool, tmp_path: Path) -> None:
    state = ibp_state(lben=lben, norm=norm, act=act)
    path = tmp_path / "ckpt.pt"
    torch.save([state, {"state": {}}, 5, 100] if lben else state, path)
    arguments = [str(path), "--m", "0.5", "--mean", "0.1307", "--std", "0.3081", *(["--gamma", "4"] if lben else [])]
    model = imported(tmp_path, *arguments, kind="ibp-mondeq")
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    wanted = ibp_reference(state, x, 0.5, 4.0)
    assert torch.allclose(model.frozen()(x), wanted, atol=1e-5)
    ((_, layer),) = model.equilibria()
    assert gauge(layer).rate(layer) < 1
    assert model.input_shape == (1, 28, 28)


def test_a_small_m_is_scaled_as_in_the_code(tmp_path: Path) -> None:
    state = ibp_state()
    state[PREFIX + "M.weight"] *= 1e-8  # where the 1e-8 that the code adds to D counts
    torch.save(state, tmp_path / "ckpt.pt")
    arguments = [str(tmp_path / "ckpt.pt"), "--m", "0.5", "--mean", "0.1307", "--std", "0.3081"]
    model = imported(tmp_path, *arguments, kind="ibp-mondeq")
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    assert torch.allclose(model.frozen()(x), ibp_reference(state, x, 0.5, 3.0), atol=1e-5)


def test_the_gamma_of_the_code_is_three(tmp_path: Path) -> None:
    state = ibp_state()
    torch.save(state, tmp_path / "ckpt.pt")
    model = imported(
        tmp_path, str(tmp_path / "ckpt.pt"), "--m", "0.5", "--mean", "0.1307", "--std", "0.3081", kind="ibp-mondeq"
    )
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    assert torch.allclose(model.frozen()(x), ibp_reference(state, x, 0.5, 3.0), atol=1e-5)
    assert not torch.allclose(model.frozen()(x), ibp_reference(state, x, 0.5, 4.0), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, [], "--m is None"),
        ({}, ["--m", "1"], "--m is 1.0"),
        ({}, ["--m", "nan"], "--m is nan"),
        ({}, ["--m", "0.5", "--gamma", "0.5"], "gamma = 0.5"),
        ({PREFIX + "M.weight": torch.ones(8, 8, 3, 3)}, ["--m", "0.5"], "pixel by pixel"),
        ({PREFIX + "M.weight": torch.ones(8, 7)}, ["--m", "0.5"], "square"),
        ({PREFIX + "M.weight": None}, ["--m", "0.5"], "holds one ...linear_module.M.weight"),
        ({PREFIX + "U.M.bias": None}, ["--m", "0.5"], "missing: U.M.bias"),
        ({PREFIX + "bn_U_module.running_var": None}, ["--m", "0.5"], "missing: bn_U_module.running_var"),
        ({"layers.layers.2.weight": torch.ones(8)}, ["--m", "0.5"], "too many: layers.layers.2.weight"),
        ({"Wout.bias": None}, ["--m", "0.5"], "missing: Wout.bias"),
        ({PREFIX + "lben_p": torch.ones(7)}, ["--m", "0.5"], "lben_p has 7"),
        ({PREFIX + "U_post_act_bias": torch.ones(7)}, ["--m", "0.5"], "U_post_act_bias has 7"),
        ({PREFIX + "bn_U_module.bias": torch.ones(7)}, ["--m", "0.5"], "batch norm"),
    ],
)
def test_other_ibp_mondeq_checkpoints_are_refused(
    change: dict[str, Tensor | None],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = {name: tensor for name, tensor in (ibp_state() | change).items() if tensor is not None}
    torch.save(state, tmp_path / "ckpt.pt")
    out = tmp_path / "model.safetensors"
    assert run(["import", "ibp-mondeq", str(tmp_path / "ckpt.pt"), *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not out.exists()
