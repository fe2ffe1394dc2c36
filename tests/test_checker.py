"""The checker accepts what is true: certificates of every kind of model, and enclosures against exact rationals."""

from __future__ import annotations

import inspect
import json
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from verideq import Equilibrium, Normalize, Status, load_model
from verideq.certify import Prepared, Verdict, certify, prepare
from verideq.certify.bound import bound
from verideq.certify.certificate import Proof, framed, record
from verideq.certify.summary import REJECTED
from verideq.checker import Checker, check
from verideq.checker.__main__ import main
from verideq.checker.adjoint import PULLS, inner, pull
from verideq.checker.arithmetic import Array, Exact, Float, Interval, centred, product, total
from verideq.checker.files import parse_blob
from verideq.checker.network import RULES, TENSORS, Node, read_nodes
from verideq.cli.main import run
from verideq.data import load
from verideq.equilibrium import HARD_SIGMOID, FeedbackFusion
from verideq.graph import OPERATIONS, Embed
from verideq.models import BUNDLED
from verideq.parametrizations import FeedbackGauge, IBPMonDEQ
from verideq.region import Region
from verideq.testing.strategies import Case, cases

Capture = pytest.CaptureFixture[str]
FLOAT, EXACT = Float(), Exact()


def write_folder(folder: Path, prepared: Prepared, records: Sequence[bytes]) -> Path:
    """A certificate folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(prepared.file)
    (folder / "gauges.safetensors").write_bytes(prepared.certificate)
    (folder / "records.bin").write_bytes(b"".join(map(framed, records)))
    return folder


def audited(prepared: Prepared, verdicts: list[Verdict]) -> int:
    """The number of certified verdicts, every one of which both arithmetics accept."""
    assert not [v.reason for v in verdicts if v.reason.startswith(REJECTED) or v.status is Status.ERROR]
    proved = [v for v in verdicts if v.certified]
    assert all(v.checked and v.certificate is not None for v in proved)
    assert all(v.certificate is None and not v.checked for v in verdicts if not v.certified)
    records = [v.certificate for v in proved if v.certificate is not None]
    for exact in (False, True):
        checker = Checker(prepared.file, prepared.certificate, exact=exact)
        for verdict, (accepted, reason, margin) in zip(proved, checker.decide(records), strict=True):
            assert accepted, reason
            assert margin is not None and verdict.margin is not None
            assert margin == verdict.margin or (exact and margin >= verdict.margin)
    return len(proved)


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four certificates of a tiny model."""
    torch.manual_seed(0)
    fusion = IBPMonDEQ.apply(nn.Linear(3, 3, bias=False), m=0.3)
    prepared = prepare(nn.Sequential(Equilibrium(fusion, nn.Linear(2, 3)), nn.Linear(3, 2)))
    images = torch.rand(4, 2, dtype=torch.float64)
    verdicts = certify(prepared, images, prepared.graph(images).argmax(1), "1/1000")
    assert audited(prepared, verdicts) == 4
    records = [v.certificate for v in verdicts if v.certificate is not None]
    return write_folder(tmp_path_factory.mktemp("small") / "certificates", prepared, records)


def test_the_checker_needs_no_torch_and_nothing_else_of_the_package(small: Path) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['checker', {str(small)!r}]\n"
        "try: runpy.run_module('verideq.checker', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "foreign = [m for m in sys.modules if m.split('.')[0] in ('torch', 'scipy', 'safetensors', 'typer')]\n"
        "own = [m for m in sys.modules if m.startswith('verideq.') and not m.startswith('verideq.checker')]\n"
        "print(code, foreign, own)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-2:] == ["4 accepted, 0 rejected", "0 [] []"]


def test_a_line_a_record_and_the_exit_code(small: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([str(small)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [f"ACCEPTED {small / 'records.bin'}"] * 4
    assert [line.split(":")[1] for line in lines[:4]] == ["0", "1", "2", "3"]
    assert all("margin" in line for line in lines[:4]) and lines[4] == "4 accepted, 0 rejected"
    assert all(re.search(r"sample \d+, label \d, linf eps \d+/?\d*, margin", line) for line in lines[:4])
    assert main([str(small), str(tmp_path)]) == 1
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == [
        f"REJECTED {tmp_path}: there is no records.bin here or below; a run keeps one with --certificates",
        "4 accepted, 1 rejected",
    ]
    assert main([str(small), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: there is no file or folder {tmp_path / 'nowhere'}\n"


@pytest.mark.parametrize("place", [".", "..", "records.bin"])
def test_a_folder_one_above_and_the_file_itself(small: Path, place: str) -> None:
    assert [outcome.accepted for outcome in check(small / place)] == [True] * 4


@pytest.mark.parametrize("options", [[], ["--exact"]])
def test_json_and_nothing_else(small: Path, capsys: Capture, options: list[str]) -> None:
    assert main([str(small), "--json", *options]) == 0
    outcomes = json.loads(capsys.readouterr().out)
    assert [(o["record"], o["accepted"], o["reason"]) for o in outcomes] == [(k, True, "") for k in range(4)]
    assert all(o["margin"] > 0 and o["path"] == str(small / "records.bin") for o in outcomes)


def test_verideq_check_is_the_same_program(small: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main([str(small), "--exact"]) == 0
    expected = capsys.readouterr().out
    assert run(["check", str(small), "--exact"]) == 0
    assert capsys.readouterr().out == expected
    assert run(["check", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["accepted"] is False


def test_the_program_itself(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["checker", str(small)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(inspect.getfile(main), run_name="__main__")
    assert end.value.code == 0 and "4 accepted" in capsys.readouterr().out


def test_calls_that_are_wrong(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2 and "PATH" in capsys.readouterr().err


# --- certificates of real and generated models ------------------------------------------------------------------------


def test_the_bundled_model(tmp_path: Path) -> None:
    prepared, digits = prepare(load_model(BUNDLED)), load("digits")
    images, labels = digits.scaled(slice(0, 40)), digits.labels[:40]
    for eps in ("1/50", "1/20"):
        verdicts = certify(prepared, images, labels, eps)
        plain = certify(prepared, images, labels, eps, check=False)
        assert [v.status for v in verdicts] == [v.status for v in plain]
        assert sum(v.checked for v in verdicts) == sum(v.certified for v in plain) >= 30
        assert not any(v.checked or v.certificate for v in plain)
        for ours, theirs in zip(verdicts, plain, strict=True):
            if ours.certified:
                assert ours.margin == pytest.approx(theirs.margin, abs=1e-6)
        records = [v.certificate for v in verdicts if v.certificate is not None]
        outcomes = check(write_folder(tmp_path / eps.replace("/", "-"), prepared, records))
        assert [o.margin for o in outcomes] == pytest.approx([v.margin for v in verdicts if v.certified], rel=1e-12)
        assert all(o.accepted for o in outcomes)
        # What is beyond the input and the boxes says what they are.
        for payload in records:
            arrays = parse_blob(payload).arrays
            assert set(arrays) > {"input"}
            assert len(payload) <= 384 + 128 * len(arrays) + sum(array.nbytes for array in arrays.values())


@settings(max_examples=60)
@given(cases())
def test_generated_models_are_checked_and_audited(case: Case) -> None:
    prepared, C = prepare(case.model), case.C[:1]
    lower, outputs = bound(prepared, case.region, C=C).lower[:, 0], bound(prepared, case.region)
    # Thresholds just below what is provable, so that there is something to prove.
    size = torch.maximum(outputs.lower.abs(), outputs.upper.abs()) @ C[0].abs()
    rhs = lower - 2.0**-20 * size - 2.0**-800
    rhs = torch.where(rhs.isfinite(), rhs, 0.0)
    verdicts = certify(prepared, case.region.center, None, case.region.eps, C=C, rhs=rhs[:, None])
    audited(prepared, verdicts)


# --- every operation --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """``x + f(x)``, then another map."""

    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Any:
        return self.after(x + self.inner(x))


def normed(module: Any) -> nn.Module:
    """Statistics as after some training."""
    nn.init.normal_(module.running_mean, 0.3)
    nn.init.uniform_(module.running_var, 0.2, 2.0)
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    return module.eval()  # type: ignore[no-any-return]  # a module


def image_model(*layers: nn.Module) -> Callable[[], nn.Module]:
    """The layers on images of 2x4x4, then three classes."""

    def make() -> nn.Module:
        body = nn.Sequential(*layers, nn.Flatten())
        size = body.eval()(torch.rand(2, 2, 4, 4)).shape[1]
        return nn.Sequential(*body, nn.Linear(size, 3))

    return make


def conv_layer(mode: Any = "zeros", **options: Any) -> Equilibrium:
    """A convolutional equilibrium over two channels, its rows below 1."""
    kernel = options.pop("kernel_size", 3)
    fusion = nn.Conv2d(2, 2, kernel, padding="same", padding_mode=mode, bias=False, **options)
    with torch.no_grad():
        fusion.weight.mul_(0.9 / fusion.weight.abs().flatten(1).sum(1).amax())
    return Equilibrium(fusion, nn.Conv2d(2, 2, 3, padding=1))


def transformed() -> nn.Module:
    """A dense equilibrium with a diagonal of -10: only the rows solved for themselves have a gauge."""
    layer = Equilibrium(nn.Linear(4, 4, bias=False), nn.Linear(3, 4))
    with torch.no_grad():
        layer.fusion.weight.mul_(0.5).fill_diagonal_(-10.0)  # type: ignore[operator, union-attr]  # a tensor
    return nn.Sequential(layer, nn.Linear(4, 3))


def saturated(layer: Any) -> nn.Module:
    """A hard sigmoid that has all kinds of units, then three classes."""
    layer.activation = HARD_SIGMOID
    with torch.no_grad():
        layer.injection.bias.copy_(torch.tensor([-2.0, 0.02, 0.98, 3.0]))
        off = layer.fusion.weight.diagonal().clone()
        layer.fusion.weight.mul_(0.5).fill_diagonal_(0.0).add_(off.clamp(max=0).diag())
    return nn.Sequential(layer, nn.Linear(4, 3))


def coupled() -> nn.Module:
    """Blocks of an image, a smaller one and a vector, the first injected behind a maximum; then three classes."""
    couplings = nn.Conv2d(2, 3, (2, 3), stride=2, padding=(0, 1), bias=False), nn.Linear(3, 2, bias=False)
    fusion = FeedbackGauge.apply(FeedbackFusion([(2, 2, 2), (3, 1, 1), (2,)], couplings), 0.2)
    first = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), Embed(torch.tensor([0.4, -0.3, 0.9, 0.2, 1.5]))
    )
    return nn.Sequential(Equilibrium(fusion, first, "hard-sigmoid"), nn.Linear(13, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (3,)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)), (3,)),
    "relu at the end": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (3,)),
    "normalize at the end": (lambda: nn.Sequential(nn.Linear(3, 4), Normalize(0.3, 0.25)), (3,)),
    "normalize": (image_model(Normalize([0.1, 0.4], [0.5, 2.0])), (2, 4, 4)),
    "batch_norm1d": (lambda: nn.Sequential(nn.Linear(3, 4), normed(nn.BatchNorm1d(4))), (3,)),
    "batch_norm1d without affine": (
        lambda: nn.Sequential(normed(nn.BatchNorm1d(3, affine=False, eps=2.0)), nn.Linear(3, 3)),
        (3,),
    ),
    "batch_norm2d": (image_model(normed(nn.BatchNorm2d(2))), (2, 4, 4)),
    "batch_norm2d without affine": (image_model(normed(nn.BatchNorm2d(2, affine=False))), (2, 4, 4)),
    "strided convolution": (image_model(nn.Conv2d(2, 4, 3, stride=2, padding=1)), (2, 4, 4)),
    "grouped convolution": (
        image_model(nn.Conv2d(2, 4, (3, 2), dilation=(2, 1), groups=2, padding="same", padding_mode="circular")),
        (2, 4, 4),
    ),
    "valid convolution": (
        image_model(nn.Conv2d(2, 3, (2, 3), padding="valid", bias=False), nn.ReLU()),
        (2, 4, 4),
    ),
    "rectangular convolution": (
        image_model(nn.Conv2d(2, 3, 2, stride=(1, 2), padding=(1, 0), padding_mode="reflect")),
        (2, 4, 4),
    ),
    "average": (image_model(nn.AvgPool2d(2)), (2, 4, 4)),
    "average of what is there": (
        image_model(nn.AvgPool2d((3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False)),
        (2, 4, 4),
    ),
    "average with its border": (image_model(nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True)), (2, 4, 4)),
    "average, overhanging": (image_model(nn.AvgPool2d(3, stride=2, ceil_mode=True)), (2, 4, 4)),
    "average, a window beyond": (image_model(nn.AvgPool2d(2, stride=3, padding=1, ceil_mode=True)), (2, 4, 4)),
    "average by another number": (image_model(nn.AvgPool2d(2, 1, divisor_override=3)), (2, 4, 4)),
    "average by a negative number": (image_model(nn.AvgPool2d(2, 1, divisor_override=-3)), (2, 4, 4)),
    "maximum": (image_model(nn.MaxPool2d(2)), (2, 4, 4)),
    "maximum, padded": (image_model(nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)), (2, 4, 4)),
    "maximum, dilated": (image_model(nn.MaxPool2d(2, 1, dilation=2), nn.ReLU()), (2, 4, 4)),
    "adaptive 1": (image_model(nn.AdaptiveAvgPool2d(1)), (2, 4, 4)),
    "adaptive 2": (image_model(nn.AdaptiveAvgPool2d((2, 1))), (2, 4, 4)),
    "adaptive 3": (image_model(nn.AdaptiveAvgPool2d(3)), (2, 4, 4)),
    "adaptive, one axis": (image_model(nn.AdaptiveAvgPool2d((3, None))), (2, 4, 4)),
    "sum": (lambda: Residual(nn.Linear(3, 3), nn.Linear(3, 4)), (3,)),
    "sum at the end": (lambda: Residual(nn.Linear(3, 3), nn.Identity()), (3,)),
    "equilibrium": (lambda: nn.Sequential(conv_layer(), nn.Flatten(), nn.Linear(32, 3)), (2, 4, 4)),
    "equilibrium at the end": (
        lambda: Equilibrium(IBPMonDEQ.apply(nn.Linear(4, 4, bias=False)), nn.Linear(3, 4)),
        (3,),
    ),
    "two equilibria": (
        lambda: nn.Sequential(transformed(), Equilibrium(IBPMonDEQ.apply(nn.Linear(3, 3, bias=False)), nn.Identity())),
        (3,),
    ),
    "transformed": (transformed, (3,)),
    "circular equilibrium": (image_model(conv_layer("circular")), (2, 4, 4)),
    "reflected equilibrium": (image_model(conv_layer("reflect", groups=2)), (2, 4, 4)),
    "replicated equilibrium": (image_model(conv_layer("replicate", dilation=(1, 2))), (2, 4, 4)),
    "equilibrium of an even kernel": (image_model(conv_layer(kernel_size=(2, 1))), (2, 4, 4)),
    "equilibrium that does not read itself": (image_model(conv_layer(kernel_size=2, dilation=3)), (2, 4, 4)),
    "hard sigmoid": (
        lambda: saturated(Equilibrium(nn.Linear(4, 4, bias=False), nn.Linear(3, 4), "hard-sigmoid")),
        (3,),
    ),
    "hard sigmoid, transformed": (lambda: saturated(transformed()[0]), (3,)),
    "coupled blocks": (coupled, (1, 4, 4)),
    "equilibrium by itself, valid": (
        image_model(Equilibrium(IBPMonDEQ.apply(nn.Conv2d(2, 2, 1, padding="valid", bias=False)), nn.Identity())),
        (2, 4, 4),
    ),
}


def decided(model: nn.Module, shape: tuple[int, ...], eps: str = "1/5000", **options: Any) -> list[Verdict]:
    """Verdicts for three inputs and the classes that the model gives them."""
    images = torch.rand(3, *shape, dtype=torch.float64)
    prepared = prepare(model)
    labels = prepared.graph(images).argmax(1)
    verdicts = certify(prepared, images, labels, eps, **options)
    assert audited(prepared, verdicts) >= 2
    return verdicts


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_is_certified_and_checked(name: str) -> None:
    torch.manual_seed(1)
    make, shape = MODELS[name]
    decided(make().eval(), shape)


def test_no_operation_is_left_out() -> None:
    seen = set()
    for make, shape in MODELS.values():
        prepared = prepare(make().eval())
        prepared.graph(torch.rand(1, *shape, dtype=torch.float64))
        seen |= {node.operation.kind for node in prepared.graph.nodes}
    assert seen == set(TENSORS) == set(OPERATIONS)
    # These are written out in the pass through the network.
    assert set(RULES) == set(TENSORS) - {"add", "relu", "equilibrium"}
    assert all(TENSORS[kind] >= set(operation.tensors) for kind, operation in OPERATIONS.items())


@pytest.mark.parametrize("name", MODELS)
def test_every_affine_operation_is_transposed(name: str) -> None:
    # q · y = (Aᵀ q) · x + q · b for every x and q; a square root apart, exactly.
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model = parse_blob(prepare(make().eval()).file)
    draw = np.random.default_rng(0)
    for calc in (FLOAT, EXACT):
        values = {"input": (calc.exactly(draw.integers(-4, 9, (1, *shape)) / 8),) * 2}
        for node in read_nodes(model, calc):
            x = values[node.inputs[0]]
            if node.kind not in PULLS:
                values[node.name] = RULES[node.kind](calc, node, x) if node.kind in RULES else x
                continue
            y = values[node.name] = RULES[node.kind](calc, node, x)
            q = calc.exactly(draw.integers(-8, 9, (2, *y[0].shape[1:])) / 8)
            pulled, shift = pull(calc, node, (q, q), x[0].shape[1:])
            assert pulled[0].shape == (2, *x[0].shape[1:])
            below, above = calc.add(inner(calc, pulled, x), shift)
            lo, hi = inner(calc, (q, q), y)
            assert (below <= hi).all() and (lo <= above).all()
            spread = np.maximum(above - below, hi - lo).max()
            assert spread <= (Fraction(1, 2**100) if calc is EXACT else 1e-10)
            if calc is EXACT and not node.kind.startswith("batch_norm"):
                assert (below == lo).all() and (above == hi).all()
            middle = calc.exactly(calc.nearly(y))
            values[node.name] = middle, middle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_and_weights_by_feature(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = transformed().to(dtype)
    for norm in ("linf", "l2"):
        decided(model, (3,), norm=norm)
        decided(model, (3,), norm=norm, weights=torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64))


@pytest.mark.parametrize("make", [transformed, lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
def test_linear_specifications(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    prepared, images = prepare(make()), torch.rand(2, 3, dtype=torch.float64)
    C = torch.tensor([[1.0, -0.5, -0.5], [0.1, 0.2, 0.3]], dtype=torch.float64)
    rhs = prepared.graph(images) @ C.T - 0.5
    assert audited(prepared, certify(prepared, images, None, "1/100", C=C, rhs=rhs)) == 2


def test_bytes_are_their_255ths_exactly() -> None:
    torch.manual_seed(4)
    prepared, images = prepare(image_model()()), torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    labels = prepared.graph(images.to(torch.float64) / 255).argmax(1)
    verdicts = certify(prepared, images, labels, "1/1000")
    assert audited(prepared, verdicts) >= 2
    assert all(b'\\"scale\\":\\"1/255\\"' in v.certificate for v in verdicts if v.certificate is not None)


def test_no_clip() -> None:
    torch.manual_seed(5)
    model = prepare(nn.Linear(3, 3))
    model.graph.pixel_range = None
    prepared = prepare(model.graph)
    images = torch.randn(3, 3, dtype=torch.float64) * 50
    assert audited(prepared, certify(prepared, images, prepared.graph(images).argmax(1), "1/100")) == 3


def test_the_mates_in_a_batch_change_no_margin() -> None:
    # The hostile record overflows on its way: its own NaN is nobody else's.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    prepared = prepare(model)
    prepared.graph.pixel_range = None
    prepared = prepare(prepared.graph)
    images = torch.rand(3, 3, dtype=torch.float64)
    alone = certify(prepared, images, prepared.graph(images).argmax(1), "1/1000")
    records = [v.certificate for v in alone if v.certificate is not None]
    assert len(records) == 3
    hostile = record(
        prepared.checker.hash, 0, Region(torch.full((1, 3), 1e300, dtype=torch.float64), 10**307, clip=None), 0,
        Proof(), label=0, C=np.zeros((1, 3)), rhs=np.zeros(1), margin=1.0,
    )  # fmt: skip
    decisions = prepared.checker.decide([records[0], hostile, *records[1:]])
    assert [accepted for accepted, _, _ in decisions] == [True, False, True, True]
    assert [m for _, _, m in decisions if m is not None] == [v.margin for v in alone]


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def numbers(draw: random.Random, *shape: int, spread: int) -> Array:
    """Float64 numbers biased to corners: small integers at powers of two, ends of binades, denormals, zeros."""

    def one() -> float:
        kind = draw.random()
        scale = 2.0 ** draw.randint(-spread, spread)
        if kind < 0.1:
            return 0.0
        if kind < 0.2:
            return draw.choice((-1, 1)) * draw.choice((5e-324, 1e-310, 2.0**-1022))
        if kind < 0.5:
            return draw.randint(-8, 8) * scale
        if kind < 0.7:
            return draw.choice((-1.0, 1.0)) * draw.choice((1 - 2.0**-53, 1 + 2.0**-52, 2.0**53 - 1)) * scale
        return draw.uniform(-1, 1) * scale

    return np.array([one() for _ in range(int(np.prod(shape)))]).reshape(shape)


def intervals(draw: random.Random, *shape: int, spread: int, positive: bool = False) -> Interval:
    """Ordered pairs, a third of them points."""
    a, b = numbers(draw, *shape, spread=spread), numbers(draw, *shape, spread=spread)
    b = np.where(np.array([draw.random() < 0.33 for _ in range(a.size)]).reshape(shape), a, b)
    if positive:
        a, b = np.abs(a) + 5e-324, np.abs(b) + 5e-324
    return np.minimum(a, b), np.maximum(a, b)


def exactly(x: Interval) -> Interval:
    return EXACT.exactly(x[0]), EXACT.exactly(x[1])


def leaks(outer: Interval, inner: Interval) -> int:
    """How many entries of `inner` (fractions) are not in `outer` (floats); NaN and infinity hold everything."""
    count = 0
    for lo, hi, low, high in zip(*(np.broadcast_to(a, inner[0].shape).ravel() for a in (*outer, *inner)), strict=True):
        below = not np.isfinite(lo) or Fraction(float(lo)) <= low
        above = not np.isfinite(hi) or high <= Fraction(float(hi))
        count += not (below and above)
    return count


def affine_leaks(layers: int, seed: int) -> tuple[int, int]:
    """Enclosures of random affine maps that do not hold the exact image, and how many there were."""
    draw, bad, total = random.Random(seed), 0, 0
    for _ in range(layers):
        n, m, batch = draw.randint(1, 8), draw.randint(1, 8), 3
        spread = draw.choice((0, 3, 60))
        x, matrix = intervals(draw, batch, n, spread=spread), numbers(draw, n, m, spread=spread)
        shift = intervals(draw, m, spread=spread)
        found = FLOAT.affine(x, matrix, shift)
        bad += leaks(found, EXACT.affine(exactly(x), EXACT.exactly(matrix), exactly(shift)))
        total += found[0].size
        assert np.isfinite(found[0]).all() and np.isfinite(found[1]).all()
        # A matrix that is known only up to an error, and differs by all of it.
        error = np.abs(numbers(draw, n, m, spread=spread))
        sign = np.array([draw.choice((-1, 1)) for _ in range(n * m)]).reshape(n, m)
        off = EXACT.exactly(matrix) + EXACT.exactly(error * sign)
        bad += leaks(FLOAT.affine(x, matrix, shift, error), EXACT.affine(exactly(x), off, exactly(shift)))
        total += found[0].size
    return bad, total


def operation_leaks(size: int, seed: int) -> tuple[int, int]:
    """The same for sums, differences, products, quotients and roots."""
    draw, bad, total = random.Random(seed), 0, 0
    for spread in (0, 60):
        a, b = intervals(draw, size, spread=spread), intervals(draw, size, spread=spread)
        p, q = (intervals(draw, size, spread=spread, positive=True) for _ in range(2))
        pairs = [
            *((getattr(FLOAT, name)(a, b), getattr(EXACT, name)(exactly(a), exactly(b))) for name in NAMES),
            (FLOAT.divide(a, q), EXACT.divide(exactly(a), exactly(q))),
            (FLOAT.root(p), EXACT.root(exactly(p))),
        ]
        bad += sum(leaks(*pair) for pair in pairs)
        total += size * len(pairs)
    return bad, total


NAMES = ("add", "subtract", "multiply")


def test_ten_thousand_enclosures() -> None:
    with np.errstate(all="ignore"):
        (bad, affine), (worse, others) = affine_leaks(250, seed=1), operation_leaks(500, seed=2)
    assert (bad, worse) == (0, 0)
    assert affine + others >= 10_000


@pytest.mark.parametrize("calc", [FLOAT, EXACT])
def test_the_product_of_two_interval_matrices(calc: Float | Exact) -> None:
    draw = random.Random(3)
    for _ in range(60):
        n, spread = draw.randint(1, 7), draw.choice((0, 60))
        a, b = intervals(draw, 3, n, spread=spread), intervals(draw, n, 4, spread=spread)
        x, y = exactly(a), exactly(b)
        lo, hi = product(calc, *(pair if calc is FLOAT else exact for pair, exact in ((a, x), (b, y))))
        # Every corner, and a point within.
        for side, other, share in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 1, Fraction(1, 3))):
            first, second = (p[k] + (p[1 - k] - p[k]) * share for p, k in ((x, side), (y, other)))
            truth = first @ second
            assert leaks((lo, hi), (truth, truth)) == 0 if calc is FLOAT else ((lo <= truth) & (truth <= hi)).all()


@pytest.mark.parametrize("calc", [FLOAT, EXACT])
def test_a_matrix_and_how_far_its_interval_reaches(calc: Float | Exact) -> None:
    draw = random.Random(4)
    for spread in (0, 60):
        floats = intervals(draw, 40, spread=spread)
        x = floats if calc is FLOAT else exactly(floats)
        middle, error = centred(calc, x)
        lo, hi = exactly(floats)
        center, reach = (side if calc is EXACT else EXACT.exactly(side) for side in (middle, error))
        assert (center - reach <= lo).all() and (hi <= center + reach).all()


def test_a_sum_of_intervals() -> None:
    draw = random.Random(5)
    for spread in (0, 60):
        x = intervals(draw, 5, 7, spread=spread)
        assert leaks(total(FLOAT, x), tuple(side.sum(1) for side in exactly(x))) == 0  # type: ignore[arg-type]  # a pair


def test_a_matrix_whose_error_is_huge_and_a_point_that_is_flushed() -> None:
    # Where denormals read as zero, 2^-1030 times an error of 2^1020 is lost.
    tiny, zero, error = np.full((1, 1), 0.0), np.zeros(1), np.full((1, 1), 2.0**1020)
    lo, hi = FLOAT.affine((tiny, tiny), np.zeros((1, 1)), (zero, zero), error)
    assert lo[0, 0] <= -(2.0**-10) and hi[0, 0] >= 2.0**-10


def test_a_sum_of_any_order() -> None:
    # Row sums that few orders of summation find in float64.
    big = 2.0**53
    rows = np.array([[big, 1, -big, 1, big, 1, -big], [big, big, big, 1, -big, -big, -big]])
    ones, zero = np.ones((1, 7)), np.zeros(2)
    lo, hi = FLOAT.affine((ones, ones), rows.T, (zero, zero))
    assert (lo[0] <= [3, 1]).all() and (hi[0] >= [3, 1]).all()


def test_the_root_is_a_bracket_at_every_scale() -> None:
    values = EXACT.exactly(np.array([5e-324, 1e-300, 2.0, 1e300]))
    lo, hi = EXACT.root((values, values))
    assert (lo > 0).all() and (lo * lo <= values).all() and (values <= hi * hi).all()
    assert (hi - lo <= lo * Fraction(1, 2**190)).all()


@pytest.mark.parametrize("chunk", [1, 64, 2**19])
@pytest.mark.parametrize("seed", range(20))
def test_a_convolution_in_floats_holds_that_in_rationals(
    seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verideq.checker.arithmetic.CHUNK", chunk)
    draw = np.random.default_rng(seed)
    groups, stride = int(draw.integers(1, 4)), tuple(draw.integers(1, 4, 2).tolist())
    mode = ("zeros", "reflect", "replicate", "circular")[seed % 4]
    conv = nn.Conv2d(
        2 * groups, groups, tuple(draw.integers(1, 4, 2).tolist()), stride, tuple(draw.integers(0, 3, 2).tolist()),
        tuple(draw.integers(1, 3, 2).tolist()), groups, padding_mode=mode, dtype=torch.float64,
    )  # fmt: skip
    size = float(10.0 ** draw.integers(-3, 4))
    x = draw.standard_normal((3, 2 * groups, 6, 5)) * size
    y = conv(torch.from_numpy(x)).detach().numpy()
    q = draw.standard_normal(y.shape)
    (pulled,) = torch.autograd.grad(
        conv(start := torch.zeros(x.shape, dtype=torch.float64, requires_grad=True)), start, torch.from_numpy(q)
    )
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    arguments = {name: list(v) if isinstance(v := getattr(conv, name), tuple) else v for name in names}
    found = []
    for calc in (FLOAT, EXACT):
        tensors = {name: calc.exactly(p.detach().numpy()) for name, p in conv.named_parameters()}
        node = Node("conv", "conv2d", ("input",), arguments, tensors)
        wide = [tuple(calc.exactly(c + s * 1e-3 * size) for s in (-1, 1)) for c in (x, q)]
        found.append((RULES["conv2d"](calc, node, wide[0]), PULLS["conv2d"](calc, node, wide[1], x.shape[1:])[0]))
    for (lo, hi), (least, most), middle in zip(*found, (y, pulled.numpy()), strict=True):
        assert lo.shape == least.shape == middle.shape
        assert all(Fraction(a) <= b for a, b in zip(lo.ravel().tolist(), least.ravel(), strict=True))
        assert all(Fraction(a) >= b for a, b in zip(hi.ravel().tolist(), most.ravel(), strict=True))
        assert ((lo <= middle) & (middle <= hi)).all()
        assert np.allclose(hi - lo, (most - least).astype(float), rtol=1e-9)
