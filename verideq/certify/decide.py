"""`certify`: from images and a radius to verdicts. One batch at a time, each sample on its own."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from verideq.attacks import attack_named
from verideq.box import Box
from verideq.certify.bound import METHODS, elide, method_named, run_method
from verideq.certify.certificate import record
from verideq.certify.method import Bounds, Prepared, prepare
from verideq.certify.summary import REJECTED
from verideq.certify.task import Task, specification
from verideq.certify.verdict import Verdict
from verideq.equilibrium import Auto, Dense, Implicit, MonotoneDense, PeacemanRachford, Solver
from verideq.equilibrium.splitting import Splitting
from verideq.errors import ConvergenceError, InconsistencyError, InputError, NoGaugeError
from verideq.graph import evaluating
from verideq.region import Radius, Region, parse_eps, round_up
from verideq.status import Status


@dataclass(frozen=True)
class Budget:
    """How hard to try.

    Args:
        method: a bound method, or ``auto``.
        attack: an attack suite, or ``none``.
        max_steps: of the equilibrium solver in a bound.
        timeout: seconds a sample; ``None`` for no limit.
        seed: of the attack's noise.
        radius: look for the largest certified radius of each sample too.
        check: have the independent checker accept a certificate of every sample before it is CERTIFIED.
        tolerance: of the solver that will run the model, in units of the slack of each gauge: what it may be off by is
            charged to every margin.
    """

    method: str = "auto"
    attack: str = "none"
    max_steps: int = 1000
    timeout: float | None = None
    seed: int = 0
    radius: bool = False
    check: bool = True
    tolerance: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        method_named(self.method)
        attack_named(self.attack)
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout {self.timeout} is no time; give a number of seconds above 0")
        if not self.tolerance >= 0:
            raise InputError(f"deployed tolerance {self.tolerance} is negative; give 0 or more")


def certify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    eps: Radius,
    *,
    norm: str = "linf",
    method: str = "auto",
    timeout: float | None = None,
    C: Tensor | None = None,
    rhs: Tensor | None = None,
    attack: str = "none",
    weights: Tensor | None = None,
    seed: int = 0,
    max_steps: int = 1000,
    radius: bool = False,
    check: bool = True,
    deployed_tolerance: Radius = 0,
    batch_size: int = 64,
) -> list[Verdict]:
    """Decide for every image whether the model is robust on the ball around it.

    The property is ``C @ model(x) > rhs`` for every ``x`` of the ball; without `C` it is that the label's output is
    strictly the largest.

    Args:
        model: a module of supported operations, or what `prepare` made of one.
        images: (batch, *features), floating point in the model's pixel range, or uint8 (divided by 255).
        labels: (batch,) integers; ``None`` only with `C`.
        eps: the radius, e.g. ``0.1`` or ``"8/255"``.
        norm: ``linf`` or ``l2``.
        method: a bound method, or ``auto``.
        timeout: seconds a sample.
        C: (rows, outputs) or (batch, rows, outputs).
        rhs: (rows,) or (batch, rows); ``None``: zero.
        attack: ``none`` or ``pgd``: look for counterexamples too.
        weights: (*features), radii of the features in units of eps.
        seed: of the attack.
        max_steps: of the equilibrium solver.
        radius: look for the largest certified radius of each sample too.
        check: have the independent checker accept a certificate of every sample before it is CERTIFIED.
        deployed_tolerance: of the solver that will run the model: it stops when ``|z - F(z)| <= tolerance * s``, ``s``
            the slack of the gauge. 0: the margin is that of the exact equilibrium.
        batch_size: samples at a time; no verdict depends on it.

    Returns:
        a `Verdict` for every image, in order.

    Raises:
        InputError: images, labels, radius or specification that make no sense.
        UnsupportedOperation: a model that cannot be bounded.
        InconsistencyError: an attack broke what a bound had certified.
    """
    prepared = prepare(model)
    images, labels = torch.as_tensor(images), None if labels is None else torch.as_tensor(labels)
    tolerance = parse_eps(deployed_tolerance, "deployed tolerance")
    budget = Budget(
        method, attack, max_steps, timeout=timeout, seed=seed, radius=radius, check=check, tolerance=tolerance
    )
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: give 1 or more")
    if images.dtype is torch.uint8:
        images = images.to(torch.float64) / 255
    count = len(images)
    original = model if isinstance(model, nn.Module) else None
    verdicts: list[Verdict] = []
    # Everything is checked before the first batch is worked on.
    region = Region(images, eps, norm, prepared.graph.pixel_range, weights=weights)
    rows = specification(prepared, images, labels, C, rhs)
    task = Task(region, labels, *rows, torch.arange(count), by_label=C is None and rhs is None)
    for start in range(0, count, batch_size):
        verdicts += decide(prepared, task[slice(start, start + batch_size)], budget, original)
    return verdicts


def decide(prepared: Prepared, task: Task, budget: Budget, original: nn.Module | None = None) -> list[Verdict]:
    """Verdicts for one batch; an exception costs only the samples that raise it.

    Args:
        original: the user's own model: a witness has to break it as well.

    Raises:
        InconsistencyError: an attack broke what a bound had certified.
    """
    try:
        return _decide(prepared, task.to(prepared.device), budget, original)
    except InconsistencyError:
        raise
    except Exception as error:  # whatever broke: the other samples get their verdicts, and this one says ERROR
        if len(task) > 1:
            halves = (slice(0, len(task) // 2), slice(len(task) // 2, None))
            return [v for half in halves for v in decide(prepared, task[half], budget, original)]
        label = None if task.labels is None else int(task.labels[0])
        status, reason = Status.ERROR, f"{type(error).__name__}: {error}"
        if isinstance(error, ConvergenceError):
            status, reason = Status.UNKNOWN, "; ".join(map(str, (error, *prepared.missing.values())))
        return [
            Verdict(status, None, task.region.eps, task.region.norm, budget.method, False, reason, 0.0, label=label)
        ]


class _Draft:
    """The verdicts of a batch while they are being worked out."""

    def __init__(self, task: Task, budget: Budget, method: str) -> None:
        self.task, self.started = task, time.monotonic()
        self.deadline = math.inf if budget.timeout is None else self.started + budget.timeout * len(task)
        region = task.region
        blank = Verdict(Status.UNKNOWN, None, region.eps, region.norm, method, False, "", 0.0)
        self.verdicts = [
            replace(blank, label=None if task.labels is None else int(task.labels[i])) for i in range(len(task))
        ]

    def set(self, i: int, **changes: object) -> None:
        self.verdicts[i] = replace(self.verdicts[i], **changes)  # type: ignore[arg-type]  # fields by name

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def expire(self, places: list[int]) -> None:
        """What is open, or was proved just now, if the time is over."""
        if self.late():
            reason = "the time limit was reached; raise --timeout"
            for i in places:
                refused = REJECTED in self.verdicts[i].reason
                if not refused and self.verdicts[i].status in (Status.UNKNOWN, Status.CERTIFIED):
                    self.set(i, status=Status.TIMEOUT, reason=reason, checked=False, certificate=None)

    def finish(self) -> list[Verdict]:
        self.expire([i for i, v in enumerate(self.verdicts) if v.status is Status.UNKNOWN])
        seconds = (time.monotonic() - self.started) / len(self.verdicts)
        return [replace(v, seconds=seconds) for v in self.verdicts]


def _decide(prepared: Prepared, task: Task, budget: Budget, original: nn.Module | None) -> list[Verdict]:
    methods = automatic(prepared, budget) if budget.method == "auto" else (budget.method,)
    draft = _Draft(task, budget, methods[0])
    right = _predict(prepared, task, draft)
    if right:
        part = task[torch.tensor(right)]
        _prove(prepared, part, draft, right, budget, methods[0], original)
        # What an attack breaks needs no proof, and costs the bounds behind it the most time.
        if budget.attack != "none" and not draft.late():
            _attack(prepared, part, draft, right, budget, original)
        for method in methods[1:]:
            # A proposal that was refused is a bug, and no better bound behind it may hide that.
            left = [
                i
                for i in right
                if draft.verdicts[i].status is Status.UNKNOWN and REJECTED not in draft.verdicts[i].reason
            ]
            if left and not draft.late():
                _prove(prepared, task[torch.tensor(left)], draft, left, budget, method, original)
        if budget.radius:
            for i, found in zip(right, _radii(prepared, part, budget), strict=True):
                # What was certified at eps by a slower method is certified there.
                certified = float(task.region.eps) if draft.verdicts[i].certified else 0.0
                draft.set(i, radius=None if found is None else max(found, certified))
    return draft.finish()


def automatic(prepared: Prepared, budget: Budget) -> tuple[str, ...]:
    """The methods of ``auto``, cheapest first; branch and bound only within a time limit, because it has no end."""
    if prepared.missing:
        return ("interval",)
    tight = ("quadratic",) if prepared.monotone else ("adjoint", "adjoint-refined", "adjoint-ascent")
    return tuple(m for m in ("interval", *tight, *(("branch-and-bound",) if budget.timeout else ())) if m in METHODS)


def _predict(prepared: Prepared, task: Task, draft: _Draft) -> list[int]:
    """Look at the centres; returns the samples that have the property there, or may have it."""
    center = task.region.center
    if prepared.missing:
        with torch.no_grad():
            outputs = prepared.graph(center)
        values = Box(outputs, outputs)  # measured, not proved
    else:
        values = run_method(prepared, Box(center, center), None, "interval", 1000).box
        outputs = values.center
    highest = elide(values, task.C, None, None).upper - task.rhs
    right = []
    wrong_reason = "the model is wrong on the input itself" if task.by_label else "the input itself lacks the property"
    wrong, finite = (highest < 0).any(1).tolist(), outputs.isfinite().all(1).tolist()
    for i, prediction in enumerate(outputs.argmax(1).tolist()):
        if not finite[i]:
            draft.set(i, status=Status.ERROR, reason="the outputs at the centre are not finite")
            continue
        draft.set(i, prediction=prediction)
        if wrong[i]:
            draft.set(i, status=Status.MISCLASSIFIED, reason=wrong_reason)
        else:
            right.append(i)
    return right


def _prove(
    prepared: Prepared,
    part: Task,
    draft: _Draft,
    right: list[int],
    budget: Budget,
    method: str,
    original: nn.Module | None,
) -> None:
    """Bound the samples `right`, which are the rows of `part`."""
    try:
        bounds = run_method(
            prepared,
            part.region,
            part.C,
            method,
            budget.max_steps,
            rhs=part.rhs,
            tolerance=round_up(budget.tolerance),
            upper=False,
            deadline=draft.deadline,
            unproved=budget.check,
        )
    except NoGaugeError as error:
        for i in right:
            if not draft.verdicts[i].reason:
                rate = "" if math.isnan(error.rate) else f" (measured contraction rate {error.rate:.4g})"
                draft.set(i, method=method, reason=f"{error}{rate}")
        return
    # The difference is rounded down, so that the margin stays a lower bound; its sign is exact before and after.
    rows = bounds.box.lower - part.rhs
    rows = torch.where(part.rhs == 0, rows, torch.nextafter(rows, torch.full_like(rows, -torch.inf)))
    lower: list[float] = rows.amin(1).tolist()
    for i, margin, steps in zip(right, lower, bounds.steps.tolist(), strict=True):
        before = draft.verdicts[i]
        if before.margin is not None and not margin > before.margin:
            continue  # an earlier method said as much, or more
        draft.set(i, margin=margin if math.isfinite(margin) else None, method=method, steps=steps)
        if not math.isfinite(margin):
            draft.set(i, reason="the bound is not finite; the weights or the region are too large for float64")
        elif margin > 0:
            draft.set(i, status=Status.CERTIFIED, reason="")
        else:
            draft.set(
                i, reason=f"the {method} bound is not tight enough; try a smaller eps, or train with certified training"
            )
    proposed = [k for k, margin in enumerate(lower) if 0 < margin < math.inf]
    if budget.check and proposed:
        _check(prepared, part, draft, right, proposed, bounds, lower, budget.tolerance)
    draft.expire(right)
    _follow(prepared, part, draft, right, budget, original, bounds)


def _check(
    prepared: Prepared,
    part: Task,
    draft: _Draft,
    right: list[int],
    proposed: list[int],
    bounds: Bounds,
    lower: list[float],
    tolerance: Fraction,
) -> None:
    """Have the independent checker read a certificate of every sample that is about to be certified."""
    checker = prepared.checker
    C, rhs = part.C.cpu().numpy(), part.rhs.cpu().numpy()
    payloads = [
        record(
            checker.hash,
            int(part.indices[k]),
            part.region,
            k,
            bounds.proof(k),
            label=int(part.labels[k]) if part.by_label and part.labels is not None else None,
            C=C[k],
            rhs=rhs[k],
            margin=lower[k],
            tolerance=tolerance,
        )
        for k in proposed
    ]
    for k, payload, (accepted, reason, margin) in zip(proposed, payloads, checker.decide(payloads), strict=True):
        if accepted:
            draft.set(right[k], checked=True, certificate=payload, margin=margin)
        elif bounds.estimated:
            draft.set(right[k], status=Status.UNKNOWN, reason=f"the bound was not confirmed: {reason}")
        else:
            draft.set(
                right[k],
                status=Status.UNKNOWN,
                reason=f"{REJECTED} a proposed certificate ({reason}): a bug in verideq; please report it",
            )


def _radii(prepared: Prepared, part: Task, budget: Budget) -> list[float | None]:
    """The largest radius that each sample is certified at, by bisection to one part in 2¹⁴ of the range."""
    region = part.region
    if prepared.missing:
        return [None] * len(part)
    shape = (-1, *[1] * (region.center.dim() - 1))
    span = float(region.eps) * 8 if region.clip is None else region.clip[1] - region.clip[0]
    low, high = torch.zeros_like(part.rhs[:, 0]), torch.full_like(part.rhs[:, 0], span)
    for _ in range(14):
        middle = (low + high) / 2
        box, tolerance = region.box_of(middle.view(shape)), round_up(budget.tolerance)
        bounds = run_method(
            prepared, box, part.C, budget.method, budget.max_steps, rhs=part.rhs, tolerance=tolerance, upper=False
        )
        held = (bounds.box.lower > part.rhs).all(1)
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    return [float(value) for value in low.tolist()]


def _attack(
    prepared: Prepared, part: Task, draft: _Draft, right: list[int], budget: Budget, original: nn.Module | None
) -> None:
    """Attack the samples `right`, prove what is found, and hold it against what was certified."""
    attack = attack_named(budget.attack)
    if attack is None:
        return
    points, margins = attack(
        _target(prepared), part.region, part.C, part.rhs, indices=part.indices, seed=budget.seed, stop=draft.late
    )
    _judge(prepared, part, draft, right, original, points, margins)


def _follow(
    prepared: Prepared,
    part: Task,
    draft: _Draft,
    right: list[int],
    budget: Budget,
    original: nn.Module | None,
    bounds: Bounds,
) -> None:
    """Attack what a bound leaves open from where it would be attained, and judge what it broke on its way."""
    attack = attack_named(budget.attack)
    if attack is None:
        return
    broken = [k for k in bounds.witnesses if draft.verdicts[right[k]].status in (Status.UNKNOWN, Status.TIMEOUT)]
    if broken:
        found = torch.stack([bounds.witnesses[k] for k in broken]).to(part.region.center)
        margins = -torch.ones(len(found), dtype=found.dtype, device=found.device)
        own = part[torch.tensor(broken)]
        found = own.region.project(found)
        _judge(prepared, own, draft, [right[k] for k in broken], original, found, margins)
    left = [k for k, i in enumerate(right) if draft.verdicts[i].status is Status.UNKNOWN]
    if bounds.points is None or not left or draft.late():
        return
    rows = torch.tensor(left)
    own, lower = part[rows], bounds.box.lower[rows]
    points, margins = attack.follow(
        _target(prepared), own.region, own.C, own.rhs, bounds.points[rows], lower <= own.rhs, stop=draft.late
    )
    _judge(prepared, own, draft, [right[k] for k in left], original, points, margins)


def _target(prepared: Prepared) -> nn.Module:
    """The model for an attack, which needs a direction and not the last digit."""
    forward: Solver = Auto(tol=1e-6)
    backward: Solver = Auto(tol=1e-3)
    layers = dict(prepared.graph.equilibria())
    if set(layers) == set(prepared.monotone) and len(layers) == 1:
        # A step of Peaceman-Rachford is one product, and memory of steps would cost more than it saves.
        operator = layers.popitem()[1].operator()
        split = (
            Splitting.of(operator, tuple(operator.diagonal().shape))
            if isinstance(operator, Dense | MonotoneDense)
            else None
        )
        if split is not None:
            forward, backward = (PeacemanRachford(tol=tol, alpha=split.alpha) for tol in (1e-6, 1e-3))
    return prepared.graph.frozen(device=prepared.device, solver=forward, gradient=Implicit(backward), throw=False)


def _judge(
    prepared: Prepared,
    part: Task,
    draft: _Draft,
    right: list[int],
    original: nn.Module | None,
    points: Tensor,
    margins: Tensor,
) -> None:
    """Prove what an attack has found, and hold it against what was certified."""
    found = (margins < 0) & part.region.contains(points)
    # A witness is proved like a bound, and has to break the user's own model, in its own dtype, as well.
    proved, deployed = torch.zeros_like(found), found
    if not prepared.missing:
        highest = run_method(prepared, Box(points, points), part.C, "interval", 1000).box.upper
        proved = found & (highest < part.rhs).any(1)
    if original is not None and bool(found.any()):
        deployed = found & (_rows(original, points, part) < 0).any(1)
    for k, i in enumerate(right):
        verdict = draft.verdicts[i]
        if verdict.certified and bool(proved[k]):
            raise _inconsistency(verdict, points[k], int(part.indices[k]))
        # What is proved outweighs what is measured: close to a tie the attack's own numbers may say otherwise.
        draft.set(i, attacked=verdict.certified or not bool(deployed[k]))
        if bool(proved[k] & deployed[k]):
            reason = "a point of the region provably lacks the property"
            draft.set(i, status=Status.FALSIFIED, witness=points[k].cpu().numpy(), reason=reason)
        elif bool(found[k]) and verdict.status is Status.UNKNOWN:
            seen = (
                "breaks the stored numbers, but not the model as it runs"
                if proved[k]
                else "is measured, and not proved"
            )
            draft.set(i, reason=f"an attack found a point, which {seen}; {verdict.reason}")


def _inconsistency(verdict: Verdict, point: Tensor, index: int) -> InconsistencyError:
    return InconsistencyError(
        f"sample {index} is certified at {verdict.norm} eps {verdict.eps} (margin {verdict.margin:.6g}) and broken by "
        "a proved witness: one of the two is a bug; please report it with the saved files",
        {"index": index, "verdict": verdict, "witness": point.cpu().numpy()},
    )


@torch.no_grad()
def _rows(original: nn.Module, points: Tensor, part: Task) -> Tensor:
    """The specification's rows as the user's own model computes them, (batch, rows)."""
    first = next((p for p in [*original.parameters(), *original.buffers()] if p.is_floating_point()), points)
    with evaluating(original):
        outputs = original(points.to(first.device, first.dtype)).to(part.C)
    rows: Tensor = (part.C @ outputs[:, :, None])[:, :, 0] - part.rhs
    return rows
