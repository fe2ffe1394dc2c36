"""`certify`: from images and a radius to verdicts. One batch at a time, each sample on its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from verideq.attacks import Problem, Suite, attack_named, open_model
from verideq.box import Box
from verideq.certify.bound import elide, run_method
from verideq.certify.budget import Budget
from verideq.certify.footprint import Footprint
from verideq.certify.method import Bounds, Prepared, prepare
from verideq.certify.proposal import margins_of, written
from verideq.certify.radius import reaches
from verideq.certify.summary import REJECTED
from verideq.certify.task import Task, specification
from verideq.certify.verdict import Verdict
from verideq.certify.witness import Found, examined, followed, inconsistency, target
from verideq.checker import STOPPED
from verideq.clock import Accounts
from verideq.errors import ConvergenceError, InconsistencyError, InputError, NoGaugeError, NotEnoughMemory
from verideq.region import Radius, Region, parse_eps, round_up
from verideq.status import Status

RESERVE = 0.85
"""The share of the time that is left which a bound may use up: a checker has to read what it proves."""
ATTACK = 0.5
"""And which an attack may use up."""
FOLLOWED = "PGD from where a bound is attained"
"""How accounts call what no attack of a suite has found."""


def certify(
    model: nn.Module | Prepared,
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
        timeout: seconds a sample, and as much again for its radius.
        C: (rows, outputs) or (batch, rows, outputs).
        rhs: (rows,) or (batch, rows); ``None``: zero.
        attack: ``none``, ``pgd``, ``standard``, ``intermediate`` or ``full``: look for counterexamples too.
        weights: (*features), radii of the features in units of eps.
        seed: of the attack.
        max_steps: of the equilibrium solver.
        radius: look for the largest certified radius of each sample too, and with an attack for the smallest at which
            that breaks it.
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
    budget.check_for(prepared)
    region = Region(images, eps, norm, prepared.graph.pixel_range, weights=weights)
    rows = specification(prepared, images, labels, C, rhs)
    task = Task(region, labels, *rows, torch.arange(count), by_label=C is None and rhs is None)
    for start in range(0, count, batch_size):
        part = task[slice(start, start + batch_size)]
        decided = decide(prepared, part, budget, original)
        if radius:
            found = reaches(prepared, part, budget, original, [decided])
            decided = [reach.told(verdict) for reach, verdict in zip(found, decided, strict=True)]
        verdicts += decided
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
        if isinstance(error, NotEnoughMemory):
            status, reason = Status.UNKNOWN, str(error)
        if isinstance(error, ConvergenceError):
            status, reason = Status.UNKNOWN, "; ".join(map(str, (error, *prepared.missing.values())))
        return [
            Verdict(
                status, None, task.region.radii[0], task.region.norm, budget.method, False, reason, 0.0, label=label
            )
        ]


class _Draft:
    """The verdicts of a batch while they are being worked out."""

    def __init__(self, task: Task, budget: Budget, method: str) -> None:
        self.task, self.accounts = task, Accounts(len(task), budget.timeout)
        self.notes: dict[int, str] = {}
        blank = Verdict(Status.UNKNOWN, None, task.region.radii[0], task.region.norm, method, False, "", 0.0)
        self.verdicts = [
            replace(blank, eps=eps, label=None if task.labels is None else int(task.labels[i]))
            for i, eps in enumerate(task.region.radii)
        ]

    def set(self, i: int, **changes: object) -> None:
        self.verdicts[i] = replace(self.verdicts[i], **changes)  # type: ignore[arg-type]  # fields by name

    def open(self, places: Sequence[int]) -> list[int]:
        """Those undecided with time left. A refused proposal is a bug, and no better bound may hide that."""
        return [
            i
            for i in places
            if self.verdicts[i].status is Status.UNKNOWN
            and REJECTED not in self.verdicts[i].reason
            and not self.accounts.late(i, RESERVE)
        ]

    def attackable(self, places: Sequence[int]) -> list[int]:
        """Those that no witness has broken, with time left: what is certified too, to be held against the attack."""
        return [i for i in places if self.verdicts[i].status is not Status.FALSIFIED and not self.accounts.late(i)]

    def expire(self, places: Sequence[int], share: float = 1.0) -> None:
        """What is open, or was proved just now, if this share of the time is over."""
        for i in places:
            status, refused = self.verdicts[i].status, REJECTED in self.verdicts[i].reason
            if self.accounts.late(i, share) and not refused and status in (Status.UNKNOWN, Status.CERTIFIED):
                reason = "the time limit was reached; raise --timeout" + self.notes.get(i, "")
                self.set(i, status=Status.TIMEOUT, reason=reason, checked=False, certificate=None)

    def finish(self) -> list[Verdict]:
        # What is open when a bound has used up all that it may is open for want of time.
        self.expire([i for i, v in enumerate(self.verdicts) if v.status is Status.UNKNOWN], RESERVE)
        return [replace(v, seconds=spent) for v, spent in zip(self.verdicts, self.accounts.spent, strict=True)]


def _decide(prepared: Prepared, task: Task, budget: Budget, original: nn.Module | None) -> list[Verdict]:
    methods = budget.methods(prepared)
    draft = _Draft(task, budget, methods[0])
    everyone = range(len(task))
    with draft.accounts.charged(everyone):
        right = _predict(prepared, task, draft)
    stages: list[str | None] = [*methods]
    # What an attack breaks needs no proof, and costs the bounds behind the first the most time.
    stages.insert(1, None)
    shape = Footprint.of(prepared, task.region.center, task.rhs.shape[1])
    for method in stages:
        places = draft.open(right) if method is not None else draft.attackable(right)
        for group in _groups(places, shape, method):
            part = task[torch.tensor(group)]
            if method is None:
                _attack(prepared, part, draft, group, budget, original)
            else:
                _prove(prepared, part, draft, group, budget, method, original)
    return draft.finish()


def _groups(places: list[int], shape: Footprint, method: str | None) -> list[list[int]]:
    """As many samples as fit into memory, with their proofs, at a time; `method`: ``None`` for an attack."""
    try:
        size = shape.attacks_at_once() if method is None else shape.samples_at_once(method)
    except NotEnoughMemory:
        size = max(1, len(places))  # the method will say so itself
    return [places[start : start + size] for start in range(0, len(places), size)]


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
    paid: dict[int, float] = {}
    try:
        with draft.accounts.charged(right, RESERVE, paid) as deadline:
            bounds = run_method(
                prepared,
                part.region,
                part.C,
                method,
                budget.max_steps,
                rhs=part.rhs,
                tolerance=round_up(budget.tolerance),
                upper=False,
                deadline=deadline,
                unproved=budget.check,
                paid=paid,
            )
    except NoGaugeError as error:
        for i in right:
            if not draft.verdicts[i].reason:
                rate = "" if math.isnan(error.rate) else f" (measured contraction rate {error.rate:.4g})"
                draft.set(i, method=method, reason=f"{error}{rate}")
        return
    except NotEnoughMemory as error:
        for i in right:
            draft.set(i, reason="; ".join(filter(None, (draft.verdicts[i].reason, str(error)))))
        return
    lower = margins_of(bounds, part)
    draft.notes |= {right[k]: f"; {note}" for k, note in bounds.notes.items()}
    for k, (i, margin, steps) in enumerate(zip(right, lower, bounds.steps.tolist(), strict=True)):
        before = draft.verdicts[i]
        if before.margin is not None and not margin > before.margin:
            continue  # an earlier method said as much, or more
        name = bounds.closer.get(k, method) if budget.method == "auto" else method
        draft.set(i, margin=margin if math.isfinite(margin) else None, method=name, steps=steps)
        if not math.isfinite(margin):
            draft.set(i, reason="the bound is not finite; the weights or the region are too large for float64")
        elif margin > 0:
            draft.set(i, status=Status.CERTIFIED, reason="")
        else:
            draft.set(
                i,
                reason=f"the {method} bound is not tight enough; try a smaller eps, or train with certified training"
                + draft.notes.get(i, ""),
            )
    proposed = [k for k, margin in enumerate(lower) if 0 < margin < math.inf]
    if budget.check and proposed:
        with draft.accounts.charged([right[k] for k in proposed]) as deadline:
            _check(prepared, part, draft, right, proposed, bounds, lower, budget, deadline)
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
    budget: Budget,
    deadline: float,
) -> None:
    """Have the independent checker read a certificate of every sample that is about to be certified."""
    payloads = [written(prepared, part, k, bounds, lower[k], budget.tolerance) for k in proposed]
    decided = prepared.checker.decide(payloads, lambda: time.monotonic() > deadline)
    for k, payload, (accepted, reason, margin) in zip(proposed, payloads, decided, strict=True):
        if accepted:
            draft.set(right[k], checked=True, certificate=budget.kept(payload), margin=margin)
        elif bounds.estimated or reason == STOPPED:
            draft.set(right[k], status=Status.UNKNOWN, reason=f"the bound was not confirmed: {reason}")
        else:
            draft.set(
                right[k],
                status=Status.UNKNOWN,
                reason=f"{REJECTED} a proposed certificate ({reason}): a bug in verideq; please report it",
            )


def _attack(
    prepared: Prepared, part: Task, draft: _Draft, right: list[int], budget: Budget, original: nn.Module | None
) -> None:
    """Attack the samples `right`, prove what is found, and hold it against what was certified."""
    attack = attack_named(budget.attack)
    if attack is None:
        return
    with draft.accounts.charged(right, ATTACK) as deadline:
        model, rows = target(prepared), (part.region, part.C, part.rhs)

        def late() -> bool:
            return time.monotonic() > deadline

        if isinstance(attack, Suite):
            dynamics = open_model(model, device=prepared.device)
            report = attack.run(Problem(dynamics, *rows, part.indices, seed=budget.seed, stop=late))
            points, margins = report.points, report.margins
            for k, i in enumerate(right):
                draft.set(i, **report.account(k))
        else:
            points, margins = attack(model, *rows, indices=part.indices, seed=budget.seed, stop=late)
        _judge(part, draft, right, examined(prepared, part, original, points, margins))


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
    undecided = Status.UNKNOWN, Status.TIMEOUT
    broken = [k for k in bounds.witnesses if draft.verdicts[right[k]].status in undecided]
    followed_up = attack is not None and bounds.points is not None
    left = [k for k, i in enumerate(right) if k in broken or (followed_up and draft.open([i]))]
    if left:
        chosen = [right[k] for k in left]
        with draft.accounts.charged(chosen, ATTACK) as deadline:
            found = followed(
                prepared, part, original, attack, bounds, left, lambda: time.monotonic() > deadline
            )  # fmt: skip
            _judge(part[torch.tensor(left)], draft, chosen, found)
        for k, i in enumerate(chosen if isinstance(attack, Suite) else []):
            if bool(found.deployed[k]):
                draft.set(i, attack=FOLLOWED, attack_margin=None)
        for i in chosen if attack is None else []:  # there was none, whatever the bound met on its way
            draft.set(i, attacked=None)


def _judge(part: Task, draft: _Draft, right: list[int], found: Found) -> None:
    """Hold what an attack has found against what was certified."""
    for k, i in enumerate(right):
        verdict = draft.verdicts[i]
        if verdict.certified and bool(found.proved[k]):
            raise inconsistency(verdict, found.points[k], int(part.indices[k]))
        # What is proved outweighs what is measured: close to a tie the attack's own numbers may say otherwise.
        draft.set(i, attacked=verdict.certified or not bool(found.deployed[k]))
        if bool(found.proved[k] & found.deployed[k]):
            reason = "a point of the region provably lacks the property"
            draft.set(i, status=Status.FALSIFIED, witness=found.points[k].cpu().numpy(), reason=reason)
        elif bool(found.seen[k]) and verdict.status is Status.UNKNOWN:
            seen = (
                "breaks the stored numbers, but not the model as it runs"
                if found.proved[k]
                else "is measured, and not proved"
            )
            draft.set(i, reason=f"an attack found a point, which {seen}; {verdict.reason}")
