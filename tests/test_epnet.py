"""Energy-based networks: their dynamics follow the primitive function, their gradients are those of a steady state."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.equilibrium import Equilibrium, Implicit, gauge
from verideq.errors import InputError, ModelError, NoGaugeError, UnknownName
from verideq.graph import load_model, save_model
from verideq.models.epnet import EPNet, fold
from verideq.training.propagation import Propagation

KINDS = [
    {"pool": pool, "readout": readout}
    for pool in ("max", "average", "stride")
    for readout in ("squared", "cross-entropy")
]


def net_of(**options: Any) -> EPNet:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"channels": (4, 5), "hidden": (6,), "free_steps": 300}
    return EPNet((1, 8, 8), 3, **{**sizes, **options}).double()


def smooth(**options: Any) -> EPNet:
    """A net whose units stay between the ends of the hard sigmoid: the cost at its steady state is differentiable."""
    net = net_of(**options)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.fill_(0.4 / net.slope)
            else:
                p.mul_(0.3)
    return net


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(size, 1, 8, 8, generator=draw, dtype=torch.float64), torch.arange(size) % 3


@pytest.mark.parametrize("kind", [*KINDS, {"pool": "average", "first_pool": "max"}, {"pool": "none", "channels": (2,)}])
@pytest.mark.parametrize("kernel", [3, 2])
def test_a_step_follows_the_gradient_of_the_primitive_function(kind: dict[str, Any], kernel: int) -> None:
    """The explicit convolutions and transposed convolutions are what autograd makes of Φ, up to rounding."""
    net, (x, _) = net_of(kernel=kernel, **kind), batch()
    links = net.snapshot()
    drive = net.drive(x, links).detach()
    states = [torch.rand(4, *shape, dtype=torch.float64).requires_grad_() for shape in net.shapes]
    wanted = torch.autograd.grad(net.primitive(drive, states, links), states)
    for a, b in zip(wanted, net.pull(drive, states, links), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


def test_all_blocks_move_at_once_from_zero() -> None:
    net, (x, _) = net_of(), batch()
    links = net.snapshot()
    drive = net.drive(x, links)
    first = net.phase(drive, net.rest(drive), links, 1)
    torch.testing.assert_close(first[0], drive.clamp(0, 1))
    torch.testing.assert_close(
        first[1], F.max_pool2d(F.conv2d(net.rest(drive)[0], links[1].weight, links[1].bias, 1, 1), 2).clamp(0, 1)
    )
    # What a block knows of the input after k steps, only the first k blocks know.
    other = net.drive(1 - x, links)
    for k, (a, b) in enumerate(
        zip(
            net.settling(drive, net.rest(drive), links, 3), net.settling(other, net.rest(drive), links, 3), strict=True
        ),
        1,
    ):
        assert [bool((s != t).any()) for s, t in zip(a, b, strict=True)] == [n < k for n in range(len(a))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_nudge_follows_the_cost(kind: dict[str, Any]) -> None:
    net, (x, y) = smooth(**kind), batch()
    links = net.snapshot()
    drive = net.drive(x, links).detach()
    states = [torch.rand(4, *shape, dtype=torch.float64) for shape in net.shapes]
    states[-1].requires_grad_()
    (slope,) = torch.autograd.grad(net.cost(states, y), states[-1])
    moved = net.phase(drive, states, links, 1, beta=1e-3, labels=y)[-1] - net.phase(drive, states, links, 1)[-1]
    torch.testing.assert_close(moved.detach(), -1e-3 * slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "padding", "kernel"), [(8, 1, 3), (7, 1, 3), (6, 0, 3), (9, 2, 4)])
def test_average_pooling_is_a_convolution_of_stride_two(size: int, padding: int, kernel: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, size, size, generator=draw, dtype=torch.float64)
    K = torch.rand(4, 3, kernel, kernel, generator=draw, dtype=torch.float64)
    pooled = F.avg_pool2d(F.conv2d(x, K, padding=padding), 2)
    torch.testing.assert_close(F.conv2d(x, fold(K), stride=2, padding=padding), pooled, rtol=1e-13, atol=1e-14)


def gradient(net: EPNet, how: Propagation, draw: torch.Generator | None = None) -> Tensor:
    x, y = batch()
    net.zero_grad()
    how.backward(net, x, y, draw)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", [*KINDS, {"activation": "half"}, {"pool": "average", "margin": 0.1}])
def test_equilibrium_propagation_is_backpropagation_through_time(kind: dict[str, Any]) -> None:
    """The known property: cosine above 0.999 at β = 0.01; the error falls like β² if symmetric, like β if one-sided."""
    net = smooth(**kind)
    exact = gradient(net, Propagation("bptt"))
    assert float(exact.norm()) > 1e-3
    for estimator, order in (("symmetric", 2), ("one-sided", 1)):
        errors = []
        for beta in (0.04, 0.02, 0.01):
            found = gradient(net, Propagation(estimator, beta, 300))
            errors.append(float((found - exact).norm() / exact.norm()))
        assert float(F.cosine_similarity(found, exact, 0)) > 0.999
        assert errors[-1] < 0.02
        for larger, smaller in pairwise(errors):
            assert larger / smaller == pytest.approx(2**order, rel=0.1)


def test_it_is_so_for_units_at_the_ends_of_the_hard_sigmoid() -> None:
    """As they are drawn, a third of the units rest at 0 or 1, and stay there under a nudge that is small enough."""
    net = net_of()
    exact, found = gradient(net, Propagation("bptt")), gradient(net, Propagation("symmetric", 1e-5, 300))
    x, _ = batch()
    state = net.final(net.inject(x)).detach()
    assert 0.1 < float(((state == 0) | (state == 1)).double().mean()) < 0.9
    assert float(F.cosine_similarity(found, exact, 0)) > 0.999999


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_of_the_input_is_propagated_too(kind: dict[str, Any]) -> None:
    net, (x, y) = smooth(**kind), batch()
    exact = Propagation("bptt").slope(net, x, y)
    found = Propagation("symmetric", 0.01, 300).slope(net, x, y)
    assert float(F.cosine_similarity(found.flatten(), exact.flatten(), 0)) > 0.999
    assert float((found - exact).norm() / exact.norm()) < 0.02
    assert all(p.grad is None for p in net.parameters())


def test_an_adversary_moves_uphill_within_its_ball() -> None:
    net, (x, y) = smooth(), batch()
    how, draw = Propagation("symmetric", 0.1, 50), torch.Generator().manual_seed(0)
    moved = how.adversary(net, x, y, 0.1, draw)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-12
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
    with torch.no_grad():
        costs = [float(net.cost(net.split(net.final(net.inject(at))), y)) for at in (x, moved)]
    assert costs[1] > costs[0]


def test_a_random_sign_is_one_of_two_one_sided_estimates() -> None:
    net = smooth()
    symmetric = gradient(net, Propagation("symmetric", 0.04, 300))
    draw = torch.Generator().manual_seed(0)
    seen = {tuple(gradient(net, Propagation("random-sign", 0.04, 300), draw).tolist()) for _ in range(8)}
    a, b = (torch.tensor(values, dtype=torch.float64) for values in seen)
    # Φ is evaluated at β, 0 and -β: the two halves of the centred difference.
    torch.testing.assert_close((a + b) / 2, symmetric, rtol=1e-7, atol=1e-10)
    assert not torch.allclose(a, b, rtol=1e-3)


def test_an_update_is_local() -> None:
    """The gradient of a kernel needs the blocks at its two ends and nothing else."""
    net, (x, y) = smooth(pool="average", channels=(4, 5), hidden=()), batch()
    net.zero_grad()
    Propagation("symmetric", 0.1, 50).backward(net, x, y)
    links = [link.detach() for link in net.snapshot()]
    drive = net.drive(x, links).detach()
    free = net.phase(drive, net.rest(drive), links, net.free_steps)
    ends = {b: net.phase(drive, free, links, 50, beta=b, labels=y) for b in (0.1, -0.1)}
    layer = net.couplings[2]
    assert isinstance(layer, nn.Linear)
    outer = {b: s[2].T @ s[1].flatten(1) for b, s in ends.items()}
    torch.testing.assert_close(layer.weight.grad, -(outer[0.1] - outer[-0.1]).detach() / (0.2 * len(x)))


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_the_gradient_of_the_input_is_that_of_the_steady_state(margin: float) -> None:
    """Unrolled where nothing is known, implicit where the step contracts: both are the exact one at convergence."""
    net, (x, _) = net_of(pool="average", margin=margin), batch(2)
    z = net.final(net.inject(x))
    assert isinstance(net.gradient, Implicit)
    x.requires_grad_()
    (found,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    h = 1e-6
    direction = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        ends = [net(x + s * h * direction)[:, 0].sum() for s in (1, -1)]
    assert float((found * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5)
    assert float((net.step(z, net.inject(x)) - z).detach().abs().max()) < 1e-9
    (implicit,) = torch.autograd.grad(net.head(net.final(net.inject(x), net.gradient), {})[:, 0].sum(), x)
    torch.testing.assert_close(implicit, found, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("activation", ["hard-sigmoid", "half"])
@pytest.mark.parametrize("pool", ["average", "stride"])
def test_a_margin_makes_the_step_contract(activation: str, pool: str) -> None:
    net = net_of(pool=pool, margin=0.3, activation=activation)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(50)  # the raw weights may be anything
    links = net.snapshot()
    drive = torch.zeros(1, *net.shapes[0], dtype=torch.float64)
    units = net.start({"v": drive}).shape[1]
    nothing = [torch.zeros_like(link.bias) for link in links]
    free = [
        type(link)(link.weight.abs(), bias, link.stride, link.padding)
        for link, bias in zip(links, nothing, strict=True)
    ]
    absolute = torch.stack(
        [net.join(net.pull(drive, net.split(e[None]), free))[0] for e in torch.eye(units).double()], 1
    )
    radius = float(torch.linalg.eigvalsh(absolute.detach()).abs().max())
    assert 0.1 < radius * net.slope <= 0.7


def test_the_curve_counts_the_steps_of_the_free_phase() -> None:
    net, (x, y) = net_of(free_steps=5), batch()
    curve = net.curve(x, y, 5)
    assert curve.shape == (5,)
    assert int(curve[-1]) == int((net(x).argmax(1) == y).sum())


def test_a_tolerance_stops_the_free_phase() -> None:
    exact, early = net_of(free_steps=500), net_of(free_steps=500, tol=1e-6)
    x, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(early(x), exact(x), rtol=1e-4, atol=1e-5)
        assert int(early.solve(early.inject(x)).steps.max()) < 200
    # No sample's state depends on another's.
    with torch.no_grad():
        torch.testing.assert_close(early(x[1:2]), early(x)[1:2], rtol=1e-12, atol=1e-12)


def test_attacks_get_the_numbers_of_steps_that_they_unroll() -> None:
    assert net_of(free_steps=30).attack_steps == (5, 10, 20)
    assert net_of(free_steps=4).attack_steps == ()


def test_the_network_of_the_paper_has_its_size() -> None:
    with torch.device("meta"):
        net = EPNet(
            (3, 32, 32),
            10,
            channels=(128, 256, 512, 512),
            paddings=(1, 1, 1, 0),
            activation="half",
            readout="cross-entropy",
        )
    assert [tuple(shape) for shape in net.shapes] == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 1, 1)]
    assert sum(p.numel() for p in net.parameters()) == 3_843_850


def test_dense_networks_need_no_convolution() -> None:
    net = net_of(channels=(), hidden=(7,))
    assert net.shapes == [(7,), (3,)]
    assert net(batch()[0]).shape == (4, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": "median"}, UnknownName, "pool"),
        ({"first_pool": "median"}, UnknownName, "first_pool"),
        ({"readout": "linear"}, UnknownName, "readout"),
        ({"activation": "relu"}, UnknownName, "activation"),
        ({"channels": (), "hidden": ()}, InputError, "a block or more"),
        ({"free_steps": 0}, InputError, "free_steps"),
        ({"margin": 1.0, "pool": "average"}, InputError, "margin"),
        ({"margin": 0.1}, InputError, "max pooling"),
        (
            {"margin": 0.1, "pool": "average", "channels": (), "hidden": (3,), "readout": "cross-entropy"},
            InputError,
            "two blocks",
        ),
        ({"channels": (2, 2, 2, 2, 2)}, InputError, "nothing"),
        ({"paddings": (1,)}, InputError, "paddings"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        net_of(**options)


@pytest.mark.parametrize(
    ("given", "error"),
    [({"estimator": "three"}, UnknownName), ({"beta": 0.0}, InputError), ({"nudged_steps": 0}, InputError)],
)
def test_estimators_that_make_no_sense_are_refused(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Propagation(**given)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "average", "margin": 0.2},
        {"pool": "stride", "margin": 0.2, "first_pool": "max", "readout": "cross-entropy"},
        {"pool": "average", "margin": 0.2, "activation": "half", "mean": (0.1,), "std": (0.3,)},
        {"pool": "average", "margin": 0.0},
        {"channels": (), "hidden": (7, 5), "margin": 0.1, "pool": "none"},
    ],
)
def test_a_certifiable_net_has_the_outputs_of_the_steady_state(options: dict[str, Any], tmp_path: Path) -> None:
    net, (x, _) = net_of(free_steps=500, **options), batch()
    model = net.certifiable()
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x), rtol=1e-7, atol=1e-8)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    loaded = load_model(path)
    assert loaded.input_shape == (1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    (layer,) = [layer for _, layer in loaded.equilibria()]
    if net.margin:
        assert gauge(layer).rate(layer) < 1


def test_max_pooling_above_the_first_convolution_has_no_certificate() -> None:
    with pytest.raises(ModelError, match="tie"):
        net_of(pool="max").certifiable()
    with pytest.raises(ModelError, match="two blocks"):
        net_of(channels=(2,), hidden=(), readout="cross-entropy").certifiable()


def test_feedback_through_max_pooling_jumps_at_a_tie() -> None:
    """Why: a change of 1e-9 of one unit moves the feedback from one place to another."""
    net = net_of(channels=(1, 1), hidden=(), kernel=1, free_steps=5)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    links = net.snapshot()
    drive = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    states = [torch.full((1, *shape), 0.5, dtype=torch.float64) for shape in net.shapes]
    before = net.pull(drive, states, links)[0]
    states[0][0, 0, 1, 1] += 1e-9
    after = net.pull(drive, states, links)[0]
    assert float((after - before).detach().abs().max()) == 0.5


def test_a_net_without_a_margin_may_have_no_gauge() -> None:
    net = net_of(pool="average", channels=(16, 32))
    (layer,) = [m for m in net.certifiable() if isinstance(m, Equilibrium)]
    with pytest.raises(NoGaugeError, match="spectral radius"):
        gauge(layer)
