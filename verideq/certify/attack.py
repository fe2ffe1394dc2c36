"""A run of attacks over a data set: the folder, the resume and the lines of a certifying run, with no bounds.

Whatever an attack has found is run again on the user's own model, in its own dtype, before a sample counts as broken.
A model that can be bounded has its witness proved too, and is FALSIFIED; otherwise the sample is UNKNOWN, and
`attacked` is false.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verideq.attacks.defences import Deciding, Defence, FinalState, entropies, entropy, entropy_curve
from verideq.attacks.opened import GraphDynamics, is_opaque, open_model
from verideq.attacks.problem import Problem
from verideq.attacks.suites import SUITES, Report
from verideq.box import Box
from verideq.certify.bound import margin_rows, run_method
from verideq.certify.corruption import Predictions, corrupted_predictions, summarise_corruptions
from verideq.certify.method import Prepared, prepare
from verideq.certify.run import IDENTITY, Run
from verideq.certify.summary import summarise
from verideq.certify.verdict import Verdict
from verideq.equilibrium import DEQ
from verideq.equilibrium.dynamics import Dynamics
from verideq.graph import evaluating, model_hash
from verideq.region import Region
from verideq.status import Status

EXTRA = ("defence", "corruptions")
"""What identifies a run of attacks besides the fields of a certifying one."""


@dataclass(frozen=True)
class Outcome(Verdict):
    """A verdict with what the attacks were like on the sample.

    Args:
        entropies: of the prediction along the forward pass, for the input and for the worst point.
        corrupted: predictions under natural corruptions; the same at every eps.
    """

    entropies: tuple[list[float], list[float]] | None = None
    corrupted: Predictions | None = None


@dataclass(frozen=True)
class _Prepared:
    """What every chunk shares."""

    dynamics: Dynamics
    prepared: Prepared | None


@dataclass(frozen=True)
class AttackRun(Run):
    """A run of a suite against a model, or against a defence of it.

    Args:
        defences: what decides, one an eps; the others are those of `Run`, of whose budget `attack` and `seed` are read.
        corruptions: by name, natural ones that every sample is tried under besides.
        training: the recipe that made the model, without its seed, and the seed; ``None`` where that is not known.
        tell: of every attack of a suite before it begins: its number, and how many there are.
    """

    defences: Sequence[Defence] = ()
    corruptions: Sequence[str] = ()
    training: Mapping[str, Any] | None = None
    tell: Callable[[int, int], None] = lambda stage, count: None

    @property
    def identity(self) -> tuple[str, ...]:
        return (*IDENTITY, *EXTRA)

    def meta(self) -> dict[str, Any]:
        own = {
            "defence": ", ".join(dict.fromkeys(defence.name for defence in self.defences)),
            "defence_settings": [defence.settings for defence in self.defences],
            "corruptions": list(self.corruptions),
            "training": self.training,
        }
        return super().meta() | {"method": "none", "check": False, **own}

    @property
    def _general(self) -> bool:
        """Whether the model is one that no model file holds and no bound is known for."""
        return isinstance(self.model, DEQ) or is_opaque(self.model)

    def _hash(self) -> str:
        return general_hash(self.model) if self._general else model_hash(self.model)

    def _prepare(self) -> _Prepared:
        provable = not self._general and all(isinstance(defence, FinalState) for defence in self.defences)
        prepared = prepare(self.model, self.device) if provable else None
        return _Prepared(open_model(self.model, device=self.device), prepared)

    def _work(self, prepared: Any, chunk: range) -> list[tuple[int, Verdict]]:
        q, rows = self.questions, slice(chunk.start, chunk.stop)
        images, labels = q.images[rows].to(self.device), q.labels[rows].to(self.device)
        weights = None if q.weights is None else q.weights.to(self.device)
        corrupted = self._corrupted(prepared, self.defences[0], images, q.indices[rows])
        found: list[tuple[int, Verdict]] = []
        for eps, defence in zip(q.eps, self.defences, strict=True):
            region = Region(images, eps, q.norm, q.clip, weights=weights)
            outcomes = self._attack(prepared, defence, region, labels, q.indices[rows])
            told = [_told(outcome, own) for outcome, own in zip(outcomes, corrupted, strict=True)]
            found += zip(q.indices[rows], told, strict=True)
        return found

    def _corrupted(
        self, prepared: _Prepared, defence: Defence, images: Tensor, indices: list[int]
    ) -> list[Predictions | Exception | None]:
        """The predictions under corruptions of a chunk, or what one sample's raised; `None`: none was asked for."""
        if not self.corruptions:
            return [None] * len(indices)
        try:
            outputs = partial(self._own, prepared, defence)
            return [*corrupted_predictions(outputs, images, indices, self.corruptions, self.budget.seed)]
        except Exception as error:
            if len(indices) == 1:
                return [error]
            halves = (slice(0, len(indices) // 2), slice(len(indices) // 2, None))
            return [own for h in halves for own in self._corrupted(prepared, defence, images[h], indices[h])]

    def _attack(
        self, prepared: _Prepared, defence: Defence, region: Region, labels: Tensor, indices: list[int]
    ) -> list[Outcome]:
        """The outcomes of one chunk at one radius; an exception costs only the samples that raise it."""
        try:
            return self._attack_all(prepared, defence, region, labels, indices)
        except Exception as error:
            if len(labels) > 1:
                halves = (slice(0, len(labels) // 2), slice(len(labels) // 2, None))
                return [v for h in halves for v in self._attack(prepared, defence, region[h], labels[h], indices[h])]
            return [
                Outcome(
                    Status.ERROR, None, region.eps, region.norm, "none", False, f"{type(error).__name__}: {error}", 0.0,
                    label=int(labels[0]),
                )
            ]  # fmt: skip

    def _attack_all(
        self, prepared: _Prepared, defence: Defence, region: Region, labels: Tensor, indices: list[int]
    ) -> list[Outcome]:
        started = time.monotonic()
        outputs = self._own(prepared, defence, region.center)
        predictions = outputs.argmax(1)
        finite = outputs.isfinite().all(1)
        right = (finite & (predictions == labels)).nonzero().flatten()
        C = margin_rows(labels, outputs.shape[1])
        rhs = torch.zeros(C.shape[:2], dtype=C.dtype, device=C.device)
        whole = Problem(
            prepared.dynamics,
            region,
            C,
            rhs,
            torch.tensor(indices),
            decide=None if isinstance(defence, FinalState) else Deciding(defence, prepared.dynamics),
            seed=self.budget.seed,
        )
        found: dict[int, dict[str, Any]] = {}
        if len(right):
            report, broken = self._search(prepared, defence, whole[right], labels[right])
            found = self._judge(prepared, whole[right], report, broken, right.tolist())
        seconds = (time.monotonic() - started) / len(labels)
        wrong = {"status": Status.MISCLASSIFIED, "reason": "the model is wrong on the input itself"}
        nothing = {"status": Status.ERROR, "reason": "the outputs at the centre are not finite"}
        return [
            Outcome(
                margin=None, eps=region.eps, norm=region.norm, method="none", checked=False, seconds=seconds,
                prediction=int(predictions[i]) if bool(finite[i]) else None, label=int(labels[i]),
                **found.get(i, wrong if bool(finite[i]) else nothing),
            )
            for i in range(len(labels))
        ]  # fmt: skip

    @property
    def _with_account(self) -> bool:
        return True

    def _search(self, prepared: _Prepared, defence: Defence, part: Problem, labels: Tensor) -> tuple[Report, Tensor]:
        """What the suite finds, and which samples, (batch,), that breaks as the model runs.

        A point that breaks the float64 copy by less than the model's own dtype is off may leave the model itself right:
        of such a sample it is asked once more, and for a margin that makes up for several times as much.
        """
        suite = SUITES[self.budget.attack].looking_at(defence.reads)

        def breaks(outputs: Tensor, labels: Tensor) -> Tensor:
            return outputs.isfinite().all(1) & (outputs.argmax(1) != labels)

        report = suite.run(part, self.tell)
        outputs = self._own(prepared, defence, report.points)
        broken = part.region.contains(report.points) & breaks(outputs, labels)
        missed = ((report.margins < 0) & ~broken).nonzero().flatten()
        if len(missed):
            own = part[missed]
            copied = (own.decide or own.dynamics.outputs)(report.points[missed])
            spare = 4 * (outputs[missed] - copied).abs().amax(1).nan_to_num(0.0, 0.0)
            deeper = suite.run(replace(own, rhs=own.rhs - spare[:, None]))
            found = own.region.contains(deeper.points)
            found &= breaks(self._own(prepared, defence, deeper.points), labels[missed])
            broken[missed] = found
            report = report.replaced(missed[found], deeper, found, deeper.margins - spare)
        return report, broken

    def _judge(
        self, prepared: _Prepared, part: Problem, report: Report, broken: Tensor, places: list[int]
    ) -> dict[int, dict[str, Any]]:
        """What became of the samples that were right: they are rows `places` of the chunk."""
        points, region = report.points, part.region
        proved = torch.zeros_like(broken)
        bounded = prepared.prepared
        if bounded is not None and not bounded.missing and bool(broken.any()):
            at = broken.nonzero().flatten()
            highest = run_method(bounded, Box(points[at], points[at]), part.C[at], "interval", 1000).box.upper
            proved[at] = (highest < part.rhs[at]).any(1)
        curves = None
        if not isinstance(prepared.dynamics, GraphDynamics | DEQ):
            curves = [entropy(prepared.dynamics.outputs(x))[None] for x in (region.center, points)]
        else:
            curves = [entropy_curve(prepared.dynamics, x) for x in (region.center, points)]
        known = torch.cat(curves).isfinite().all(0)
        result = {}
        for k, i in enumerate(places):
            name = report.name(k)
            if bool(proved[k]):
                status, reason = Status.FALSIFIED, f"{name}: a point of the region provably lacks the property"
            elif bool(broken[k]):
                status, reason = Status.UNKNOWN, f"broken by {name}, as the model runs; not proved"
            elif float(report.margins[k]) < 0:
                status, reason = Status.UNKNOWN, f"{name} breaks a float64 copy, and not the model as it runs"
            else:
                status, reason = Status.UNKNOWN, f"no attack of the suite {self.budget.attack} found a counterexample"
            result[i] = {
                "status": status,
                "reason": reason,
                "attacked": not bool(broken[k]),
                "witness": points[k].cpu().numpy() if bool(broken[k]) else None,
                **report.account(k),
                "entropies": (curves[0][:, k].tolist(), curves[1][:, k].tolist()) if bool(known[k]) else None,
            }
        return result

    @torch.no_grad()
    def _own(self, prepared: _Prepared, defence: Defence, x: Tensor) -> Tensor:
        """The outputs of what is attacked, as it runs: in its own dtype, but for defences of supported models."""
        model, first = self.model, _example(self.model, x)
        if isinstance(defence, FinalState):
            with evaluating(model):
                outputs: Tensor = model(x.to(first.device, first.dtype))
        elif isinstance(model, DEQ):
            own = copy.deepcopy(model).eval().requires_grad_(False)
            outputs = defence.outputs(own, x.to(first.device, first.dtype))
        else:
            outputs = defence.outputs(prepared.dynamics, x)
        return outputs.to(x)

    def _line(self, index: int, verdict: Verdict, places: Mapping[bytes, str]) -> dict[str, Any]:
        line = super()._line(index, verdict, places)
        if not isinstance(verdict, Outcome):
            return line
        clean, attacked = verdict.entropies or (None, None)
        line |= {} if verdict.corrupted is None else {"corrupted": verdict.corrupted}
        return line | {"entropy_clean": clean, "entropy_attacked": attacked}

    def _summarise(self, records: list[dict[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
        return summarise_attack(records, meta)


def summarise_attack(records: list[dict[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """`summarise`, with `entropy` an eps, and with `corruptions` where some were asked for."""
    summary = summarise(records, meta)
    for result in summary["results"]:
        mine = [r for r in records if r["eps"] == result["eps"] and r["entropy_clean"] is not None]
        final = [[torch.tensor([r[key][-1] for r in mine])] for key in ("entropy_clean", "entropy_attacked")]
        compared = entropies(final[0][0], final[1][0]) if mine else None
        result["entropy"] = None if compared is None else {"P": compared.share, "dH": compared.difference}
    corruptions = summarise_corruptions(records)
    known = {} if corruptions is None else {"corruptions": corruptions}
    return summary | {"suite": meta["attack"], "defence": meta["defence"], **known}


def _example(model: torch.nn.Module, x: Tensor) -> Tensor:
    """A tensor of the device and the dtype that a model runs in: one of its own, or else `x`."""
    return next((p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()), x)


def _told(outcome: Outcome, corrupted: Predictions | Exception | None) -> Outcome:
    """An outcome with what the corruptions gave; where they raised, it is an ERROR."""
    if isinstance(corrupted, Exception):
        reason = f"on a corrupted input: {type(corrupted).__name__}: {corrupted}"
        return replace(outcome, status=Status.ERROR, reason=reason, attacked=None, witness=None)
    return outcome if corrupted is None else replace(outcome, corrupted=corrupted)


def general_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model that no model file can hold: its printed structure and every tensor."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
