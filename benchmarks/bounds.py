"""What each bound proves, and what it costs beside intervals: one thread, one JSON line.

    python benchmarks/bounds.py MODEL [--data NAME] [--limit N] [--eps E ...] [--norm linf|l2] [--methods M ...]
        [--timeout S] [--batch-size N] [--cpu] [--out NAME]

Methods are run one by one on all samples that the model has right, so that their times can be compared: of each its
seconds a sample, what it certifies, and the time of the independent checker as a share of it; and the same once more of
those samples alone that no method before it has certified (`needed`). `auto`, with the attack and checks in it, is run
as `verideq certify` runs it. `--cpu` takes the time of this process for that of the clock, in
limits too: for a machine on which others work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import verideq
from verideq import Region, load_model
from verideq.certify import certify, margin_rows, prepare
from verideq.certify.bound import METHODS, run_method
from verideq.certify.certificate import record
from verideq.certify.summary import REJECTED
from verideq.checker import Verdict
from verideq.data import load
from verideq.errors import NoGaugeError


def measure(
    prepared: Any, images: torch.Tensor, labels: torch.Tensor, eps: str, norm: str, method: str, size: int, limit: float
) -> tuple[dict[str, Any], set[int]]:
    """Shares and seconds of one method, `size` samples at a time, and which it certifies."""
    region, classes = Region(images, eps, norm, prepared.graph.pixel_range), prepared.graph.classes
    C, rhs = margin_rows(labels, classes), torch.zeros(len(images), classes - 1, dtype=torch.float64)
    payloads: list[bytes] = []
    decisions: list[Verdict] = []
    proving, checking, proved = 0.0, 0.0, set[int]()
    for part in torch.split(torch.arange(len(images)), size):
        started = time.perf_counter()
        deadline = time.monotonic() + limit * len(part)
        bounds = run_method(
            prepared, region[part], C[part], method, rhs=rhs[part], upper=False, unproved=True, deadline=deadline
        )
        margins = bounds.box.lower.amin(1)
        proved |= {int(part[i]) for i in (margins > 0).nonzero().flatten().tolist()}
        own = [
            record(prepared.checker.hash, int(part[i]), region[part], i, bounds.proof(i), label=int(labels[part[i]]),
                   C=C[part[i]].numpy(), rhs=rhs[part[i]].numpy(), margin=float(margins[i]))
            for i in (margins > 0).nonzero().flatten().tolist()
        ]  # fmt: skip
        proving, started = proving + time.perf_counter() - started, time.perf_counter()
        decisions += prepared.checker.decide(own)
        checking, payloads = checking + time.perf_counter() - started, payloads + own
    figures = {
        "certified": len(payloads) / len(images),
        "refused": sum(not accepted for accepted, _, _ in decisions),
        "prove_seconds": round(proving / len(images), 5),
        "check_seconds": round(checking / max(1, len(payloads)), 5),
        "check_over_prove": round(checking / max(1, len(payloads)) / (proving / len(images)), 3),
        "record_bytes": int(np.median([len(payload) for payload in payloads])) if payloads else None,
    }
    return figures, proved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--eps", nargs="+", default=["1/100", "3/100"])
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--methods", nargs="*", default=[m for m in METHODS if m != "branch-and-bound"])
    parser.add_argument("--timeout", type=float, default=2.0, help="of auto, seconds a sample")
    parser.add_argument("--batch-size", type=int, default=50, help="of auto, and of the others")
    parser.add_argument("--cpu", action="store_true", help="all times are CPU seconds of this process")
    parser.add_argument("--out", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cpu:
        time.monotonic = time.perf_counter = time.process_time
    prepared, data = prepare(load_model(options.model)), load(options.data, "test")
    images, labels = data.scaled(slice(0, options.limit)), data.labels[: options.limit]
    right = (prepared.graph(images).argmax(1) == labels).nonzero().flatten()
    result: dict[str, Any] = {
        "verideq": verideq.__version__, "torch": torch.__version__, "model": Path(options.model).name,
        "data": options.data, "norm": options.norm, "samples": options.limit, "right": len(right),
        "clock": "cpu" if options.cpu else "wall", "eps": {},
    }  # fmt: skip
    for eps in options.eps:
        rows: dict[str, Any] = {}
        done: set[int] = set()
        for method in options.methods:
            try:
                task = eps, options.norm, method, options.batch_size, options.timeout
                rows[method], proved = measure(prepared, images[right], labels[right], *task)
                own, done = right[sorted(proved - done)], done | proved
                if len(own):
                    rows[method]["needed"] = measure(prepared, images[own], labels[own], *task)[0] | {
                        "samples": len(own)
                    }
            except NoGaugeError as reason:
                rows[method] = str(reason)
        started, worked = time.perf_counter(), time.process_time()
        verdicts = certify(
            prepared, images, labels, eps, norm=options.norm, attack="pgd", timeout=options.timeout,
            batch_size=options.batch_size,
        )  # fmt: skip
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        spent = sorted(v.seconds for v in verdicts)
        rows["auto"] = {
            "statuses": dict(Counter(str(v.status) for v in verdicts)),
            "by_method": dict(Counter(v.method for v in verdicts if v.certified)),
            "survive_attack": sum(bool(v.attacked) for v in verdicts),
            "rejected": sum(REJECTED in v.reason for v in verdicts),
            "timeout": options.timeout,
            "batch_size": options.batch_size,
            "seconds": round(seconds / len(images), 4),
            "cpu_seconds": round(worked / len(images), 4),
            "median_seconds": round(spent[len(spent) // 2], 4),
            "nine_in_ten_seconds": round(spent[int(0.9 * len(spent))], 4),
        }
        result["eps"][eps] = rows
    line = json.dumps(result)
    print(line)
    if options.out:
        (Path(__file__).parent / "results" / f"{options.out}.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
