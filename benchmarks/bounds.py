"""What each bound proves, and what it costs beside intervals: one thread, one JSON line.

    python benchmarks/bounds.py MODEL [--data NAME] [--limit N] [--eps E ...] [--norm linf|l2] [--out NAME]

Methods are run one by one on all samples that the model has right, so that their times can be compared: of each its
seconds a sample, what it certifies, and the time of the independent checker as a share of it. `auto`, with the attack
and checks in it, is run as `verideq certify` runs it.
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
from verideq.data import load
from verideq.errors import NoGaugeError


def measure(
    prepared: Any, images: torch.Tensor, labels: torch.Tensor, eps: str, norm: str, method: str
) -> dict[str, Any]:
    """Shares and seconds of one method."""
    region, classes = Region(images, eps, norm, prepared.graph.pixel_range), prepared.graph.classes
    C, rhs = margin_rows(labels, classes), torch.zeros(len(images), classes - 1, dtype=torch.float64)
    started = time.perf_counter()
    bounds = run_method(prepared, region, C, method, rhs=rhs, upper=False)
    margins = bounds.box.lower.amin(1)
    proved = (margins > 0).nonzero().flatten().tolist()
    payloads = [
        record(prepared.checker.hash, i, region, i, bounds.proof(i), label=int(labels[i]), C=C[i].numpy(),
               rhs=rhs[i].numpy(), margin=float(margins[i]))
        for i in proved
    ]  # fmt: skip
    proving = time.perf_counter() - started
    started = time.perf_counter()
    decisions = prepared.checker.decide(payloads)
    checking = time.perf_counter() - started
    return {
        "certified": len(proved) / len(images),
        "refused": sum(not accepted for accepted, _, _ in decisions),
        "prove_seconds": round(proving / len(images), 5),
        "check_seconds": round(checking / max(1, len(payloads)), 5),
        "record_bytes": int(np.median([len(payload) for payload in payloads])) if payloads else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--eps", nargs="+", default=["1/100", "3/100"])
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--timeout", type=float, default=2.0, help="of auto, seconds a sample")
    parser.add_argument("--out", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepared, data = prepare(load_model(options.model)), load(options.data, "test")
    images, labels = data.scaled(slice(0, options.limit)), data.labels[: options.limit]
    right = (prepared.graph(images).argmax(1) == labels).nonzero().flatten()
    result: dict[str, Any] = {
        "verideq": verideq.__version__, "torch": torch.__version__, "model": Path(options.model).name,
        "data": options.data, "norm": options.norm, "samples": options.limit, "right": len(right), "eps": {},
    }  # fmt: skip
    for eps in options.eps:
        rows: dict[str, Any] = {}
        for method in METHODS:
            if method == "branch-and-bound":
                continue  # `auto` runs it, within its time
            try:
                rows[method] = measure(prepared, images[right], labels[right], eps, options.norm, method)
            except NoGaugeError as reason:
                rows[method] = str(reason)
        started = time.perf_counter()
        verdicts = certify(
            prepared, images, labels, eps, norm=options.norm, attack="pgd", timeout=options.timeout, batch_size=50
        )
        seconds = time.perf_counter() - started
        rows["auto"] = {
            "statuses": dict(Counter(str(v.status) for v in verdicts)),
            "by_method": dict(Counter(v.method for v in verdicts if v.certified)),
            "survive_attack": sum(bool(v.attacked) for v in verdicts),
            "seconds": round(seconds / len(images), 4),
        }
        result["eps"][eps] = rows
    line = json.dumps(result)
    print(line)
    if options.out:
        (Path(__file__).parent / "results" / f"{options.out}.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
