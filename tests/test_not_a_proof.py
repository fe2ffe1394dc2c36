"""docs/not-a-proof.md: its blocks print what stands below them, its figures are so, and nothing false passes."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import Tensor

from verideq import Status
from verideq.certify import certify, margin_rows, prepare
from verideq.certify.certificate import gauge_file
from verideq.checker import Checker
from verideq.checker.files import parse_blob
from verideq.testing.exact import exact

PAGE = Path(__file__).resolve().parent.parent / "docs" / "not-a-proof.md"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
ONE = torch.ones(1, 1)


@dataclass(frozen=True)
class Session:
    """The page, pasted: what every block printed, what the page says that it prints, and what it defined."""

    printed: list[str]
    claimed: list[str]
    names: dict[str, Any]


@pytest.fixture(scope="module")
def session() -> Session:
    blocks = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    names: dict[str, Any] = {"__name__": "pasted"}
    printed = []
    for code, _ in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(code, PAGE.name, "exec"), names)  # the project's own page
        printed.append(stream.getvalue())
    return Session(printed, [claim for _, claim in blocks], names)


def test_the_page_prints_what_it_says(session: Session) -> None:
    assert len(session.printed) == 7 and session.claimed[0] == "" and all(session.claimed[1:])
    for printed, claimed in zip(session.printed, session.claimed, strict=True):
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", claimed)
        # A last digit may differ where a network is trained on another machine.
        ours, theirs = ([float(number) for number in NUMBER.findall(text)] for text in (printed, claimed))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=0.02 if "digit" in claimed or "batch" in claimed else 0)


# ----------------------------------------------------------------------------------------------- the figures themselves


def test_stopped_too_early(session: Session) -> None:
    slow = session.names["deq"]([[0.99]], [-1.0], 105.0)
    margin, steps = session.names["naive"](slow, ONE, 0.1, ONE, tol=1e-3, cap=1000)
    assert steps == 240 and float(margin) == pytest.approx(4.859, abs=1e-3)
    truth = 105 - Fraction("1.1") / (1 - exact(slow[0].fusion.weight)[0, 0])
    assert float(truth) == pytest.approx(-5.0001, abs=1e-5)


@pytest.mark.parametrize(("power", "stuck", "truth"), [(12, 5119, 5120), (16, 81664, 81920)])
def test_a_residual_of_zero(power: int, stuck: float, truth: int) -> None:
    w, z = np.float32(1 - 2.0**-power), np.float32(stuck)
    assert w * z + np.float32(1.25) == z
    assert Fraction("5/4") / (1 - Fraction(float(w))) == truth


def test_a_trained_network_is_certified_for_two_classes(session: Session) -> None:
    names = session.names
    net, digit = names["net"], names["digit"]
    W = exact(net[0].fusion.weight)
    assert (W >= 0).all() and all(abs(float(row.sum()) - 0.99) < 1e-6 for row in W)
    assert float(names["margin"].min()) > 8 and names["steps"] < 50  # it stopped because it believed to have converged
    verdict = names["verdict"]
    assert verdict.certified and verdict.checked and verdict.label == 0
    prepared = prepare(net)
    audit = Checker(prepared.file, gauge_file(prepared.file, prepared.gauges), exact=True)
    ((accepted, reason, margin),) = audit.decide([verdict.certificate])
    assert accepted and not reason and margin is not None and margin > 1
    outputs = names["outputs"]  # rational
    assert outputs[0] - outputs[9] >= Fraction(verdict.margin) and isinstance(outputs[0], Fraction)
    assert names["labels"][269] == 9 and digit.shape == (1, 64)


def test_a_looser_tolerance_is_not_what_is_wrong(session: Session) -> None:
    naive, net, digit = (session.names[key] for key in ("naive", "net", "digit"))
    C = margin_rows(torch.tensor([9]), 10).float()
    for tol in (1e-2, 1e-3, 1e-5):
        assert float(naive(net, digit.float(), 1e-4, C, tol=tol)[0].min()) > 5  # the cap of 50 steps
    assert float(naive(net, digit.float(), 1e-4, C, tol=1e-7, cap=10_000)[0].min()) < 0


def test_most_of_its_answers_are_right(session: Session) -> None:
    naive, net, images = (session.names[key] for key in ("naive", "net", "images"))
    with torch.no_grad():
        truth = net(images.float()).argmax(1)
    said = torch.cat([naive(net, x[None].float(), 0.0, torch.eye(10)[None])[0].argmax(1) for x in images[:90]])
    assert 80 <= int((said == truth[:90]).sum()) < 90


def test_batch_mates_decide_for_the_naive_certifier_alone(session: Session) -> None:
    classes, net, images, labels = (session.names[key] for key in ("certified_classes", "net", "images", "labels"))
    assert (classes(images[[24]], 0), classes(images, 24)) == ([6], [0])
    together = certify(net, images[:30], labels[:30], "1/10000")
    for i, verdict in enumerate(together):
        (alone,) = certify(net, images[[i]], labels[[i]], "1/10000")
        assert (alone.status, alone.margin) == (verdict.status, pytest.approx(verdict.margin, abs=1e-9))


# ----------------------------------------------------------------------------------------------- verideq is never wrong

FALSE: dict[str, tuple[list[list[float]], list[float], float, list[float], str]] = {
    "stopped too early": ([[0.99]], [-1.0], 105.0, [1.0], "1/10"),
    "the same, by a ring": ([[0.0, 0.99], [0.99, 0.0]], [-0.5, -0.5], 105.0, [1.0, 1.0], "1/10"),
    "residual zero, 12": ([[1 - 2.0**-12]], [-1.0], 5119.5, [1.125], "1/8"),
    "residual zero, 16": ([[1 - 2.0**-16]], [-1.0], 81792.0, [1.125], "1/8"),
    "two equilibria": ([[2.0]], [-1.0], 0.5, [-1.0], "0"),
    "a crossed box": ([[-10.0]], [1.0], -0.5, [1.0], "0"),
    "residual over m": ([[0.0, 10.0], [-10.0, 0.0]], [1.0, 0.0], -1.5, [1.0, -100.0], "0"),
}
"""W, V, c, x, eps: ``V z + c > 0`` on the ball is false."""


@pytest.mark.parametrize("name", FALSE)
def test_what_is_false_is_never_certified(session: Session, name: str) -> None:
    W, V, c, x, eps = FALSE[name]
    model = session.names["deq"](W, V, c)
    for attack in ("none", "pgd"):
        for max_steps in (1, 50, 1000):
            (verdict,) = certify(model, torch.tensor([x]), None, eps, C=ONE, attack=attack, max_steps=max_steps)
            assert verdict.status in (Status.UNKNOWN, Status.FALSIFIED, Status.MISCLASSIFIED)
            assert verdict.certificate is None and (verdict.margin is None or verdict.margin <= 0)


@pytest.mark.parametrize("name", ["stopped too early", "residual zero, 12", "residual zero, 16", "a crossed box"])
def test_a_naive_box_in_a_record_is_refused(session: Session, name: str) -> None:
    """A record of something true, with the naive claim and the naive box written into it."""
    W, V, c, x, eps = FALSE[name]
    prepared = prepare(session.names["deq"](W, V, c))
    (verdict,) = certify(prepared, torch.tensor([x]), None, eps, C=ONE, rhs=torch.tensor([-1e6]))
    assert verdict.certificate is not None
    blob = parse_blob(verdict.certificate)
    lower, upper = (f"box/0/{side}" for side in ("lower", "upper"))
    high = {"stopped too early": 100.14, "residual zero, 12": 5119.0, "residual zero, 16": 81664.0}.get(name, 0.0)
    naive_box = {lower: np.array([1.0 if name == "a crossed box" else high * 0.8]), upper: np.array([high])}
    claim = {"C": blob.arrays["C"], "rhs": np.zeros(1), "input": blob.arrays["input"]}
    head = {"verideq": json.dumps({**blob.head, "margin": "1/10"})}
    for box in (naive_box, {key: blob.arrays[key] for key in naive_box}):
        forged: bytes = save({**claim, **box}, metadata=head)
        for exactly in (False, True):
            checker = Checker(prepared.file, gauge_file(prepared.file, prepared.gauges), exact=exactly)
            ((accepted, reason, _),) = checker.decide([forged])
            assert not accepted and ("not mapped into itself" if box is naive_box else "not proved") in reason


def test_a_true_claim_about_the_same_layer_is_certified(session: Session) -> None:
    x: Tensor = torch.tensor([[1.0]])
    (verdict,) = certify(session.names["deq"]([[0.99]], [-1.0], 111.0), x, None, "1/10", C=ONE)
    assert verdict.certified and verdict.checked and verdict.margin == pytest.approx(0.9999, abs=1e-3)
