"""How much memory a bound takes, against what was predicted for it.

    python benchmarks/memory.py [--quick] [--out NAME]

Each case runs in a process of its own, on one thread; the figure is by how much the largest resident size grew over
that of the process with the model in it. The prediction is that of `verideq.certify.footprint`, by which batches are
cut: it has to be no less. It takes every unit for unstable, which costs the tightened methods most.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from verideq import Equilibrium, Region
from verideq.certify import margin_rows, prepare
from verideq.certify.adjoint import ELEMENTS
from verideq.certify.bound import run_method
from verideq.certify.footprint import WORK, Footprint
from verideq.parametrizations import RowGauge

CASES = [
    ("dense", 128, "interval"), ("dense", 128, "adjoint"), ("dense", 128, "adjoint-refined"),
    ("dense", 16, "adjoint-ascent"), ("conv", 64, "interval"), ("conv", 64, "adjoint"), ("conv", 64, "adjoint-refined"),
]  # fmt: skip
QUICK = [("dense", 128, "adjoint"), ("conv", 8, "adjoint")]


def network(kind: str) -> nn.Module:
    """A dense equilibrium of 512 units, or a convolutional one of 32 channels on 14×14; random weights."""
    torch.manual_seed(0)
    if kind == "dense":
        layer = Equilibrium(nn.Linear(512, 512, bias=False), nn.Linear(784, 512))
        head: list[nn.Module] = [nn.Flatten(), layer, nn.Linear(512, 10)]
    else:
        layer = Equilibrium(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.Conv2d(1, 32, 4, stride=2, padding=1))
        head = [layer, nn.Flatten(), nn.Linear(32 * 14 * 14, 10)]
    RowGauge.apply(layer.fusion, m=0.5)
    return nn.Sequential(*head)


def measure(kind: str, batch: int, method: str) -> dict[str, object]:
    """Predicted and measured, in MiB."""
    torch.set_num_threads(1)
    prepared, x = prepare(network(kind)), torch.rand(batch, 1, 28, 28)
    shape = Footprint.of(prepared, x, 9)
    fixed, row, _ = shape._parts(method)
    predicted = batch * (fixed + 9 * row)
    if method not in ("interval", "adjoint"):
        together = max(1, min(batch, ELEMENTS // (2 * shape.relaxed**2)))
        predicted += together * min(2 * shape.relaxed, WORK // shape.relaxed) * shape.row
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    C, rhs = margin_rows(torch.zeros(batch, dtype=torch.long), 10), torch.zeros(batch, 9)
    run_method(prepared, Region(x, 0.01), C, method, rhs=rhs, upper=False)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "model": kind, "batch": batch, "method": method, "predicted_mib": round(predicted / 2**20),
        "measured_mib": round(took / 1024),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, batch, method = options.case
        print(json.dumps(measure(kind, int(batch), method)))
        return
    found = []
    for case in QUICK if options.quick else CASES:
        command = [sys.executable, __file__, "--case", *map(str, case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(json.dumps(found[-1]), flush=True)
    if options.out:
        path = Path(__file__).parent / "results" / f"{options.out}.json"
        path.write_text(json.dumps({"cases": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
