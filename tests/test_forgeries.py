"""The checker refuses what is false, damaged or ambiguous, and every part of it that could be dropped is missed."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

from verideq import Equilibrium, checker
from verideq.certify import certify, prepare
from verideq.certify.certificate import framed, gauge_file
from verideq.checker import (
    Checker,
    Rejected,
    adjoint,
    arithmetic,
    check,
    claim,
    dual,
    files,
    layers,
    network,
    proof,
    quadratic,
)
from verideq.checker.arithmetic import Exact, Float
from verideq.graph import model_bytes
from verideq.parametrizations import IBPMonDEQ

Patch = pytest.MonkeyPatch
Head, Arrays = dict[str, Any], dict[str, Any]
Change = Callable[[Head, Arrays], object]


def pack(head: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    """A blob, its arrays as they are given."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data: bytes = save(whole, metadata={"verideq": json.dumps(head)})
    return data


def unpack(data: bytes) -> tuple[Head, Arrays]:
    """What a valid blob holds."""
    blob = files.parse_blob(data)
    return dict(blob.head), dict(blob.arrays)


def raw(header: str | bytes, body: bytes = b"") -> bytes:
    """A blob with whatever header."""
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


@dataclass(frozen=True)
class Folder:
    """The bytes of a certificate folder."""

    model: bytes
    gauges: bytes
    records: tuple[bytes, ...]

    def decide(self, *, exact: bool = False) -> list[tuple[bool, str]]:
        """The verdict and the reason for every record; a reason for every rejection."""
        try:
            decided = Checker(self.model, self.gauges, exact=exact).decide(list(self.records))
        except Rejected as reason:
            decided = [(False, str(reason), None)] * len(self.records)
        assert all(accepted == (not reason) == (margin is not None) for accepted, reason, margin in decided)
        return [(accepted, reason) for accepted, reason, _ in decided]

    def accepted(self, *, exact: bool = False) -> bool:
        return all(accepted for accepted, _ in self.decide(exact=exact))

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(self.model)
        (folder / "gauges.safetensors").write_bytes(self.gauges)
        (folder / "records.bin").write_bytes(b"".join(map(framed, self.records)))
        return folder


def tiny() -> nn.Sequential:
    """Two inputs, three units, two classes."""
    torch.manual_seed(0)
    fusion = IBPMonDEQ.apply(nn.Linear(3, 3, bias=False), m=0.3)
    return nn.Sequential(Equilibrium(fusion, nn.Linear(2, 3)), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


def convolutional() -> nn.Sequential:
    """Two channels of 3x3, padded in a circle."""
    torch.manual_seed(0)
    fusion = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        fusion.weight.mul_(0.8 / fusion.weight.abs().flatten(1).sum(1).amax())
    layer = Equilibrium(fusion, nn.Conv2d(1, 2, 3, padding=1))
    return nn.Sequential(layer, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(2, 2)).eval()


def made(model: nn.Module, *shape: int, **options: Any) -> Folder:
    """Three valid certificates."""
    torch.manual_seed(1)
    prepared, images = prepare(model), torch.rand(3, *shape, dtype=torch.float64)
    labels = prepared.graph(images).argmax(1)
    verdicts = certify(prepared, images, labels, "1/2000", **options)
    records = tuple(v.certificate for v in verdicts if v.certificate is not None)
    assert len(records) == 3
    return Folder(prepared.file, gauge_file(prepared.file, prepared.gauges), records)


TINY, CONV = made(tiny(), 2), made(convolutional(), 1, 3, 3)


def test_what_is_forged_was_valid() -> None:
    for folder in (TINY, CONV):
        assert folder.accepted() and folder.accepted(exact=True)
    assert set(unpack(TINY.records[0])[1]) == {"input", *BOXES}


def boxes(folder: Folder) -> list[str]:
    return [name for name in unpack(folder.records[0])[1] if name.startswith("box/")]


BOXES = sorted(boxes(TINY))
LOWER, UPPER = BOXES

# --- a record -----------------------------------------------------------------------------------------------------


def edited(folder: Folder, change: Change, place: int = 0) -> Folder:
    """One record changed, alone."""
    head, arrays = unpack(folder.records[place])
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(head, arrays)
    return replace(folder, records=(pack(head, arrays),))


def put(key: str, value: Any) -> Change:
    return lambda head, arrays: head.update({key: value})


def array(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda head, arrays: arrays.update({name: change(arrays[name])})


def crossing(head: Head, arrays: Arrays) -> None:
    arrays[LOWER], arrays[UPPER] = arrays[UPPER], arrays[LOWER]


FORGED: dict[str, Change] = {
    "a crossing box": crossing,
    "half a box": lambda head, arrays: arrays.pop(UPPER),
    "a box a little too small": array(UPPER, lambda a: a * (1 - 2.0**-30)),
    "a box of a point": lambda head, arrays: arrays.update({LOWER: arrays[UPPER]}),
    "a box far away": lambda head, arrays: arrays.update({LOWER: arrays[LOWER] + 9, UPPER: arrays[UPPER] + 9}),
    "a box of one number": array(UPPER, lambda a: a[:1]),
    "a box with an axis more": array(UPPER, lambda a: a[None]),
    "both sides of one number": lambda head, arrays: arrays.update(
        {LOWER: np.zeros(1), UPPER: np.full(1, arrays[UPPER].max())}
    ),
    "a box in float32": array(LOWER, lambda a: a.astype(np.float32)),
    "both sides in float32": lambda head, arrays: arrays.update({name: arrays[name].astype("<f4") for name in BOXES}),
    "a box of no equilibrium": lambda head, arrays: arrays.update(
        {name.replace("/0/", "/9/"): arrays.pop(name) for name in BOXES}
    ),
    "a box of a linear layer": lambda head, arrays: arrays.update(
        {name.replace("/0/", "/2/"): arrays[name] for name in BOXES}
    ),
    "a third side": lambda head, arrays: arrays.update({LOWER.replace("lower", "middle"): arrays[LOWER]}),
    "an array without a meaning": lambda head, arrays: arrays.update({"bias": np.zeros(1)}),
    "a specification beside a label": lambda head, arrays: arrays.update({"C": np.ones((1, 2)), "rhs": np.zeros(1)}),
    "a huge box": array(UPPER, lambda a: a + 1e308),
    "a box of denormals": lambda head, arrays: arrays.update({name: arrays[name] * 0 + 5e-324 for name in BOXES}),
    "no input": lambda head, arrays: arrays.pop("input"),
    "an input of one number": array("input", lambda a: a[:1]),
    "an input with an axis more": array("input", lambda a: a[None]),
    "an input in float32": array("input", lambda a: a.astype(np.float32)),
    "an input of bytes without a scale": array("input", lambda a: (a * 255).astype(np.uint8)),
    "an input of numbers with a scale": put("scale", "1/255"),
    "an input outside the range": array("input", lambda a: a + 1),
    "another input": array("input", lambda a: 1 - a),
    "a scalar input": array("input", lambda a: a[0].reshape(())),
    "a huge input": lambda head, arrays: (
        head.update(clip=None),
        arrays.update(input=arrays["input"] + 1e308),
    ),
    "weights of one number": lambda head, arrays: arrays.update(weights=np.ones(1)),
    "weights in float32": lambda head, arrays: arrays.update(weights=np.ones(2, np.float32)),
    "a negative weight": lambda head, arrays: arrays.update(weights=np.array([1.0, -1.0])),
    "huge weights": lambda head, arrays: arrays.update(weights=np.array([1e308, 1.0])),
    "another label": lambda head, arrays: head.update(label=1 - head["label"]),
    "an unknown field": put("note", "trust me"),
    "a missing field": lambda head, arrays: head.pop("clip"),
    "fewer fields and more": lambda head, arrays: head.update(Norm=head.pop("norm")),
    "a linear claim without C": lambda head, arrays: head.update(specification="linear", label=None),
    "a linear claim of a wrong width": lambda head, arrays: (
        (
            head.update(specification="linear", label=None),
            arrays.update(C=np.ones((1, 1)), rhs=np.zeros(1)),
        )
    ),
    "a linear claim with one threshold for two rows": lambda head, arrays: (
        (
            head.update(specification="linear", label=None),
            arrays.update(C=np.ones((2, 2)), rhs=np.zeros(1)),
        )
    ),
    "a linear claim of no rows": lambda head, arrays: (
        (
            head.update(specification="linear", label=None),
            arrays.update(C=np.ones((0, 2)), rhs=np.zeros(0)),
        )
    ),
}
STEP: dict[str, Any] = {"node": None, "slopes": None, "iterations": 0, "empty": False}
LEAF: dict[str, Any] = {"case": 0}
TREE: dict[str, Any] = {"rows": None, "tree": LEAF}
WRONG: dict[str, list[Any]] = {
    "version": [0, 2, "1", None, [1]],
    "model": ["0" * 64, None, 1, [], ""],
    "index": [-1, "0", None, 0.5, True, [0]],
    "label": [-1, 2, 10**30, "0", 0.0, True, None, [0]],
    "eps": [
        "-1/2000", "1/2", "0.0005", "5e-4", " 1/2000", "1/-2000", "1/0", "1//2000", "1/", "/2000", "+1/2000",
        "1_0/2000",
        "²/2000", "NaN", "inf", "", "-", "1" * 400, "1" * 3000, 0.0005, 0, None, ["1/2000"], "9" * 310 + "/1",
    ],
    "norm": ["l1", "Linf", None, 2, ["linf"], {}],
    "clip": [[], ["0"], ["0", "1", "1"], [0, 1], "01", ["1", "0"], ["1/4", "3/4"], ["0", "99/100"], {}, True],
    "scale": ["1/255", 1, "x", [], "1" * 400],
    "specification": ["linear", "labels", None, 1, []],
    "margin": ["10", "-1/2", "1" * 400, 0.0, None, "nan", "1e9"],
    "tolerance": ["-1/9", "1/0", "0.1", "1" * 400, 0, 0.0, None, [], "nan"],
    "refinements": [-1, 501, 10**9, 0.0, "0", True, None, []],
    "cases": [
        None, "", 0, [], [[]], [{}], [None], [[None]], [[0]], [[[]]], [[{}]], [[STEP] * 501], [[STEP], [STEP]], [STEP],
        *([[{**STEP, key: value}]] for key, value in (
            ("node", "0"), ("node", 0), ("node", []), ("slopes", "best"), ("slopes", 1), ("slopes", ["zero"]),
            ("iterations", -1), ("iterations", 501), ("iterations", 1.0), ("iterations", True), ("iterations", None),
            ("empty", True), ("empty", None), ("empty", 1), ("empty", "no"), ("more", 1),
        )),
        *([[{field: STEP[field] for field in STEP if field != left}]] for left in STEP),
        [[{**STEP, "node": "0"}, STEP]], [[STEP, STEP]],
    ],
    "trees": [
        None, "", 0, [], [None], [[]], [{}], [0], [{"rows": None}], [{"tree": LEAF}], [{**TREE, "more": 1}],
        [TREE, TREE],
        *([{"rows": rows, "tree": LEAF}] for rows in (0, "0", [], ["0"], [0.0], [True], [-1], [1], [0, 0], [None], {})),
        *([{"rows": None, "tree": tree}] for tree in (
            None, 0, [], [LEAF], {}, {"case": 1}, {"case": -1}, {"case": "0"}, {"case": 0.0}, {"case": True},
            {"case": None}, {**LEAF, "node": "0"}, {"node": "0", "unit": 0, "at": "0", "below": LEAF},
        )),
    ],
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", FORGED)
def test_a_forged_record_is_refused(name: str, exact: bool) -> None:
    assert not edited(TINY, FORGED[name]).accepted(exact=exact)


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_refused(field: str) -> None:
    assert set(WRONG) == set(unpack(TINY.records[0])[0])
    for value in [*WRONG[field], float("nan"), float("inf"), {"a": 1}]:
        for exact in (False, True):
            assert not edited(TINY, put(field, value)).accepted(exact=exact), value


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_every_array(value: float) -> None:
    for folder in (TINY, CONV):
        for name in unpack(folder.records[0])[1]:

            def spoil(head: Head, arrays: Arrays, name: str = name) -> None:
                arrays[name].flat[0] = value

            assert edited(folder, spoil).decide()[0] == (False, f"{name} holds NaN or infinity")
        head, arrays = unpack(folder.gauges)
        for name, u in arrays.items():
            spoilt = pack(head, {**arrays, name: np.full_like(u, value)})
            assert not replace(folder, gauges=spoilt).accepted()


def test_the_same_claim_in_other_words_is_accepted() -> None:
    for change in (put("eps", "2/4000"), put("eps", "0"), put("norm", "l2"), put("margin", "0"), put("index", 7)):
        assert edited(TINY, change).accepted()
    without = edited(TINY, lambda head, arrays: [arrays.pop(name) for name in BOXES] and head.update(refinements=50))
    assert without.accepted() and without.accepted(exact=True)


def _recomputed(head: Head, arrays: Arrays) -> None:
    head.update(refinements=50, margin="0")
    for name in BOXES:
        arrays.pop(name)


COMPANIONS: dict[str, Change] = {
    "as it is": lambda head, arrays: None,
    "all of the range": put("eps", "5"),
    "no radius": put("eps", "0"),
    "l2": put("norm", "l2"),
    "a wider clip": lambda head, arrays: head.update(clip=["-1", "2"], eps="5"),
    "nothing moves": lambda head, arrays: (head.update(eps="5"), arrays.update(weights=np.zeros(2))),
    "one feature moves": lambda head, arrays: (head.update(eps="5"), arrays.update(weights=np.array([0.0, 1.0]))),
    "another label": lambda head, arrays: head.update(label=1 - head["label"]),
    "another input": array("input", lambda a: 1 - a),
    "a tolerance": put("tolerance", "1/1000"),
    "a specification": lambda head, arrays: (
        head.update(specification="linear", label=None),
        arrays.update(C=np.ones((1, 2)), rhs=np.full(1, -9.0)),
    ),
}


def test_what_stands_beside_a_record_changes_nothing() -> None:
    torch.manual_seed(2)
    fusion = IBPMonDEQ.apply(nn.Linear(3, 3, bias=False), m=0.3)
    folder = made(nn.Sequential(Equilibrium(fusion, nn.Linear(2, 3)), nn.Linear(3, 2)).eval(), 2)
    recomputed = edited(folder, _recomputed)
    records = {name: edited(recomputed, change).records[0] for name, change in COMPANIONS.items()}
    alone = {name: replace(folder, records=(record,)).decide()[0] for name, record in records.items()}
    assert {accepted for accepted, _ in alone.values()} == {True, False}
    assert alone["nothing moves"][0] and not alone["all of the range"][0]
    for a in records:
        for b in records:
            assert replace(folder, records=(records[a], records[b])).decide() == [alone[a], alone[b]], (a, b)


def test_a_box_recomputed_without_refinement_proves_less() -> None:
    claimed = unpack(CONV.records[0])[0]
    name = boxes(CONV)
    none = edited(CONV, lambda head, arrays: [arrays.pop(key) for key in name])
    assert not none.accepted() and Fraction(claimed["margin"]) > 0


def test_samples_cannot_be_swapped() -> None:
    for a in range(3):
        for b in range(3):
            _, other = unpack(TINY.records[b])
            forged = edited(TINY, lambda head, arrays, other=other: arrays.update(input=other["input"]), a)
            assert forged.accepted() == (a == b)


def test_a_box_that_is_one_ulp_too_small() -> None:
    # In exact arithmetic the box of this layer is known: z = relu(v), v = [1, 2].
    layer = Equilibrium(linear([[0.0]]), nn.Identity())
    model = nn.Sequential(linear([[1.0]], [1.0]), layer, linear([[-1.0], [1.0]], [5.0, 0.0]))

    def claim(low: float, high: float) -> Folder:
        return forged(model, [1.0], {"input": np.full(1, 0.5), "box/1/lower": [low], "box/1/upper": [high]}, eps="1/2")

    assert claim(1.0, 2.0).accepted(exact=True)
    assert not claim(np.nextafter(1.0, 2), 2.0).accepted(exact=True)
    assert not claim(1.0, np.nextafter(2.0, 1)).accepted(exact=True)
    assert not claim(np.nextafter(1.0, 2), 2.0).accepted() and not claim(1.0, np.nextafter(2.0, 1)).accepted()


@pytest.mark.parametrize("folder", [TINY, CONV])
@pytest.mark.parametrize("exact", [False, True])
def test_a_margin_one_ulp_above_what_is_proved(folder: Folder, exact: bool) -> None:
    decided = Checker(folder.model, folder.gauges).decide([folder.records[0]])
    margin = decided[0][2]
    assert margin is not None
    assert edited(folder, put("margin", str(Fraction(margin)))).accepted(exact=exact)
    above = edited(folder, put("margin", str(Fraction(float(np.nextafter(margin, 9))))))
    assert not above.accepted()


# --- gauges -------------------------------------------------------------------------------------------------------

GAUGES: dict[str, Change] = {
    "none": lambda head, arrays: arrays.clear(),
    "shrunk in one entry": lambda head, arrays: arrays["gauge/0"].__setitem__(0, 1e-9),
    "zero": lambda head, arrays: arrays["gauge/0"].__setitem__(0, 0.0),
    "negative": lambda head, arrays: arrays.update({"gauge/0": -arrays["gauge/0"]}),
    "of one number": lambda head, arrays: arrays.update({"gauge/0": np.ones(1)}),
    "of too many": lambda head, arrays: arrays.update({"gauge/0": np.ones(4)}),
    "of two axes": lambda head, arrays: arrays.update({"gauge/0": np.ones((1, 3))}),
    "a scalar": lambda head, arrays: arrays.update({"gauge/0": np.ones(())}),
    "in float32": lambda head, arrays: arrays.update({"gauge/0": arrays["gauge/0"].astype(np.float32)}),
    "of integers": lambda head, arrays: arrays.update({"gauge/0": np.ones(3, np.int64)}),
    "denormal": lambda head, arrays: arrays.update({"gauge/0": arrays["gauge/0"] * 1e-310}),
    "huge": lambda head, arrays: arrays.update({"gauge/0": arrays["gauge/0"] * 1e308}),
    "of no layer": lambda head, arrays: arrays.update({"gauge/9": np.ones(3)}),
    "of a linear layer": lambda head, arrays: arrays.update({"gauge/2": np.ones(2)}),
    "without its prefix": lambda head, arrays: arrays.update({"0": arrays.pop("gauge/0")}),
    "of another model": lambda head, arrays: head.update(model="0" * 64),
    "of another version": lambda head, arrays: head.update(version=2),
    "with a field more": lambda head, arrays: head.update(note=1),
    "without a field": lambda head, arrays: head.pop("version"),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", GAUGES)
def test_a_forged_gauge_is_refused(name: str, exact: bool) -> None:
    head, arrays = unpack(TINY.gauges)
    arrays = {key: value.copy() for key, value in arrays.items()}
    GAUGES[name](head, arrays)
    changed = replace(TINY, gauges=pack(head, arrays))
    # A gauge may have any size, as far as the arithmetic can tell.
    assert changed.accepted(exact=exact) == (name == "huge" or (exact and name == "denormal"))


def test_a_gauge_by_channel_or_by_state() -> None:
    head, arrays = unpack(CONV.gauges)
    u = arrays["gauge/0"]
    for value, accepted in ((np.broadcast_to(u[:, None, None], (2, 3, 3)), True), (u[:, None, None], False)):
        assert replace(CONV, gauges=pack(head, {"gauge/0": value})).accepted() == accepted


# --- the model ------------------------------------------------------------------------------------------------------


def node(head: Head, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in head["nodes"] if entry["operation"] == kind)
    return found


def edit_model(folder: Folder, change: Change, *, sign: bool) -> Folder:
    """The model changed after it was certified; signed: the new hash in the gauges and the records too."""
    head, arrays = unpack(folder.model)
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(head, arrays)
    model = pack(head, arrays)
    if not sign:
        return replace(folder, model=model)
    mark = {"model": files.model_hash(files.parse_blob(model))}
    gauges = pack({**unpack(folder.gauges)[0], **mark}, unpack(folder.gauges)[1])
    records = tuple(pack({**unpack(record)[0], **mark}, unpack(record)[1]) for record in folder.records)
    return Folder(model, gauges, records)


def attribute(kind: str, name: str, value: Any) -> Change:
    return lambda head, arrays: node(head, kind)["attributes"].update({name: value})


def fused(name: str, value: Any) -> Change:
    return lambda head, arrays: node(head, "equilibrium")["attributes"]["fusion"]["attributes"].update({name: value})


def entry(kind: str, name: str, value: Any) -> Change:
    return lambda head, arrays: node(head, kind).update({name: value})


def weight(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda head, arrays: arrays.update({name: change(arrays[name])})


NONSENSE: list[Change] = [
    *(entry("equilibrium", key, value) for key in ("name", "operation", "inputs", "attributes", "tensors")
      for value in (None, 1, [], {}, "x", [[]], ["x"])),
    *(attribute("avg_pool2d", "kernel_size", value) for value in (0, -1, "3", None, [3], [3, 3, 3], 2.5, 9, 10**9)),
    *(attribute("avg_pool2d", "stride", value) for value in (0, "1", [1])),
    *(attribute("avg_pool2d", "divisor_override", value) for value in (0, 1.5, "9")),
    *(attribute("conv2d", key, value) for key in ("out_channels", "in_channels", "groups")
      for value in (0, None, 3, "x")),
    *(attribute("conv2d", "padding_mode", value) for value in ("wrap", None, [])),
    *(attribute("conv2d", "stride", value) for value in (0, 2)),
    *(attribute("conv2d", "dilation", value) for value in (0, 7)),
    *(attribute("conv2d", "padding", value) for value in ("full", 0, [1])),
    *(attribute("equilibrium", "activation", value) for value in ("tanh", None)),
    *(attribute("equilibrium", "fusion", value) for value in
      (None, {}, {"operation": "relu", "attributes": {}}, {"operation": "conv2d"},
       {"operation": [], "attributes": {}})),
    *(fused(key, value) for key, value in
      (("stride", 2), ("padding", 9), ("padding", 0), ("dilation", 2), ("groups", 2), ("in_channels", 0))),
    weight("0.injection/weight", lambda w: w[:1]),
    weight("0.injection/bias", lambda b: b[:1]),
    weight("3/weight", lambda w: w[:, :1]),
    weight("3/bias", lambda b: b[:1]),
    weight("0/fusion.weight", lambda w: w[:, :1]),
    weight("0/fusion.weight", lambda w: w[:, :, 0]),
    weight("0/fusion.weight", lambda w: w * 9),
    lambda head, arrays: arrays.update({"extra": np.zeros(1)}),
    lambda head, arrays: (arrays.update({"3/more": np.zeros(1)}), node(head, "linear")["tensors"].append("more")),
    lambda head, arrays: (node(head, "equilibrium").update(tensors=[]), arrays.pop("0/fusion.weight")),
    lambda head, arrays: (node(head, "conv2d")["tensors"].remove("weight"), arrays.pop("0.injection/weight")),
    lambda head, arrays: head.update(nodes=[]),
    lambda head, arrays: head.update(nodes="x"),
    lambda head, arrays: head.update(nodes=[1]),
    lambda head, arrays: head.update(nodes=head["nodes"][::-1]),
    lambda head, arrays: head.update(nodes=head["nodes"] * 2),
    lambda head, arrays: head.update(format=2),
    lambda head, arrays: head.update(pixel_range=[-1.0, 1.0]),
    lambda head, arrays: head.update(pixel_range=None),
    lambda head, arrays: head.update(pixel_range=["x", 1]),
    lambda head, arrays: head.update(pixel_range=3),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(NONSENSE)))
def test_a_model_that_makes_no_sense_is_refused_even_if_signed(place: int) -> None:
    for sign in (False, True):
        try:
            changed = edit_model(CONV, NONSENSE[place], sign=sign)
        except Rejected:
            continue
        except (AttributeError, TypeError):  # the hash of nonsense cannot be had at all
            continue
        assert not changed.accepted()


EDITS: dict[str, Change] = {
    "a weight by one ulp": weight("0/fusion.weight", lambda w: np.nextafter(w, np.float32(9))),
    "a bias": weight("2/bias", lambda b: b + b.dtype.type(1e-6)),
    "the eps of batch norm": attribute("batch_norm1d", "eps", 2e-5),
    "a dtype": weight("2/bias", lambda b: b.astype(np.float64)),
    "a name": lambda head, arrays: head.update(classes=3),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_model_edited_after_certification_is_refused(name: str) -> None:
    changed = edit_model(TINY, EDITS[name], sign=False)
    assert all("another model" in reason for _, reason in changed.decide())
    with_gauges = edit_model(TINY, EDITS[name], sign=True)
    assert all("another model" in reason for _, reason in replace(with_gauges, records=TINY.records).decide())


@pytest.mark.parametrize("eps", [-1e-5, -10.0, "1e-5", None, True, [], 10**400])
def test_a_batch_norm_that_makes_no_sense_is_refused_even_if_signed(eps: object) -> None:
    for sign in (False, True):
        assert not edit_model(TINY, attribute("batch_norm1d", "eps", eps), sign=sign).accepted()


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_a_padding_edited_after_certification_is_refused(padding: str) -> None:
    assert not edit_model(CONV, fused("padding_mode", padding), sign=False).accepted()


# --- bytes ----------------------------------------------------------------------------------------------------------

META = '"__metadata__":{"verideq":"{}"}'
ENTRY = '{"dtype":"F64","shape":[1],"data_offsets":[0,8]}'
BLOBS: list[bytes] = [
    b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, (10).to_bytes(8, "little") + b"{}",
    raw(""), raw("[]"), raw("{}"), raw("{"), raw("1"), raw("null"), raw(b"\xff\xfe"), raw(b"\x80abc"),
    raw("[" * 100_000), raw("{" + META + "," + META + "}"), raw('{"__metadata__":{"verideq":"{}","x":"1"}}'),
    raw('{"__metadata__":{"verideq":{}}}'), raw('{"__metadata__":[]}'), raw('{"__metadata__":{"verideq":"[]"}}'),
    raw('{"__metadata__":{"verideq":"{"}}'), raw('{"__metadata__":{"verideq":"{\\"a\\":1,\\"a\\":1}"}}'),
    raw('{"__metadata__":{"verideq":"\\ud800"}}'), raw('{"__metadata__":{"verideq":"{\\"a\\":NaN}"}}'),
    raw('{"__metadata__":{"verideq":"{\\"a\\":' + "9" * 5000 + '}"}}'),
    raw("{" + META + "}", b"\0"),
    *(raw("{" + META + ',"a":' + text + "}", b"\0" * 8) for text in (
        "1", "[]", "{}", '{"dtype":"F64"}', ENTRY.replace("F64", "F16"), ENTRY.replace('"F64"', "[]"),
        ENTRY.replace("[1]", "1"), ENTRY.replace("[1]", "[-1]"), ENTRY.replace("[1]", "[1.0]"),
        ENTRY.replace("[1]", "[true]"), ENTRY.replace("[1]", "[2]"), ENTRY.replace("[1]", "[99999999999999999999]"),
        ENTRY.replace("[1]", "[0," * 1 + "1]"), ENTRY.replace("[1]", "[" + ",".join(["1"] * 80) + "]"),
        ENTRY.replace("[0,8]", "[8,16]"), ENTRY.replace("[0,8]", "[0]"), ENTRY.replace("[0,8]", "[8,0]"),
        ENTRY.replace("[0,8]", "[-8,0]"), ENTRY.replace("[0,8]", "null"), ENTRY.replace("}", ',"x":1}'),
        ENTRY + ',"a":' + ENTRY, ENTRY + ',"b":' + ENTRY, ENTRY + ',"\\ud800":' + ENTRY,
    )),
    raw("{" + META + ',"a":' + ENTRY + "}", b"\0" * 16),
    raw("{" + META + ',"a":' + ENTRY.replace("[0,8]", "[8,16]") + "}", b"\0" * 16),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(BLOBS)))
def test_bytes_that_are_no_blob_are_refused_wherever_they_stand(place: int) -> None:
    blob = BLOBS[place]
    for folder in (
        replace(TINY, model=blob), replace(TINY, gauges=blob), replace(TINY, records=(blob,)),
    ):  # fmt: skip
        assert not folder.accepted()


@pytest.mark.parametrize("kind", ["add", "linear"])
def test_an_operation_with_a_wrong_number_of_inputs_is_refused(kind: str) -> None:
    inputs = ["input"] if kind == "add" else ["input", "input"]
    entry = {"name": "a", "operation": kind, "inputs": inputs, "tensors": [], "attributes": {}}
    model = pack({"format": 1, "nodes": [entry]}, {})
    with pytest.raises(Rejected, match="a: a wrong number of inputs"):
        network.read_nodes(files.parse_blob(model), Float())


def test_a_sum_too_long_to_bound_is_refused() -> None:
    assert arithmetic.gamma(2**30) < 2.0**-20
    with pytest.raises(Rejected), arithmetic.guarded():
        arithmetic.gamma(2**30 + 1)


def test_a_folder_that_was_cut_off_anywhere(tmp_path: Path) -> None:
    folder = TINY.write(tmp_path)
    data = (folder / "records.bin").read_bytes()
    ends = np.cumsum([len(framed(record)) for record in TINY.records]).tolist()
    for cut in sorted({*range(0, len(data), 13), *ends, *(end - 1 for end in ends), *(end + 8 for end in ends[:-1])}):
        (folder / "records.bin").write_bytes(data[:cut])
        outcomes, whole = check(folder), sum(end <= cut for end in ends)
        assert [o.accepted for o in outcomes][:whole] == [True] * whole
        assert len(outcomes) == whole + (cut not in ends)
        assert all(o.accepted for o in outcomes) == (cut in ends)
    for name in ("model.safetensors", "gauges.safetensors"):
        TINY.write(folder)
        kept = (folder / name).read_bytes()
        for cut in range(0, len(kept), 97):
            (folder / name).write_bytes(kept[:cut])
            assert [o.accepted for o in check(folder)] == [False]
        (folder / name).unlink()
        assert [(o.accepted, o.record) for o in check(folder)] == [(False, -1)]


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    folder, first = TINY.write(tmp_path), framed(TINY.records[0])
    for size in (2**32, 2**32 + 1, 2**63, 2**64 - 1):
        (folder / "records.bin").write_bytes(first + size.to_bytes(8, "little") + b"\0" * 64)
        assert [o.accepted for o in check(folder)] == [True, False]


def test_a_folder_for_a_file_and_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "records.bin").mkdir()
    (tmp_path / "model.safetensors").write_bytes(TINY.model)
    (tmp_path / "gauges.safetensors").write_bytes(TINY.gauges)
    assert [o.accepted for o in check(tmp_path)] == [False]
    assert [o.accepted for o in check(tmp_path / "other")] == [False]


def test_more_records_than_a_batch_with_one_damaged(tmp_path: Path) -> None:
    folder = replace(TINY, records=TINY.records * 45).write(tmp_path)
    data = bytearray((folder / "records.bin").read_bytes())
    data[-1] ^= 1
    (folder / "records.bin").write_bytes(bytes(data))
    outcomes = check(folder)
    assert sorted(o.record for o in outcomes) == list(range(135))
    assert [o.record for o in outcomes if not o.accepted] == [134]


def mutated(draw: random.Random, data: bytes) -> bytes:
    """One byte or a few next to each other changed, dropped, doubled or zeroed."""
    place, span = draw.randrange(len(data)), draw.choice((1, 1, 1, 2, 8))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:place] + data[place + span :]
    if kind == 1:
        return data[:place] + data[place : place + span] * 2 + data[place + span :]
    if kind == 2:
        return data[:place] + b"\0" * len(data[place : place + span]) + data[place + span :]
    changed = bytearray(data)
    for k in range(place, min(place + span, len(data))):
        changed[k] = changed[k] ^ (1 << draw.randrange(8)) if kind < 5 else draw.randrange(256)
    return bytes(changed)


def test_every_mutation_of_a_record_fails_its_digest(tmp_path: Path) -> None:
    folder, draw = replace(TINY, records=TINY.records[:1]).write(tmp_path), random.Random(0)
    data = (folder / "records.bin").read_bytes()
    for k in range(400):
        other = mutated(draw, data)
        (folder / "records.bin").write_bytes(other)
        assert other == data or not all(o.accepted for o in check(folder)), k


@pytest.mark.parametrize("part", ["record", "gauges", "model"])
def test_a_mutation_with_a_new_digest_is_accepted_only_if_it_is_true(part: str) -> None:
    draw, accepted = random.Random(1), 0
    for k in range(600 if part == "record" else 250):
        record = TINY.records[k % 3]
        changed = replace(TINY, records=(record,))
        if part == "record":
            changed = replace(TINY, records=(mutated(draw, record),))
        elif part == "gauges":
            changed = replace(changed, gauges=mutated(draw, TINY.gauges))
        else:
            changed = replace(changed, model=mutated(draw, TINY.model))
        if changed.accepted():
            accepted += 1
            assert changed.accepted(exact=True)
    assert accepted < (300 if part == "record" else 200)


# --- broken twins ---------------------------------------------------------------------------------------------------


def linear(rows: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    """A linear layer of float64."""
    module = nn.Linear(len(rows[0]), len(rows), bias=bias is not None).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(rows, dtype=torch.float64))
        if bias is not None:
            module.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return module


def forged(
    model: nn.Module, u: list[float], arrays: Arrays, *, label: int = 0, eps: str = "0", margin: str = "0"
) -> Folder:
    """A claim about a model, with a gauge for its layer ``1``: whatever one likes."""
    data = model_bytes(model)
    mark = files.model_hash(files.parse_blob(data))
    head = {
        "version": 1, "model": mark, "index": 0, "label": label, "eps": eps, "norm": "linf", "clip": None,
        "scale": None, "specification": "label", "margin": margin, "tolerance": "0", "refinements": 0,
        "cases": [[STEP]], "trees": [TREE],
    }  # fmt: skip
    gauges = pack({"version": 1, "model": mark}, {"gauge/1": np.array(u)} if u else {})
    whole = {name: np.array(value, dtype=np.float64) for name, value in arrays.items()}
    return Folder(data, gauges, (pack(head, whole),))


def unstable(W: list[list[float]], v: list[float], u: list[float], z: list[float], slack: float = 0.05) -> Folder:
    """The false claim that a layer has one equilibrium, `z`: that the first unit stays within `slack` of it."""
    units = len(v)
    fusion = Equilibrium(linear(W), nn.Identity())
    row = [1.0] + [0.0] * (units - 1)
    # The class 0 leads as long as z_0 < z[0] + slack.
    last = linear([[0.0] * units, row], [z[0] + slack, 0.0])
    model = nn.Sequential(linear([[0.0]] * units, v), fusion, last)
    pad = 2.0**-20
    lower, upper = [max(0.0, x - pad) if x else 0.0 for x in z], [x + pad if x else 0.0 for x in z]
    return forged(model, u, {"input": [0.5], "box/1/lower": lower, "box/1/upper": upper})


MODULES = (
    checker, arithmetic, network, adjoint, layers, dual, quadratic, claim, proof, files,
)  # fmt: skip


def rewrite(patch: Patch, owner: Any, name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the source of a function, also where another module has imported it."""
    function = inspect.getattr_static(owner, name)
    static = isinstance(function, staticmethod)
    function = function.__func__ if static else function
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} does not read {old!r} once"
    source = source.replace("@staticmethod\n", "").replace(old, new)
    scope: dict[str, Any] = {}
    module: ModuleType | None = inspect.getmodule(function)
    assert module is not None
    exec(compile("from __future__ import annotations\n" + source, "<twin>", "exec"), vars(module) | {}, scope)
    twin = scope[name]
    # The twin reads the globals of the module as they are, other patches included.
    real = type(twin)(twin.__code__, vars(module), name, function.__defaults__, twin.__closure__)
    real.__kwdefaults__ = function.__kwdefaults__
    for place in MODULES:
        for key, value in list(vars(place).items()):
            if value is function and place is not owner:
                patch.setattr(place, key, real)
            if isinstance(value, dict):
                for kind in [kind for kind, rule in value.items() if rule is function]:
                    patch.setitem(value, kind, real)
    patch.setattr(owner, name, staticmethod(real) if static else real)


def affine(calc: Any, x: Any, matrix: Any, shift: Any) -> Any:
    """``A x + b`` by the rule of matrices."""
    return calc.affine(x, matrix, shift)


def bilinear(calc: Any, x: Any, matrix: Any, shift: Any) -> Any:
    """The same by that of convolutions."""
    return calc.bilinear(lambda A, y: y @ A, matrix, x, shift, len(matrix), 1)


def leaks_by_rounding(
    rows: list[list[float]], x: list[float], shift: float = 0.0, rule: Callable[..., Any] = affine
) -> bool:
    """Whether the exact ``A x + b`` leaves its enclosure."""
    A, point = np.array(rows), np.array([x])
    lo, hi = rule(Float(), (point, point), A.T, (np.full(len(A), shift),) * 2)
    truth = [sum(Fraction(a) * Fraction(b) for a, b in zip(row, x, strict=True)) + Fraction(shift) for row in rows]
    return any(not Fraction(float(a)) <= t <= Fraction(float(b)) for a, b, t in zip(lo[0], hi[0], truth, strict=True))


BIG = 2.0**53
CANCELLING = [[BIG, 1.0, -BIG, 1.0, BIG, 1.0, -BIG], [BIG, BIG, BIG, 1.0, -BIG, -BIG, -BIG]]


def signs_matter(calc: Any, rule: Callable[..., Any] = affine) -> bool:
    """Whether ``x - y`` on [0, 1]² is taken for less than [-1, 1]."""
    A, zero = calc.exactly(np.array([[1.0, -1.0]])), calc.exactly(np.zeros(1))
    lo, hi = rule(calc, (calc.exactly(np.zeros((1, 2))), calc.exactly(np.ones((1, 2)))), A.T, (zero, zero))
    return not (lo[0, 0] <= -1 and hi[0, 0] >= 1)


def underflows() -> bool:
    """Whether a flushed product of denormals could leave its enclosure."""
    big = np.full((1, 1), 1e300)
    lo, hi = Float().affine((big, big), np.zeros((1, 1)), (np.zeros(1),) * 2)
    return not (lo[0, 0] <= -1e-8 and hi[0, 0] >= 1e-8)


def sum_leaks() -> bool:
    one, small = np.ones(2), np.array([2.0**-60, -(2.0**-60)])
    lo, hi = Float().add((one, one), (small, small))
    truth = [1 + Fraction(s) for s in small.tolist()]
    return any(not Fraction(float(a)) <= t <= Fraction(float(b)) for a, b, t in zip(lo, hi, truth, strict=True))


def product_leaks() -> bool:
    a, b = (np.array([-1.0]), np.array([2.0])), (np.array([-3.0]), np.array([1.0]))
    lo, hi = Float().multiply(a, b)
    return not (lo[0] <= -6 and hi[0] >= 3)


def wide_matrix_leaks() -> bool:
    """Whether what is unknown of the matrix is left out."""
    one, zero = np.ones((1, 1)), np.zeros(1)
    lo, hi = Float().affine((one, one), one, (zero, zero), one)
    return not (lo[0, 0] <= 0 and hi[0, 0] >= 2)


def wide_product_leaks() -> bool:
    """Whether the width of the second of two interval matrices is left out."""
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    lo, hi = arithmetic.product(Float(), (one, one), (zero, one))
    return not (lo[0, 0] <= 0 and hi[0, 0] >= 1)


def one_sided() -> bool:
    """Whether an interval is taken to reach as far above its rounded middle as below it."""
    high = np.array([1 + Fraction(1, 2**60)], dtype=object)
    middle, error = arithmetic.centred(Exact(), (Exact().exactly(np.zeros(1)), high))
    return not bool(middle[0] + error[0] >= high[0])


def wide_exact_matrix_leaks() -> bool:
    """The same with rationals."""
    one, zero = Exact().exactly(np.ones((1, 1))), Exact().exactly(np.zeros(1))
    lo, hi = Exact().affine((one, one), one, (zero, zero), one)
    return not (lo[0, 0] <= 0 and hi[0, 0] >= 2)


def spoilt(a: str, b: str) -> Folder:
    """The tiny record with a side of its box moved into the inside."""
    middle = {LOWER: 0.5, UPPER: 0.5}
    return edited(TINY, lambda head, arrays: arrays.update({a: middle[a] * arrays[a] + middle[a] * arrays[b]}))


def between(low: float, high: float, rows: list[list[float]], bias: list[float]) -> Folder:
    """A claim about ``z = relu(v)``, ``v`` in [1, 2], with a box of `z`."""
    model = nn.Sequential(linear([[1.0]], [1.0]), Equilibrium(linear([[0.0]]), nn.Identity()), linear(rows, bias))
    return forged(model, [1.0], {"input": [0.5], "box/1/lower": [low], "box/1/upper": [high]}, eps="1/2")


def above_the_least() -> Folder:
    """The false claim that ``z`` is above 5/4, with a box that its image leaves below."""
    return between(1.5, 2.0, [[1.0], [0.0]], [0.0, 1.25])


def below_the_most() -> Folder:
    """The false claim that ``z`` is below 7/4, with a box that its image leaves above."""
    return between(1.0, 1.5, [[-1.0], [0.0]], [1.75, 0.0])


def tied() -> Folder:
    """Two classes that are exactly equal."""
    model = nn.Sequential(linear([[0.0]], [1.0]), nn.ReLU(), linear([[1.0], [1.0]]))
    return forged(model, [], {"input": [0.5]})


def foreign() -> Folder:
    """Records of one model beside another."""
    changed = edit_model(TINY, EDITS["the eps of batch norm"], sign=True)
    return replace(changed, records=TINY.records[:1])


def narrow() -> Folder:
    """A clip that leaves one point of the ball: the claimed radius means nothing."""
    x = unpack(TINY.records[0])[1]["input"]
    point = [str(Fraction(float(v))) for v in (x.min(), x.max())]
    return edited(TINY, put("clip", point))


def convolution_leaks() -> bool:
    """Whether the adjoint of ``y_i = x_i + 2 x_{i+1}`` leaves its enclosure."""
    arguments = {"kernel_size": [2, 1], "in_channels": 1, "out_channels": 1}
    node = network.Node("n", "conv2d", ("input",), arguments, {"weight": np.array([1.0, 2.0]).reshape(1, 1, 2, 1)})
    row = np.array([1.0, 10.0]).reshape(1, 1, 2, 1)
    lo, hi = adjoint.PULLS["conv2d"](Float(), node, (row, row), (1, 3, 1))[0]
    return not ((lo.ravel() <= [1, 12, 20]) & (hi.ravel() >= [1, 12, 20])).all()


Broken = tuple[Any, str, str, str, Callable[[], bool]]
SWAP = [[0.0, 1.0], [1.0, 0.0]]
TWINS: dict[str, Broken] = {
    "no rounding error": (Float, "affine", "g = gamma(n)", "g = 0.0", lambda: leaks_by_rounding(CANCELLING, [1.0] * 7)),
    "no |A|": (Float, "affine", "size = np.abs(matrix)", "size = matrix", lambda: signs_matter(Float())),
    "no radius": (Float, "affine", "radius * (1 + g) + g", "0 * radius + g", lambda: signs_matter(Float())),
    "no underflow": (Float, "_around", "8 * TINY * (terms + SLACK) * (2 + largest)", "0.0", underflows),
    "no rounding error of a convolution": (Float, "bilinear", "g = gamma(terms)", "g = 0.0",
        lambda: leaks_by_rounding(CANCELLING, [1.0] * 7, rule=bilinear)),
    "no |A| of a convolution": (Float, "bilinear", "size = np.abs(matrix)", "size = matrix",
        lambda: signs_matter(Float(), bilinear)),
    "no radius of a convolution": (Float, "bilinear", "radius * (1 + g) + g", "0 * radius + g",
        lambda: signs_matter(Float(), bilinear)),
    "U+ for U- of a convolution": (Exact, "bilinear", "np.minimum(matrix, self.zero)", "np.maximum(matrix, self.zero)",
        lambda: signs_matter(Exact(), bilinear)),
    "a tap too many": (adjoint, "_conv2d", "columns[:, :, i, j]", "columns[:, :, 0, j]", convolution_leaks),
    "no error of the matrix": (Float, "affine", "if error is not None", "if False", wide_matrix_leaks),
    "no error of an exact matrix": (Exact, "affine", "if error is None", "if True", wide_exact_matrix_leaks),
    "no error of a product": (arithmetic, "product", "1), error)", "1))", wide_product_leaks),
    "no reach above the middle": (arithmetic, "centred", "calc.subtract(x, (middle, middle))[1]",
        "calc.subtract((middle, middle), x)[1]", one_sided),
    "sums rounded to nearest": (Float, "add", "self.up(a[1] + b[1])", "a[1] + b[1]",
        sum_leaks),
    "down that is not": (Float, "down", "x - (np.abs(x) * 2.0**-51 + TINY)", "x",
        sum_leaks),
    "two corners of a product": (Float, "multiply", "for x in _ends(a) for y in _ends(b)", "for x, y in zip(a, b)",
        product_leaks),
    "U+ for U-": (Exact, "affine", "np.minimum(matrix, self.zero)", "np.maximum(matrix, self.zero)",
        lambda: signs_matter(Exact())),
    "any gauge": (layers, "contraction", "(u > calc.zero).all()", "True",
        lambda: unstable([[0.0, 1.0], [20.0, 0.0]], [-1.0, -1.0], [-1.0, -10.0], [0.0, 0.0]).accepted()),
    "a slack of zero": (layers, "contraction", "room > calc.zero", "room >= calc.zero",
        lambda: unstable(SWAP, [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]).accepted(exact=True)),
    "no slack": (layers, "contraction", "(room > calc.zero).all()", "True",
        lambda: unstable([[0.0, 2.0], [2.0, 0.0]], [-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]).accepted()),
    "a signed slack": (layers, "_absolute", "np.abs(fusion.matrix)", "fusion.matrix",
        lambda: unstable([[0.0, -2.0], [-2.0, 0.0]], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]).accepted()),
    "a row of its own": (layers, "layer", "(own[1] < calc.one).all()", "True",
        lambda: contracts([[2.0]], [-1.0])),
    "a lower end that moves": (layers, "enclosed", "& (lo <= image[0])", "",
        lambda: above_the_least().accepted(exact=True)),
    "an upper end that moves": (layers, "enclosed", "& (image[1] <= hi)", "",
        lambda: spoilt(UPPER, LOWER).accepted() and below_the_most().accepted(exact=True)),
    "the least t": (layers, "enclosed", ".max(1).reshape(-1", ".min(1).reshape(-1", lambda: shrunk_reach()),
    "a tie": (checker, "_verdict", "0 < margin", "0 <= margin", lambda: tied().accepted(exact=True)),
    "any claim": (checker, "_verdict", "and Fraction(margin) >= claim.margin", "",
        lambda: edited(TINY, put("margin", "100")).accepted()),
    "boxes that do not hold": (proof._Proof, "_box", "self.holds & holds", "self.holds",
        lambda: above_the_least().accepted(exact=True)),
    "records of other models": (claim, "read_claim", 'head["model"] == model', "True", lambda: foreign().accepted()),
    "gauges of other models": (Checker, "_read", 'certificate.head["model"] == self.hash', "True",
        lambda: replace(TINY, gauges=pack({"version": 1, "model": ""}, unpack(TINY.gauges)[1])).accepted()),
    "a narrow clip": (claim, "read_claim", "require(whole,", "require(True,", lambda: narrow().accepted()),
    "a negative radius": (claim, "read_claim", "require(eps >= 0", "require(True",
        lambda: edited(TINY, put("eps", "-1/9000000")).decide()[0][1] != "eps is negative"),
    "NaN": (files, "parse_blob", "not np.isfinite(array).all()", "False",
        lambda: "NaN" not in edited(TINY, array("input", lambda a: a * np.nan)).decide()[0][1]),
    "overlapping arrays": (files, "parse_blob", "start == position", "True", lambda: parses(overlapping)),
    "repeated keys": (files, "parse_json", "len(found) != len(pairs)", "False",
        lambda: parses(lambda: files.parse_json(b'{"eps": 1, "eps": 2}', "it"))),
}  # fmt: skip


def contracts(W: list[list[float]], v: list[float]) -> bool:
    """Whether ``z = relu(2 z - 1)``, with its equilibria 0 and 1, is taken for a contraction."""
    arrays = {"input": [0.5], "box/1/lower": [0.0], "box/1/upper": [0.0]}
    model = nn.Sequential(linear([[0.0]], v), Equilibrium(linear(W), nn.Identity()), linear([[0.0], [1.0]], [0.5, 0.0]))
    return "W_ii" not in forged(model, [1.0], arrays).decide()[0][1]


def shrunk_reach() -> bool:
    """Whether the box from the gauge alone leaves the larger of two equilibria out."""
    zero, one = np.zeros((2, 2)), np.ones((1, 2))
    layer = layers.Layer("n", layers.Dense(zero, zero), (one, one), one, one)
    v = np.array([[1.0, 100.0]])
    (_, hi), _, _ = layers.enclosed(Float(), layer, (v, v), None, 0)
    return bool(hi[0, 1] < 100)


def overlapping() -> object:
    return files.parse_blob(raw("{" + META + ',"a":' + ENTRY + ',"b":' + ENTRY + "}", b"\0" * 8))


def parses(read: Callable[[], object]) -> bool:
    try:
        read()
    except Rejected:
        return False
    return True


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_twin_is_seen(monkeypatch: Patch, name: str) -> None:
    owner, function, old, new, fooled = TWINS[name]
    assert not fooled()
    rewrite(monkeypatch, owner, function, old, new)
    assert fooled()


def test_a_digest_that_is_not_compared_is_seen(monkeypatch: Patch, tmp_path: Path) -> None:
    folder = replace(TINY, records=TINY.records[:1]).write(tmp_path)
    data = framed(TINY.records[0])
    (folder / "records.bin").write_bytes(data.replace(b'\\"index\\":0', b'\\"index\\":7'))
    assert (folder / "records.bin").read_bytes() != data
    assert [o.reason for o in check(folder)] == ["the digest does not fit the record"]
    rewrite(monkeypatch, files, "records", "hashlib.sha256(payload).digest() == digest", "True")
    assert [o.accepted for o in check(folder)] == [True]
    assert hashlib.sha256(data[8:-32]).digest() == data[-32:]
