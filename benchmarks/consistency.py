"""Whether any attack breaks what was certified: bounds, checker and attacks held against one another.

    python benchmarks/consistency.py [--samples N] [--models NAME ...] [--finished NAME=FILE ...] [--out NAME]

Of every model some samples are certified by `auto`, at a few radii and at the largest radius that `--radius` finds for
each of them; what is certified is attacked at exactly that radius, by the suite `full`, which holds the attacks of all
others (`--suites thin`: some of each kind), by warm and by exact gradients, and by what was crafted against each
defence. Points are judged by the model without a defence, which is what the certificate is about. The worst point of
each claim is then evaluated rigorously: it must neither break the sample nor lie below the certified margin. Exit code
1 if any does, or lies outside its ball.

The models: the bundled one (which `recipes/digits.toml` makes), `recipes/digits-standard.toml`, `recipes/mondeq.toml`
(MNIST), small ones that are trained here in seconds, dense and convolutional, and random ones of every parametrization,
labelled by themselves. `--finished` names model files of recipes that were trained before: these two, or any for MNIST.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verideq import Box, Equilibrium, Region, load_model
from verideq.attacks import (
    APGD,
    FAB,
    PGD,
    SUITES,
    EarlyState,
    EntropyReduction,
    Problem,
    Square,
    Stage,
    StateEnsemble,
    Suite,
    open_model,
    sweep,
)
from verideq.attacks.defences import Deciding, Defence
from verideq.attacks.suites import READY_MADE
from verideq.attacks.warm import Warm
from verideq.certify import certify, margin_rows, prepare
from verideq.certify.bound import run_method
from verideq.data import load
from verideq.equilibrium import Implicit, Phantom
from verideq.equilibrium.surrogates import Final, Simultaneous, Through, Unrolled
from verideq.models import BUNDLED
from verideq.models.zoo import PARAMETRIZATIONS
from verideq.training import Trainer
from verideq.training.recipe import make_recipe, read_recipe

STATES = tuple(range(1, 9))
GRADIENTS = Suite("gradients", (Stage(PGD(40, 1), Warm()), Stage(PGD(40, 1), Final(Implicit()))))
CRAFTED = Suite(
    "crafted",
    (
        Stage(PGD(20, 1)),
        Stage(READY_MADE, Unrolled(STATES, 1, 1.0)),
        Stage(READY_MADE, Simultaneous(STATES)),
        Stage(READY_MADE, Through(STATES)),
        Stage(Square(200)),
    ),
    prune=False,
)
"""Against each defence."""
THIN = Suite(
    "thin",
    (
        *(Stage(attack) for attack in (PGD(), APGD("ce", 25), APGD("t", 25), FAB(25), Square(300))),
        *(Stage(READY_MADE, surrogate) for surrogate in (Final(Phantom(5, 0.5)), Unrolled(STATES, 1, 1.0))),
        *(Stage(READY_MADE, Simultaneous(states)) for states in (STATES, (1,), (4,), (8,))),
        *sweep((1, 3, 8), (1, 5, 9)),
        *(Stage(APGD("ce", 25), surrogate) for surrogate in (Unrolled(STATES, 1, 1.0), Through())),
    ),
)
"""Every kind of attack of `full` by every kind of gradient, in a twentieth of its time."""


@dataclass(frozen=True)
class Case:
    """A model and what it is asked.

    Args:
        model: of supported operations.
        images: (batch, *features).
        labels: (batch,).
        eps: radii by norm; the radius of each sample itself comes on top.
        clip: the pixel range.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: dict[str, tuple[str, ...]]
    clip: tuple[float, float] | None = (0.0, 1.0)


@dataclass(frozen=True)
class Claim:
    """That one sample of a case is certified.

    Args:
        sample: its place.
        radius: of the ball.
        margin: what its rows are proved to reach; 0 where only the sign is.
    """

    sample: int
    radius: Fraction
    margin: float = 0.0


def claims_of(case: Case, norm: str, timeout: float | None = None, *, radius: bool = True) -> list[Claim]:
    """What `auto` certifies of a case; with `radius` at the largest one of each sample too."""
    claims = set()
    for eps in case.eps[norm]:
        last = radius and eps == case.eps[norm][-1]
        verdicts = certify(case.model, case.images, case.labels, eps, norm=norm, timeout=timeout, radius=last)
        for k, verdict in enumerate(verdicts):
            if verdict.certified and verdict.margin is not None:
                claims.add(Claim(k, verdict.eps, verdict.margin))
            if verdict.radius is not None:
                claims.add(Claim(k, verdict.radius))
    return sorted(claims, key=lambda claim: (claim.sample, claim.radius))


def defences_of(case: Case, claims: Sequence[Claim]) -> list[Defence]:
    """Every defence but the final state, which is the model."""
    largest = float(max(claim.radius for claim in claims))
    entropy = EntropyReduction(beta=max(largest, 1e-9) / 4, radius=largest, clip=case.clip)
    return [EarlyState(2), StateEnsemble(), entropy]


def contradictions(
    case: Case, norm: str, claims: Sequence[Claim], suites: Iterable[Suite], crafted: Suite = CRAFTED
) -> dict[str, Any]:
    """Attack what is claimed, and say which claims do not hold.

    Returns:
        ``wrong``: claims that a point of the ball refutes, proved; ``outside``: attacks whose point is not in the ball;
        ``attacks``: stages that were run; ``least margin``: of all points found; ``least above claim``: how near they
        came to a certified margin.
    """
    rows = torch.tensor([claim.sample for claim in claims])
    region = Region(case.images[rows], [claim.radius for claim in claims], norm, case.clip)
    dynamics, prepared = open_model(case.model), prepare(case.model)
    C = margin_rows(case.labels[rows], dynamics.outputs(region.center[:1]).shape[1])
    problem = Problem(dynamics, region, C, torch.zeros(C.shape[:2], dtype=torch.float64), rows)
    points, worst = region.center.clone(), problem.judge(region.center)
    attacks = outside = 0
    jobs = [(suite, problem) for suite in suites]
    jobs += [(crafted, replace(problem, decide=Deciding(d, dynamics))) for d in defences_of(case, claims)]
    for suite, asked in jobs:
        for tried in suite.run(asked).tried:
            attacks += 1
            own = problem[tried.at]
            outside += int((~own.region.contains(tried.found.points)).sum())
            margins = own.judge(tried.found.points)
            lower = margins < worst[tried.at]
            points[tried.at[lower]], worst[tried.at[lower]] = tried.found.points[lower], margins[lower]
    claimed = torch.tensor([claim.margin for claim in claims], dtype=torch.float64)
    values = run_method(prepared, Box(points, points), C, "interval").box
    wrong = (values.upper < claimed[:, None]).any(1) | (values.upper <= 0).any(1)
    return {
        "claims": len(claims),
        "samples": len(set(rows.tolist())),
        "attacks": attacks,
        "wrong": [vars(claims[k]) | {"radius": str(claims[k].radius)} for k in wrong.nonzero().flatten().tolist()],
        "outside": outside,
        "least margin": float(worst.min()),
        "least above claim": float((worst - claimed).min()),
    }


# --- models


def trained(recipe: Any) -> nn.Module:
    """What a recipe makes."""
    with tempfile.TemporaryDirectory() as folder:
        return load_model(Trainer(recipe, Path(folder), torch.device("cpu")).run())


def quick(architecture: str, **options: Any) -> nn.Module:
    """A small certified model of the digits, in seconds."""
    settings = {"eps": "0.05", "epochs": 5, "natural_epochs": 1, "ramp_epochs": 3, "learning_rate": 2e-2}
    return trained(make_recipe({"architecture": architecture, "options": options, **settings}))


def on(model: nn.Module, name: str, samples: int, linf: tuple[str, ...], l2: tuple[str, ...]) -> Case:
    """Test samples that a model classifies right."""
    data = load(name, "test")
    images, labels = data.scaled(slice(0, 2 * samples + 8)), data.labels[: 2 * samples + 8]
    with torch.no_grad():
        right = (model(images.float()).argmax(1) == labels).nonzero().flatten()[:samples]
    return Case(model, images[right], labels[right], {"linf": linf, "l2": l2})


def random_case(kind: str, seed: int, samples: int) -> Case:
    """A random network of a parametrization, dense or convolutional, labelled by itself."""
    torch.manual_seed(seed)
    make = PARAMETRIZATIONS[kind].apply
    if seed % 2 and kind != "mondeq":
        fusion, head = make(nn.Conv2d(3, 3, 3, padding=1, bias=False)), nn.Linear(48, 4)
        model = nn.Sequential(Equilibrium(fusion, nn.Conv2d(1, 3, 3, padding=1)), nn.Flatten(), head)
        images = torch.rand(samples, 1, 4, 4)
    else:
        layer = Equilibrium(make(nn.Linear(12, 12, bias=False)), nn.Linear(6, 12))
        model, images = nn.Sequential(layer, nn.Linear(12, 4)), torch.rand(samples, 6)
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    return Case(model, images, labels, {"linf": ("0.01", "0.05"), "l2": ("0.05",)})


def cases(samples: int, finished: Mapping[str, str]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every model by name; what is not asked for is not trained."""
    linf, l2 = ("0.02", "0.05", "0.1"), ("0.1", "0.3")

    def of(name: str) -> nn.Module:
        recipe = Path(__file__).resolve().parent.parent / "recipes" / f"{name}.toml"
        return load_model(finished[name]) if name in finished else trained(read_recipe(recipe))

    yield "bundled", lambda: on(load_model(BUNDLED), "digits", samples, linf, l2)
    yield "digits-standard", lambda: on(of("digits-standard"), "digits", samples, ("0.01", "0.03"), l2)
    yield "quick dense", lambda: on(quick("linear-deq", width=24), "digits", samples, linf, l2)
    yield "quick convolution", lambda: on(quick("conv-deq", width=3), "digits", samples, linf, l2)
    if os.environ.get("VERIDEQ_DATA"):
        yield "mondeq", lambda: on(of("mondeq"), "mnist", samples, ("0.02", "0.05"), ("0.2",))
        for name in sorted(set(finished) - {"digits-standard", "mondeq"}):
            yield name, lambda name=name: on(of(name), "mnist", samples, ("0.05", "0.1"), ("0.3",))  # type: ignore[misc]  # defaults bind
    for number, kind in enumerate(PARAMETRIZATIONS):
        for seed in (2 * number, 2 * number + 1):
            yield f"random {kind} {seed % 2}", lambda kind=kind, seed=seed: random_case(kind, seed, samples)  # type: ignore[misc]  # defaults bind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6, help="of a model")
    parser.add_argument("--models", nargs="+", help="only those whose name begins with one of these")
    parser.add_argument(
        "--suites", nargs="+", choices=[*SUITES, "thin"], default=["full"], help="full holds the others"
    )
    parser.add_argument("--norms", nargs="+", choices=["linf", "l2"], default=["linf", "l2"])
    parser.add_argument("--finished", nargs="+", default=[], metavar="RECIPE=FILE", help="do not train these")
    parser.add_argument("--timeout", type=float, default=2.0, help="of auto, seconds a sample")
    parser.add_argument("--out", default="consistency")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    target = Path(__file__).parent / "results" / f"{chosen.out}.json"
    result: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    suites = [{**SUITES, "thin": THIN}[name] for name in chosen.suites] + [GRADIENTS]
    bad = False
    for name, make in cases(chosen.samples, dict(pair.split("=", 1) for pair in chosen.finished)):
        if chosen.models and not any(name.startswith(start) for start in chosen.models):
            continue
        case = make()
        for norm in chosen.norms:
            started = time.process_time()
            claims = claims_of(case, norm, chosen.timeout)
            line: dict[str, Any] = {"claims": 0}
            if claims:
                line |= contradictions(case, norm, claims, suites)
            line["cpu seconds"] = round(time.process_time() - started, 1)
            result[f"{name}, {norm}, {' '.join(chosen.suites)}"] = line
            bad |= bool(line.get("wrong") or line.get("outside"))
            target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            print(f"{name}, {norm}: {json.dumps(line)}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
