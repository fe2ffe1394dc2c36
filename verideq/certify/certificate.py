"""From a bound to a certificate that the checker reads: the model's gauges once, a record a sample.

The formats are in ``docs/certificate.md``. What is written here is a suggestion: the checker believes none of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from verideq.box import Box
from verideq.checker.files import model_hash, parse_blob
from verideq.equilibrium import Gauge
from verideq.region import Region

VERSION = 1


def gauge_file(model: bytes, gauges: Mapping[str, Gauge]) -> bytes:
    """The model certificate: a gauge for every equilibrium, (units,), of the model of this file."""
    arrays = {f"gauge/{name}": gauge.u.cpu().numpy() for name, gauge in gauges.items()}
    return _blob(arrays, {"version": VERSION, "model": model_hash(parse_blob(model))})


def record(
    model: str,
    index: int,
    region: Region,
    i: int,
    *,
    label: int | None,
    C: NDArray[np.float64],
    rhs: NDArray[np.float64],
    margin: float,
    enclosures: Mapping[str, Box],
) -> bytes:
    """The record of one sample.

    Args:
        model: the model's hash.
        index: of the sample in its data set.
        region: the batch that it is in.
        i: its place in the batch.
        label: for the specification "its output is the largest"; ``None`` for `C` and `rhs`.
        C: (rows, outputs), written where there is no label.
        rhs: (rows,), likewise.
        margin: proved; what is claimed is a little less, because the checker rounds in its own way.
        enclosures: of the batch, by node name.
    """
    pixels = region.center[i].cpu().numpy()
    # An image of bytes is its bytes: a 255th of each is what is meant, and not the float64 next to it.
    bytes_ = np.rint(pixels * 255).clip(0, 255)
    whole = bool((bytes_ / 255 == pixels).all())
    arrays: dict[str, NDArray[Any]] = {"input": bytes_.astype(np.uint8) if whole else pixels}
    if region.weights is not None:
        arrays["weights"] = region.weights.cpu().numpy()
    if label is None:
        arrays |= {"C": C, "rhs": rhs}
    for name, box in enclosures.items():
        arrays[f"box/{name}/lower"], arrays[f"box/{name}/upper"] = (
            box.lower[i].cpu().numpy(),
            box.upper[i].cpu().numpy(),
        )
    claimed = max(0.0, margin * (1 - 2.0**-18))
    head = {
        "version": VERSION,
        "model": model,
        "index": index,
        "label": label,
        "eps": str(region.eps),
        "norm": region.norm,
        "clip": None if region.clip is None else [str(Fraction(end)) for end in region.clip],
        "scale": "1/255" if whole else None,
        "specification": "linear" if label is None else "label",
        "margin": str(Fraction(claimed)),
        "refinements": 0,
    }
    return _blob(arrays, head)


def framed(payload: bytes) -> bytes:
    """A record as it stands in ``records.bin``: its length in 8 bytes, the payload, its SHA-256."""
    return len(payload).to_bytes(8, "little") + payload + hashlib.sha256(payload).digest()


def _blob(arrays: Mapping[str, NDArray[Any]], head: Mapping[str, Any]) -> bytes:
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data: bytes = save(whole, metadata={"verideq": json.dumps(head, sort_keys=True, separators=(",", ":"))})
    return data
