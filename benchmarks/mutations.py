"""Damage valid certificates at random and count what the checker still accepts: one JSON line, exit 1 if unsound.

    python benchmarks/mutations.py [CERTIFICATES] [--count N] [--seed N] [--out NAME]

Without a certificates folder: records of the bundled model and of small models of every kind. A mutation damages bytes
of one region of a record (the size of its header, the header, one of its arrays), or edits a field or an array and
packs the record anew. Each is offered twice.

* `old_digest`: under the digest of the record that it was. Every one has to be refused. `frame` are mutations of the
  length, the payload or the digest themselves.
* `new_digest`: with the digest made to fit, as a forger would. It may be accepted only if the checker accepts it in
  rational arithmetic too, and if the model, run by torch at points of the claimed ball, has the claimed margin: a true
  claim in other words is no forgery. `gauges` are mutations of the model certificate.

Mutation number `i` depends on the seed and `i` alone. Regions, fields and arrays are found by parsing, so that a new
kind of record takes part by an entry in `KINDS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import nn

from verideq import Equilibrium, Normalize, load_model
from verideq.certify import certify, prepare
from verideq.certify.certificate import framed
from verideq.checker import Checker, files
from verideq.checker.arithmetic import Rejected
from verideq.data import load
from verideq.graph import Graph
from verideq.models import BUNDLED
from verideq.parametrizations import IBPMonDEQ, MonDEQ

BATCH = 64
PARTS = ("making", "old_digest", "new_digest", "gauges")
"""Of the time that a run takes."""
DIGEST = 32
Head = dict[str, Any]
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What a certificates folder holds; `weight` is its share of the mutations, in proportion to the others'."""

    name: str
    model: bytes
    gauges: bytes
    records: tuple[bytes, ...]
    graph: Graph
    weight: int = 4

    def checker(self, *, exact: bool = False) -> Checker:
        """The checker, with the model in it."""
        return Checker(self.model, self.gauges, exact=exact)


@dataclass(frozen=True)
class Mutation:
    """One damaged blob.

    Args:
        region: what was damaged: ``size``, ``header``, an array by the first part of its name, a field of the head.
        kind: how.
        record: the place of the record that it was.
    """

    region: str
    kind: str
    record: int
    payload: bytes


# --- what is damaged --------------------------------------------------------------------------------------------------


def _made(name: str, model: nn.Module, images: torch.Tensor, eps: str, needs: str = "", **options: Any) -> Folder:
    """What is certified; with `needs`, where that stands in the record."""
    prepared = prepare(model)
    labels = None if "C" in options else prepared.graph(images.double()).argmax(1)
    found = [v.certificate for v in certify(prepared, images, labels, eps, **options) if v.certificate is not None]
    found = [record for record in found if needs in repr(unpack(record))]
    if not found:
        raise SystemExit(f"error: no record of the kind {name} was certified")
    return Folder(name, prepared.file, prepared.certificate, tuple(found[:8]), prepared.graph)


def _dense() -> nn.Sequential:
    fusion = IBPMonDEQ.apply(nn.Linear(3, 3, bias=False), m=0.3)
    return nn.Sequential(Equilibrium(fusion, nn.Linear(2, 3)), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


def _convolution() -> Folder:
    fusion = IBPMonDEQ.apply(nn.Conv2d(2, 2, 3, padding=1, bias=False), m=0.5)
    layer = Equilibrium(fusion, nn.Conv2d(1, 2, 3, padding=1))
    model = nn.Sequential(Normalize(0.3, 0.4), layer, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    return _made("convolution", model, torch.randint(256, (4, 1, 4, 4)).double() / 255, "1/500", norm="l2")


def _two_layers() -> Folder:
    first = Equilibrium(IBPMonDEQ.apply(nn.Linear(4, 4, bias=False), m=0.4), nn.Linear(3, 4))
    second = Equilibrium(fusion := nn.Linear(3, 3, bias=False), nn.Linear(4, 3))
    nn.init.constant_(fusion.weight, -0.3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Linear(3, 3)).eval()
    return _made("two layers", model, torch.rand(4, 3), "1/1000")


def _linear() -> Folder:
    C, rhs = torch.tensor([[1.0, -0.5], [0.25, 1.0]]), torch.tensor([-9.0, -9.0])
    plain = _made("linear", _dense(), torch.rand(4, 2), "1/100", C=C, rhs=rhs)
    weighted = (pack(head, arrays | {"weights": np.array([1.0, 0.5])}) for head, arrays in map(unpack, plain.records))
    return replace(plain, records=tuple(weighted))


def _recomputed() -> Folder:
    full = _made("recomputed", _dense(), torch.rand(4, 2), "1/2000")
    without = ((head | {"refinements": 60}, {"input": arrays["input"]}) for head, arrays in map(unpack, full.records))
    return replace(full, records=tuple(pack(head, arrays) for head, arrays in without))


def _digits() -> Folder:
    images = load("digits", split="test").scaled(slice(0, 8))
    return replace(_made("digits", load_model(BUNDLED), images, "1/50"), weight=1)  # rational arithmetic takes seconds


def _proved(
    name: str, make: Callable[[], nn.Module], seed: int, eps: str, needs: str, method: str, norm: str = "linf"
) -> Folder:
    torch.manual_seed(seed)
    return _made(name, make(), torch.rand(64, 2), eps, needs, method=method, norm=norm)


def _wide() -> nn.Sequential:
    """A net that intervals do not prove."""
    fusion = IBPMonDEQ.apply(nn.Linear(4, 4, bias=False), m=0.1)
    injection, head = nn.Linear(2, 4), nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in (*injection.parameters(), *head.parameters()):
            parameter.mul_(2)
    return nn.Sequential(Equilibrium(fusion, injection), nn.ReLU(), head).eval()


def _monotone() -> nn.Sequential:
    fusion = MonDEQ.from_weights(torch.randn(4, 4), 4 * torch.randn(4, 4), 1.0)
    return nn.Sequential(Normalize(0.25, 0.5), Equilibrium(fusion, nn.Linear(2, 4)), nn.Linear(4, 3)).eval()


KINDS: dict[str, Callable[[], Folder]] = {
    "digits": _digits,
    "dense": lambda: _made("dense", _dense(), torch.rand(4, 2), "1/2000"),
    "convolution": _convolution,
    "two layers": _two_layers,
    "linear": _linear,
    "recomputed": _recomputed,
    # Of each what no cheaper method makes.
    "multipliers": lambda: _proved("multipliers", _wide, 2, "1/50", "/g/", "adjoint"),
    "tightenings": lambda: _proved("tightenings", _wide, 2, "1/2", "units", "adjoint-refined"),
    "tree": lambda: _proved("tree", _wide, 2, "1/2", "'below'", "branch-and-bound"),
    "quadratic": lambda: _proved("quadratic", _monotone, 1, "1/20", "q/tau", "quadratic"),
    "quadratic tree": lambda: _proved("quadratic tree", _monotone, 6, "1/6", "'below'", "branch-and-bound"),
    "exact": lambda: _proved("exact", _wide, 2, "1/2", "'below'", "exact"),
    "ball": lambda: _proved("ball", _monotone, 1, "1/20", "state", "interval", "l2"),
    "ball tightenings": lambda: _proved("ball tightenings", _wide, 2, "1/2", "units", "adjoint-refined", "l2"),
    "ball quadratic": lambda: _proved("ball quadratic", _monotone, 1, "1/10", "q/tau", "quadratic", "l2"),
    "lipschitz": lambda: _proved("lipschitz", _monotone, 8, "1/20", "q/tau", "lipschitz"),
    "ball lipschitz": lambda: _proved("ball lipschitz", _monotone, 9, "1/5", "q/tau", "lipschitz", "l2"),
}
"""A maker for every kind of record."""


def folders(path: Path | None = None, kinds: Iterable[str] = tuple(KINDS)) -> list[Folder]:
    """What the path holds, or a folder of every kind; none of it is damaged yet."""
    if path is None:
        made = []
        for kind in kinds:
            torch.manual_seed(1)
            made.append(KINDS[kind]())
    else:
        payloads = [payload for payload in files.records(path / "records.bin") if isinstance(payload, bytes)]
        model, gauges = path / "model.safetensors", path / "gauges.safetensors"
        graph = prepare(load_model(model)).graph
        made = [Folder(path.name, model.read_bytes(), gauges.read_bytes(), tuple(payloads[:BATCH]), graph)]
    for folder in made:
        for accepted, reason, _ in folder.checker().decide(list(folder.records)):
            if not accepted:
                raise SystemExit(f"error: a record of {folder.name} is refused before it is damaged: {reason}")
    return made


# --- how --------------------------------------------------------------------------------------------------------------


def pack(head: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    """A blob."""
    data: bytes = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"verideq": json.dumps(head)})
    return data


def unpack(data: bytes) -> tuple[Head, Arrays]:
    """What a valid blob holds, to be changed."""
    blob = files.parse_blob(data)
    return dict(blob.head), {name: array.copy() for name, array in blob.arrays.items()}


def regions(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """The places of a valid blob by the name of their region."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = {"size": [(0, 8)], "header": [(8, start)]}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            found.setdefault(name.partition("/")[0], []).append((start + low, start + high))
    return found


def _damage(draw: random.Random, data: bytes, low: int, high: int) -> tuple[str, bytes]:
    """Bytes of ``data[low:high]`` changed; the bytes may move."""
    place, span = draw.randrange(low, high), draw.choice((1, 1, 1, 2, 8))
    end = min(place + span, high)
    kind = draw.choice(("flip", "set", "swap", "drop", "double", "zero", "truncate"))
    changed = bytearray(data)
    if kind == "flip":
        changed[place] ^= 1 << draw.randrange(8)
    elif kind == "set":
        changed[place:end] = draw.randbytes(end - place)
    elif kind == "swap":
        other = draw.randrange(low, high)
        changed[place], changed[other] = changed[other], changed[place]
    elif kind == "drop":
        del changed[place:end]
    elif kind == "double":
        changed[place:place] = changed[place:end]
    elif kind == "zero":
        changed[place:end] = bytes(end - place)
    else:
        del changed[place:]
    return kind, bytes(changed)


FACTORS = [sign * (1 + step * 2.0**-k) for k in (52, 40, 30, 20, 10, 3) for step in (-1, 1) for sign in (1, 1, 1, -1)]
FACTORS += [0.0, 2.0, 0.5, 1e300, 1e-300]


def _number(draw: random.Random, value: Any) -> Any:
    """A field of a head, changed: a number a little or a lot, another value into something of its kind or of none."""
    if isinstance(value, list) and value:
        place = draw.randrange(len(value))
        return [*value[:place], _number(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value))
        return {**value, key: _number(draw, value[key])}
    if isinstance(value, bool) or value is None:
        return draw.choice((True, False, None, 0, "1/2", []))
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, -value, 0, 2 * value, value + 256, float(value), str(value)))
    if isinstance(value, float):
        return value * draw.choice(FACTORS)
    try:
        return str(Fraction(value) * Fraction(draw.choice(FACTORS)) + draw.choice((0, 0, 0, 1, -1)))
    except (ValueError, TypeError):
        return draw.choice((None, "", *({"linf": ("l2",), "l2": ("linf",)}.get(value, (str(value)[::-1],)))))


def _value(draw: random.Random, array: Any) -> Any:
    """An array, changed in one entry or in all."""
    changed = array.copy()
    where: Any = draw.choice((draw.randrange(array.size), draw.randrange(array.size), slice(None)))
    if array.dtype.kind == "f":
        towards = draw.choice((-np.inf, np.inf))
        choices: tuple[Callable[[Any], Any], ...] = (
            lambda x: np.nextafter(x, x.dtype.type(towards)),
            lambda x: x * draw.choice(FACTORS),
            lambda x: x * draw.choice(FACTORS),
            lambda x: x + draw.choice((1.0, -1.0, 1e-6, -1e-6, 5e-324)),
        )
        with np.errstate(all="ignore"):
            changed.reshape(-1)[where] = draw.choice(choices)(changed.reshape(-1)[where])
    else:
        changed.reshape(-1)[where] ^= array.dtype.type(1 << draw.randrange(8))
    return changed


def _edit(draw: random.Random, folder: Folder, data: bytes) -> tuple[str, str, bytes]:
    """A field or an array changed, the blob packed anew."""
    head, arrays = unpack(data)
    kind = draw.choice(("field", "field", "value", "value", "value", "exchange", "shape"))
    if kind == "field" or not arrays:
        region = draw.choice(sorted(head))
        head[region] = _number(draw, head[region])
        return region, "field", pack(head, arrays)
    name = draw.choice(sorted(arrays))
    array = arrays[name]
    if kind == "value" and array.size:
        arrays[name] = _value(draw, array)
    elif kind == "exchange":
        other = unpack(draw.choice(folder.records))[1]
        mate = draw.choice(sorted(other))
        if mate in arrays and draw.random() < 0.5:
            arrays[mate] = array
        arrays[name] = other[mate]
    else:
        shapes: tuple[Any, ...] = (
            None,
            array[None],
            array[:1],
            np.concatenate((array, array)),
            array.astype(np.float32),
        )
        chosen = draw.choice(range(len(shapes)))
        arrays[name] = shapes[chosen]
        if chosen == 0:
            del arrays[name]
    return name.partition("/")[0], kind, pack(head, arrays)


def mutation(folder: Folder, seed: str, of: Sequence[bytes]) -> Mutation:
    """A blob of `of` that is no longer what it was: half of the time its bytes, half of the time what it says."""
    draw = random.Random(f"{seed}/{folder.name}")
    place = draw.randrange(len(of))
    while True:
        if draw.random() < 0.5:
            found = regions(of[place])
            region = draw.choice(
                [name for name, spans in sorted(found.items()) if any(low < high for low, high in spans)]
            )
            low, high = draw.choice([span for span in found[region] if span[0] < span[1]])
            kind, payload = _damage(draw, of[place], low, high)
        else:
            region, kind, payload = _edit(draw, folder, of[place])
        if payload != of[place]:
            return Mutation(region, kind, place, payload)


# --- what comes of it -------------------------------------------------------------------------------------------------


def under_old_digest(
    folder: Folder, mutations: Iterable[Mutation], seed: int, frames: int, scratch: Path
) -> Counter[str]:
    """Files of one damaged record, read as the checker reads them: how many were offered, how many were accepted."""
    counts: Counter[str] = Counter()
    originals = set(folder.records)

    def offer(what: str, data: bytes) -> None:
        scratch.write_bytes(data)
        read = list(files.records(scratch))
        refused = not read or any(isinstance(payload, Rejected) for payload in read)
        believed = any(isinstance(payload, bytes) and payload not in originals for payload in read)
        counts[what] += 1
        counts[what + "_accepted"] += not refused or believed

    for made in mutations:
        digest = hashlib.sha256(folder.records[made.record]).digest()
        offer("old_digest", len(made.payload).to_bytes(8, "little") + made.payload + digest)
    for number in range(frames):
        draw = random.Random(f"{seed}/frame/{number}/{folder.name}")
        data = framed(draw.choice(folder.records))
        low, high = draw.choice(((0, 8), (8, len(data) - DIGEST), (len(data) - DIGEST, len(data))))
        changed = data
        while changed == data:
            _, changed = _damage(draw, data, low, high)
        offer("frame", changed)
    return counts


def decided(checker: Checker, payloads: list[bytes]) -> list[bool | None]:
    """Accepted or not; ``None`` where the checker failed to answer."""
    try:
        return [accepted for accepted, _, _ in checker.decide(payloads)]
    except Exception:  # whatever it is, it is no answer, and that is what is counted
        return [None] if len(payloads) == 1 else [decided(checker, [payload])[0] for payload in payloads]


def refuted(folder: Folder, payload: bytes, points: int = 16) -> bool:
    """Whether the model itself, by torch in float64, has less than the claimed margin at the centre or at a corner."""
    head, arrays = unpack(payload)
    center = arrays["input"].astype(np.float64) * float(Fraction(head["scale"] or 1))
    draw = np.random.default_rng(0)
    away = draw.choice((-1.0, 1.0), (points, *center.shape))
    away[0] = 0.0
    if head["norm"] == "l2":
        away /= np.sqrt(center.size)
    x = center + float(Fraction(head["eps"])) * arrays.get("weights", np.ones_like(center)) * away
    if head["clip"] is not None:
        x = x.clip(*(float(Fraction(end)) for end in head["clip"]))
    with torch.no_grad():
        outputs = folder.graph(torch.from_numpy(x)).numpy()
    if head["label"] is None:
        margins = outputs @ arrays["C"].T - arrays["rhs"]
    else:
        margins = outputs[:, [head["label"]]] - np.delete(outputs, head["label"], axis=1)
    return not margins.min() >= float(Fraction(head["margin"])) - 1e-6 * (1 + np.abs(outputs).max())


def under_new_digest(folder: Folder, mutations: Sequence[Mutation]) -> list[str]:
    """What became of every mutation: refused, accepted, wrong (accepted and not true), crashed (no answer)."""
    fast, slow = folder.checker(), folder.checker(exact=True)
    known: dict[str, bool] = {}

    def confirmed(payload: bytes) -> bool:
        try:
            head, arrays = unpack(payload)
        except Rejected:
            return False
        said = json.dumps(head, sort_keys=True) + repr(
            [(k, v.dtype, v.shape, v.tobytes()) for k, v in sorted(arrays.items())]
        )
        if said not in known:
            known[said] = decided(slow, [payload]) == [True] and not refuted(folder, payload)
        return known[said]

    outcomes = []
    for start in range(0, len(mutations), BATCH):
        batch = mutations[start : start + BATCH]
        for made, accepted in zip(batch, decided(fast, [made.payload for made in batch]), strict=True):
            if accepted is None:
                outcomes.append("crashed")
            else:
                outcomes.append("refused" if not accepted else "accepted" if confirmed(made.payload) else "wrong")
    return outcomes


def with_gauges(folder: Folder, seed: int, count: int) -> Counter[str]:
    """Outcomes of damaged model certificates, each for one record."""
    counts: Counter[str] = Counter()
    for number in range(count):
        made = mutation(folder, f"{seed}/gauges/{number}", [folder.gauges])
        changed = replace(folder, gauges=made.payload)
        answers = []
        for exact in (False, True):
            try:
                answers.append(decided(changed.checker(exact=exact), [folder.records[number % len(folder.records)]])[0])
            except Rejected:
                answers.append(False)
            if answers == [False]:
                break
        counts["refused" if not answers[0] else "accepted" if answers[1] else "wrong"] += 1
        counts["crashed"] += answers[0] is None
    return counts


def run(of: Sequence[Folder], count: int, seed: int) -> dict[str, Any]:
    """All counts for `count` mutations, shared among the folders by weight.

    Returns:
        `sound`: nothing was accepted that must not be; and the counts, by region, kind and folder.
    """
    old, gauges, total = Counter[str](), Counter[str](), Counter[str]()
    tables: dict[str, dict[str, Counter[str]]] = {"by_region": {}, "by_kind": {}, "by_model": {}}
    wrong: list[tuple[str, int]] = []
    seconds: dict[str, float] = {}
    turns = [place for place, folder in enumerate(of) for _ in range(folder.weight)]
    with tempfile.TemporaryDirectory() as temporary:
        for place, folder in enumerate(of):
            begun = time.perf_counter()
            numbers = [number for number in range(count) if turns[number % len(turns)] == place]
            made = [mutation(folder, f"{seed}/{number}", folder.records) for number in numbers]
            built = time.perf_counter()
            old += under_old_digest(folder, made, seed, len(made) // 10, Path(temporary) / "records.bin")
            offered = time.perf_counter()
            outcomes = under_new_digest(folder, made)
            ended = time.perf_counter()
            gauges += with_gauges(folder, seed, len(made) // 10)
            times = (begun, built, offered, ended, time.perf_counter())
            for name, since, until in zip(PARTS, times, times[1:], strict=False):
                seconds[name] = seconds.get(name, 0.0) + until - since
            for number, mutant, outcome in zip(numbers, made, outcomes, strict=True):
                total[outcome] += 1
                if outcome in ("wrong", "crashed"):
                    wrong.append((folder.name, number))
                for table, row in (("region", mutant.region), ("kind", mutant.kind), ("model", folder.name)):
                    tables[f"by_{table}"].setdefault(row, Counter())[outcome] += 1
    accepted = {name: old[f"{name}_accepted"] for name in ("old_digest", "frame")}
    bad = sum(accepted.values()) + sum(counts[key] for counts in (total, gauges) for key in ("wrong", "crashed"))
    names = ("refused", "accepted", "wrong", "crashed")
    return {
        "sound": not bad,
        "seed": seed,
        **{name: {"mutations": old[name], "accepted": accepted[name]} for name in accepted},
        "new_digest": {"mutations": total.total(), **{name: total[name] for name in names}},
        "gauges": {"mutations": sum(gauges[name] for name in names), **{name: gauges[name] for name in names}},
        **{table: {row: dict(sorted(n.items())) for row, n in sorted(rows.items())} for table, rows in tables.items()},
        "wrong": wrong,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def main() -> int:
    """Count, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("certificates", nargs="?", type=Path, help="a certificates folder; without one they are made")
    parser.add_argument("--count", type=int, default=10_000, help="mutations of records, each offered twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write benchmarks/results/NAME.json", metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = run(folders(options.certificates), options.count, options.seed)
    line = json.dumps(figures)
    print(line)
    if options.out:
        Path(__file__).parent.joinpath("results", f"{options.out}.json").write_text(line + "\n", encoding="utf-8")
    return 0 if figures["sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
