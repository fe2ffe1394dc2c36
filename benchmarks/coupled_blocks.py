"""A small energy-based network that has a gauge by construction, trained and certified: what intervals and adjoint
bounds prove of it, and what the checker takes beside the prover.

    python -m benchmarks.coupled_blocks [--epochs 12] [--samples 200] [--eps 1/100 1/40 1/20]

Digits; 8 channels of 4x4 (convolution, maximum), 16 of 2x2, 10 units, coupled by a convolution of stride 2 and a
matrix; hard sigmoids; a linear readout. Trained for accuracy alone, by implicit gradients. One thread; CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn

from verideq import Equilibrium, Region, gauge
from verideq.certify import Prepared, prepare
from verideq.certify.bound import margin_rows, run_method
from verideq.certify.certificate import record
from verideq.data import load
from verideq.equilibrium import Auto, FeedbackFusion, Implicit
from verideq.graph import Embed
from verideq.parametrizations import FeedbackGauge

BLOCKS = (8, 4, 4), (16, 2, 2), (10,)


def network(m: float) -> nn.Sequential:
    couplings = nn.Conv2d(8, 16, 4, stride=2, padding=1, bias=False), nn.Linear(64, 10, bias=False)
    fusion = FeedbackGauge.apply(FeedbackFusion(BLOCKS, couplings), m)
    first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), Embed(torch.full((74,), 0.3)))
    solver = Auto(tol=1e-4, max_steps=100)
    layer = Equilibrium(fusion, first, "hard-sigmoid", solver, gradient=Implicit(Auto(tol=1e-3)), throw=False)
    return nn.Sequential(layer, nn.Linear(202, 10))


def trained(m: float, epochs: int) -> nn.Sequential:
    torch.manual_seed(0)
    train, model = load("digits", "train"), network(m)
    images, labels = train.scaled().float(), train.labels
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
        schedule.step()
    return model.eval()


def measured(prepared: Prepared, eps: str, samples: int, method: str) -> dict[str, object]:
    """How many are proved, how many of these the checker accepts, and what both take."""
    data = load("digits", "test")
    images, labels = data.scaled(list(range(samples))), data.labels[:samples]
    region, C = Region(images, eps), margin_rows(labels, 10)
    rhs = torch.zeros(C.shape[:2], dtype=torch.float64)
    started = time.process_time()
    bounds = run_method(prepared, region, C, method, rhs=rhs, upper=False)
    least = bounds.box.lower.amin(1)
    proved = (least > 0).nonzero().flatten().tolist()
    payloads = [
        record(prepared.checker.hash, i, region, i, bounds.proof(i), label=int(labels[i]), C=C[i].numpy(),
               rhs=rhs[i].numpy(), margin=float(least[i]))
        for i in proved
    ]  # fmt: skip
    proving, started = time.process_time() - started, time.process_time()
    accepted = sum(ok for ok, _, _ in prepared.checker.decide(payloads))
    checking = time.process_time() - started
    return {
        "eps": str(Fraction(eps)), "method": method, "samples": samples, "proved": len(proved), "accepted": accepted,
        "prove_seconds": round(proving, 2), "check_seconds": round(checking, 2),
        "check_over_prove": round(checking / proving, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--m", type=float, default=0.1)
    parser.add_argument("--eps", nargs="+", default=["1/100", "1/40", "1/20"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = load("digits", "test")
    for name, epochs in (("random", 0), ("trained", options.epochs)):
        started = time.process_time()
        model = trained(options.m, epochs)
        seconds = time.process_time() - started
        with torch.no_grad():
            clean = float((model(test.scaled().float()).argmax(1) == test.labels).float().mean())
        prepared = prepare(model)
        prepared.checker  # noqa: B018  # made before the clock runs
        ((_, layer),) = prepared.graph.equilibria()
        rate = gauge(layer).rate(layer)
        print(
            json.dumps({"model": name, "clean": round(clean, 4), "rate": round(rate, 4), "seconds": round(seconds, 1)})
        )
        for eps in options.eps if epochs else options.eps[:1]:
            for method in ("interval", "adjoint", "adjoint-refined"):
                print(json.dumps(measured(prepared, eps, options.samples, method)), flush=True)


if __name__ == "__main__":
    main()
