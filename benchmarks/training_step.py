"""What a certified training step of an equilibrium model costs, against its explicit twin.

    python benchmarks/training_step.py [--quick] [--out NAME]

One thread, float32, the interval loss with its backward pass and the update of the weights. A model and its twin (the
equilibrium replaced by one application of the same ``U`` and of a free ``W``) take turns, after as many training steps
as `warm` says with the radius of the recipe, so that neither is measured at weights that nobody trains with. A figure
is the median over the rounds of the ratio within a round, in CPU time.

The reason beside it: *products* with ``W``, ``|W|`` or a transpose of either, forwards and backwards, from the floating
point operations that torch counts. The twin has nine: clean value, centre and radius, each forwards, for the gradient
of the input, and for that of the weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from verideq.data import Dataset, load
from verideq.errors import DataError
from verideq.training import Trainer
from verideq.training.recipe import Recipe, read_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Case:
    """A recipe, and how much of it is measured.

    Args:
        recipe: its file.
        batch: samples a step.
        warm: steps before.
        rounds: measured.
        bar: the ratio that a step is meant to stay below.
        settings: on top of the recipe.
    """

    recipe: str
    batch: int
    warm: int
    rounds: int
    bar: float
    settings: tuple[str, ...] = ()


CASES = {
    "deq-3": Case("mnist-deq-3.toml", 8, 60, 9, 2.5),
    "deq-3, 1e-3": Case("mnist-deq-3.toml", 8, 60, 9, 2.5, ("tol=1e-3",)),
    "deq-3, 1e-5, exact": Case("mnist-deq-3.toml", 8, 60, 9, 2.5, ("tol=1e-5", "backward_steps=0")),
    "deq-7": Case("mnist-deq-7.toml", 8, 60, 9, 2.0),
    "deq-7, 1e-5, exact": Case("mnist-deq-7.toml", 8, 60, 9, 2.0, ("tol=1e-5", "backward_steps=0")),
    "small": Case("mnist.toml", 128, 200, 25, 2.0),
}


def images(recipe: Recipe, samples: int) -> Dataset:
    """Of MNIST where it is there; else noise of its shape, which solves in about as many steps."""
    try:
        return load(recipe.data, "train").subset(range(samples))
    except DataError:
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (samples, 1, 28, 28), generator=draw, dtype=torch.uint8)
        return Dataset("noise", "train", pixels, torch.randint(0, 10, (samples,), generator=draw), 10)


class Step:
    """One model in training, a step at a time, at the full radius.

    Args:
        recipe: its batch size and radius.
        data: to train on.
    """

    def __init__(self, recipe: Recipe, data: Dataset) -> None:
        made = replace(recipe, natural_epochs=0, ramp_epochs=0, epochs=10**6)
        self.trainer = Trainer(made, Path("nowhere"), torch.device("cpu"), data)
        self.trainer.model.train()
        self.count = 0

    def __call__(self) -> float:
        trainer, size = self.trainer, self.trainer.batch_size
        batch = torch.arange(self.count * size, (self.count + 1) * size) % len(trainer.data)
        self.count += 1
        start = time.process_time()
        trainer._step(0, batch)
        return time.process_time() - start

    def flops(self) -> int:
        """Of one more step."""
        with FlopCounterMode(display=False) as counter:
            self()
        return int(counter.get_total_flops())


def products(one: Step, other: Step) -> tuple[float, float]:
    """Products with the fusion that a step takes, and with the twin's: 9, and what is counted beyond that."""
    (name, layer), *_ = one.trainer.graph.equilibria()
    shape = one.trainer.graph.shapes(one.trainer.data.scaled(slice(1)).float())[name]
    weight = layer.fusion.weight
    assert isinstance(weight, Tensor)
    size = 2 * weight.numel() * one.trainer.batch_size
    for side in shape[1:]:
        size *= side
    return 9 + (one.flops() - other.flops()) / size, 9.0


def measure(case: Case, *, quick: bool) -> dict[str, Any]:
    recipe = read_recipe(RECIPES / case.recipe, [*case.settings, f"batch_size={case.batch}", "validation.samples=0"])
    data = images(recipe, case.batch * 40)
    models = [Step(replace(recipe, explicit=explicit), data) for explicit in (False, True)]
    for _ in range(5 if quick else case.warm):
        for model in models:
            model()
    times = [[model() for model in models] for _ in range(3 if quick else case.rounds)]
    ratios = sorted(own / twin for own, twin in times)
    used, twin = products(*models)
    own, other = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        "bar": case.bar,
        "milliseconds": round(1000 * own, 1),
        "twin_milliseconds": round(1000 * other, 1),
        "products": round(used, 1),
        "twin_products": twin,
        "solver_steps": models[0].trainer.solver_steps,
        "batch": case.batch,
        "tol": recipe.tol,
        "backward_steps": recipe.backward_steps,
        "data": data.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--out", metavar="NAME", help="keep the line in results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: case for name, case in CASES.items() if arguments.only in (None, name)}
    figures = {name: measure(case, quick=arguments.quick) for name, case in chosen.items()}
    result = {"benchmark": "training_step", "torch": torch.__version__, "threads": 1, **figures}
    print(json.dumps(result))
    if arguments.out:
        path = Path(__file__).resolve().parent / "results" / f"{arguments.out}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0)


if __name__ == "__main__":
    main()
