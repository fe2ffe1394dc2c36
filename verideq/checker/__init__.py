"""A small program that reads a certificate and decides: numpy and the standard library, nothing else of verideq.

Read in this order: `arithmetic` (the inclusion principle), `network` (a rule an operation) and `adjoint` (its
transpose), `layers` (why an equilibrium is unique, and where it lies), `dual` and `quadratic` (the two bounds), `claim`
(what a record says), `proof` (the pass through the network), `files` (bytes). `check` is the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Exact, Float, Rejected, guarded, require
from verideq.checker.claim import Case, Claim, read_claim
from verideq.checker.files import Blob, model_hash, parse_blob, records
from verideq.checker.layers import Layer, layer
from verideq.checker.network import Node, read_nodes
from verideq.checker.proof import least_margins, row_bounds

__all__ = ["STOPPED", "Checker", "Outcome", "check"]

SIZE = 64
"""Records, and cases, that are worked out together, at most."""
STOPPED = "there was no time to check it"
"""The reason for what was not looked at."""
NUMBERS = 2**19
"""Of the rows of cases that are worked out together: what a processor's cache holds."""


@dataclass(frozen=True)
class Outcome:
    """What was decided about one record.

    Args:
        path: its file.
        record: its place in the file, from 0; -1 for the file as a whole.
        accepted: the claim holds.
        reason: why not; empty if it does.
        margin: what the checker itself proved, where it got so far.
        claim: what was claimed, in words, where it could be read.
    """

    path: str
    record: int
    accepted: bool
    reason: str
    margin: float | None = None
    claim: str = ""


Verdict = tuple[bool, str, float | None]
"""Whether a claim holds, the reason if not, and the margin that was proved."""


class Checker:
    """The claims about one model.

    Args:
        model: the bytes of the model file.
        certificate: the bytes of the model certificate: why its equilibria are unique.
        exact: rational arithmetic instead of outward rounding.

    Raises:
        Rejected: a file that is not what it should be, or a certificate of another model.
    """

    def __init__(self, model: bytes, certificate: bytes, *, exact: bool = False) -> None:
        self.arithmetic: Arithmetic = Exact() if exact else Float()
        self._layers: dict[tuple[str, tuple[int, ...]], Layer] = {}
        with guarded():
            self._read(parse_blob(model), parse_blob(certificate))

    def _read(self, blob: Blob, certificate: Blob) -> None:
        self.hash = model_hash(blob)
        require(set(certificate.head) == {"version", "model"}, "the model certificate has other fields")
        require(certificate.head["version"] == 1, "the version of the model certificate is not known")
        require(certificate.head["model"] == self.hash, "the model certificate is about another model")
        self.nodes = read_nodes(blob, self.arithmetic)
        pixels = blob.head.get("pixel_range")
        self.pixels = None if pixels is None else (Fraction(pixels[0]), Fraction(pixels[1]))
        self._why: dict[str, dict[str, Array]] = {node.name: {} for node in self.nodes if node.kind == "equilibrium"}
        for name, array in certificate.arrays.items():
            kind, _, place = name.partition("/")
            known = kind in ("gauge", "m", "L") and place in self._why
            require(known, f"the array {name} of the model certificate has no meaning")
            require(array.dtype == np.float64, f"{name} is not float64")
            self._why[place][kind] = self.arithmetic.exactly(array)

    def layer(self, node: Node, state: tuple[int, ...]) -> Layer:
        """The equilibrium of a node, proved unique once for states of a shape."""
        if (node.name, state) not in self._layers:
            self._layers[node.name, state] = layer(self.arithmetic, node, self._why[node.name], state)
        return self._layers[node.name, state]

    def decide(self, payloads: list[bytes], stop: Callable[[], bool] = lambda: False) -> list[Verdict]:
        """Whether each record's claim holds, the reason if not, and the margin that was proved.

        Args:
            stop: asked between the parts of the work; from then on nothing is accepted, for the reason `STOPPED`.
        """
        claims: dict[int, Claim] = {}
        cases: dict[object, list[tuple[int, Case]]] = {}
        reasons: dict[int, str] = {}
        for place, payload in enumerate(payloads):
            try:
                with guarded():
                    claim = read_claim(parse_blob(payload), self.hash, self.pixels, self.arithmetic)
                    for case in claim.cases(self._rows(claim)):
                        cases.setdefault(_form(case), []).append((place, case))
                claims[place] = claim
            except Rejected as reason:
                reasons[place] = str(reason)
        margins: dict[int, list[float | Fraction]] = {place: [] for place in claims}
        for group in cases.values():
            size = _together(group[0][1])
            for start in range(0, len(group), size):
                if stop():
                    reasons = {place: STOPPED for place, _ in group[start:]} | reasons
                wanted = [(place, case) for place, case in group[start : start + size] if place not in reasons]
                for place, margin in self._margins(wanted):
                    if isinstance(margin, str):
                        reasons.setdefault(place, margin)
                    else:
                        margins[place].append(margin)
        return [
            (False, reasons[place], None) if place in reasons else _verdict(claims[place], margins[place])
            for place in range(len(payloads))
        ]

    def rows(self, payload: bytes) -> Array:
        """A lower bound of every row of a record's specification, less `rhs`, whatever it claims: (rows,).

        ``-inf`` where nothing is proved.

        Raises:
            Rejected: a record that cannot be read.
        """
        with guarded():
            claim = read_claim(parse_blob(payload), self.hash, self.pixels, self.arithmetic)
            cases = list(claim.cases(self._rows(claim)))
        groups: dict[object, list[Case]] = {}
        for case in cases:
            groups.setdefault(_form(case), []).append(case)
        lower = np.full(self._rows(claim) or 0, np.inf)
        for group in groups.values():
            size = _together(group[0])
            for start in range(0, len(group), size):
                part = group[start : start + size]
                for case, bounds in zip(part, self._bounded(part), strict=True):
                    chosen = slice(None) if case.rows is None else list(case.rows)
                    ends = np.where(bounds > 0, np.inf, -np.inf) if case.steps[-1].empty else bounds
                    lower[chosen] = np.minimum(lower[chosen], np.where(ends == ends, ends, -np.inf))
        return lower

    def _bounded(self, cases: list[Case]) -> Array:
        """`row_bounds`, and ``-inf`` for cases about which nothing can be said."""
        try:
            with guarded():
                return row_bounds(self.arithmetic, self.nodes, self.layer, cases)
        except Rejected:
            if len(cases) == 1:
                return np.full((1, 1), -np.inf)
            parts = [self._bounded([case]) for case in cases]
            width = max(part.shape[1] for part in parts)
            return np.concatenate([np.broadcast_to(part, (1, width)) for part in parts])

    def _rows(self, claim: Claim) -> int | None:
        """How many rows a claim's specification has, where the model file says so."""
        if claim.linear is not None:
            return len(claim.linear[0])
        weight = self.nodes[-1].tensors.get("weight")
        return len(weight) - 1 if self.nodes[-1].kind == "linear" and weight is not None else None

    def _margins(self, group: list[tuple[int, Case]]) -> Iterator[tuple[int, Any]]:
        """The least row of every case, or why there is none; what is wrong with one case costs no other its answer."""
        if not group:
            return
        try:
            with guarded():
                least = least_margins(self.arithmetic, self.nodes, self.layer, [case for _, case in group])
        except Rejected as reason:
            if len(group) == 1:
                yield group[0][0], str(reason)
                return
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                yield from self._margins(half)
            return
        for (place, case), margin in zip(group, least, strict=True):
            if margin != margin:  # NaN; a fraction may be beyond float64
                yield place, "a box is not mapped into itself, or is crossed"
            elif case.steps[-1].empty:
                if not margin > 0:
                    yield place, "a case that is said to be empty may not be"
            else:
                yield place, margin


def _together(case: Case) -> int:
    """How many cases of this form are worked out together."""
    rows = max([9 if case.rows is None else len(case.rows), *(len(s.units) for s in case.steps if s.units is not None)])
    sizes: list[int] = [case.claim.center[0].size, *(lower.size for lower, _ in case.claim.boxes.values())]
    return max(1, min(SIZE, NUMBERS // (max(1, rows) * max(1, *sizes))))


def _form(case: Case) -> object:
    """What cases have in common that are worked out together."""
    claim = case.claim
    boxes = tuple((name, box[0].shape) for name, box in sorted(claim.boxes.items()))
    states = tuple((name, state.shape) for name, state in sorted(claim.states.items()))
    rows = None if claim.linear is None else len(claim.linear[0])
    count = rows if case.rows is None else len(case.rows)
    return (
        claim.center[0].shape, claim.norm, claim.tolerance, claim.refinements, boxes, states, count,
        case.before is None, tuple(step.form for step in case.steps),
    )  # fmt: skip


def _verdict(claim: Claim, margins: list[float | Fraction]) -> Verdict:
    """The least of the margins, if it is what was claimed. A ball all of whose parts are empty is no ball."""
    if not margins:
        return False, "nothing is claimed of any input", None
    margin = min(margins)
    if not (0 < margin < np.inf and Fraction(margin) >= claim.margin):
        return False, f"the claimed margin {shown(claim.margin)} is not proved: {shown(margin)}", None
    return True, "", float(min(margin, np.finfo(np.float64).max))


def check(path: str | Path, *, exact: bool = False) -> list[Outcome]:
    """Check every record of a certificate folder, or of the folders below it.

    Args:
        path: a folder with ``model.safetensors``, ``gauges.safetensors`` and ``records.bin``; or one above such
        folders. exact: rational arithmetic, for audits.

    Returns:
        an `Outcome` a record; a folder without records is one rejection, never an empty success.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("records.bin"))
    if not files:
        return [
            Outcome(str(path), -1, False, "there is no records.bin here or below; a run keeps one with --certificates")
        ]
    return [outcome for file in files for outcome in _check_file(file, exact)]


def _check_file(file: Path, exact: bool, size: int = SIZE) -> Iterator[Outcome]:
    name, folder = str(file), file.parent
    count = 0
    waiting: list[tuple[int, bytes]] = []
    try:
        model, gauges = (folder / "model.safetensors").read_bytes(), (folder / "gauges.safetensors").read_bytes()
        checker = Checker(model, gauges, exact=exact)
        for count, payload in enumerate(records(file), 1):
            if not isinstance(payload, Rejected):
                waiting.append((count - 1, payload))
            if len(waiting) == size or isinstance(payload, Rejected):
                yield from _outcomes(checker, name, waiting)
                waiting = []
            if isinstance(payload, Rejected):
                yield Outcome(name, count - 1, False, str(payload))
    except (Rejected, OSError) as error:
        yield Outcome(name, -1, False, str(error))
        return
    yield from _outcomes(checker, name, waiting)
    if not count:
        yield Outcome(name, -1, False, "the file holds no records")


def _outcomes(checker: Checker, name: str, waiting: list[tuple[int, bytes]]) -> Iterable[Outcome]:
    verdicts: Mapping[int, Verdict] = dict(
        zip((place for place, _ in waiting), checker.decide([payload for _, payload in waiting]), strict=True)
    )
    claims = {place: spelled(payload) for place, payload in waiting}
    return [Outcome(name, place, *verdict, claims[place]) for place, verdict in verdicts.items()]


def spelled(payload: bytes) -> str:
    """The claim of a record in words, or nothing where it cannot be read."""
    try:
        head = parse_blob(payload).head
        what = "its C and rhs" if head["label"] is None else f"label {head['label']}"
        return f"sample {head['index']}, {what}, {head['norm']} eps {head['eps']}"
    except (Rejected, KeyError):
        return ""


def shown(value: float | Fraction) -> str:
    """A number for a message, also one that no float64 holds."""
    try:
        return f"{float(value):.6g}"
    except OverflowError:
        return "a number beyond float64"
