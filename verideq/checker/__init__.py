"""A small program that reads a certificate and decides: numpy and the standard library, nothing else of verideq.

Read in this order: `arithmetic` (the inclusion principle), `network` (a rule an operation), `proof` (the theorem, and
what a record claims), `files` (bytes). `check` is the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Exact, Float, Interval, Rejected, guarded, require
from verideq.checker.files import Blob, model_hash, parse_blob, records
from verideq.checker.network import Node, read_nodes
from verideq.checker.proof import Claim, Contraction, apply, contraction, equilibrium, read_claim, region

__all__ = ["Checker", "Outcome", "check"]


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


class Checker:
    """The claims about one model.

    Args:
        model: the bytes of the model file.
        gauges: the bytes of the model certificate.
        exact: rational arithmetic instead of outward rounding.

    Raises:
        Rejected: a file that is not what it should be, or a certificate of another model.
    """

    def __init__(self, model: bytes, gauges: bytes, *, exact: bool = False) -> None:
        self.arithmetic: Arithmetic = Exact() if exact else Float()
        self._layers: dict[tuple[str, tuple[int, ...]], Contraction] = {}
        with guarded():
            self._read(parse_blob(model), parse_blob(gauges))

    def _read(self, blob: Blob, certificate: Blob) -> None:
        self.hash = model_hash(blob)
        require(set(certificate.head) == {"version", "model"}, "the model certificate has other fields")
        require(certificate.head["version"] == 1, "the version of the model certificate is not known")
        require(certificate.head["model"] == self.hash, "the model certificate is about another model")
        self.nodes = read_nodes(blob, self.arithmetic)
        pixels = blob.head.get("pixel_range")
        self.pixels = None if pixels is None else (Fraction(pixels[0]), Fraction(pixels[1]))
        self.gauges = {name.removeprefix("gauge/"): u for name, u in certificate.arrays.items()}
        layers = {f"gauge/{node.name}" for node in self.nodes if node.kind == "equilibrium"}
        for name, u in certificate.arrays.items():
            require(name in layers, f"the array {name} of the model certificate has no meaning")
            require(u.dtype == np.float64, f"{name} is not float64")

    def decide(self, payloads: list[bytes]) -> list[tuple[bool, str, float | None]]:
        """Whether each record's claim holds, the reason if not, and the margin that was proved."""
        decided: dict[int, tuple[bool, str, float | None]] = {}
        groups: dict[object, list[tuple[int, Claim]]] = {}
        for place, payload in enumerate(payloads):
            try:
                with guarded():
                    claim = read_claim(parse_blob(payload), self.hash, self.pixels, self.arithmetic)
                shapes = tuple((name, box[0].shape) for name, box in sorted(claim.suggestions.items()))
                rows = None if claim.linear is None else claim.linear[0].shape
                groups.setdefault((claim.center[0].shape, shapes, claim.refinements, rows), []).append((place, claim))
            except Rejected as reason:
                decided[place] = (False, str(reason), None)
        for group in groups.values():
            for place, verdict in self._group(group):
                decided[place] = verdict
        return [decided[place] for place in range(len(payloads))]

    def _group(self, group: list[tuple[int, Claim]]) -> Iterator[tuple[int, tuple[bool, str, float | None]]]:
        """Claims of one shape at a time; what is wrong with one sample costs no other its answer."""
        try:
            with guarded():
                lower, enclosed = self._margins([claim for _, claim in group])
        except Rejected as reason:
            if len(group) == 1:
                yield group[0][0], (False, str(reason), None)
                return
            for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                yield from self._group(half)
            return
        for (place, claim), margin, inside in zip(group, lower, enclosed, strict=True):
            if not inside:
                yield place, (False, "a box is not mapped into itself, or is crossed", None)
            elif not (0 < margin < np.inf and Fraction(margin) >= claim.margin):
                claimed, proved = shown(claim.margin), shown(margin)
                yield place, (False, f"the claimed margin {claimed} is not proved: {proved}", None)
            else:
                yield place, (True, "", float(min(margin, np.finfo(np.float64).max)))

    def _margins(self, claims: list[Claim]) -> tuple[Array, Array]:
        """The smallest margin of every claim, and whether all of its boxes hold: (batch,) each."""
        regions = [region(claim, self.arithmetic) for claim in claims]
        values = {"input": (np.stack([lo for lo, _ in regions]), np.stack([hi for _, hi in regions]))}
        enclosed = np.ones(len(claims), dtype=bool)
        used: set[str] = set()
        last = self.nodes[-1]
        elided = last.kind == "linear"
        for node in self.nodes[: len(self.nodes) - elided]:
            arguments = [values[name] for name in node.inputs]
            if node.kind == "add":
                require(arguments[0][0].shape == arguments[1][0].shape, f"{node.name}: a sum of two shapes")
                values[node.name] = self.arithmetic.add(*arguments)
            elif node.kind == "equilibrium":
                values[node.name], holds = self._equilibrium(node, arguments[0], claims)
                enclosed &= holds
                used.add(node.name)
            else:
                values[node.name] = apply(self.arithmetic, node, arguments[0])
        require(used >= set(claims[0].suggestions), "a box belongs to no equilibrium")
        if elided:
            return self._least(last, values[last.inputs[0]], claims), enclosed
        identity = self.arithmetic.exactly(np.eye(values[last.name][0].shape[1]))
        return self._least(replace(last, tensors={"weight": identity}), values[last.name], claims), enclosed

    def _equilibrium(self, node: Node, v: Interval, claims: list[Claim]) -> tuple[Interval, Array]:
        state = v[0].shape[1:]
        if (node.name, state) not in self._layers:
            require(
                node.name in self.gauges,
                f"{node.name}: there is no gauge, so nothing says that its equilibrium is unique",
            )
            u = self.arithmetic.exactly(self.gauges[node.name])
            self._layers[node.name, state] = contraction(self.arithmetic, node, u, state)
        suggested = None
        if node.name in claims[0].suggestions:
            boxes = [claim.suggestions[node.name] for claim in claims]
            suggested = np.stack([lo for lo, _ in boxes]), np.stack([hi for _, hi in boxes])
        return equilibrium(self.arithmetic, self._layers[node.name, state], v, suggested, claims[0].refinements)

    def _least(self, node: Node, z: Interval, claims: list[Claim]) -> Array:
        """The smallest row of ``C (V z + b) - rhs`` for each claim, ``C V`` one matrix; (batch,)."""
        weight, calc = node.tensors.get("weight"), self.arithmetic
        if weight is None or weight.ndim != 2 or z[0].shape[1:] != weight.shape[1:]:
            raise Rejected(f"{node.name}: its weight does not fit its input")
        outputs = len(weight)
        bias = node.tensors.get("bias", np.full(outputs, calc.zero, dtype=weight.dtype))
        require(bias.shape == (outputs,), f"{node.name}: the bias has a wrong shape")
        if claims[0].linear is None:
            own = np.array([claim.label for claim in claims])
            require(outputs >= 2 and (own < outputs).all(), "a label is no class of the model")
            others = (own[:, None] + np.arange(1, outputs)) % outputs
            # The rounded difference of two rows is one more rounding of each product, which `affine` has room for.
            matrix, error = np.swapaxes(weight[own][:, None] - weight[others], 1, 2), None
            shift = calc.subtract((bias[own][:, None, None],) * 2, (bias[others][:, None],) * 2)
        else:
            C = np.stack([claim.linear[0] for claim in claims if claim.linear is not None])
            rhs = np.stack([claim.linear[1] for claim in claims if claim.linear is not None])[:, None]
            require(C.shape[2] == outputs, "C has not one column an output")
            rows, error = calc.compose(C, weight)
            matrix, error = np.swapaxes(rows, 1, 2), None if error is None else np.swapaxes(error, 1, 2)
            zero = np.full((1, 1, len(bias)), calc.zero, dtype=bias.dtype)
            shift = calc.affine((zero + bias, zero + bias), np.swapaxes(C, 1, 2), (-rhs, -rhs))
        lower = calc.affine((z[0][:, None], z[1][:, None]), matrix, shift, error)[0]
        least: Array = lower.reshape(len(claims), -1).min(1)
        return least


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


def _check_file(file: Path, exact: bool, size: int = 64) -> Iterator[Outcome]:
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
    verdicts: Mapping[int, tuple[bool, str, float | None]] = dict(
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
