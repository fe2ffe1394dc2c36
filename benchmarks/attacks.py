"""What attacks find on DEQs, and what an attack costs.

    verideq train recipes/adversarial/mnist.toml --out PHANTOM
    verideq train recipes/adversarial/mnist.toml --set gradient=exact --out EXACT
    verideq train recipes/adversarial/mnist-unconverged.toml --out STOPPED
    verideq train recipes/mondeq.toml --out STANDARD
    python benchmarks/attacks.py --phantom PHANTOM --exact EXACT --unconverged STOPPED \\
        --standard STANDARD/model.safetensors [--out NAME]

Needs MNIST. `--limit` samples of the test split; accuracies are shares of them, the misclassified ones included.

* unconverged: of a DEQ that stops far from its equilibrium, trained against an adversary who believes its exact
  gradients: what such attacks leave, and what others do.
* findings: on adversarially trained general DEQs, at the radius they were trained for: ready-made PGD-10 at the final
  state against the sweep of 144 unrolled attacks, the simultaneous adjoint, phantom gradients and Square; the state
  defences, each attacked by what was crafted against each; entropies.
* standard: a model trained for accuracy alone, at eps 0.3, under every suite.
* cost: PGD-40 through an equilibrium with `Warm` gradients against PGD-40 through its explicit twin, which applies U
  and W once: ``relu(W relu(v) + v)``; in turns within one process, CPU time, the median ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verideq.attacks import PGD, SUITES, Problem, Square, StateEnsemble, open_model, sweep
from verideq.attacks.defences import (
    EarlyState,
    EntropyReduction,
    FinalState,
    choose_early,
    entropies,
    entropy,
    transfer,
)
from verideq.attacks.opened import GraphDynamics, PlainDynamics
from verideq.attacks.problem import cross_entropy
from verideq.attacks.suites import READY_MADE, Stage, Suite
from verideq.attacks.warm import Warm
from verideq.certify.bound import margin_rows
from verideq.data import load
from verideq.equilibrium import DEQ, Broyden, Implicit, Phantom, path
from verideq.equilibrium.surrogates import Final, Simultaneous, Through, Unrolled
from verideq.graph import load_model
from verideq.models import BUNDLED
from verideq.region import Region
from verideq.training.adversary import AdversarialRecipe
from verideq.training.kinds import read_trained

EXACT = Final(Implicit(Broyden(max_steps=7)))


def problem_of(model: nn.Module, data: str, split: str, rows: Sequence[int], eps: str, norm: str = "linf") -> Problem:
    """Samples of a data set, attacked away from their labels; misclassified ones have a negative margin at once."""
    dataset = load(data, split)
    labels = dataset.labels[list(rows)]
    C = margin_rows(labels, dataset.classes)
    region = Region(dataset.scaled(list(rows)), eps, norm)
    return Problem(open_model(model), region, C, torch.zeros(C.shape[:2]).double(), torch.tensor(list(rows)))


def left(margins: Tensor) -> float:
    """Percent that is not broken."""
    return round(100 * float((~(margins < 0)).double().mean()), 2)


def trained(folder: Path) -> tuple[DEQ, AdversarialRecipe]:
    """The model of a folder of adversarial training."""
    model = read_trained(folder)
    if not isinstance(model, DEQ):
        raise TypeError(f"{folder} has no general DEQ")
    return model, AdversarialRecipe.read(folder / "recipe.toml")


def findings(folder: Path, limit: int) -> dict[str, Any]:
    """What every kind of attack leaves of one adversarially trained model."""
    model, recipe = trained(folder)
    problem = problem_of(model, recipe.data, "test", range(limit), recipe.eps)
    dynamics, x = problem.dynamics, problem.region.center
    injected = dynamics.inject(x)
    result: dict[str, Any] = {
        "eps": recipe.eps,
        "clean": left(problem.judge(x)),
        "residuals": [round(float(r), 4) for r in path(dynamics, injected).residuals.median(1).values],
    }
    single = {
        "PGD-10 final, the model's own gradient": Stage(READY_MADE),
        "PGD-10 final, exact gradient of 7 steps": Stage(READY_MADE, EXACT),
        "PGD-100 final, exact gradient of 7 steps": Stage(PGD(100, 1, 0.25, decay=False, plain=True), EXACT),
        "PGD-10 final, phantom": Stage(READY_MADE, Final(Phantom(5, 0.5))),
        "PGD-10 unrolled z8 k=9 λ=1": Stage(READY_MADE, Unrolled((8,), 9, 1.0)),
        "PGD-10 simultaneous ensemble": Stage(READY_MADE, Simultaneous(tuple(range(1, 9)))),
        "PGD-10 unrolled ensemble": Stage(READY_MADE, Unrolled(tuple(range(1, 9)), 1, 1.0)),
        "PGD-10 through all": Stage(READY_MADE, Through()),
        "PGD-10 unrolled z0 k=8 λ=1": Stage(READY_MADE, Unrolled((0,), 8, 1.0)),
        "Square-1000": Stage(Square(1000)),
    }
    report = Suite("single", tuple(single.values()), prune=False).run(problem)
    result["left"] = {name: left(t.found.margins) for name, t in zip(single, report.tried, strict=True)}
    worst = report.margins
    swept = Suite("sweep", sweep(), prune=False).run(problem)
    each = {t.name: left(t.found.margins) for t in swept.tried}
    result["sweep"] = {
        "strongest": min(each.items(), key=lambda item: item[1]),
        "weakest": max(each.items(), key=lambda item: item[1]),
        "pointwise worst": left(swept.margins),
    }
    result["ALL"] = left(torch.minimum(worst, swept.margins))
    points = swept.points
    result["entropy"] = vars(entropies(entropy(dynamics.outputs(x)), entropy(dynamics.outputs(points))))
    validation = problem_of(model, recipe.data, "train", range(59_500, 59_500 + limit), recipe.eps)
    early = choose_early(validation, load(recipe.data, "train").labels[59_500 : 59_500 + limit])
    eps = float(problem.region.eps)
    reduction = EntropyReduction(beta=eps / 4, radius=eps)
    with torch.no_grad():
        before = [
            entropy(dynamics.head(z, dynamics.inject(points))) for z in path(dynamics, dynamics.inject(points)).states
        ]
    states, moved = reduction.states_of(dynamics, points)
    result["entropy reduction, ΔH by state"] = [
        round(float((entropy(dynamics.head(z, moved)) - b).mean()), 4) for z, b in zip(states, before, strict=True)
    ]
    defences = [FinalState(), EarlyState(early.state), StateEnsemble(), reduction]
    crafted = Suite(
        "crafted", tuple(single[name] for name in list(single)[3:9]) + sweep((1, 3, 8), (1, 5), (0.5,)), False
    )
    small = problem[torch.arange(min(limit, 100))]
    table = transfer(small, defences, crafted)
    result["defences"] = {
        name: {"clean": left(replace(small, decide=None).judge(small.region.center)) if name == "final" else None}
        | {source: round(100 * float(survives.double().mean()), 2) for source, survives in row.items()}
        for name, row in table.items()
    }
    return result


def unconverged(folder: Path, limit: int) -> dict[str, Any]:
    """Table 1 of the first paper: gradients at a state that is no equilibrium, against what needs none of them."""
    model, recipe = trained(folder)
    problem = problem_of(model, recipe.data, "test", range(limit), recipe.eps)
    exact = Final(Implicit(Broyden(max_steps=recipe.backward_steps)))
    long = PGD(100, 1, 0.25, decay=False, plain=True)
    stages = {
        "PGD-10, exact": Stage(READY_MADE, exact),
        "PGD-100, exact": Stage(long, exact),
        "PGD-10, phantom": Stage(READY_MADE, Final(Phantom(5, 0.5))),
        "PGD-100, phantom": Stage(long, Final(Phantom(5, 0.5))),
        "PGD-10, through the solver": Stage(READY_MADE, Through()),
        "PGD-100, through the solver": Stage(long, Through()),
        "Square-1000": Stage(Square(1000)),
    }
    report = Suite("single", tuple(stages.values()), prune=False).run(problem)
    residuals = path(problem.dynamics, problem.dynamics.inject(problem.region.center)).residuals
    return {
        "eps": recipe.eps,
        "loss": recipe.loss,
        "clean": left(problem.judge(problem.region.center)),
        "residual": round(float(residuals[-1].median()), 4),
        "left": {name: left(t.found.margins) for name, t in zip(stages, report.tried, strict=True)},
        "ALL": left(report.margins),
    }


def standard(path_of: str, limit: int) -> dict[str, Any]:
    """What every suite leaves of a model trained for accuracy alone, at eps 0.3."""
    problem = problem_of(load_model(path_of), "mnist", "test", range(limit), "0.3")
    return {"clean": left(problem.judge(problem.region.center))} | {
        name: left(suite.run(problem).margins) for name, suite in SUITES.items()
    }


class Twin(nn.Module):
    """The explicit network with the same U and W, each applied once."""

    def __init__(self, opened: GraphDynamics) -> None:
        super().__init__()
        self.opened = opened

    def forward(self, x: Tensor) -> Tensor:
        opened = self.opened
        injected = opened.inject(x)
        v = injected[opened.node.inputs[0]]
        return opened.head(torch.relu(opened.operator.apply(torch.relu(v)) + v), injected)


def cost(model: nn.Module, data: str, batch: int, rounds: int) -> dict[str, Any]:
    """PGD-40 through the equilibrium against PGD-40 through the twin."""
    problem = problem_of(model, data, "test", range(batch), "0.1")
    opened = problem.dynamics
    if not isinstance(opened, GraphDynamics):
        raise TypeError("the model has no equilibrium")
    twin = replace(problem, dynamics=PlainDynamics(Twin(opened)))

    def seconds(own: Problem) -> float:
        started, x = time.process_time(), own.random_start(1)
        for _ in range(40):
            slope = own.slope(x, cross_entropy)
            x = own.region.project(x + 0.1 * float(own.region.eps) * own.direction(slope.gradient))
        own.judge(x)
        return time.process_time() - started

    ratios, cold = [], []
    for _ in range(rounds):
        base = seconds(twin)
        ratios.append(seconds(replace(problem, surrogate=Warm())) / base)
        cold.append(seconds(problem) / base)
    return {"batch": batch, "warm": round(statistics.median(ratios), 2), "cold": round(statistics.median(cold), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantom", type=Path)
    parser.add_argument("--exact", type=Path)
    parser.add_argument("--unconverged", type=Path)
    parser.add_argument("--standard")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="attacks")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    target = Path(__file__).parent / "results" / f"{chosen.out}.json"
    result = json.loads(target.read_text()) if target.exists() else {}
    result.setdefault("commands", []).append(" ".join(a for a in sys.argv[1:] if not a.startswith("/")))
    for name in ("phantom", "exact"):
        if (folder := getattr(chosen, name)) is not None:
            result[name] = findings(folder, chosen.limit)
            target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if chosen.unconverged is not None:
        result["unconverged"] = unconverged(chosen.unconverged, chosen.limit)
    if chosen.standard:
        result["standard"] = standard(chosen.standard, chosen.limit)
        result["cost, mnist, dense"] = cost(load_model(chosen.standard), "mnist", 256, chosen.rounds)
        result["cost, digits, convolutional"] = cost(load_model(BUNDLED), "digits", 256, chosen.rounds)
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
