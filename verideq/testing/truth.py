"""Small networks of every kind, and every bound method held against the exact answer of an integer program.

`network` draws one by its seed: dense and convolutional equilibria with a gauge or monotone, ReLUs, maxima, averages
and residual sums before and after them, few enough units for HiGHS to need milliseconds. `complaints` says what is
wrong with any bound of it, which should be nothing.

What is compared with what, and how closely:

* A minimiser is a point of the region, and what the model gives there is a true value. No bound may be above it,
  rounding of the model's own float64 apart (`ROUNDING`).
* What HiGHS claims holds to its own tolerances: a column may leave its range, and a binary variable its integer, by
  1e-6 of its range, and with large weights that comes out larger. So claims and values are compared to `SOLVED`.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from verideq.attacks import PGD
from verideq.certify.bound import METHODS, margin_rows
from verideq.certify.certificate import record
from verideq.certify.exact import Minimum, branched, minimum
from verideq.certify.method import Bounds, Prepared, Query, prepare
from verideq.certify.program import Outcome
from verideq.equilibrium import Auto, Equilibrium
from verideq.equilibrium.monotone import MonotoneConvolution
from verideq.errors import NoGaugeError
from verideq.parametrizations import MonDEQ
from verideq.region import Region
from verideq.testing.strategies import PADDINGS

ROUNDING = 1e-10
"""Of a value of the model, relative to the sum of what goes into it."""
SOLVED = 2e-5
"""Of what HiGHS says, likewise."""
ROOM = 1e-4
"""How far from the exact answer branch and bound has to have decided, likewise."""
KINDS = ("dense", "convolution", "explicit")


class Residual(nn.Module):
    """``x + layer(x)``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return x + y


@dataclass(frozen=True)
class Net:
    """A network and what is asked of it: rows ``C`` over the balls of a region, (samples, rows, outputs)."""

    name: str
    prepared: Prepared
    query: Query

    @property
    def region(self) -> Region:
        """The balls."""
        if self.query.region is None:  # `network` always has one
            raise ValueError(f"{self.name} has no region")
        return self.query.region

    @property
    def C(self) -> Tensor:
        """The rows."""
        if self.query.C is None:
            raise ValueError(f"{self.name} has no rows")
        return self.query.C


class _Draw:
    """Random layers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.names: list[str] = []

    def one(self, *values: object) -> object:
        return values[int(torch.randint(len(values), (), generator=self.generator))]

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def tensor(self, *shape: int, low: int = -8) -> Tensor:
        return torch.randint(low, 9, shape, generator=self.generator) / 8

    def filled(self, layer: nn.Module, size: float = 1.0) -> nn.Module:
        for parameter in layer.parameters():
            with torch.no_grad():
                parameter.copy_(self.tensor(*parameter.shape) * size)
        return layer

    def contraction(self, layer: nn.Module) -> nn.Module:
        """A ``W`` with a gauge, in other units than the rows; or with -3 on its diagonal."""
        self.filled(layer)
        weight: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
        units = len(weight)
        with torch.no_grad():
            sums = weight.abs().flatten(1).sum(1).clamp(min=0.125)
            rate = 0.1 * self.number(3, 9)
            scale = 2.0 ** self.tensor(units)
            view = (-1, *[1] * (weight.dim() - 1))
            weight.mul_((rate * scale / sums).view(view)).div_(scale.view(1, -1, *view[2:]))
            if self.number(0, 4) == 0:
                middle = [size // 2 for size in weight.shape[2:]]
                weight.index_put_(
                    (torch.arange(units), torch.arange(units), *map(torch.tensor, middle)), weight.new_tensor(-3.0)
                )
        return layer

    def monotone(self, *shape: int) -> nn.Module:
        """A MonDEQ with `m` down to 1/20, which as a rule has no gauge."""
        m = float(self.one(0.05, 0.5, 5.0))  # type: ignore[arg-type]  # of numbers
        self.names.append(f"m={m}")
        return MonDEQ.from_weights(
            self.tensor(*shape), self.tensor(*shape), m, "zeros" if self.number(0, 1) else "circular"
        )

    def equilibrium(self, fusion: nn.Module, monotone: nn.Module, injection: nn.Module) -> nn.Module:
        kind = self.one("gauge", "monotone")
        self.names.append(str(kind))
        return Equilibrium(self.contraction(fusion) if kind == "gauge" else monotone, self.filled(injection))

    def flat(self, inputs: int) -> tuple[nn.Module, int]:
        """A layer on a vector, and the size of what it gives."""
        kind, units = self.one("relu", "equilibrium", "equilibrium", "residual", "linear"), self.number(1, 5)
        self.names.append(str(kind))
        if kind == "relu":
            return nn.Sequential(self.filled(nn.Linear(inputs, units)), nn.ReLU()), units
        if kind == "linear":
            return self.filled(nn.Linear(inputs, units)), units
        if kind == "residual":
            return Residual(nn.Sequential(self.filled(nn.Linear(inputs, inputs)), nn.ReLU())), inputs
        fusion = nn.Linear(units, units, bias=False)
        return self.equilibrium(fusion, self.monotone(units, units), nn.Linear(inputs, units)), units

    def image(self, channels: int) -> tuple[nn.Module, int]:
        """A layer on an image, and the channels of what it gives."""
        kind, wide = self.one("relu", "equilibrium", "maximum", "average", "norm"), self.number(1, 2)
        self.names.append(str(kind))
        if kind == "relu":
            return nn.Sequential(self.filled(nn.Conv2d(channels, wide, 3, padding=1)), nn.ReLU()), wide
        if kind == "maximum":
            return nn.MaxPool2d(2, stride=1), channels
        if kind == "average":
            return nn.AvgPool2d(2, stride=1, padding=1), channels
        if kind == "norm":
            layer = nn.BatchNorm2d(channels)
            layer.running_mean = self.tensor(channels)
            layer.running_var = self.tensor(channels, low=1)
            return self.filled(layer), channels
        mode = PADDINGS[self.number(0, 3)]
        fusion = nn.Conv2d(wide, wide, 3, padding=1, padding_mode=mode, bias=False)
        injection = nn.Conv2d(channels, wide, int(self.number(0, 1)) * 2 + 1, padding="same")
        return self.equilibrium(fusion, self.monotone(wide, wide, 3, 3), injection), wide


def network(seed: int, samples: int = 1, norm: str = "linf") -> Net:
    """The network of this seed, on balls around random inputs, and two rows of its outputs for each."""
    draw = _Draw(seed)
    layers: list[nn.Module] = []
    if draw.number(0, 2) == 0:
        shape: tuple[int, ...] = (draw.number(1, 2), 2, 2)
        channels = shape[0]
        for _ in range(draw.number(1, 2)):
            # A maximum of 2 × 2 pixels leaves one, which is no image to go on with.
            layer, channels = draw.image(channels)
            layers.append(layer)
            if isinstance(layer, nn.MaxPool2d):
                break
        layers.append(nn.Flatten())
        size = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
    else:
        shape = (draw.number(1, 3),)
        size = shape[0]
        for _ in range(draw.number(1, 3)):
            layer, size = draw.flat(size)
            layers.append(layer)
    outputs = draw.number(2, 3)
    layers.append(draw.filled(nn.Linear(size, outputs)))
    prepared = prepare(nn.Sequential(*layers).eval().double())
    clip = (0.0, 1.0) if draw.number(0, 1) else None
    eps = str(draw.one("0", "1/20", "1/5", "1/2"))
    region = Region((draw.tensor(samples, *shape, low=0)).double(), eps, norm, clip)
    labels = torch.randint(outputs, (samples,), generator=draw.generator)
    C = margin_rows(labels, outputs) if draw.number(0, 1) else draw.tensor(samples, 2, outputs).double()
    name = f"seed {seed}: {' '.join(draw.names)}, eps {eps}, {norm}"
    return Net(name, prepared, Query(region.box(), region, C, None, upper=False))


def complaints(net: Net) -> list[str]:
    """What is wrong with the bounds of a network, or with the exact answer itself: one line each.

    Branch and bound is asked what it can decide: rows just below and just above the answer. The others are asked for
    the best that they know.
    """
    query, prepared = net.query, net.prepared
    truth = minimum(prepared, query)
    size = _size(net, truth.points)
    found = _of_truth(net, truth, size)
    plain = METHODS["interval"](prepared, query).box.lower
    for method in (name for name in METHODS if name != "branch-and-bound"):
        try:
            bounds = METHODS[method](prepared, query)
        except NoGaugeError:
            continue  # of another kind of network
        lower = bounds.box.lower
        if bool((lower > truth.values + ROUNDING * size).any()):
            found.append(f"{method} is above the exact answer: {lower.tolist()} and {truth.values.tolist()}")
        # The quadratic bound stands by itself; every other one begins with intervals.
        begins = method != "quadratic" and not (method == "exact" and prepared.monotone)
        if begins and bool((lower < plain - ROUNDING * (size + plain.abs())).any()):
            found.append(f"{method} is below intervals: {lower.tolist()} and {plain.tolist()}")
        if bool(lower.isfinite().all()) and not _apart(net, method):
            found += [f"{method}: {line}" for line in _refused(net, bounds, lower)]
    return [f"{net.name}: {line}" for line in found + _undecided(net, truth, size)]


def _apart(net: Net, method: str) -> bool:
    """Whether the checker has other boxes: of ``B z - Bᵀ z`` of a convolution it bounds the two terms one by one."""
    layers = [layer.operator() for _, layer in net.prepared.graph.equilibria()]
    return method != "interval" and any(isinstance(operator, MonotoneConvolution) for operator in layers)


def _size(net: Net, points: Tensor) -> Tensor:
    """What goes into a row there, (samples, rows)."""
    outputs = net.prepared.graph(points.flatten(0, 1)).view(*points.shape[:2], -1)
    size: Tensor = 1 + (net.C.abs() * outputs.abs()).sum(2)
    return size


def _of_truth(net: Net, truth: Minimum, size: Tensor) -> list[str]:
    """Whether HiGHS, the model at its minimisers, and other points of the region agree."""
    lines = [f"HiGHS: {end}" for ends in truth.outcomes for end in ends if end is not Outcome.OPTIMAL]
    off = (truth.values - truth.claims).abs() / size
    if bool((off > SOLVED).any()):
        lines.append(f"HiGHS claims {truth.claims.tolist()}, and at its minimisers is {truth.values.tolist()}")
    for points in (corners(net), attacked(net, truth)):
        rows = (net.prepared.graph(points.flatten(0, 1)).view(*points.shape[:2], -1) @ net.C.mT).amin(1)
        if bool((rows < truth.claims - SOLVED * size).any()):
            lines.append(f"HiGHS claims {truth.claims.tolist()}, and there are inputs with {rows.tolist()}")
    if not bool(
        net.region[torch.arange(len(net.region)).repeat_interleave(net.C.shape[1])]
        .contains(truth.points.flatten(0, 1))
        .all()
    ):
        lines.append("a minimiser is outside of the region")
    return lines


def corners(net: Net, count: int = 32) -> Tensor:
    """Corners of the boxes and points within, moved into the region: (samples, points, *features)."""
    box, generator = net.query.box, torch.Generator().manual_seed(0)
    features = box.lower[0].numel()
    share = torch.rand(count, features, generator=generator, dtype=torch.float64)
    share = torch.where(torch.rand(count, 1, generator=generator) < 0.5, share.round(), share)
    if features <= 3:
        share[: 2**features] = torch.tensor(list(itertools.product((0.0, 1.0), repeat=features)))
    share = share.view(1, count, *box.lower.shape[1:])
    points = box.lower[:, None] + share * box.width[:, None]
    return torch.stack([net.region.project(points[:, k]) for k in range(count)], 1)


def attacked(net: Net, truth: Minimum) -> Tensor:
    """What an attack finds, (samples, 1, *features)."""
    model = net.prepared.graph.frozen(solver=Auto(tol=1e-9), throw=False)
    points, _ = PGD(steps=10, restarts=2)(model, net.region, net.C, truth.values, indices=torch.arange(len(net.query)))
    return points[:, None]


def _refused(net: Net, bounds: Bounds, lower: Tensor) -> list[str]:
    """Why the checker does not accept a certificate of the bounds."""
    checker = net.prepared.checker
    payloads = [
        record(
            checker.hash, i, net.region, i, bounds.proof(i), label=None, C=net.C[i].numpy(),
            rhs=(lower[i] - 1e-6 * (1 + lower[i].abs())).numpy(), margin=0.0,
        )
        for i in range(len(lower))
    ]  # fmt: skip
    return [f"refused, {reason}" for accepted, reason, _ in checker.decide(payloads) if not accepted]


def _undecided(net: Net, truth: Minimum, size: Tensor) -> list[str]:
    """Where branch and bound does not say what the exact answer says: it is complete, maxima apart."""
    lines = []
    whole = all(node.operation.kind != "max_pool2d" for node in net.prepared.graph.nodes)
    for below in (True, False):
        goal = truth.values + (-ROOM if below else ROOM) * size
        # Where it is not complete it may go on for long.
        query = Query(net.query.box, net.region, net.C, goal, upper=False)
        query = query if whole else replace(query, deadline=time.monotonic() + 1)
        bounds = branched(net.prepared, query)
        closed = query.closed(bounds.box.lower)
        broken = torch.tensor([i in bounds.witnesses for i in range(len(closed))])
        if bool((closed & broken).any()) or (not below and bool(closed.any())) or (below and bool(broken.any())):
            lines.append(f"branch and bound says the opposite of the exact answer {truth.values.tolist()}")
        elif whole and not bool((closed if below else broken).all()):
            lines.append(
                f"branch and bound leaves {'a truth' if below else 'a falsehood'} open: "
                f"{bounds.box.lower.tolist()}, {goal.tolist()}"
            )
        if below and bool(closed.all()) and not _apart(net, "branch-and-bound"):
            lines += [
                f"branch and bound: {line}" for line in _refused(net, bounds, torch.minimum(bounds.box.lower, goal))
            ]
    return lines
