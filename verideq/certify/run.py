"""A run over a data set: a folder that grows by whole chunks and can be taken up again after any interruption.

The unit of work is a *chunk*: the samples of one batch at every radius. Its lines reach ``results.jsonl`` together and
are forced to disk; a resumed run cuts what an interrupted write left of a chunk and works the chunk out again, in the
same batch.
Formats: ``docs/run-folder.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import verideq
from verideq.attacks import Suite, attack_named
from verideq.certify.budget import Budget
from verideq.certify.certificate import framed
from verideq.certify.decide import decide
from verideq.certify.method import TOLERANCE, Prepared, prepare
from verideq.certify.radius import reaches
from verideq.certify.summary import ACCOUNT, summarise
from verideq.certify.task import Task, specification
from verideq.certify.verdict import Verdict
from verideq.distributed import ALONE, World
from verideq.errors import InconsistencyError, ResumeError
from verideq.graph import model_hash
from verideq.region import Region

IDENTITY = (
    "version",
    "model_hash",
    "data_hash",
    "split",
    "indices",
    "eps",
    "norm",
    "method",
    "attack",
    "seed",
    "tolerances",
    "radius",
    "check",
    "certificates",
)
"""The fields of ``run.json`` in which a resumed run has to agree with the folder."""


RECORDS = "certificates/records.bin"


@dataclass(frozen=True)
class Questions:
    """What a run asks: samples of a data set, and radii.

    Args:
        name: of the data set.
        path: what loads it again: its name, or the path of its file.
        split: of the data set.
        data_hash: of its content.
        images: (samples, *features), float64 in the pixel range.
        labels: (samples,).
        indices: (samples,) of the samples in the split.
        eps: exact radii.
        norm: ``linf`` or ``l2``.
        weights: (*features), radii in units of eps, or ``None``.
        clip: the pixel range, or ``None``.
    """

    name: str
    path: str
    split: str
    data_hash: str
    images: Tensor
    labels: Tensor
    indices: list[int]
    eps: list[Fraction]
    norm: str
    weights: Tensor | None
    clip: tuple[float, float] | None


@dataclass(frozen=True)
class Run:
    """A run and its folder.

    Args:
        folder: made if it is not there.
        model: the user's module.
        model_name: a path or a name, for the record.
        questions: what to ask.
        budget: how hard to try.
        batch_size: samples a chunk; no verdict depends on it. A resumed run keeps the one that it began with.
        device: where to bound.
        certificates: keep the accepted certificates in the folder.
        command: the command line, for the record.
    """

    folder: Path
    model: nn.Module
    model_name: str
    questions: Questions
    budget: Budget
    batch_size: int = 64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    certificates: bool = False
    command: Sequence[str] = ()

    def meta(self) -> dict[str, Any]:
        """``run.json``: what made the run."""
        q = self.questions
        return {
            "command": list(self.command),
            "version": verideq.__version__,
            "model": self.model_name,
            "model_hash": self._hash(),
            "data": q.name,
            "data_path": q.path,
            "data_hash": q.data_hash,
            "split": q.split,
            "indices": q.indices,
            "eps": [str(eps) for eps in q.eps],
            "norm": q.norm,
            "method": self.budget.method,
            "attack": self.budget.attack,
            "radius": self.budget.radius,
            "check": self.budget.check,
            "certificates": self.certificates,
            "seed": self.budget.seed,
            "tolerances": {
                "tol": TOLERANCE,
                "max_steps": self.budget.max_steps,
                "timeout": self.budget.timeout,
                "deployed": str(self.budget.tolerance),
            },
            "batch_size": self.batch_size,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "input_shape": list(q.images.shape[1:]),
            "clip": None if q.clip is None else list(q.clip),
        }

    def execute(
        self,
        *,
        resume: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        world: World = ALONE,
    ) -> dict[str, Any]:
        """Work out every sample, write the folder, and return the summary.

        Args:
            resume: go on with what the folder holds.
            progress: called with the lines done and the lines in all, in the process that leads.
            world: processes that share the work: each takes the chunk of its rank out of every `world.size`, and the
                one that leads writes them in their order, so that the folder is that of one process.

        Raises:
            ResumeError: the folder holds a run and `resume` is not set, or it is another run.
            InconsistencyError: an attack broke a certified sample; the evidence is in ``inconsistency/``.
        """
        results = self.folder / "results.jsonl"

        def begin() -> tuple[dict[str, Any], int]:
            meta = self._open(resume)
            chunks = list(self._chunks(meta["batch_size"]))
            return meta, self._keep_whole_chunks(results, chunks) if resume else 0

        meta, done = world.lead(begin)
        chunks = list(self._chunks(meta["batch_size"]))
        total = len(self.questions.indices) * len(self.questions.eps)
        written = sum(len(chunk) for chunk in chunks[:done]) * len(self.questions.eps)
        if world.leads:
            progress(written, total)
        prepared = self._prepare() if done < len(chunks) else None
        while prepared is not None and done < len(chunks):
            mine = chunks[done : done + world.size][world.rank : world.rank + 1]
            verdicts = [self._work(prepared, chunk) for chunk in mine]
            for found in (part for parts in world.collect(verdicts) for part in parts):
                self._write(prepared, results, found)
                written += len(found)
                progress(written, total)
            done += world.size

        def finish() -> dict[str, Any]:
            summary = self._summarise(read_results(results), meta)
            write_json(self.folder / "summary.json", summary)
            return summary

        return world.lead(finish)

    def _write(self, prepared: Prepared, results: Path, verdicts: list[tuple[int, Verdict]]) -> None:
        """Append the lines of a chunk, and its certificates."""
        places = self._keep_certificates(prepared, [verdict for _, verdict in verdicts])
        lines = [json.dumps(self._line(index, verdict, places), allow_nan=False) + "\n" for index, verdict in verdicts]
        with results.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def identity(self) -> tuple[str, ...]:
        """The fields of ``run.json`` in which a resumed run has to agree with the folder."""
        return IDENTITY

    def _hash(self) -> str:
        return model_hash(self.model)

    def _prepare(self) -> Any:
        """What the work on every chunk shares."""
        prepared = prepare(self.model, self.device)
        self.budget.check_for(prepared)  # a method that is not for the model is a wrong call, and no verdict
        return prepared

    def _summarise(self, records: list[dict[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
        return summarise(records, meta)

    def _open(self, resume: bool) -> dict[str, Any]:
        path, meta = self.folder / "run.json", self.meta()
        if path.exists():
            if not resume:
                raise ResumeError(
                    f"{self.folder} holds a run already; pass --resume to go on with it, or another --out"
                )
            try:
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise ResumeError(f"{path} cannot be read: {error}; use another --out") from error
            differing = [key for key in self.identity if before.get(key) != meta[key]]
            if differing:
                key = differing[0]
                raise ResumeError(
                    f"{self.folder} holds another run: {', '.join(differing)} differ ({key}: {_short(before.get(key))} "
                    f"there, {_short(meta[key])} here); repeat its options, or use another --out"
                )
            if not isinstance(before.get("batch_size"), int) or before["batch_size"] < 1:
                raise ResumeError(f"{path} has no batch_size, which orders its results; use another --out")
            return before
        if (self.folder / "results.jsonl").exists():
            raise ResumeError(f"{self.folder} holds results, but no run.json that says of what; use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, meta)
        return meta

    def _chunks(self, size: int) -> Iterator[range]:
        count = len(self.questions.indices)
        for start in range(0, count, size):
            yield range(start, min(start + size, count))

    def _keep_whole_chunks(self, results: Path, chunks: list[range]) -> int:
        """Cut ``results.jsonl`` after its last whole chunk; returns how many it holds.

        Raises:
            ResumeError: its lines are not those of this run.
        """
        if not results.exists():
            return 0
        lines = results.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        position = done = 0
        for chunk in chunks:
            expected = [(self.questions.indices[i], float(eps)) for eps in self.questions.eps for i in chunk]
            part = lines[position : position + len(expected)]
            try:
                found = [(record["index"], record["eps"]) for record in map(json.loads, part)]
            except (ValueError, KeyError, TypeError) as error:
                raise ResumeError(f"{results} is damaged after line {position}: {error}; use another --out") from error
            if found != expected[: len(found)]:
                raise ResumeError(
                    f"{results} holds other samples than this run after line {position}; use another --out"
                )
            if len(found) < len(expected):
                break
            position, done = position + len(expected), done + 1
        kept = b"".join(line + b"\n" for line in lines[:position])
        with results.open("r+b") as stream:
            stream.truncate(len(kept))
        fields = [json.loads(line) for line in lines[:position]]
        self._cut_certificates([line.get(name) for line in fields for name in ("certificate", "radius_certificate")])
        return done

    def _keep_certificates(self, prepared: Prepared, verdicts: list[Verdict]) -> dict[bytes, str]:
        """Append the records of a chunk, each once; returns their places, ``certificates/records.bin:OFFSET``."""
        if not self.certificates:
            return {}
        path = self.folder / RECORDS
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "model.safetensors").write_bytes(prepared.file)
            (path.parent / "gauges.safetensors").write_bytes(prepared.certificate)
        places: dict[bytes, str] = {}
        with path.open("ab") as stream:
            for record in (record for v in verdicts for record in (v.certificate, v.radius_certificate)):
                if record is not None and record not in places:
                    places[record] = f"{RECORDS}:{stream.tell()}"
                    stream.write(framed(record))
            stream.flush()
            os.fsync(stream.fileno())
        return places

    def _cut_certificates(self, places: list[str | None]) -> None:
        """Cut what an interrupted chunk appended: all after the last record of the lines that are kept."""
        path = self.folder / RECORDS
        if not path.exists():
            return
        offsets = [int(place.rpartition(":")[2]) for place in places if place is not None]
        with path.open("r+b") as stream:
            end = 0
            if offsets:
                stream.seek(max(offsets))
                end = max(offsets) + 8 + int.from_bytes(stream.read(8), "little") + 32
            stream.truncate(end)

    def _work(self, prepared: Prepared, chunk: range) -> list[tuple[int, Verdict]]:
        """The verdicts of a chunk: all samples at the first eps, then at the next, and so on."""
        q, rows = self.questions, slice(chunk.start, chunk.stop)
        images, labels, indices = q.images[rows], q.labels[rows], q.indices[rows]
        C, rhs = specification(prepared, images, labels, None, None)
        task = Task(Region(images, 0, q.norm, q.clip, weights=q.weights), labels, C, rhs, torch.tensor(indices), True)
        budget = replace(self.budget, keep=self.certificates)
        try:
            decided = [
                decide(prepared, replace(task, region=task.region.with_eps(eps)), budget, self.model) for eps in q.eps
            ]
            if budget.radius:  # of a sample, whatever the eps: what is known of all of them is where to begin
                found = reaches(prepared, task, budget, self.model, decided)
                decided = [[reach.told(v) for reach, v in zip(found, line, strict=True)] for line in decided]
        except InconsistencyError as error:
            self._save_evidence(error)
            raise
        return [pair for line in decided for pair in zip(indices, line, strict=True)]

    def _line(self, index: int, verdict: Verdict, places: Mapping[bytes, str]) -> dict[str, Any]:
        witness = self._keep_witness(index, str(verdict.eps).replace("/", "-"), verdict.witness)
        line = {
            "index": index,
            "label": verdict.label,
            "prediction": verdict.prediction,
            "eps": float(verdict.eps),
            "norm": verdict.norm,
            "status": str(verdict.status),
            "margin": verdict.margin,
            "method": verdict.method,
            "checked": verdict.checked,
            "attacked": verdict.attacked,
            "reason": verdict.reason,
            "steps": verdict.steps,
            "seconds": round(verdict.seconds, 6),
            "witness": witness,
            "certificate": _place(verdict.certificate, places),
        }
        if self._with_account:
            line |= {key: getattr(verdict, key) for key in ACCOUNT}
        if not self.budget.radius:
            return line
        return line | {
            "radius": None if verdict.radius is None else float(verdict.radius),
            "attacked_radius": None if verdict.attacked_radius is None else float(verdict.attacked_radius),
            "radius_certificate": _place(verdict.radius_certificate, places),
            "radius_witness": self._keep_witness(index, "radius", verdict.radius_witness),
        }

    @property
    def _with_account(self) -> bool:
        """Whether every line says what the attacks were like: a suite has several, to be compared."""
        return isinstance(attack_named(self.budget.attack), Suite)

    def _keep_witness(self, index: int, name: str, witness: np.ndarray | None) -> str | None:
        if witness is None:
            return None
        place = f"witnesses/{index}_{name}.npy"
        save_array(self.folder / place, witness)
        return place

    def _save_evidence(self, error: InconsistencyError) -> None:
        verdict: Verdict = error.evidence["verdict"]
        folder = self.folder / "inconsistency"
        save_array(folder / "witness.npy", error.evidence["witness"])
        if verdict.certificate is not None:
            (folder / "certificate.bin").write_bytes(framed(verdict.certificate))
        record = {k: str(v) for k, v in asdict(verdict).items() if not isinstance(v, (bytes, np.ndarray))}
        write_json(folder / "verdict.json", {"index": error.evidence["index"], "message": str(error), **record})


def read_results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``results.jsonl``."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file in one move, without pickles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    partial.replace(path)


def _place(record: bytes | None, places: Mapping[bytes, str]) -> str | None:
    return None if record is None else places.get(record)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
