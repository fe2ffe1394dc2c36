"""What every bound method is handed, and what it hands back."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from verideq.box import Box, flushed
from verideq.certify.certificate import Numbers, Proof, gauge_file
from verideq.certify.interval import Arithmetic
from verideq.checker import Checker
from verideq.equilibrium import RELU, Auto, Dense, Equilibrium, Gauge, Monotone, Solver, gauge
from verideq.equilibrium.monotonicity import proved_m
from verideq.errors import ModelError, NoGaugeError
from verideq.graph import Graph, model_bytes, trace
from verideq.region import Region

TOLERANCE = 1e-13
"""The relative residual to which equilibria are solved for a proof: how tight it is, never whether it holds."""


LINEAR = ("interval", "adjoint", "adjoint-refined", "adjoint-ascent")
"""Methods of intervals and lines, which know every activation; the others are for ReLU."""


@dataclass(frozen=True)
class Prepared:
    """A model made ready for proofs: its stored weights in float64, and a gauge for every equilibrium that has one.

    Args:
        graph: materialised, float64, evaluation mode.
        gauges: by node name.
        missing: why a layer has neither a gauge nor a proved ``m``, by node name.
        monotone: a proved ``m > 0`` with ``I - sym W ⪰ m I`` of the layers without a gauge.
        file: the model file of the stored weights, as they were when the model was prepared.
        norms: proved spectral norms of affine nodes, as they were needed.
        slopes: multipliers for a Lipschitz bound that a solver has proposed, by norm and row.
    """

    graph: Graph
    gauges: Mapping[str, Gauge]
    missing: Mapping[str, NoGaugeError] = field(default_factory=dict)
    file: bytes = b""
    monotone: Mapping[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict, compare=False, repr=False)
    slopes: dict[tuple[bool, bytes], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def arithmetic(self, query: Query) -> Arithmetic:
        """How boxes of a query are pushed through the model."""
        found = Arithmetic(self.gauges, query.solver, query.tolerance, self.monotone)
        found.balls.begin(query.region, query.box, self.norms)
        return found

    @cached_property
    def checker(self) -> Checker:
        """The independent checker, with this model's file and gauges in it."""
        return Checker(self.file, self.certificate)

    @cached_property
    def certificate(self) -> bytes:
        """The model certificate: why every equilibrium is unique."""
        stored = {name: m for name, m in self.monotone.items() if isinstance(self.layer(name).operator(), Dense)}
        gauges = {
            name: replace(found, u=self.layer(name).operator().spread_units(found.u).flatten())
            for name, found in self.gauges.items()
        }
        return gauge_file(self.file, gauges, stored)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((t.device for t in [*self.graph.parameters(), *self.graph.buffers()]), torch.device("cpu"))

    def layer(self, name: str) -> Equilibrium:
        """The equilibrium of this name."""
        return dict(self.graph.equilibria())[name]

    @property
    def rectified(self) -> bool:
        """Whether every equilibrium is one of ReLU."""
        return all(layer.activation == RELU for _, layer in self.graph.equilibria())

    def require_method(self, method: str) -> None:
        """Nothing, if the method knows the activation of every equilibrium.

        Raises:
            ModelError: the first layer that it is not for.
        """
        for name, layer in self.graph.equilibria():
            if layer.activation != RELU and method not in LINEAR:
                raise ModelError(
                    f"method {method} is for ReLU equilibria; {name} is {layer.activation.name}: use adjoint-refined"
                )

    def require_gauges(self) -> None:
        """Nothing, if every equilibrium has a gauge, or is monotone.

        Raises:
            NoGaugeError: the first layer of which neither is known.
        """
        for name, error in self.missing.items():
            raise NoGaugeError(f"{name}: {error}", error.rate)


def prepare(model: nn.Module | Prepared, device: torch.device | str | None = None) -> Prepared:
    """Trace, materialise and look for gauges, once for any number of bounds.

    Args:
        model: a module of supported operations.
        device: where to bound; ``None``: where the model's first parameter is.

    Raises:
        UnsupportedOperation: a node without a rule.
        ModelError: NaN or infinite weights, or denormal ones where torch flushes these to zero.
    """
    if isinstance(model, Prepared):
        return model
    graph = trace(model).check_finite()
    for node in graph.nodes:
        for name, tensor in node.operation.state(node.module).items():
            if bool(flushed(tensor).any()):
                raise ModelError(
                    f"{node.name}.{name} holds denormal numbers, which torch has been told to read as zero; call "
                    "torch.set_flush_denormal(False) before bounding this model"
                )
    if device is None:
        device = next((t.device for t in [*graph.parameters(), *graph.buffers()]), torch.device("cpu"))
    frozen = graph.frozen(torch.float64, device)
    gauges, missing, monotone = {}, {}, {}
    for name, layer in frozen.equilibria():
        try:
            gauges[name] = gauge(layer)
        except NoGaugeError as error:
            # What is proved of a layer without a gauge is proved for ReLU.
            m = strength(layer) if layer.activation == RELU else 0.0
            if m > 0:
                monotone[name] = m
            else:
                missing[name] = error
    return Prepared(frozen, gauges, missing, model_bytes(graph), monotone)


def strength(layer: Equilibrium) -> float:
    """A proved ``m`` with ``I - sym W ⪰ m I`` of the stored ``W``; 0 or less, or NaN, where there is none."""
    operator = layer.operator()
    if isinstance(operator, Monotone):
        return operator.m
    # A little less than was proved: the checker has its own rounding.
    return proved_m(operator.weight)[0] * (1 - 2.0**-16) if isinstance(operator, Dense) else 0.0


@dataclass(frozen=True)
class Bounds:
    """What a method returns: the box, and what it took.

    Args:
        box: (batch, rows).
        steps: (batch,) solver steps, zero without an equilibrium.
        proof: what a certificate of the sample with this place in the batch is made of.
        witnesses: by place in the batch, a point, (*features), at which a row was measured to be below its ``rhs``.
        points: (batch, rows, *features) where the bound of a row would be attained: where an attack may start;
            ``None`` if the method does not say.
        estimated: the box was measured, see `Query.unproved`: what holds is what the checker makes of the proof.
        notes: by place in the batch, what else a user should know of a sample that is left open.
        closer: by place in the batch, the cheaper method on the way to this one that left nothing open.
    """

    box: Box
    steps: Tensor
    proof: Callable[[int], Proof] = lambda i: Proof()
    witnesses: Mapping[int, Tensor] = field(default_factory=dict)
    points: Tensor | None = None
    estimated: bool = False
    notes: Mapping[int, str] = field(default_factory=dict)
    closer: Mapping[int, str] = field(default_factory=dict)

    def replaced(self, part: Tensor, other: Bounds) -> Bounds:
        """These with others for the samples `part`."""
        sides = [a.index_copy(0, part, b) for a, b in zip(_sides(self.box), _sides(other.box), strict=True)]
        steps = self.steps.to(other.steps).index_copy(0, part.to(other.steps.device), other.steps)
        places = {whole: own for own, whole in enumerate(part.tolist())}

        def proof(i: int) -> Proof:
            return other.proof(places[i]) if i in places else self.proof(i)

        kept = {i: point for i, point in self.witnesses.items() if i not in places}
        found = {int(part[own]): point for own, point in other.witnesses.items()}
        points = self.points
        if points is not None and other.points is not None:
            points = points.index_copy(0, part, other.points)
        notes, closer = (
            {i: word for i, word in old.items() if i not in places}
            | {int(part[own]): word for own, word in new.items()}
            for old, new in ((self.notes, other.notes), (self.closer, other.closer))
        )
        estimated = self.estimated or other.estimated
        return Bounds(Box(*sides), steps, proof, {**kept, **found}, points, estimated, notes, closer)

    @staticmethod
    def joined(parts: Sequence[Bounds]) -> Bounds:
        """Those of samples, one part after another."""
        lower, upper = (torch.cat([getattr(part.box, side) for part in parts]) for side in ("lower", "upper"))
        places = [(part, i) for part in parts for i in range(len(part.box.lower))]
        starts = itertools.accumulate((len(part.box.lower) for part in parts), initial=0)
        found = {start + i: x for start, part in zip(starts, parts, strict=False) for i, x in part.witnesses.items()}
        points = [part.points for part in parts if part.points is not None]
        closer = {i: part.closer[own] for i, (part, own) in enumerate(places) if own in part.closer}
        return Bounds(
            Box(lower, upper), torch.cat([part.steps for part in parts]), lambda i: places[i][0].proof(places[i][1]),
            found, torch.cat(points) if len(points) == len(parts) else None, any(part.estimated for part in parts),
            closer=closer,
        )  # fmt: skip

    @staticmethod
    def beside(parts: Sequence[Bounds]) -> Bounds:
        """Those of the rows of one sample, some at a time."""
        lower, upper = (torch.cat([getattr(part.box, side) for part in parts], 1) for side in ("lower", "upper"))
        counts = [part.box.lower.shape[1] for part in parts]
        points = [part.points for part in parts if part.points is not None]
        witnesses = {i: x for part in parts for i, x in part.witnesses.items()}
        return Bounds(
            Box(lower, upper), torch.stack([part.steps for part in parts]).amax(0),
            lambda i: Proof.beside([part.proof(i) for part in parts], counts), witnesses,
            torch.cat(points, 1) if len(points) == len(parts) else None, any(part.estimated for part in parts),
        )  # fmt: skip


def _sides(box: Box) -> tuple[Tensor, Tensor]:
    return box.lower, box.upper


@dataclass(frozen=True)
class Query:
    """What a method is asked: bounds of ``C @ model(x)`` for every ``x`` of a region.

    Args:
        box: of inputs, (batch, *features), float64.
        region: the balls that the box is around, where it is around balls.
        C: (batch, rows, outputs), or ``None`` for the outputs themselves.
        rhs: (batch, rows): rows above it need no better bound; ``None`` for as good as it goes.
        solver: of equilibria.
        tolerance: of the deployed solver, in units of the slack.
        upper: whether upper bounds are wanted too.
        deadline: `time.monotonic` at which to hand back what there is; each sample has its share of what is left.
        paid: seconds that went to single samples, see `parts`; one for all that are selected from it.
        ids: of the samples, in `paid`.
        unproved: estimates of lower bounds will do, because whoever asks has every proof checked, and believes that.
    """

    box: Box
    region: Region | None
    C: Tensor | None
    rhs: Tensor | None = None
    solver: Solver = Auto(tol=TOLERANCE)
    tolerance: float = 0.0
    upper: bool = True
    deadline: float = math.inf
    unproved: bool = False
    paid: dict[int, float] = field(default_factory=dict)
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(len(self))))

    def __len__(self) -> int:
        return len(self.box.lower)

    def select(self, part: Tensor) -> Query:
        """The question about some of the samples."""
        box = Box(self.box.lower[part], self.box.upper[part])
        region = None if self.region is None else self.region[part]
        C, rhs = (None if x is None else x[part] for x in (self.C, self.rhs))
        ids = tuple(self.ids[i] for i in part.tolist())
        return replace(self, box=box, region=region, C=C, rhs=rhs, ids=ids)

    def parts(self, places: Tensor, size: int) -> Iterator[tuple[Tensor, Query]]:
        """Some of the samples a few at a time, and the question about these: each has its own time, and no other's."""
        share = (self.deadline - time.monotonic()) / max(1, len(self))
        for part in torch.split(places, size):
            if len(part) and share > 0:
                started, before = time.monotonic(), sum(self.paid.values())
                own = replace(self.select(part), deadline=started + share * len(part))
                yield part, own
                rest = time.monotonic() - started - (sum(self.paid.values()) - before)
                own.pay([rest / len(part)] * len(part))

    def pay(self, seconds: Sequence[float]) -> None:
        """Write down what was done for each sample, and for no other."""
        for i, spent in zip(self.ids, seconds, strict=True):
            self.paid[i] = self.paid.get(i, 0.0) + spent

    def closed(self, lower: Tensor) -> Tensor:
        """(batch,) whether lower bounds, (batch, rows), leave nothing open."""
        if self.rhs is None or self.upper:
            return torch.zeros(len(self), dtype=torch.bool, device=lower.device)
        return (lower > self.rhs).all(1)


Method = Callable[[Prepared, Query], Bounds]


def boxes_of(boxes: Mapping[str, Box], i: int) -> dict[str, tuple[Numbers, Numbers]]:
    """The enclosures of one sample as a certificate holds them."""
    return {name: (box.lower[i].cpu().numpy(), box.upper[i].cpu().numpy()) for name, box in boxes.items()}


def states_of(states: Mapping[str, Tensor], i: int) -> dict[str, Numbers]:
    """The points of one sample that the boxes of monotone layers are around."""
    return {name: state[i].cpu().numpy() for name, state in states.items()}
