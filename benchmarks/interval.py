"""How fast the interval equilibrium is solved, against the floor and against two rivals, at equal accuracy.

    python benchmarks/interval.py [--quick] [--out NAME]

One thread, float32. Every candidate solves the same problem: centre and radius of the interval fixed point of an
IBP-MonDEQ layer for a batch of balls of injections.

* ours: `Auto` on the pair (centre, radius), as `Equilibrium.equilibrate_ball` runs it without gradients, tolerance
  1e-5; solving the rows for their own unknowns and forming ``|W|`` are part of the time.
* papers: the solver of the code of Wei & Kolter (ICLR 2022): forward-backward with alpha 1 on (z, upper, lower), three
  products a step, Anderson window 5 with separate coefficients for each of the three, beta 1, ridge 1e-4 on the
  normalised Gram matrix, stop on the sum of the relative steps over the batch.
* damped: forward-backward with alpha 0.125 on (lower, upper) with ``W⁺`` and ``W⁻``, four products a step.
* floor: two products (``W c`` and ``|W| r``) times the fewest steps that any solver tried needs.

The error of an answer is measured against a float64 reference: the worst sample's ``‖c - c*‖/‖c*‖ + ‖r - r*‖/‖r*‖``.
Rows solved for their own unknowns give slightly tighter intervals than ``W`` itself, so that ours has a reference of
its own. A rival's tolerance is set, by bisection, so that its error is at least ours and at most 1.5 times ours; where
one step leads from above that range to below it, the rival stops before that step. Candidates run in turn; a figure is
the median over the rounds of the ratio within a round, in CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.equilibrium import Anderson, Auto, Operator, Picard, Solver, System, fixed_point, operator_of
from verideq.parametrizations import IBPMonDEQ

TOL = 1e-5
Answer = tuple[Tensor, Tensor, int]
"""Centre, radius, steps."""


@dataclass(frozen=True)
class Problem:
    """An operator and the balls injected into it, (batch, *features) each."""

    operator: Operator
    center: Tensor
    radius: Tensor

    def system(self) -> System:
        return System(self.operator, torch.stack((self.center, self.radius)))


def problem(fusion: nn.Module, m: float, batch: int, *features: int, nonnegative: bool = False) -> Problem:
    """A random IBP-MonDEQ problem; the seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    weight = fusion.get_parameter("weight")
    free = torch.randn(weight.shape, generator=generator)
    weight.data = free.abs() if nonnegative else free
    operator = operator_of(IBPMonDEQ.apply(fusion, m)).map(Tensor.detach)
    center = torch.randn(batch, *features, generator=generator)
    return Problem(operator, center, 0.1 * torch.rand(batch, *features, generator=generator))


def dense(m: float, nonnegative: bool = False) -> Problem:
    return problem(nn.Linear(512, 512, bias=False), m, 128, 512, nonnegative=nonnegative)


def convolution(m: float) -> Problem:
    return problem(nn.Conv2d(32, 32, 3, padding=1, bias=False), m, 32, 32, 14, 14)


def ours(given: Problem, tol: float = TOL, solver: type[Solver] = Auto, **options: int) -> Answer:
    system = given.system().solved()
    solution = fixed_point(system.stepper(), system.start(), solver(tol=tol, **options)).check()
    return solution.value[0], solution.value[1], int(solution.steps.max())


def relative_step(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / (1e-6 + new.norm()))


def papers(given: Problem, tol: float, window: int = 5, ridge: float = 1e-4, max_steps: int = 1000) -> Answer:
    plain, absolute = given.operator, given.operator.absolute()
    center, radius = given.center, given.radius
    batch, injected = len(center), (center, center + radius, center - radius)

    def forward(z: list[Tensor]) -> list[Tensor]:
        point, upper, lower = z
        middle = plain.apply((upper + lower) / 2)
        half = absolute.apply((upper - lower) / 2)
        moved = plain.apply(point), middle + half, middle - half
        return [F.relu(a + v) for a, v in zip(moved, injected, strict=True)]

    z = [torch.zeros_like(center) for _ in injected]
    inputs, outputs = ([center.new_zeros(batch, window, center[0].numel()) for _ in injected] for _ in range(2))
    identity = torch.eye(window)
    for step in range(max_steps):
        image, slot, count = forward(z), step % window, min(step + 1, window)
        for part in range(3):
            inputs[part][:, slot], outputs[part][:, slot] = z[part].flatten(1), image[part].flatten(1)
        if sum(relative_step(new, old) for new, old in zip(image, z, strict=True)) < tol:
            return (image[1] + image[2]) / 2, (image[1] - image[2]) / 2, step + 1
        if step == 0:
            z = image
            continue
        for part in range(3):
            residuals = outputs[part][:, :count] - inputs[part][:, :count]
            gram = residuals @ residuals.mT
            gram = gram / (gram.flatten(1).norm(dim=1)[:, None, None] + 1e-6) + ridge * identity[:count, :count]
            # The least-squares weights that add up to 1, with the multiplier eliminated.
            weights = torch.linalg.solve(gram, gram.new_ones(batch, count, 1)).mT
            weights = weights / weights.sum(2, keepdim=True)
            z[part] = (weights @ outputs[part][:, :count]).view_as(center)
    raise RuntimeError(f"papers' style: no convergence in {max_steps} steps")


def split(operator: Operator) -> tuple[Operator, Operator]:
    """``W⁺`` and ``W⁻``."""
    return operator.map(lambda w: w.clamp(min=0)), operator.map(lambda w: w.clamp(max=0))


def damped(given: Problem, tol: float, alpha: float = 0.125, max_steps: int = 20_000) -> Answer:
    positive, negative = split(given.operator)
    top, bottom = given.center + given.radius, given.center - given.radius
    upper, lower = torch.zeros_like(top), torch.zeros_like(top)
    for step in range(max_steps):
        pushed_up = positive.apply(upper) + negative.apply(lower) + top
        pushed_down = positive.apply(lower) + negative.apply(upper) + bottom
        old = upper, lower
        upper, lower = (F.relu(torch.lerp(z, p, alpha)) for z, p in zip(old, (pushed_up, pushed_down), strict=True))
        if relative_step(upper, old[0]) + relative_step(lower, old[1]) < tol:
            return (upper + lower) / 2, (upper - lower) / 2, step + 1
    raise RuntimeError(f"damped: no convergence in {max_steps} steps")


def references(given: Problem) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Centre and radius in float64: of the solved system, and of ``W`` as it is; confirmed by a four-product step."""
    wide = given.system().map(Tensor.double)
    found = []
    for system in (wide.solved(), wide):
        value = fixed_point(system.stepper(), system.start(), Auto(tol=1e-12)).check().value
        center, radius = value[0], value[1]
        positive, negative = split(system.operator)
        upper = F.relu(positive.apply(center + radius) + negative.apply(center - radius) + system.injection.sum(0))
        if not relative_step(upper, center + radius) < 1e-11:
            raise RuntimeError("the reference does not solve the problem")
        found.append((center, radius))
    return found[0], found[1]


def error(answer: Answer, exact: tuple[Tensor, Tensor]) -> float:
    relative = [
        (a - e).flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1) for a, e in zip(answer[:2], exact, strict=True)
    ]
    return float((relative[0] + relative[1]).max())


def equal_tolerance(rival: Callable[[float], Answer], exact: tuple[Tensor, Tensor], target: float) -> float:
    """A tolerance at which the error of `rival` is at least `target` and, steps permitting, at most 1.5 times that."""
    loose, tight = 0.0, -9.0  # powers of ten
    while loose - tight > 0.0125:
        middle = (loose + tight) / 2
        if error(rival(10**middle), exact) > 1.5 * target:
            loose = middle
        else:
            tight = middle
    return float(10 ** (tight if error(rival(10**tight), exact) >= target else loose))


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def measure(given: Problem, rounds: int) -> dict[str, object]:
    """All candidates on one problem."""
    solved, exact = references(given)
    target = error(ours(given), solved)
    tolerances = {
        "papers": equal_tolerance(partial(papers, given), exact, target),
        "damped": equal_tolerance(partial(damped, given), exact, target),
    }
    runs: dict[str, Callable[[], Answer]] = {
        "ours": lambda: ours(given),
        "papers": lambda: papers(given, tolerances["papers"]),
        "damped": lambda: damped(given, tolerances["damped"]),
    }
    answers = {name: run() for name, run in runs.items()}
    steps = {name: answer[2] for name, answer in answers.items()}
    tried = {"picard": ours(given, solver=Picard)[2], "papers": steps["papers"], "ours": steps["ours"]}
    tried |= {f"anderson{window}": ours(given, solver=Anderson, window=window)[2] for window in range(1, 6)}
    fewest = min(tried.values())

    absolute = given.operator.absolute()
    times: dict[str, list[float]] = {name: [] for name in (*runs, "products")}
    for _ in range(rounds):
        times["products"].append(
            seconds(lambda: (given.operator.apply(given.center), absolute.apply(given.radius)), repeats=10)
        )
        times["ours"].append(statistics.median(seconds(runs["ours"]) for _ in range(5)))
        for name in ("papers", "damped"):
            times[name].append(seconds(runs[name]))

    def ratio(above: list[float], below: list[float], factor: float = 1.0) -> float:
        return round(statistics.median(a / (factor * b) for a, b in zip(above, below, strict=True)), 3)

    return {
        "ours_over_floor": ratio(times["ours"], times["products"], fewest),
        "papers_over_ours": ratio(times["papers"], times["ours"]),
        "damped_over_ours": ratio(times["damped"], times["ours"]),
        "milliseconds": {name: round(1000 * statistics.median(values), 3) for name, values in times.items()},
        "steps": steps,
        "errors": {name: short(error(answer, solved if name == "ours" else exact)) for name, answer in answers.items()},
        "tolerances": {"ours": TOL} | {name: short(tol) for name, tol in tolerances.items()},
        "steps_tried": tried,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds, and only the two problems that have a bar")
    parser.add_argument("--out", metavar="NAME", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 15
    with torch.no_grad():
        linear, conv = measure(dense(0.1), rounds), measure(convolution(0.1), rounds)
        information = {} if options.quick else {
            "dense_m0.01": measure(dense(0.01), 5),
            "dense_nonnegative": measure(dense(0.1, nonnegative=True), 5),
            "conv_m0.01": measure(convolution(0.01), 5),
        }  # fmt: skip
    report = {
        "ours_over_floor": linear["ours_over_floor"],
        "papers_over_ours": linear["papers_over_ours"],
        "damped_over_ours": linear["damped_over_ours"],
        "conv_papers_over_ours": conv["papers_over_ours"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "dense": linear,
        "conv": conv,
        **information,
    }
    line = json.dumps(report)
    if options.out:
        (Path(__file__).parent / "results" / f"{options.out}.json").write_text(line + "\n")
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
