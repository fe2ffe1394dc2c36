"""Balls on their way through a network, of the prover and of the checker: no value leaves its box or its ball."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from test_checker import MODELS
from test_forged_duals import STEP, Net, claimed, split
from test_forgeries import Folder, rewrite
from torch import Tensor, nn

from verideq import Equilibrium, Normalize, Region
from verideq.certify import Prepared, bound, certify, prepare
from verideq.certify import balls as proving
from verideq.certify.bound import run_method
from verideq.certify.certificate import Proof, Split, Step, Then, record
from verideq.checker import Checker, balls, files, proof
from verideq.checker.arithmetic import Exact, Float, Interval, guarded
from verideq.checker.claim import read_claim
from verideq.checker.network import Node, read_nodes
from verideq.equilibrium import RELU
from verideq.errors import ModelError
from verideq.graph import INPUT, Graph
from verideq.parametrizations import MonDEQ
from verideq.testing.exact import ExactModel, exact, outside

FLOAT, EXACT = Float(), Exact()
EPS = Fraction(1, 4)


def monotone(inputs: int = 3, units: int = 3) -> Equilibrium:
    """An equilibrium without a gauge."""
    fusion = MonDEQ.from_weights(torch.randn(units, units) / 2, 3 * torch.randn(units, units), 0.5)
    return Equilibrium(fusion, nn.Linear(inputs, units))


def turning(m: float, k: float, v: tuple[float, float]) -> Equilibrium:
    """``relu`` of ``x + v`` turned and stretched by ``1 / √(m² + k²)``, without a gauge."""
    fusion = MonDEQ.from_weights(torch.zeros(2, 2), torch.tensor([[0.0, k], [0.0, 0.0]]), m)
    return Equilibrium(fusion, linear([[1.0, 0.0], [0.0, 1.0]], list(v)) if any(v) else nn.Identity())


def linear(W: list[list[float]], b: list[float] | None = None) -> nn.Linear:
    module = nn.Linear(len(W[0]), len(W))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(W))
        module.bias.copy_(torch.zeros(len(W)) if b is None else torch.tensor(b))
    return module


def ones(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.ones_(module.weight)
    return module


class Summed(nn.Module):
    """A sum of two values that move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(self.layer(x)) + x)  # type: ignore[no-any-return]  # a tensor


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **MODELS,
    "monotone": (lambda: nn.Sequential(Normalize(0.25, 0.5), monotone(), nn.Linear(3, 2)), (3,)),
    "two monotone": (lambda: nn.Sequential(monotone(), nn.Linear(3, 3), monotone(), nn.Linear(3, 2)), (3,)),
    "deep": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()),
        (3,),
    ),
    "two values that move": (Summed, (3,)),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(8, 2)), (1, 5, 5)),
    # Nets that move as far as a ball says.
    "weak": (lambda: nn.Sequential(turning(0.125, 0.5, (-0.375, 0.625)), linear([[1.0, 0.0]])), (2,)),
    "direct": (lambda: nn.Sequential(Normalize(0.0, 0.125), turning(1.0, 1.5, (0, 0)), linear([[1.0, 0.0]])), (2,)),
    "stretched": (
        lambda: nn.Sequential(
            Normalize(0.0, 0.25), nn.Flatten(), linear([[3.0, 4.0], [3.0, 4.0]]), linear([[1.0, 1.0]])
        ),
        (2,),
    ),
    "wrapped": (
        lambda: nn.Sequential(ones(nn.Conv2d(1, 1, (1, 3), padding=(0, 1), padding_mode="replicate")), nn.Flatten()),
        (1, 1, 1),
    ),
    "spiked": (lambda: nn.Sequential(nn.MaxPool2d(2, 1), nn.Flatten(), linear([[1.0, 1.0, 1.0, 1.0]])), (1, 3, 3)),
    "one of a group": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, stride=2, dilation=(1, 2), padding=2, groups=2), nn.Flatten()),
        (2, 4, 4),
    ),
}


AROUND = {"weak": (0.0, 0.0), "direct": (-0.5, 2.5)}
"""Where no unit of these is off."""


@dataclass(frozen=True)
class Scenario:
    """A net, inputs in an l2 ball, and the true values at the centre and at points of it, (points) by node."""

    prepared: Prepared
    region: Region
    center: dict[str, np.ndarray]
    points: list[dict[str, np.ndarray]]

    def payload(self, steps: tuple[Step, ...] = (), tree: Any = 0) -> bytes:
        """A record about the outputs, its boxes those of the interval bound."""
        known = run_method(self.prepared, self.region, None, "interval").proof(0)
        last = self.center[self.prepared.graph.nodes[-1].name].size
        cases = ((*steps, Step()),) if tree == 0 else ((steps), (Step(),), (Step(),))
        made = Proof(known.boxes, known.states, cases, ((None, tree),))
        return record(
            self.prepared.checker.hash, 0, self.region, 0, made, label=None, C=np.eye(last), rhs=np.zeros(last),
            margin=0.0,
        )  # fmt: skip


def worst(prepared: Prepared, center: Tensor, draw: np.random.Generator) -> list[np.ndarray]:
    """Directions of length 1 in which values move most: single entries of them, and all of them together."""
    ways = []
    for node in prepared.graph.nodes:
        part = Graph(prepared.graph.nodes[: prepared.graph.nodes.index(node) + 1], input_shape=tuple(center.shape))

        def run(x: Tensor, part: Graph = part) -> Tensor:
            return part(x[None])[0].flatten()

        jacobian = torch.autograd.functional.jacobian(run, center).flatten(1).numpy()
        ways += [jacobian[draw.integers(len(jacobian))], np.linalg.svd(jacobian)[2][0]]
    size = center.numel()
    ways += [np.eye(size)[draw.integers(size)], draw.normal(size=size)]
    return [way / np.linalg.norm(way) for way in ways if np.linalg.norm(way) > 0]


def measured(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    """Values in float64, for nets with a square root."""
    values = {INPUT: torch.from_numpy(x.astype(np.float64))[None]}
    for node in graph.nodes:
        values[node.name] = node.module(*(values[name] for name in node.inputs)).detach()
    return {name: exact(value[0]) for name, value in values.items()}


@cache
def scenario(name: str, weighted: bool = False) -> Scenario:
    """The net of this name, seeded by it."""
    torch.manual_seed(len(name))
    make, shape = NETS[name]
    prepared = prepare(deepcopy(make()).eval().double())
    center = torch.rand(shape, dtype=torch.float64).mul(64).round().div(64)
    if name == "spiked":  # in four windows, the largest of each
        center[0, 1, 1] += 2
    if name in AROUND:
        center = torch.tensor(AROUND[name], dtype=torch.float64)
    draw = np.random.default_rng(0)
    weights = torch.from_numpy(draw.choice([0.0, 0.5, 1.0], shape)) if weighted else None
    region = Region(center[None], EPS, "l2", None, weights=weights)
    truth = ExactModel(prepared.graph).values if name in RATIONAL else partial(measured, prepared.graph)
    values = []
    for way in worst(prepared, center, draw):
        for sign in (1, -1):
            step = torch.from_numpy(sign * way.reshape(shape)) * (float(EPS) * (1 - 1e-12))
            x = exact(center) + exact(step if weights is None else step * weights)
            values.append(truth(x))
    return Scenario(prepared, region, truth(exact(center)), values)


RATIONAL = [name for name in NETS if not name.startswith("batch_norm")]
"""Nets without a square root."""


def scene(given: Scenario, calc: Float | Exact, payload: bytes | None = None) -> proof._Proof:
    """What the checker knows of the values."""
    checker = Checker(given.prepared.file, given.prepared.certificate, exact=calc is EXACT)
    read = read_claim(files.parse_blob(payload or given.payload()), checker.hash, checker.pixels, checker.arithmetic)
    (case,) = list(read.cases(len(given.center[given.prepared.graph.nodes[-1].name])))[-1:]
    run = proof._Proof(checker.arithmetic, checker.nodes, checker.layer, [case])
    with guarded():
        run.run()
    assert run.holds.all()
    return run


def beyond(given: Scenario, calc: Float | Exact, run: proof._Proof, near: Fraction = Fraction(0)) -> list[str]:
    """Values that leave their box or their ball by more than this."""
    found = []
    for values in given.points:
        for name, box in run.scene.values.items():
            lo, hi = box[0][0], box[1][0]
            if not ((lo <= values[name] + near) & (values[name] - near <= hi)).all():
                found.append(f"{name} leaves its box")
        for name, ball in run.scene.balls.items():
            moved, length = values[name] - given.center[name], Fraction(ball.length[0])
            scale = calc.exactly(ball.scale[0].astype(float)) if calc is FLOAT else ball.scale[0]
            away = sum((Fraction(m) / Fraction(d)) ** 2 for m, d in zip(moved.flat, scale.flat, strict=True) if d)
            still = all(m == 0 for m, d in zip(moved.flat, scale.flat, strict=True) if not d)
            center = ball.center[0][0], ball.center[1][0]
            middle = given.center[name]
            inside = (center[0] <= middle + near).all() and (middle - near <= center[1]).all()
            if away > (length + near) ** 2 or not still or not inside:
                found.append(f"{name} leaves its ball")
    return found


@pytest.mark.parametrize("calc", [FLOAT, EXACT])
@pytest.mark.parametrize("name", RATIONAL)
def test_no_value_leaves_its_ball(name: str, calc: Float | Exact) -> None:
    given = scenario(name)
    assert beyond(given, calc, scene(given, calc)) == []


@pytest.mark.parametrize("name", sorted(set(NETS) - set(RATIONAL)))
def test_no_measured_value_leaves_its_ball(name: str) -> None:
    given = scenario(name)
    assert beyond(given, FLOAT, scene(given, FLOAT), Fraction(1, 10**12)) == []


@pytest.mark.parametrize("name", ["normalize", "deep", "monotone", "strided convolution", "maximum", "average"])
def test_features_have_radii_of_their_own(name: str) -> None:
    given = scenario(name, weighted=True)
    assert beyond(given, FLOAT, scene(given, FLOAT)) == []


@pytest.mark.parametrize("name", RATIONAL)
@pytest.mark.parametrize("method", ["interval", "adjoint"])
def test_no_output_leaves_its_bound(name: str, method: str) -> None:
    given = scenario(name)
    last = given.prepared.graph.nodes[-1].name
    outputs = given.center[last].size
    for C in (None, torch.eye(outputs).double()[None]):
        box = bound(given.prepared, given.region, C=C, method=method)
        assert all(outside(values[last], box.lower[0], box.upper[0]) == [] for values in given.points)


@pytest.mark.parametrize("method", ["interval", "adjoint", "lipschitz"])
@pytest.mark.parametrize("name", NETS)
def test_the_checker_proves_as_much_as_the_prover(name: str, method: str) -> None:
    given = scenario(name)
    if method == "lipschitz" and any(layer.activation != RELU for _, layer in given.prepared.graph.equilibria()):
        with pytest.raises(ModelError, match="method lipschitz is for ReLU equilibria"):
            run_method(given.prepared, given.region, None, method)
        return
    size = given.center[given.prepared.graph.nodes[-1].name].size
    C = torch.cat((torch.eye(size), -torch.ones(1, size))).double()
    ours = run_method(given.prepared, given.region, C, method, upper=False)
    lower, made = ours.box.lower[0], ours.proof(0)
    rhs = (lower - 1e-6 * (1 + lower.abs())).numpy()
    prepared, region = given.prepared, given.region
    payload = record(prepared.checker.hash, 0, region, 0, made, label=None, C=C.numpy(), rhs=rhs, margin=0.0)
    accepted, reason, _ = prepared.checker.decide([payload])[0]
    assert accepted, reason


@pytest.mark.parametrize("name", ["deep", "monotone", "two values that move"])
def test_balls_are_kept_below_shared_tightenings(name: str) -> None:
    given = scenario(name)
    states = {n.name: given.center[n.name] for n in given.prepared.graph.nodes if n.operation.kind in RELAXED}
    node, state = next(iter(states.items()))
    step = Step(node, units=np.arange(state.size), multipliers={node: np.zeros((state.size, *state.shape))})
    payload = given.payload((step,), Then(0, Split(INPUT, 0, Fraction(1, 2), 1, 2)))
    run = scene(given, FLOAT, payload)
    assert set(run.scene.balls) == set(scene(given, FLOAT).scene.balls)
    half = [values for values in given.points if values[INPUT].flat[0] >= Fraction(1, 2)]
    assert half and beyond(Scenario(given.prepared, given.region, given.center, half), FLOAT, run) == []


RELAXED = ("relu", "equilibrium")


# --- how tight they are -----------------------------------------------------------------------------------------------


def test_one_affine_map_is_bounded_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Normalize([0.25], [0.5]), nn.Flatten(), nn.Linear(16, 3)).double()
    center = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    box = bound(model, Region(center, EPS, "l2", None))
    for side, sign in ((box.lower, -1), (box.upper, 1)):
        truth = model(center) + sign * float(EPS) * model.get_parameter("2.weight").norm(dim=1) / 0.5
        assert torch.allclose(side, truth, rtol=1e-11, atol=1e-11)
    C = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    rows = bound(model, Region(center, EPS, "l2", None), C=C)
    truth = (model(center) @ C.T - float(EPS) * (C @ model.get_parameter("2.weight")).norm(dim=1) / 0.5).detach()
    assert torch.allclose(rows.lower, truth, rtol=1e-11, atol=1e-11)


def test_orthogonal_layers_move_no_further_than_their_input() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 2)).double()
    center = torch.rand(1, 16, dtype=torch.float64)
    ball, linf = (bound(model, Region(center, "1/10", norm, None)).width for norm in ("l2", "linf"))
    row = model.get_parameter("8.weight").norm(dim=1)
    assert bool((ball <= 2 * 0.1 * row * (1 + 1e-6)).all())
    assert bool((ball < linf / 20).all())


def test_a_monotone_layer_has_the_constant_of_pabbaraju() -> None:
    """``‖C‖ ‖U‖ / m``."""
    torch.manual_seed(0)
    layer, last = monotone(4, 4).double(), nn.Linear(4, 2).double()
    width = bound(nn.Sequential(layer, last), Region(torch.rand(1, 4), "1/10", "l2", None)).width
    U = torch.linalg.matrix_norm(layer.injection.get_parameter("weight"), 2)
    assert bool((width <= 2 * 0.1 * last.weight.norm(dim=1) * U / 0.5 * (1 + 1e-5)).all())


def weights() -> list[np.ndarray]:
    """Matrices of many shapes and scales."""
    draw = np.random.default_rng(0)
    shapes = [(1, 1), (5, 5), (3, 9), (9, 3), (12, 20)]
    found = [draw.normal(size=shape) * 10.0 ** draw.integers(-9, 9) for shape in shapes]
    return [*found, np.eye(4), np.outer(found[1][0], found[1][1]), np.ones((7, 3)), np.full((2, 2), 1e-120)]


@pytest.mark.parametrize("place", range(len(weights())))
def test_a_norm_is_proved_and_close(place: int) -> None:
    matrix = weights()[place]
    truth = float(np.linalg.norm(matrix, 2))
    for found in (
        proving.spectral(torch.from_numpy(matrix)),
        float(balls.spectral(FLOAT, matrix)[0]),
        float(balls.spectral(EXACT, EXACT.exactly(matrix))[0]),
    ):
        assert truth * (1 - 1e-12) <= found <= truth * (1 + 1e-5)
    # Or the checker has wider values than those that a proposed box is made for.
    assert proving.spectral(torch.from_numpy(matrix)) >= float(balls.spectral(FLOAT, matrix)[0])


def test_norms_of_nothing_and_of_too_much() -> None:
    zero, large = np.zeros((3, 2)), np.full((2, 2), 1e200)
    assert proving.spectral(torch.from_numpy(zero)) == 0 and float(balls.spectral(FLOAT, zero)[0]) <= 2.0**-400
    assert 2e200 <= proving.spectral(torch.from_numpy(large)) <= 2.001e200
    with guarded():
        assert not float(balls.spectral(FLOAT, large)[0]) < 2e200
    assert np.isnan(proving.spectral(torch.full((2, 2), torch.inf, dtype=torch.float64)))


def test_a_norm_of_a_large_matrix_is_that_of_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = weights()[3]
    sums = np.sqrt(np.abs(matrix).sum(0).max() * np.abs(matrix).sum(1).max())
    monkeypatch.setattr(balls, "LARGE", 1)
    monkeypatch.setattr(proving, "LARGE", 1)
    for found in (proving.spectral(torch.from_numpy(matrix)), float(balls.spectral(FLOAT, matrix)[0])):
        assert sums * (1 - 1e-12) <= found <= sums * (1 + 1e-5)


CONVOLUTIONS: list[dict[str, Any]] = [
    dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=2, stride=2),
    dict(kernel_size=(1, 3), stride=(1, 3)), dict(kernel_size=2, dilation=2, stride=2), dict(kernel_size=1, groups=2),
    dict(kernel_size=3, groups=2, padding=1), dict(kernel_size=3, padding="same", dilation=(1, 2)),
    dict(kernel_size=2, stride=3), dict(kernel_size=3, padding="valid"),
]  # fmt: skip


def convolution_norms(arguments: dict[str, Any], seed: int, *, ones: bool) -> tuple[float, float, float]:
    """The true norm on a small image, and the two bounds."""
    torch.manual_seed(seed)
    inputs, outputs = ((2, 4), (4, 2))[seed % 2]
    module = nn.Conv2d(inputs, outputs, bias=False, **arguments).double()
    with torch.no_grad():
        module.weight.normal_()
        if ones:  # as far as a bound by patches goes
            module.weight.fill_(1.0)
    basis = torch.eye(inputs * 49, dtype=torch.float64).view(-1, inputs, 7, 7)
    truth = float(torch.linalg.matrix_norm(module(basis).flatten(1).detach(), 2))
    prepared = prepare(nn.Sequential(module, nn.Flatten()))
    (node, _) = read_nodes(files.parse_blob(prepared.file), FLOAT)
    ours = proving.Balls(lambda node, boxes: boxes[0]).norm(prepared.graph.nodes[0])
    return truth, ours, float(balls.norm(FLOAT, node)[0])


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
def test_a_norm_of_a_convolution_is_one(arguments: dict[str, Any]) -> None:
    for seed in range(4):
        truth, ours, theirs = convolution_norms(arguments, seed, ones=seed >= 2)
        assert truth <= ours * (1 + 1e-12) and ours == pytest.approx(theirs, rel=1e-5)
        assert ours <= 3 * truth


def test_a_norm_belongs_to_its_weights() -> None:
    node = Node("a", "linear", (), {}, {"weight": np.eye(2)})
    assert float(balls.norm(FLOAT, node)[0]) == pytest.approx(1)
    assert "norm" in node.kept and balls.norm(FLOAT, node) is balls.norm(FLOAT, node)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["interval", "adjoint", "adjoint-refined", "branch-and-bound"])
@pytest.mark.parametrize("name", ["deep", "pooled", "two values that move", "transformed", "average", "two equilibria"])
def test_what_is_proposed_is_accepted(name: str, method: str) -> None:
    prepared = scenario(name).prepared
    images = torch.rand(6, *NETS[name][1], dtype=torch.float64)
    labels = prepared.graph(images).argmax(1)
    certified = 0
    for eps in ("1/100", "1/20", "1/5"):
        verdicts = certify(prepared, images, labels, eps, norm="l2", method=method, timeout=2.0)
        assert not any("refused" in verdict.reason for verdict in verdicts)
        records = [verdict.certificate for verdict in verdicts if verdict.certificate is not None]
        decisions = Checker(prepared.file, prepared.certificate, exact=True).decide(records[:2])
        assert [reason for accepted, reason, _ in decisions if not accepted] == []
        certified += len(records)
    assert certified


def test_a_box_behind_a_norm_is_accepted() -> None:
    """What is injected is as far away as the norm of the layer before it says, and the gauge leaves little room."""
    fusion = linear([[0.5, 0.5 - 2.0**-24], [-0.5, 0.5 - 2.0**-24]])
    layer = Equilibrium(nn.Linear(2, 2, bias=False), linear([[1.0, 1.0], [1.0, -1.0]], [1.0, 1.0]))
    layer.fusion.weight = fusion.weight
    prepared = prepare(nn.Sequential(linear([[0.6, 0.8], [-0.8, 0.6]]), layer, linear([[1.0, 0.0], [0.0, 0.0]])))
    (verdict,) = certify(prepared, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), "1/4", norm="l2", method="interval")
    assert verdict.certified and verdict.checked, verdict.reason


def test_a_deployed_tolerance_ends_a_ball() -> None:
    given = scenario("transformed")
    verdicts = certify(given.prepared, given.region.center, torch.tensor([0]), EPS, norm="l2", deployed_tolerance="1/9")
    assert not any("refused" in verdict.reason for verdict in verdicts)


# --- broken twins -----------------------------------------------------------------------------------------------------


def misled(*names: str) -> bool:
    """Whether some value leaves what the checker knows of it."""
    for name in names or RATIONAL:
        given = scenario(name)
        for node in given.prepared.checker.nodes:
            node.kept.clear()
        try:
            if beyond(given, FLOAT, scene(given, FLOAT)):
                return True
        except AssertionError:
            return True
    return False


def then() -> bool:
    """Whether what lies below shared tightenings forgets how far it moves."""
    given = scenario("deep")
    step = Step("1", units=np.arange(2), multipliers={"1": np.zeros((2, 4))})
    payload = given.payload((step,), Then(0, Split(INPUT, 0, Fraction(1, 2), 1, 2)))
    return bool((scene(given, FLOAT, payload).scene.balls["0"].scale == 0).all())


def tolerated() -> Folder:
    """The false claim that a solver that may stop 1/2 early stays above 1/2."""
    net = Net(1).fused("e", "input", [[0.0]], gauge=[1.0], m=0.5).linear("a", "e", [[1.0]]).relu("r", "a")
    return claimed(net, [1.0], [[1.0]], [0.5], {"state/e": np.ones(1)}, norm="l2", eps="1/8", tolerance="1/2")


def corner() -> Folder:
    """A claim about a corner of the box that the ball does not reach."""
    net = Net(2).linear("a", "input", [[1.0, 1.0]]).linear("b", "a", [[1.0]])
    inner = split("input", 1, {"case": 1}, {"case": 2}, at="9/10")
    tree = split("input", 0, {"case": 0}, inner, at="9/10")
    fields = {"cases": [[STEP]] * 3, "trees": [{"rows": None, "tree": tree}]}
    return claimed(net, [0.0, 0.0], [[1.0]], [-2.0], norm="l2", eps="1", **fields)


def far_half() -> bool:
    """Whether a unit that is off in half of a ball, the centre not in it, is thought to stay where it is."""
    model = nn.Sequential(linear([[1.0, 0.0]]), nn.ReLU())
    prepared = prepare(model)
    region = Region(torch.tensor([[0.125, 0.0]]), EPS, "l2", None)
    made = Proof(cases=((Step(),), (Step(),)), trees=((None, Split("1", 0, Fraction(0), 0, 1)),))
    C, rhs = np.array([[1.0]]), np.array([0.0625])
    payload = record(prepared.checker.hash, 0, region, 0, made, label=None, C=C, rhs=rhs, margin=0.0)
    half, _ = read_claim(files.parse_blob(payload), prepared.checker.hash, None, FLOAT).cases(1)
    # The output is 0 there.
    with np.errstate(all="ignore"):  # as the checker works
        least = proof.least_margins(FLOAT, prepared.checker.nodes, prepared.checker.layer, [half])
    return float(least[0]) > -0.0625


def strided() -> bool:
    cases = [(arguments, seed, ones) for arguments in CONVOLUTIONS for seed in range(4) for ones in (True, False)]
    return any(truth > theirs for truth, _, theirs in (convolution_norms(a, s, ones=o) for a, s, o in cases))


def small_norm() -> bool:
    return any(float(balls.spectral(FLOAT, A)[0]) < np.linalg.norm(A, 2) * (1 - 1e-12) for A in weights())


def low_rows() -> bool:
    """Whether rows over a ball are thought to be larger than they are."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        q, center, scale = draw.normal(size=(3, 1, 4))
        ball = balls.Ball((center, center), np.abs(scale), np.array([0.5]))
        least = float(balls.lowest(FLOAT, (q, q), ball, 1)[0])
        if least > (q @ center.T).item() - 0.5 * np.linalg.norm(q * scale) + 1e-12:
            return True
    return False


def of_others() -> bool:
    """Whether rows of several cases are mixed up."""
    ball = balls.Ball((np.array([[0.0], [8.0]]),) * 2, np.array([[1.0], [2.0]]), np.array([1.0, 3.0]))
    q: Interval = (np.array([[1.0], [2.0], [1.0], [2.0]]),) * 2
    return not np.allclose(balls.lowest(FLOAT, q, ball, 2), [-1, -2, 2, 4])


Broken = tuple[Any, str, str, str, Callable[[], bool]]
TWINS: dict[str, Broken] = {
    "a radius rounded down": (balls, "start", "calc.rational(claim.eps)[1]", "calc.rational(claim.eps)[0] / 2",
        lambda: misled("deep")),
    "no weights": (balls, "start", "one if claim.weights is None else claim.weights", "one / 2", misled),
    "rows of other cases": (balls, "lowest", "np.repeat(ball.scale, rows, 0)", "np.tile(ball.scale, (rows, 1))",
        of_others),
    "lengths of other cases": (balls, "lowest", "np.repeat(ball.length, rows)", "np.tile(ball.length, rows)",
        of_others),
    "no length": (balls, "lowest", "(moved, moved)", "(0 * moved, 0 * moved)", low_rows),
    "no scale": (balls, "lowest", "np.repeat(ball.scale, rows, 0)", "np.repeat(ball.scale, rows, 0) / 2", low_rows),
    "a half that is off": (balls, "rectified", "(z[1] <= 0) & (center[1] <= 0)", "z[1] <= 0", far_half),
    "a ReLU that moves nothing": (balls, "rectified", "np.where(off, calc.zero, ball.scale)", "0 * ball.scale", misled),
    "half a sum": (balls, "summed", "calc.add((a.length, a.length), (b.length, b.length))[1]", "a.length",
        lambda: misled("two values that move")),
    "the smaller scale of a sum": (balls, "summed", "np.maximum(a.scale, b.scale)", "np.minimum(a.scale, b.scale) / 2",
        lambda: misled("two values that move")),
    "half the reach of a sum": (balls, "summed", "calc.add((_reach(calc, a),) * 2, (_reach(calc, b),) * 2)[1]",
        "_reach(calc, b)", lambda: misled("two values that move")),
    "no scaling": (balls, "_scaled", "_times(calc, ball.scale, size)", "ball.scale", lambda: misled("stretched")),
    "a border that repeats": (balls, "_weighted", '"zeros") != "zeros"', '"zeros") == ""', lambda: misled("wrapped")),
    "squares of the scale": (balls, "_weighted", "(_times(calc, ball.scale, ball.scale),) * 2",
        "(ball.scale / 2,) * 2", misled),
    "weights for their squares": (balls, "_weighted", "_times(calc, weight, weight)", "weight", misled),
    "the norm alone, of unit scale": (balls, "_fewer", "_times(calc, _most(ball.scale), norm(calc, node))",
        "norm(calc, node)", lambda: misled("stretched")),
    "the largest row for all": (balls, "_fewer", "_root(calc, total(calc, (flat, flat))[1])",
        "_root(calc, flat.max(1))", misled),
    "an average by the larger sum": (balls, "_averaged", "_times(calc, *sums)", "_times(calc, sums[1], sums[1])",
        misled),
    "a maximum that is in one window": (balls, "_maxima", "_times(calc, ball.length, _covered(calc, node, stride))",
        "ball.length", lambda: misled("spiked")),
    "an equilibrium without m": (balls, "settled", "calc.divide((moved, moved), (strength, strength))[1]", "moved",
        lambda: misled("weak")),
    "an equilibrium of unit scale": (balls, "settled", "_times(calc, ball.length, _most(ball.scale))", "ball.length",
        lambda: misled("direct")),
    "a stride of both ways": (balls, "_convolved", '(1, (1, 1))', '(1, pair(node, "stride", 1))', strided),
    "windows without overlap": (balls, "_covered", "-(-k // s) if d == 1 else k", "1", strided),
    "a dilation that is none": (balls, "_covered", "-(-k // s) if d == 1 else k", "-(-k // s)", strided),
    "the first group": (balls, "_convolved", "for kernel in kernels]", "for kernel in kernels[:1]]", strided),
    "a norm by sums of rows": (balls, "spectral", "size.T, size.T", "size, size", small_norm),
    "the least eigenvalue": (balls, "spectral", "near=-largest * (1 + 2.0**-24))",
        "near=-largest * (1 + 2.0**-24)) / 2",
        small_norm),
    "NaN that is nothing": (balls, "_root", "calc.root((some, some))[1], x)", "calc.root((some, some))[1], calc.zero)",
        lambda: bool(balls._root(FLOAT, np.array([np.nan]))[0] == 0)),
    "a ball around one end": (balls, "around", "(-reach, reach)", "(0 * reach, reach)", misled),
    "the ball of another case": (balls.Ball, "of", "self.scale[chosen]", "0 * self.scale[chosen]", then),
    "a tolerance that nobody charges": (proof._Proof, "_box", "None if claims[0].tolerance else ", "",
        lambda: tolerated().accepted()),
    "crossings": (proof._Proof, "_met", "self.holds & ~", "self.holds | ~", lambda: corner().accepted()),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_twin_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, function, old, new, fooled = TWINS[name]
    assert not fooled()
    rewrite(monkeypatch, owner, function, old, new)
    assert fooled()
