"""Reading a run folder back, whole or interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verideq.certify.attack import summarise_attack
from verideq.certify.summary import summarise
from verideq.errors import DataError

FIELDS = (
    *("index", "label", "prediction", "eps", "norm", "status", "margin", "method"),
    *("checked", "attacked", "reason", "steps", "seconds", "witness", "certificate"),
)
"""What every line of ``results.jsonl`` holds."""


@dataclass(frozen=True)
class Run:
    """A run folder in memory.

    Args:
        folder: where it lies.
        name: what to call it on the page.
        meta: ``run.json``.
        records: the lines of ``results.jsonl``.
        summary: counted afresh from the records, so that a stale ``summary.json`` cannot mislead.
        finished: whether ``summary.json`` is there and counts the same samples.
    """

    folder: Path
    name: str
    meta: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    finished: bool


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, named by their last part, or by the whole path where that is not unique.

    Raises:
        DataError: no folder is given, or one is no run folder; the message names the file.
    """
    if not folders:
        raise DataError("no run folder was given; name at least one folder written by `verideq certify --out`")
    names = [folder.resolve().name for folder in folders]
    return [
        _read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read_run(folder: Path, name: str) -> Run:
    meta = _read_object(folder / "run.json")
    records = _read_records(folder / "results.jsonl")
    try:
        summary = summarise_attack(records, meta) if "defence" in meta else summarise(records, meta)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'results.jsonl'}: a line is not a result ({error}); certify again") from error
    path = folder / "summary.json"
    written = _read_object(path).get("results", []) if path.is_file() else None
    finished = written is not None and [r.get("n") for r in written] == [r["n"] for r in summary["results"]]
    return Run(folder, name, meta, records, summary, finished)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); name a folder written by `verideq certify --out`"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); certify again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object; certify again")
    return value


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); the run has no results yet") from error
    # A line counts once its newline is written: whatever follows the last newline was torn off by an interruption.
    lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); certify again") from error
        if not isinstance(record, dict) or any(field not in record for field in FIELDS):
            raise DataError(f"{path}, line {number} is no result with the fields {', '.join(FIELDS)}; certify again")
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no results yet; let `verideq certify` finish at least one sample")
    return records
