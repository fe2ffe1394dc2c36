"""The graph: it computes what the model computes, and refuses whatever it does not know, by name and place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import verideq
from verideq.box import Box
from verideq.certify.interval import RULES
from verideq.equilibrium import Equilibrium, FeedbackFusion
from verideq.errors import ModelError, UnsupportedOperation
from verideq.graph import OPERATIONS, Add, Embed, Graph, Normalize, load_model, save_model, trace, unsupported
from verideq.parametrizations import FeedbackGauge, IBPMonDEQ


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def dense(units: int = 6, inputs: int = 8) -> Equilibrium:
    return Equilibrium(IBPMonDEQ.apply(nn.Linear(units, units, bias=False), m=0.2), nn.Linear(inputs, units))


class Forward(nn.Module):
    """A user's module whose forward is a function of the module and one input."""

    def __init__(self, run: Callable[..., object], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def kinds(graph: Graph) -> list[str]:
    return [node.operation.kind for node in graph.nodes]


def assert_same(model: nn.Module, x: Tensor, expected: list[str] | None = None) -> Graph:
    """The graph has the given operations and the model's outputs; the model is left as it was."""
    model.eval()
    graph = trace(model)
    if expected is not None:
        assert kinds(graph) == expected
    kept = x.clone()
    assert torch.equal(graph(x.clone()), model(x.clone()))
    assert torch.allclose(graph.frozen()(kept.double()), model(kept.clone()).double(), atol=1e-4)
    return graph


IMAGE = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(7))
ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(8))


# --- what is traced ---------------------------------------------------------------------------------------------------


def test_sequential() -> None:
    model = nn.Sequential(
        Normalize([0.1, 0.2], [0.5, 0.4]), nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    graph = assert_same(model, IMAGE, ["normalize", "conv2d", "relu", "flatten", "linear"])
    assert [node.name for node in graph.nodes] == ["0", "1", "2", "3", "4"]
    assert graph.classes == 5
    assert graph.nodes[1].module is model[1], "the graph shares the user's parameters"


def test_a_bare_operation_and_a_bare_equilibrium() -> None:
    assert_same(nn.Linear(8, 2), ROWS, ["linear"])
    assert_same(dense(), ROWS, ["linear", "equilibrium"])


def test_nested_containers_keep_the_place_in_the_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 2))
    assert [node.name for node in assert_same(model, ROWS).nodes] == ["0.0", "0.1", "1"]


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (lambda self, x: F.relu(x), "relu"),
        (lambda self, x: torch.relu(x), "relu"),
        (lambda self, x: x.relu(), "relu"),
        (lambda self, x: F.relu(x, inplace=True), "relu"),
        (lambda self, x: x.relu_(), "relu"),
        (lambda self, x: torch.flatten(x, 1), "flatten"),
        (lambda self, x: x.flatten(start_dim=1), "flatten"),
        (lambda self, x: x.view(x.size(0), -1), "flatten"),
        (lambda self, x: x.view((x.shape[0], -1)), "flatten"),
        (lambda self, x: x.reshape(x.size()[0], -1), "flatten"),
        (lambda self, x: torch.reshape(x, (x.shape[0], -1)), "flatten"),
        (lambda self, x: F.avg_pool2d(x, 2), "avg_pool2d"),
        (lambda self, x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False), "avg_pool2d"),
        (lambda self, x: F.max_pool2d(x, 2), "max_pool2d"),
        (lambda self, x: F.max_pool2d(x, 3, 1, padding=1), "max_pool2d"),
        (lambda self, x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d"),
    ],
)
def test_functions(run: Callable[..., object], kind: str) -> None:
    assert_same(Forward(run), IMAGE - 0.5, [kind])


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: self.a(x) + self.b(x),
        lambda self, x: torch.add(self.a(x), self.b(x)),
        lambda self, x: self.a(x).add(self.b(x)),
        lambda self, x: self.a(x).add_(self.b(x)),
        lambda self, x: self.add(self.a(x), self.b(x)),
    ],
)
def test_residual_adds(run: Callable[..., object]) -> None:
    model = Forward(run, a=nn.Linear(8, 4), b=nn.Linear(8, 4), add=Add())
    assert_same(model, ROWS, ["linear", "linear", "add"])


def test_augmented_assignment() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        out = self.a(x)
        out += self.b(x)
        return F.relu(out)

    assert_same(Forward(run, a=nn.Linear(8, 4), b=nn.Linear(8, 4)), ROWS, ["linear", "linear", "add", "relu"])


def test_a_residual_on_the_input() -> None:
    assert_same(Forward(lambda self, x: self.a(x) + x, a=nn.Linear(8, 8)), ROWS, ["linear", "add"])


def test_dropout_and_identity_are_nothing() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Conv2d(2, 4, 3), nn.Dropout2d(0.3), nn.ReLU())
    assert_same(model, IMAGE, ["conv2d", "relu"])


def test_a_shared_module_is_a_node_for_every_use() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.a(self.a(x))

    graph = assert_same(Forward(run, a=nn.Linear(8, 8)), ROWS, ["linear", "linear"])
    assert [node.name for node in graph.nodes] == ["a", "a@2"]


def test_a_module_named_input_does_not_hide_the_input() -> None:
    graph = assert_same(Forward(lambda self, x: self.input(x) + x, input=nn.Linear(8, 8)), ROWS, ["linear", "add"])
    assert graph.nodes[1].inputs == ("input@2", "input")


def test_equilibria_inside_equilibria() -> None:
    inner = dense()
    residual = Forward(lambda self, x: self.a(x) + F.relu(self.b(x)), a=nn.Linear(6, 5), b=nn.Linear(6, 5))
    outer = Equilibrium(IBPMonDEQ.apply(nn.Linear(5, 5, bias=False)), nn.Sequential(inner, residual))
    graph = assert_same(nn.Sequential(outer, nn.Linear(5, 2)), ROWS)
    assert kinds(graph) == ["linear", "equilibrium", "linear", "linear", "relu", "add", "equilibrium", "linear"]
    assert [name for name, _ in graph.equilibria()] == ["0.injection.0", "0"]


def test_an_identity_injection() -> None:
    layer = Equilibrium(IBPMonDEQ.apply(nn.Linear(8, 8, bias=False)), nn.Identity())
    assert_same(layer, ROWS, ["equilibrium"])


def test_what_is_computed_beside_the_output_is_left_out() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        hidden = self.a(x)
        self.b(hidden)
        return hidden

    assert_same(Forward(run, a=nn.Linear(8, 4), b=nn.Linear(4, 2)), ROWS, ["linear"])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_is_left_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 4), nn.Dropout()), nn.Linear(4, 2)).train(
        training
    )
    model[1].eval()
    before = [module.training for module in model.modules()]
    trace(model)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(UnsupportedOperation):
        trace(model.append(nn.Tanh()))
    assert [module.training for module in model.modules()][:-1] == before


def test_a_graph_is_its_own_graph() -> None:
    graph = trace(nn.Linear(8, 2))
    assert trace(graph) is graph


# --- what is refused --------------------------------------------------------------------------------------------------


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class NotIdentity(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else F.relu(x)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class BareParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


def replaced(module: nn.Module) -> nn.Module:
    module.forward = lambda x: -x  # type: ignore[method-assign]  # what a user may do
    return module


REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "module": (nn.Sequential(nn.Linear(8, 4), nn.Tanh()), "1", "Tanh"),
    "nested module": (nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())), "0.1", "Sigmoid"),
    "in an injection": (
        nn.Sequential(Equilibrium(nn.Linear(8, 8, bias=False), nn.Sequential(nn.GELU()))),
        "0.injection.0",
        "GELU",
    ),
    "function": (Forward(lambda self, x: torch.sigmoid(x)), "the model", "sigmoid"),
    "method": (Forward(lambda self, x: x.tanh()), "the model", "tanh"),
    "subclass": (nn.Sequential(Shifted(8, 4)), "the model", "0.weight"),
    "subclass of Equilibrium": (
        nn.Sequential(type("Mine", (Equilibrium,), {})(nn.Linear(8, 8, bias=False), nn.Identity())),
        "0",
        "Mine",
    ),
    "hook": (nn.Sequential(hooked(nn.Linear(8, 4))), "0", "hooks"),
    "hook on an identity": (nn.Sequential(hooked(nn.Identity()), nn.Linear(8, 4)), "0", "hooks"),
    "hook on the model": (hooked(nn.Sequential(nn.Linear(8, 4))), "the model", "hooks"),
    "hook on a bare layer": (hooked(nn.Linear(8, 4)), "the model", "hooks"),
    "replaced forward": (nn.Sequential(replaced(nn.Linear(8, 4))), "0", "replaced forward"),
    "replaced forward of the model": (replaced(nn.Sequential(nn.Linear(8, 4))), "the model", "replaced forward"),
    "hook on an injection": (
        Equilibrium(nn.Linear(4, 4, bias=False), hooked(nn.Linear(8, 4))),
        "equilibrium.injection",
        "hooks",
    ),
    "control flow": (nn.Sequential(Branches()), "the model", "control flow"),
    "bare parameter": (BareParameter(), "the model", "bare parameter scale"),
    "product with a number": (Forward(lambda self, x: x * 2), "the model", "mul"),
    "sum with a number": (Forward(lambda self, x: x + 1), "the model", "add"),
    "scaled sum": (Forward(lambda self, x: torch.add(x, self.a(x), alpha=2), a=nn.Linear(8, 8)), "the model", "add"),
    "difference": (Forward(lambda self, x: x - self.a(x), a=nn.Linear(8, 8)), "the model", "sub"),
    "flatten with the batch": (Forward(lambda self, x: x.flatten(0)), "flatten", "axes 0 to -1"),
    "flatten module with the batch": (nn.Sequential(nn.Flatten(0)), "0", "axes 0 to -1"),
    "view of the batch": (Forward(lambda self, x: x.view(-1)), "the model", "view"),
    "view by another axis": (Forward(lambda self, x: x.view(x.shape[1:][0], -1)), "the model", "view"),
    "view by a second axis": (Forward(lambda self, x: x.view(x.size(1), -1)), "the model", "view"),
    "no running statistics": (nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False)), "0", "running statistics"),
    "indices": (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "0", "returns indices"),
    "softmax": (nn.Sequential(nn.Linear(8, 4), nn.Softmax(dim=1)), "1", "Softmax"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_operations_are_refused_by_name_and_place(case: str) -> None:
    model, place, name = REFUSED[case]
    with pytest.raises(UnsupportedOperation) as caught:
        trace(model.eval())
    message = str(caught.value)
    assert message.startswith((f"{place}:", f"{place} ("))
    assert name in message
    assert all(kind in message for kind in OPERATIONS), "the list of what is supported"
    assert "\n" not in message


def test_the_line_of_the_users_code_is_named() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return torch.sigmoid(x)  # the offending line

    with pytest.raises(UnsupportedOperation, match=r"at test_graph\.py:\d+, `return torch.sigmoid\(x\)"):
        trace(Forward(run))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoInputs(), "the model takes more than one input .y."),
        (Forward(lambda self, x: (F.relu(x), x)), "has to return one tensor"),
        (Forward(lambda self, x: {"logits": F.relu(x)}), "has to return one tensor"),
        (nn.Sequential(nn.Linear(8, 8), Forward(lambda self, x: None)), "has to return one tensor"),
    ],
)
def test_one_tensor_in_one_tensor_out(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedOperation, match=message):
        trace(model)


def test_a_model_without_operations_is_refused() -> None:
    with pytest.raises(ModelError, match="no operations"):
        trace(nn.Identity())


def test_a_subclass_of_identity_is_looked_into() -> None:
    with pytest.raises(UnsupportedOperation, match="neg"):
        trace(Equilibrium(nn.Linear(8, 8, bias=False), NotIdentity()))


def _alias(self: nn.Module, x: Tensor) -> Tensor:
    hidden = self.a(x)
    other = hidden
    hidden += x
    return hidden + other


OVERWRITES: dict[str, nn.Module] = {
    "another name": Forward(_alias, a=nn.Linear(8, 8)),
    "a relu": Forward(lambda self, x: F.relu(x, inplace=True) + x),
    "a relu module": Forward(lambda self, x: self.relu(x) + x, relu=nn.ReLU(inplace=True)),
    "a view": Forward(
        lambda self, x: (self.a(h := self.b(x)), h.flatten(1).relu_(), h)[2], a=nn.Linear(8, 8), b=nn.Linear(8, 8)
    ),
    "through dropout": Forward(lambda self, x: self.drop(x).relu_() + x, drop=nn.Dropout()),
    "the result is dropped": Forward(lambda self, x: (h := self.a(x), h.relu_(), h)[2], a=nn.Linear(8, 8)),
    "an injection": Forward(
        lambda self, x: self.a(h := self.b(x)) + h,
        a=Equilibrium(nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True)),
        b=nn.Linear(8, 8),
    ),
    "within an injection": Forward(
        lambda self, x: self.a(h := self.b(x)) + h,
        a=Equilibrium(nn.Linear(8, 8, bias=False), nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))),
        b=nn.Linear(8, 8),
    ),
}


@pytest.mark.parametrize("case", OVERWRITES)
def test_reading_what_was_overwritten_in_place_is_refused(case: str) -> None:
    with pytest.raises(UnsupportedOperation, match="overwritten it in place"):
        trace(OVERWRITES[case].eval())


def test_harmless_work_in_place_is_traced() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        hidden = self.relu(self.a(x))
        kept = self.b(hidden)  # reads before, not after
        hidden += kept
        return F.relu(hidden, inplace=True)

    assert_same(Forward(run, a=nn.Linear(8, 8), b=nn.Linear(8, 8), relu=nn.ReLU(inplace=True)), ROWS)


# --- shapes and weights -----------------------------------------------------------------------------------------------


def test_an_input_of_the_wrong_shape_names_the_node() -> None:
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(72, 4)))
    assert graph.check_input(IMAGE) == (4,)
    with pytest.raises(ModelError, match=r"inputs of shape \(2, 5, 5\) do not fit the model: 1 \(linear\) got \(50,\)"):
        graph.check_input(IMAGE[..., :5, :5])


def test_a_recorded_input_shape_is_checked_first() -> None:
    graph = Graph(trace(nn.Flatten()).nodes, input_shape=(2, 6, 6))
    assert graph.check_input(IMAGE) == (72,)
    with pytest.raises(ModelError, match=r"takes inputs of shape \(2, 6, 6\), the data have \(2, 5, 6\)"):
        graph.check_input(IMAGE[..., :5, :])


def test_an_injection_that_does_not_fit_the_state() -> None:
    graph = trace(Equilibrium(nn.Linear(4, 4, bias=False), nn.Linear(8, 5)))
    with pytest.raises(ModelError, match="equilibrium"):
        graph.check_input(ROWS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[1, 2] = value
    with pytest.raises(ModelError, match=r"1\.weight\[1, 2\] is (nan|inf)"):
        trace(model).check_finite()


def test_names_are_defined_once_and_before_use() -> None:
    node = trace(nn.Linear(8, 8)).nodes[0]
    with pytest.raises(ModelError, match="'linear'"):
        Graph([node, node])
    with pytest.raises(ModelError, match="no operations"):
        Graph([])


# --- the conformance suite: a new operation needs a case here, and inherits every test ------------------------------


def _batch_norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], channels: int) -> nn.Module:
    module = kind(channels)
    for tensor in (module.running_mean, module.weight, module.bias):
        nn.init.normal_(tensor)
    nn.init.uniform_(module.running_var, 0.5, 2.0)
    return module


def _convolutional_equilibrium() -> Equilibrium:
    fusion = IBPMonDEQ.apply(nn.Conv2d(3, 3, 3, padding="same", bias=False), m=0.2)
    return Equilibrium(fusion, nn.Conv2d(2, 3, 3, padding=1))


def _coupled_equilibrium() -> nn.Module:
    couplings = nn.Conv2d(2, 3, 4, 2, 1, bias=False), nn.Linear(27, 4, bias=False)
    fusion = FeedbackFusion([(2, 6, 6), (3, 3, 3), (4,)], couplings)
    injection = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Embed(torch.randn(31)))
    return Equilibrium(FeedbackGauge.apply(fusion, 0.2), injection, "hard-sigmoid")


CASES: dict[str, list[tuple[Callable[[], nn.Module], Tensor]]] = {
    "normalize": [(lambda: Normalize([0.1, 0.4], [0.5, 2.0]), IMAGE), (lambda: Normalize(0.3, 0.25), ROWS)],
    "linear": [(lambda: nn.Linear(8, 5), ROWS), (lambda: nn.Linear(8, 5, bias=False), ROWS)],
    "conv2d": [
        (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), IMAGE),
        (
            lambda: nn.Conv2d(
                2, 4, (3, 2), dilation=(2, 1), groups=2, padding="same", padding_mode="circular", bias=False
            ),
            IMAGE,
        ),
    ],
    "batch_norm1d": [(lambda: _batch_norm(nn.BatchNorm1d, 8), ROWS), (lambda: nn.BatchNorm1d(8, affine=False), ROWS)],
    "batch_norm2d": [(lambda: _batch_norm(nn.BatchNorm2d, 2), IMAGE)],
    "relu": [(nn.ReLU, ROWS), (lambda: nn.ReLU(inplace=True), ROWS)],
    "avg_pool2d": [
        (lambda: nn.AvgPool2d(2), IMAGE),
        (lambda: nn.AvgPool2d((3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False), IMAGE),
        (lambda: nn.AvgPool2d(2, divisor_override=3), IMAGE),
    ],
    "adaptive_avg_pool2d": [(lambda: nn.AdaptiveAvgPool2d(1), IMAGE), (lambda: nn.AdaptiveAvgPool2d((4, None)), IMAGE)],
    "max_pool2d": [
        (lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), IMAGE),
        (lambda: nn.MaxPool2d(2, 1, dilation=2), IMAGE),
    ],
    "flatten": [(nn.Flatten, IMAGE)],
    "embed": [(lambda: Embed(torch.randn(3)), IMAGE), (lambda: Embed(torch.randn(1)), ROWS)],
    "add": [(lambda: Forward(lambda self, x: self.a(x) + x, a=nn.Linear(8, 8)), ROWS)],
    "equilibrium": [(dense, ROWS), (_convolutional_equilibrium, IMAGE), (_coupled_equilibrium, IMAGE)],
}

INSTANCES = [
    pytest.param(kind, *case, id=f"{kind}-{i}") for kind, cases in CASES.items() for i, case in enumerate(cases)
]
CONFORMANCE = pytest.mark.parametrize(("kind", "make", "x"), INSTANCES)


def test_every_operation_has_a_case_and_a_rule() -> None:
    assert set(CASES) == set(OPERATIONS) == set(RULES)


@CONFORMANCE
def test_file_round_trip(kind: str, make: Callable[[], nn.Module], x: Tensor, tmp_path: object) -> None:
    model = make().eval()
    path = f"{tmp_path}/model.safetensors"
    digest = save_model(model, path)
    loaded = load_model(path)
    assert kind in kinds(loaded)
    assert torch.allclose(loaded(x.clone()), model(x.clone()), atol=1e-5, rtol=1e-5)
    assert verideq.graph.model_hash(loaded) == digest


@CONFORMANCE
def test_frozen_computes_the_same_in_float64(kind: str, make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make().eval()
    frozen = trace(model).frozen()
    assert kinds(frozen) == kinds(trace(model))
    result = frozen(x.double())
    assert result.dtype is torch.float64
    # The same numbers in float64: parametrizations are evaluated before the change of dtype.
    for node, copy in zip(trace(model).nodes, frozen.nodes, strict=True):
        state, copied = node.operation.state(node.module), copy.operation.state(copy.module)
        assert all(torch.equal(state[name].double(), copied[name]) for name in state)
        assert state.keys() == copied.keys()
    assert torch.allclose(result, model(x.clone()).double(), atol=1e-4, rtol=1e-4)


@CONFORMANCE
def test_the_bound_contains_sampled_and_corner_points(kind: str, make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make().eval()
    frozen = trace(model).frozen()
    center, radius = x.double(), 0.1 * torch.rand_like(x, dtype=torch.float64)
    box = verideq.bound(model, Box(center - radius, center + radius))
    for sample in range(40):
        t = 2 * torch.rand_like(center) - 1
        if sample % 2:
            t = t.sign()  # corners, where the extremes of affine maps are
        point = (center + t * radius).clamp(center - radius, center + radius)
        assert bool(box.contains(frozen(point)).all())
    assert bool((box.width < 100).all()), "a bound, not the whole line"


def test_an_affine_bound_is_tight() -> None:
    layer = nn.Linear(8, 5)
    box = verideq.bound(layer, Box(ROWS.double() - 0.1, ROWS.double() + 0.1))
    exact = 0.2 * layer.weight.double().abs().sum(1)
    assert torch.allclose(box.width, exact.expand_as(box.width), rtol=1e-9)


def test_everything_unsupported_is_listed_at_once() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
            fusion = nn.Linear(3, 3, bias=False)
            self.layer = verideq.Equilibrium(fusion, nn.Sequential(nn.Linear(3, 3), nn.GELU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.sigmoid(self.features(x)) * 2)

    problems = unsupported(Several())
    assert [problem.split(" is not supported")[0] for problem in problems] == [
        "features.1: Tanh",
        "the model: sigmoid(features_2)",
        "the model: mul(sigmoid, 2)",
        "layer.injection.1: GELU",
    ]
    assert unsupported(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("forward", "hint"),
    [
        (lambda x: (x - 0.5) / 0.2, "use verideq.Normalize"),
        (lambda x: x + 1, "a constant belongs into a bias"),
        (lambda x: x.mean((2, 3)), r"use adaptive_avg_pool2d\(x, 1\)"),
        (lambda x: torch.softmax(x, 1), "Leave it out"),
    ],
)
def test_a_refusal_says_what_to_write_instead(forward: Callable[[Tensor], Tensor], hint: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    with pytest.raises(UnsupportedOperation, match=hint):
        trace(Model())
