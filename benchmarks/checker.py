"""How fast certificates are checked, and what that costs beside proving: one thread, one JSON line.

    python benchmarks/checker.py [--out NAME]

Two untrained models with images of the size of MNIST: a dense equilibrium of 128 units, and a convolutional one of 32
channels on 14 x 14. Proving and checking the same batch are timed in turn; a record that is refused costs as much as
one that is accepted, so nothing hangs on the models being trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import verideq
from verideq.certify import margin_rows, prepare
from verideq.certify.bound import run_method
from verideq.certify.certificate import record
from verideq.models.zoo import conv_deq, initialise, linear_deq

SHAPE = (1, 28, 28)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: nn.Module, count: int, rounds: int) -> dict[str, float]:
    """Records a second, in batches of 64 and one by one, and the time of checking as a share of proving."""
    initialise(model, "ibp")
    prepared = prepare(model.eval())
    images = torch.rand(count, *SHAPE)
    labels = prepared.graph(images.double()).argmax(1)
    region, C = verideq.Region(images, "1/1000"), margin_rows(labels, 10)
    bounds = run_method(prepared, region, C, "interval", 1000)
    nothing: Any = None
    payloads = [
        record(prepared.checker.hash, i, region, i, bounds.proof(i), label=int(labels[i]), C=nothing, rhs=nothing,
               margin=0.0)
        for i in range(count)
    ]  # fmt: skip

    def check(size: int, of: list[bytes]) -> None:
        for start in range(0, len(of), size):
            prepared.checker.decide(of[start : start + size])

    few = payloads[: min(count, 64)]
    times = [
        (
            seconds(lambda: run_method(prepared, region, C, "interval", 1000)),
            seconds(lambda: check(64, payloads)),
            seconds(lambda: check(1, few)),
        )
        for _ in range(rounds)
    ]
    return {
        "batched_per_second": round(count / statistics.median(t[1] for t in times), 1),
        "single_per_second": round(len(few) / statistics.median(t[2] for t in times), 1),
        "check_over_prove": round(statistics.median(t[1] / t[0] for t in times), 3),
        "record_bytes": len(payloads[0]),
    }


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="also write benchmarks/results/NAME.json", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = {
        "torch": torch.__version__,
        "dense128": measure(linear_deq(SHAPE, 10, width=128), 512, options.rounds),
        "conv32": measure(conv_deq(SHAPE, 10, width=32, stride=2), 64, options.rounds),
    }
    line = json.dumps(figures)
    print(line)
    if options.out:
        Path(__file__).parent.joinpath("results", f"{options.out}.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
