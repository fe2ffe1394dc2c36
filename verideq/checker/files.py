"""Reading what is to be checked: safetensors blobs, framed records, hashes. Nothing is believed about a byte of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from verideq.checker.arithmetic import Array, Rejected, require

DTYPES = {"F64": "<f8", "F32": "<f4", "U8": "|u1", "I64": "<i8"}
NAMES = {"F64": "float64", "F32": "float32", "U8": "uint8", "I64": "int64"}
KINDS = {code: np.dtype(form) for code, form in DTYPES.items()}
LARGEST = 2**32
"""The most bytes that one blob may claim."""


@dataclass(frozen=True)
class Blob:
    """A safetensors file: its one metadata entry as JSON, and its arrays by name."""

    head: dict[str, Any]
    arrays: dict[str, Array]


def parse_blob(data: bytes) -> Blob:
    """A safetensors blob: 8 bytes of header length, a JSON header, the arrays end to end without gaps.

    Every array is finite and little-endian; the header's entry ``verideq`` is a JSON object.

    Raises:
        Rejected: whatever is not exactly so.
    """
    require(len(data) >= 8, "the blob is shorter than its header")
    size = int.from_bytes(data[:8], "little")
    require(size <= len(data) - 8, "the blob is truncated")
    header = parse_json(data[8 : 8 + size], "the header")
    body = data[8 + size :]
    meta = header.pop("__metadata__", None)
    require(isinstance(meta, dict) and set(meta) == {"verideq"}, "the header has no verideq entry")
    text = meta["verideq"]
    require(isinstance(text, str), "the verideq entry is no string")
    arrays, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Rejected(f"{name}: a wrong description")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in KINDS:
            raise Rejected(f"{name}: the dtype {dtype!r} is not known")
        whole = isinstance(shape, list) and all(map(_is_count, shape))
        if not (whole and isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
            raise Rejected(f"{name}: a wrong shape or place")
        kind, (start, stop) = KINDS[dtype], offsets
        if stop - start != prod(shape) * kind.itemsize or stop > len(body):
            raise Rejected(f"{name}: its bytes do not fit its shape")
        array = np.frombuffer(body[start:stop], kind).reshape(shape)
        if kind.kind == "f" and not np.isfinite(array).all():
            raise Rejected(f"{name} holds NaN or infinity")
        arrays[name] = array
        spans.append((start, stop))
    position = 0
    for start, stop in sorted(spans):
        require(start == position, "the arrays overlap or leave a gap")
        position = stop
    require(position == len(body), "bytes follow the last array")
    return Blob(parse_json(text.encode(), "the verideq entry"), arrays)


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Rejected(f"{what} repeats a key")
        return found

    def constant(name: str) -> None:
        raise Rejected(f"{what} holds {name}")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{what} is no JSON") from error
    require(isinstance(value, dict), f"{what} is no JSON object")
    return dict(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def records(path: Path) -> Iterator[bytes | Rejected]:
    """The payloads of a record file: 8 bytes of length, the payload, its SHA-256; or why one cannot be had.

    A record whose digest fails is reported and the next one is read; a torn end is reported and ends the file.
    """
    whole = path.stat().st_size
    with path.open("rb") as stream:
        while head := stream.read(8):
            size = int.from_bytes(head, "little")
            if len(head) < 8 or size > LARGEST:
                yield Rejected("the record file is damaged: a length that cannot be")
                return
            if stream.tell() + size + 32 > whole:
                yield Rejected("the last record is torn")
                return
            payload, digest = stream.read(size), stream.read(32)
            yield (
                payload
                if hashlib.sha256(payload).digest() == digest
                else Rejected("the digest does not fit the record")
            )


def model_hash(model: Blob) -> str:
    """SHA-256 over the architecture (canonical JSON, without the names of parametrizations) and every array."""
    architecture = dict(model.head)
    nodes = [{k: v for k, v in node.items() if k != "parametrizations"} for node in architecture.get("nodes", [])]
    text = json.dumps({**architecture, "nodes": nodes}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode())
    names = {np.dtype(DTYPES[code]): name for code, name in NAMES.items()}
    for name in sorted(model.arrays):
        array = model.arrays[name]
        digest.update(f"{name}|{names[array.dtype]}|{list(array.shape)}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
