"""`verideq.certify.certify` from Python: verdicts that hold, whatever the batch, and refusals in one line."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import verideq
from verideq.box import Box
from verideq.certify import METHODS, Verdict, certify, prepare
from verideq.certify.bound import interval
from verideq.certify.budget import Budget
from verideq.certify.method import Bounds, Prepared, Query
from verideq.certify.run import Questions, Run
from verideq.certify.summary import REJECTED
from verideq.data import load
from verideq.equilibrium import Equilibrium
from verideq.errors import InconsistencyError, InputError, ModelError, RegionError, UnknownName, UnsupportedOperation
from verideq.graph import Graph, load_model
from verideq.status import Status

DIGITS = load("digits")
LIMIT = 30


@pytest.fixture(scope="module")
def model(digits_model: Path) -> Graph:
    return load_model(digits_model)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return DIGITS.scaled(slice(LIMIT))


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return DIGITS.labels[:LIMIT]


@pytest.fixture(scope="module")
def attacked(model: Graph, images: Tensor, labels: Tensor) -> list[Verdict]:
    """Verdicts at eps 0.05 under attack."""
    return certify(model, images, labels, "0.05", attack="pgd")


@pytest.fixture(scope="module")
def by_intervals(model: Graph, images: Tensor, labels: Tensor) -> list[Verdict]:
    """The same by intervals alone: every status but TIMEOUT and ERROR is among them."""
    return certify(model, images, labels, "0.05", attack="pgd", method="interval")


def statuses(verdicts: list[Verdict]) -> Counter[Status]:
    return Counter(verdict.status for verdict in verdicts)


def decided(verdict: Verdict) -> tuple[object, ...]:
    """What may not depend on the batch, but for the margin's last digits."""
    return (verdict.status, verdict.prediction, verdict.label, verdict.attacked, verdict.method, verdict.reason)


# --- what a verdict says ----------------------------------------------------------------------------------------------


def test_the_four_common_verdicts(by_intervals: list[Verdict], model: Graph, images: Tensor, labels: Tensor) -> None:
    attacked = by_intervals
    found = statuses(attacked)
    assert set(found) == {Status.CERTIFIED, Status.FALSIFIED, Status.MISCLASSIFIED, Status.UNKNOWN}
    with torch.no_grad():
        predictions = model(images.float()).argmax(1).tolist()
    for verdict, prediction, label in zip(attacked, predictions, labels.tolist(), strict=True):
        assert (verdict.prediction, verdict.label) == (prediction, label)
        assert (verdict.eps, verdict.norm) == (Fraction(1, 20), "linf")
        assert (verdict.method, verdict.checked) == ("interval", verdict.certified)
        assert (verdict.certificate is not None) == verdict.certified
        if prediction != label:
            assert verdict.status is Status.MISCLASSIFIED
            assert verdict.attacked is None
            continue
        assert verdict.margin is not None
        assert verdict.certified == (verdict.margin > 0)
        assert verdict.attacked == (verdict.status is not Status.FALSIFIED)
        assert verdict.steps is not None and verdict.steps > 0
        assert (verdict.witness is None) == (verdict.status is not Status.FALSIFIED)
        assert bool(verdict.reason) != verdict.certified, "whatever is not certified has its reason"


def test_certified_holds_on_sampled_points(
    attacked: list[Verdict], model: Graph, images: Tensor, labels: Tensor
) -> None:
    frozen, noise = model.frozen(), torch.Generator().manual_seed(0)
    for verdict, x, y in zip(attacked, images, labels, strict=True):
        if not verdict.certified or verdict.margin is None:
            continue
        shifts = 2 * torch.rand(30, *x.shape, generator=noise, dtype=x.dtype) - 1
        shifts[::2] = shifts[::2].sign()
        logits = frozen((x + 0.05 * shifts).clamp(0, 1))
        others = logits.clone()
        others[:, y] = -math.inf
        assert float((logits[:, y] - others.amax(1)).min()) >= verdict.margin


def test_a_witness_is_in_the_region_exactly_and_breaks_the_original_model(
    attacked: list[Verdict], model: Graph, images: Tensor, labels: Tensor
) -> None:
    broken = [i for i, verdict in enumerate(attacked) if verdict.status is Status.FALSIFIED]
    assert broken
    for i in broken:
        witness = attacked[i].witness
        assert witness is not None and witness.dtype == np.float64
        pairs = zip(witness.ravel().tolist(), images[i].flatten().tolist(), strict=True)
        assert all(abs(Fraction(w) - Fraction(x)) <= Fraction(1, 20) and 0 <= w <= 1 for w, x in pairs)
        with torch.no_grad():
            assert int(model(torch.from_numpy(witness)[None].float()).argmax()) != int(labels[i])


def test_a_witness_that_the_original_model_resists_is_no_witness(model: Graph, images: Tensor) -> None:
    """What breaks the float64 copy has to break the user's model too."""
    C = torch.zeros(1, 10)
    C[0, 3] = 1.0
    rhs = verideq.bound(model, verideq.Region(images, 0), C=C).lower[:, :1] - 1e-3
    assert statuses(certify(model, images, None, "0.05", C=C, rhs=rhs, attack="pgd"))[Status.FALSIFIED] == LIMIT

    class Stubborn(Graph):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 10), 1e6)

    stubborn = Stubborn(model.nodes, input_shape=model.input_shape)
    found = certify(stubborn, images, None, "0.05", C=C, rhs=rhs, attack="pgd")
    assert set(statuses(found)) == {Status.UNKNOWN}
    assert all(verdict.attacked for verdict in found)


def test_a_verdict_prints_as_one_line(attacked: list[Verdict]) -> None:
    for verdict in attacked:
        text = str(verdict)
        assert "\n" not in text
        assert text.startswith(f"{verdict.status} at linf eps 1/20")


def test_eps_zero_certifies_what_is_right(model: Graph, images: Tensor, labels: Tensor) -> None:
    verdicts = certify(model, images, labels, 0, attack="pgd")
    assert set(statuses(verdicts)) <= {Status.CERTIFIED, Status.MISCLASSIFIED}


@pytest.mark.parametrize("eps", ["8/255", Fraction(8, 255)])
def test_eps_is_kept_exact(model: Graph, images: Tensor, labels: Tensor, eps: str | Fraction) -> None:
    (verdict,) = certify(model, images[:1], labels[:1], eps)
    assert verdict.eps == Fraction(8, 255)


def test_uint8_images_are_read_as_k_over_255(model: Graph, labels: Tensor) -> None:
    data = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = certify(model, data, labels[:3], "1/255")
    scaled = certify(model, data.double() / 255, labels[:3], "1/255")
    assert [(v.status, v.margin) for v in whole] == [(v.status, v.margin) for v in scaled]


def test_no_images_no_verdicts(model: Graph, images: Tensor, labels: Tensor) -> None:
    assert certify(model, images[:0], labels[:0], 0.1) == []


def test_a_prepared_model_gives_the_same(model: Graph, images: Tensor, labels: Tensor, attacked: list[Verdict]) -> None:
    found = certify(prepare(model), images, labels, "0.05", attack="pgd")
    assert [decided(v) for v in found] == [decided(v) for v in attacked]


# --- nothing depends on the batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_nothing(
    model: Graph, images: Tensor, labels: Tensor, attacked: list[Verdict], batch_size: int
) -> None:
    found = certify(model, images, labels, "0.05", attack="pgd", batch_size=batch_size)
    assert [decided(v) for v in found] == [decided(v) for v in attacked]
    for one, other in zip(found, attacked, strict=True):
        assert one.margin == pytest.approx(other.margin, abs=1e-9) if other.margin is not None else one.margin is None


def test_the_order_changes_nothing(tmp_path: Path, model: Graph, attacked: list[Verdict]) -> None:
    """In a run the noise belongs to the sample's index in the data set, wherever it stands."""
    order = torch.randperm(LIMIT, generator=torch.Generator().manual_seed(3)).tolist()
    run = make_run(tmp_path, model, order, "0.05", Budget(attack="pgd"), batch_size=7)
    run.execute()
    lines = {line["index"]: line for line in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert list(lines) == order
    for i, verdict in enumerate(attacked):
        assert (lines[i]["status"], lines[i]["attacked"]) == (str(verdict.status), verdict.attacked)
        assert lines[i]["margin"] == (verdict.margin and pytest.approx(verdict.margin, abs=1e-9))


# --- specifications, regions, weights ---------------------------------------------------------------------------------


def test_a_specification_of_ones_own(model: Graph, images: Tensor, labels: Tensor) -> None:
    """The margins as an explicit specification give what labels give; a lower right-hand side certifies more."""
    others = torch.tensor([[j for j in range(10) if j != y] for y in labels.tolist()])
    C = torch.eye(10)[labels][:, None] - torch.eye(10)[others]
    given = certify(model, images, None, "0.05", C=C, method="interval")
    expected = certify(model, images, labels, "0.05", method="interval")
    assert [v.status for v in given] == [v.status for v in expected]
    assert all(v.label is None for v in given)
    relaxed = certify(model, images, None, "0.05", C=C, rhs=torch.full((9,), -100.0), method="interval")
    assert set(statuses(relaxed)) == {Status.CERTIFIED}
    for one, other in zip(relaxed, given, strict=True):
        if other.margin is not None:
            assert one.margin == pytest.approx(other.margin + 100)
    strict = certify(model, images, None, "0.05", C=C, rhs=torch.full((LIMIT, 9), 100.0))
    assert set(statuses(strict)) == {Status.MISCLASSIFIED}


def test_one_specification_for_all(model: Graph, images: Tensor) -> None:
    C = torch.zeros(1, 10)
    C[0, 3] = 1.0
    box = verideq.bound(model, verideq.Region(images, "0.05"), C=C)
    threshold = float(box.lower.median())
    rhs = torch.tensor([threshold], dtype=torch.float64)
    found = certify(model, images, None, "0.05", C=C, rhs=rhs, method="interval")
    assert [v.certified for v in found] == (box.lower[:, 0] > threshold).tolist()


BAD_CALLS = {
    "label outside": (lambda x, y: dict(labels=torch.tensor([1, 10])), InputError, "label 10 of sample 1 .*0 to 9"),
    "label negative": (lambda x, y: dict(labels=torch.tensor([-1, 1])), InputError, "label -1 of sample 0"),
    "labels too few": (lambda x, y: dict(labels=y[:1]), InputError, "labels are one integer an image .2 images."),
    "labels floating": (lambda x, y: dict(labels=y.double()), InputError, "labels are one integer an image"),
    "no labels": (lambda x, y: dict(labels=None), InputError, "give labels, or a specification C"),
    "shape": (lambda x, y: dict(images=x[..., :7]), ModelError, r"takes inputs of shape \(1, 8, 8\)"),
    "pixel above 1": (lambda x, y: dict(images=x + 1), RegionError, "outside the pixel range"),
    "pixel nan": (lambda x, y: dict(images=x * math.nan), RegionError, "input 0, .*not finite"),
    "eps negative": (lambda x, y: dict(eps=-0.1), RegionError, "eps -0.1 is negative"),
    "eps nan": (lambda x, y: dict(eps=math.nan), RegionError, "eps nan is not a finite number"),
    "eps no number": (lambda x, y: dict(eps="a tenth"), RegionError, "eps 'a tenth'"),
    "norm": (lambda x, y: dict(norm="l1"), UnknownName, "unknown norm 'l1'; choose one of: linf, l2"),
    "method": (lambda x, y: dict(method="magic"), UnknownName, "unknown method 'magic'; choose one of: auto, interval"),
    "attack": (
        lambda x, y: dict(attack="fgsm"),
        UnknownName,
        "unknown attack 'fgsm'; choose one of: none, pgd, standard, intermediate, full",
    ),
    "timeout": (lambda x, y: dict(timeout=0.0), InputError, "timeout 0.0"),
    "batch size": (lambda x, y: dict(batch_size=0), InputError, "batch_size 0"),
    "C columns": (lambda x, y: dict(C=torch.ones(1, 9)), InputError, r"C has shape \(2, 1, 9\)"),
    "C without rows": (lambda x, y: dict(C=torch.ones(0, 10)), InputError, "one row or more"),
    "C batch": (lambda x, y: dict(C=torch.ones(3, 1, 10)), InputError, r"C has shape \(3, 1, 10\)"),
    "C nan": (lambda x, y: dict(C=torch.full((1, 10), math.nan)), InputError, "finite"),
    "rhs": (lambda x, y: dict(C=torch.ones(2, 10), rhs=torch.ones(3)), InputError, r"rhs \(2, 3\)"),
    "rhs infinite": (lambda x, y: dict(C=torch.ones(1, 10), rhs=torch.tensor([-math.inf])), InputError, "finite"),
    "weights shape": (lambda x, y: dict(weights=torch.ones(64)), RegionError, r"eps weights have shape \(64,\)"),
    "weights negative": (lambda x, y: dict(weights=-torch.ones(1, 8, 8)), RegionError, "must be 0, or between"),
    "weights tiny": (lambda x, y: dict(weights=torch.full((1, 8, 8), 1e-99, dtype=torch.float64)), RegionError, "be 0"),
    "weights huge": (lambda x, y: dict(weights=torch.full((1, 8, 8), 1e99, dtype=torch.float64)), RegionError, "be 0"),
    "eps huge": (lambda x, y: dict(eps="1e400"), RegionError, "eps '1e400' is larger than any float64"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_in_one_line(model: Graph, images: Tensor, labels: Tensor, case: str) -> None:
    change, error, message = BAD_CALLS[case]
    call = {"images": images[:2], "labels": labels[:2], "eps": 0.05} | change(images[:2], labels[:2])
    with pytest.raises(error, match=message) as caught:
        certify(model, call.pop("images"), call.pop("labels"), call.pop("eps"), **call)
    assert "\n" not in str(caught.value)


def test_an_unsupported_model_and_one_with_nan(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(UnsupportedOperation, match="2: Tanh"):
        certify(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh()), images, labels, 0.1)
    broken = nn.Linear(64, 10)
    nn.init.constant_(broken.bias, math.nan)
    with pytest.raises(ModelError, match=r"bias\[0\] is nan"):
        certify(nn.Sequential(nn.Flatten(), broken), images, labels, 0.1)
    with pytest.raises(InputError, match="two classes or more"):
        certify(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), images, 0 * labels, 0.1)


def test_weights_say_how_far_each_feature_may_move() -> None:
    """f = (x0 + x1, 0) at x = (0.5, 0.5): margin 1 - eps (w0 + w1), exactly."""
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        net.bias.zero_()
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    for weights, margin in (([1.0, 1.0], 0.5), ([2.0, 0.0], 0.5), ([0.0, 0.0], 1.0), ([0.5, 1.0], 0.625)):
        (verdict,) = certify(net, x, y, "1/4", weights=torch.tensor(weights), attack="pgd")
        assert verdict.margin == pytest.approx(margin, abs=1e-12)
        assert verdict.certified and verdict.attacked


def test_a_witness_keeps_within_the_weights() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        net.bias.copy_(torch.tensor([-0.9, 0.0]))
    x, weights = torch.full((1, 2), 0.5), torch.tensor([3.0, 0.0])
    (verdict,) = certify(net, x, torch.tensor([0]), "1/10", weights=weights, attack="pgd")
    assert verdict.status is Status.FALSIFIED
    assert verdict.witness is not None
    assert verdict.witness[1] == 0.5
    assert 0.2 <= verdict.witness[0] < 0.4


def test_tabular_rows_without_a_pixel_range() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    net.pixel_range = None
    rows = 10 * torch.randn(20, 5, dtype=torch.float64)
    with torch.no_grad():
        labels = net(rows.float()).argmax(1)
    verdicts = certify(net, rows, labels, 0.01, attack="pgd")
    assert statuses(verdicts)[Status.CERTIFIED] >= 15
    net.pixel_range = (-1.0, 1.0)
    with pytest.raises(RegionError, match="outside the pixel range"):
        certify(net, rows, labels, 0.01)


def test_l2(model: Graph, images: Tensor, labels: Tensor) -> None:
    verdicts = certify(model, images, labels, "3/5", norm="l2", attack="pgd")
    found = statuses(verdicts)
    assert found[Status.FALSIFIED]
    small = certify(model, images, labels, "1/50", norm="l2", attack="pgd", method="interval")
    assert statuses(small)[Status.CERTIFIED] > LIMIT // 2
    for verdict, x, y in zip(verdicts, images, labels, strict=True):
        if verdict.witness is None:
            continue
        pairs = zip(verdict.witness.ravel().tolist(), x.flatten().tolist(), strict=True)
        assert sum((Fraction(w) - Fraction(c)) ** 2 for w, c in pairs) <= Fraction(9, 25)
        assert verdict.witness.min() >= 0 and verdict.witness.max() <= 1
        with torch.no_grad():
            assert int(model(torch.from_numpy(verdict.witness)[None].float()).argmax()) != int(y)
    # Whatever holds on the box around the ball holds on the ball, and more does.
    box = certify(model, images, labels, "1/50", method="interval")
    assert all(v.certified or not w.certified for v, w in zip(small, box, strict=True))
    assert sum(v.certified for v in small) > sum(v.certified for v in box)


def test_radius_is_certified_and_nearly_the_largest(model: Graph, images: Tensor, labels: Tensor) -> None:
    verdicts = certify(model, images[:12], labels[:12], "0.05", radius=True, method="interval")
    for i, verdict in enumerate(verdicts):
        if verdict.status is Status.MISCLASSIFIED:
            assert verdict.radius is None
            continue
        assert verdict.radius is not None

        def at(radius: float, x: Tensor = images[i : i + 1], y: Tensor = labels[i : i + 1]) -> bool:
            return certify(model, x, y, radius, method="interval")[0].certified

        assert at(verdict.radius) and not at(verdict.radius + 2e-4)
        assert (verdict.radius >= 0.05) == verdict.certified


def test_auto_closes_what_intervals_leave_open(attacked: list[Verdict], by_intervals: list[Verdict]) -> None:
    assert statuses(by_intervals)[Status.UNKNOWN] > statuses(attacked)[Status.UNKNOWN]
    assert {v.method for v in attacked if v.certified} > {"interval"}
    for ours, theirs in zip(attacked, by_intervals, strict=True):
        assert ours.status is theirs.status or theirs.status is Status.UNKNOWN
        assert ours.checked is ours.certified and (ours.certificate is not None) is ours.certified


def test_a_radius_by_auto_is_certified(model: Graph, images: Tensor, labels: Tensor) -> None:
    verdicts = certify(model, images[:8], labels[:8], "0.05", radius=True)
    plain = certify(model, images[:8], labels[:8], "0.05", radius=True, method="interval")
    for i, (verdict, other) in enumerate(zip(verdicts, plain, strict=True)):
        if verdict.radius is not None and other.radius is not None:
            assert verdict.radius >= other.radius
            assert not verdict.certified or verdict.radius >= 0.05
            assert certify(model, images[i : i + 1], labels[i : i + 1], verdict.radius)[0].certified


# --- fail closed ------------------------------------------------------------------------------------------------------


def test_a_clock_that_ran_out_certifies_nothing(model: Graph, images: Tensor, labels: Tensor) -> None:
    verdicts = certify(model, images, labels, "0.001", timeout=1e-9, attack="pgd")
    assert set(statuses(verdicts)) <= {Status.TIMEOUT, Status.MISCLASSIFIED}
    assert statuses(verdicts)[Status.TIMEOUT] > LIMIT // 2
    assert all("--timeout" in v.reason for v in verdicts if v.status is Status.TIMEOUT)
    assert Status.TIMEOUT not in statuses(certify(model, images[:4], labels[:4], "0.001", timeout=3600))


def _net(weight: float) -> nn.Module:
    torch.manual_seed(0)
    layer = Equilibrium(nn.Linear(4, 4, bias=False), nn.Linear(64, 4))
    nn.init.constant_(layer.fusion.weight, weight)
    nn.init.uniform_(layer.injection.weight, 0.1, 0.2)
    return nn.Sequential(nn.Flatten(), layer, nn.Linear(4, 10))


def test_a_layer_without_a_gauge_is_unknown_with_its_rate(images: Tensor) -> None:
    """Inhibition: the equilibrium is found, but there is no gauge, of ``W`` or of the solved rows, and no ``m > 0``."""
    net = _net(-0.6)
    with torch.no_grad():
        net[1].fusion.weight[0, 1] = -3.0  # type: ignore[index, union-attr]  # a Sequential's second module
    with torch.no_grad():
        labels = net(images.float()).argmax(1)
    verdicts = certify(net, images, labels, 0.01, attack="pgd")
    assert set(statuses(verdicts)) == {Status.UNKNOWN}
    for verdict in verdicts:
        assert verdict.margin is None
        assert "no gauge" in verdict.reason
        assert "measured contraction rate" in verdict.reason
    assert all(v.status is Status.MISCLASSIFIED for v in certify(net, images, (labels + 1) % 10, 0.01))


def test_an_equilibrium_that_diverges_is_unknown(images: Tensor, labels: Tensor) -> None:
    verdicts = certify(_net(5.0), images[:5], labels[:5], 0.01, attack="pgd")
    assert set(statuses(verdicts)) == {Status.UNKNOWN}
    for verdict in verdicts:
        assert "NaN or infinity" in verdict.reason or "step limit" in verdict.reason
        assert "spectral radius of |W| is about 20" in verdict.reason


def test_outputs_that_overflow_are_an_error(images: Tensor, labels: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10)).double()
    for layer in (net[1], net[2]):
        nn.init.constant_(layer.weight, 1e300)
    verdicts = certify(net, images[:3], labels[:3], 0.01)
    assert set(statuses(verdicts)) == {Status.ERROR}


def certify_everything(prepared: Prepared, query: Query) -> Bounds:
    """A bound with the worst bug that a bound can have."""
    result = interval(prepared, query)
    return Bounds(Box(result.box.lower.abs() + 1, result.box.upper.abs() + 2), result.steps)


def make_run(folder: Path, model: nn.Module, indices: list[int], eps: str, budget: Budget, batch_size: int = 64) -> Run:
    chosen = DIGITS.subset(indices)
    radii, clip = [Fraction(eps)], (0.0, 1.0)
    images, labels = chosen.scaled(), chosen.labels
    questions = Questions("digits", "digits", "test", chosen.hash, images, labels, indices, radii, "linf", None, clip)
    return Run(folder, model, "small", questions, budget, batch_size)


def test_a_certificate_and_a_counterexample_stop_the_run(
    model: Graph, images: Tensor, labels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "broken", certify_everything)
    with pytest.raises(InconsistencyError, match=r"certified at linf eps 1/20 .* broken by a proved witness") as caught:
        certify(model, images, labels, "0.05", method="broken", attack="pgd", check=False)
    index = caught.value.evidence["index"]
    assert caught.value.evidence["verdict"].certified
    with pytest.raises(InconsistencyError):
        make_run(tmp_path / "run", model, list(range(LIMIT)), "0.05", Budget("broken", "pgd", check=False)).execute()
    witness = np.load(tmp_path / "run/inconsistency/witness.npy")
    record = json.loads((tmp_path / "run/inconsistency/verdict.json").read_text())
    assert (record["index"], record["status"], record["method"]) == (index, "CERTIFIED", "broken")
    assert np.array_equal(witness, caught.value.evidence["witness"])
    with torch.no_grad():
        assert int(model(torch.from_numpy(witness)[None].float()).argmax()) != int(labels[index])
    assert not (tmp_path / "run/summary.json").exists()


def test_the_checker_refuses_what_a_broken_bound_proposes(
    model: Graph, images: Tensor, labels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = certify(model, images, labels, "0.05")
    monkeypatch.setitem(METHODS, "broken", certify_everything)
    verdicts = certify(model, images, labels, "0.05", method="broken", attack="pgd")
    assert not any(verdict.certified for verdict in verdicts)
    assert all(REJECTED in verdict.reason for verdict, before in zip(verdicts, honest, strict=True) if before.certified)
    summary = make_run(tmp_path, model, list(range(LIMIT)), "0.05", Budget("broken")).execute()
    (result,) = summary["results"]
    assert (result["certified"], result["rejected"]) == (0, sum(v.prediction == v.label for v in honest))


def test_no_better_bound_hides_that_a_proposal_was_refused(
    model: Graph, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = certify(model, images, labels, "0.05", method="interval")
    monkeypatch.setitem(METHODS, "adjoint", certify_everything)
    for attack in ("none", "pgd"):
        verdicts = certify(model, images, labels, "0.05", method="auto", attack=attack)
        refused = [v for v, own in zip(verdicts, honest, strict=True) if own.status is Status.UNKNOWN]
        assert refused
        for verdict in refused:
            assert verdict.status is Status.FALSIFIED or REJECTED in verdict.reason
            assert not verdict.certified and not verdict.checked and verdict.certificate is None


@pytest.mark.parametrize("error", [RuntimeError, IndexError, MemoryError])
def test_what_breaks_for_one_sample_costs_that_sample(
    model: Graph, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    expected = certify(model, images, labels, "0.02", method="interval")
    victim = next(i for i, verdict in enumerate(expected) if verdict.certified)
    # A pixel of the victim's box that no other sample has.
    mark = verideq.Region(images[victim : victim + 1], "0.02").box().lower

    def fragile(prepared: Prepared, query: Query) -> Bounds:
        if bool((query.box.lower == mark).flatten(1).all(1).any()):
            raise error("a cosmic ray")
        return interval(prepared, query)

    monkeypatch.setitem(METHODS, "fragile", fragile)
    found = certify(model, images, labels, "0.02", method="fragile")
    assert found[victim].status is Status.ERROR
    assert found[victim].reason == f"{error.__name__}: a cosmic ray"
    assert [v.status for i, v in enumerate(found) if i != victim] == [
        v.status for i, v in enumerate(expected) if i != victim
    ]


@pytest.mark.parametrize("ends", [(math.nan, math.nan), (1.0, -1.0), (math.inf, math.inf), (-math.inf, math.inf)])
def test_a_bound_that_is_no_pair_of_numbers_certifies_nothing(
    model: Graph, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch, ends: tuple[float, float]
) -> None:
    def senseless(prepared: Prepared, query: Query) -> Bounds:
        result = interval(prepared, query)
        lower, upper = (torch.full_like(result.box.lower, end) for end in ends)
        return Bounds(Box(lower, upper), result.steps)

    monkeypatch.setitem(METHODS, "senseless", senseless)
    verdicts = certify(model, images[:8], labels[:8], "0.001", method="senseless")
    assert set(statuses(verdicts)) <= {Status.UNKNOWN, Status.MISCLASSIFIED}
    assert all(v.margin is None and "not finite" in v.reason for v in verdicts if v.status is Status.UNKNOWN)
