"""The time of every bound method, beside intervals and over the floor of its matrix products: one thread, one line.

    python benchmarks/methods.py [--width H] [--batch N] [--eps E] [--rounds N] [--out NAME]

An untrained equilibrium of `width` dense units between images of the size of MNIST and ten outputs: nine margins a
sample. `quadratic` and `branch-and-bound` are measured on a monotone one of 40 units. All candidates take turns in
every round, and ratios are those of a round, so that what else the machine does weighs on all of them; medians are
kept.

*Floor*: the least time of the products that a method cannot do without, each timed by itself in the same round, with
the number of steps that its solver took.

* interval: ``W c`` and ``|W| r`` a step, ``U c`` and ``|U| r`` once.
* adjoint: for each of three slopes and every row ``Wᵀ g`` a step and once more for the bound, and ``Uᵀ g`` once; the
  interval bound before that.
* adjoint-refined: two rows for every unit of the layer, as above, and then the margins.
* adjoint-ascent: for every open row, a step, ``Wᵀ g``, ``Uᵀ g`` and their transposes.
* quadratic: for every row and step ``U S⁻¹ Uᵀ``.
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
from torch import Tensor, nn

import verideq
from verideq import Equilibrium, Region
from verideq.certify import backward, margin_rows, prepare, quadratic
from verideq.certify.ascent import Climb
from verideq.certify.bound import run_method
from verideq.certify.method import Query
from verideq.models.zoo import linear_deq
from verideq.parametrizations import MonDEQ

SHAPE, CLASSES = (1, 28, 28), 10
ROWS = CLASSES - 1


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Counted:
    """How often the adjoint equilibrium is stepped, and for how many rows: read off `backward._fixed_point`."""

    def __init__(self) -> None:
        self.rows = 0
        self.solve = backward._fixed_point

    def __enter__(self) -> Counted:
        def counted(apply: Callable[[Tensor], Tensor], *arguments: Any) -> Tensor:
            def once(rows: Tensor) -> Tensor:
                self.rows += len(rows)
                return apply(rows)

            return self.solve(once, *arguments)

        backward._fixed_point = counted  # type: ignore[assignment]  # a spy
        return self

    def __exit__(self, *_: object) -> None:
        backward._fixed_point = self.solve


def dense(width: int, batch: int, eps: str, rounds: int) -> dict[str, Any]:
    """The linear bounds on a layer with a gauge."""
    torch.manual_seed(0)
    prepared = prepare(linear_deq(SHAPE, CLASSES, width=width).eval())
    images = torch.rand(batch, *SHAPE)
    C = margin_rows(prepared.graph(images.double()).argmax(1), CLASSES)
    region, rhs = Region(images, eps), torch.zeros(batch, ROWS, dtype=torch.float64)

    def run(method: str, goal: bool) -> verideq.certify.method.Bounds:
        return run_method(prepared, region, C, method, rhs=rhs if goal else None, upper=False)

    W, U = (torch.rand(n, width, dtype=torch.float64) for n in (width, 784))
    with Counted() as adjoint:
        run("adjoint", False)
    with Counted() as open_:
        run("adjoint", True)
    steps = float(run("interval", False).steps.double().mean())
    few, many = torch.rand(batch, width, dtype=torch.float64), torch.rand(ROWS * batch, width, dtype=torch.float64)
    inputs = torch.rand(batch, 784, dtype=torch.float64)
    times: list[dict[str, float]] = []
    for _ in range(rounds):
        one = {
            "interval": seconds(lambda: run("interval", False)),
            "adjoint": seconds(lambda: run("adjoint", False)),
            "adjoint, open rows": seconds(lambda: run("adjoint", True)),
        }
        w, u = seconds(lambda: few @ W), seconds(lambda: inputs @ U)
        a, b = seconds(lambda: many @ W) / len(many), seconds(lambda: many @ U.T) / len(many)
        one["interval floor"] = 2 * steps * w + 2 * u
        rows = 3 * len(many)
        one["adjoint floor"] = one["interval floor"] + adjoint.rows * a + rows * (a + b)
        one["adjoint, open rows floor"] = one["interval floor"] + open_.rows * a + len(many) * (a + b)
        times.append(one)

    def median(of: str, over: str = "", share: int = 1) -> float:
        return round(statistics.median(t[of] / share / (t[over] if over else 1) for t in times), 3)

    result: dict[str, Any] = {
        "width": width, "batch": batch, "rows": ROWS, "eps": eps, "interval_steps": round(steps, 1),
        "adjoint_steps": round(adjoint.rows / rows, 1),
        "closed_by": {m: float((run(m, True).box.lower > 0).all(1).double().mean()) for m in ("interval", "adjoint")},
    }  # fmt: skip
    for name in ("interval", "adjoint", "adjoint, open rows"):
        result[name] = {
            "seconds": median(name),
            "over_interval": median(name, "interval"),
            "row_over_interval": median(name, "interval", ROWS),
            "over_floor": median(name, f"{name} floor"),
        }
    return result


def tighter(width: int, batch: int, eps: str, rounds: int) -> dict[str, Any]:
    """`adjoint-refined` and `adjoint-ascent`, on fewer units and samples: every row open to the end."""
    torch.manual_seed(0)
    prepared = prepare(linear_deq(SHAPE, CLASSES, width=width).eval())
    images = torch.rand(batch, *SHAPE)
    C = margin_rows(prepared.graph(images.double()).argmax(1), CLASSES)
    region = Region(images, eps)

    def run(method: str) -> object:
        return run_method(prepared, region, C, method, upper=False)

    W, U = (torch.rand(n, width, dtype=torch.float64) for n in (width, 784))
    count = Counted()
    with count:
        run("adjoint-refined")
    many = torch.rand(ROWS * batch, width, dtype=torch.float64)
    steps, times = Climb().steps, []
    for _ in range(rounds):
        a, b = seconds(lambda: many @ W) / len(many), seconds(lambda: many @ U.T) / len(many)
        refined, ascent = seconds(lambda: run("adjoint-refined")), seconds(lambda: run("adjoint-ascent"))
        floor = count.rows * (a + (a + b) / 4)
        times.append((refined, refined / floor, ascent, (ascent - refined) / (2 * steps * len(many) * (a + b))))
    names = ("refined_seconds", "refined_over_floor", "ascent_seconds", "ascent_over_floor")
    medians = (round(statistics.median(t[k] for t in times), 3) for k in range(4))
    return {"width": width, "batch": batch, "eps": eps, **dict(zip(names, medians, strict=True))}


def monotone(width: int, batch: int, rounds: int) -> dict[str, Any]:
    """Steps of the quadratic bound, at the root and of the halves of branch and bound."""
    torch.manual_seed(0)
    fusion = MonDEQ.from_weights(torch.randn(width, width) / width**0.5, torch.randn(width, width), 20.0)
    prepared = prepare(nn.Sequential(nn.Flatten(), Equilibrium(fusion, nn.Linear(784, width)), nn.Linear(width, 10)))
    images = torch.rand(batch, *SHAPE)
    C = margin_rows(prepared.graph(images.double()).argmax(1), CLASSES)
    region = Region(images, "1/20")
    query = Query(region.box(), region, C, upper=False)
    form = quadratic.form_of(prepared, query.box.lower)
    problem, _, _ = quadratic.pose(prepared, query, form, C)
    point, some = quadratic.start(problem), 10
    U = torch.rand(ROWS * batch, width, 784, dtype=torch.float64)
    times = []
    for _ in range(rounds):
        took = seconds(lambda: quadratic.ascend(problem, point, some, float("inf"))) / some
        floor = seconds(lambda: torch.bmm(U, U.mT))
        times.append((took / len(U), took / floor))
    medians = [statistics.median(t[k] for t in times) for k in range(2)]
    return {
        "width": width, "rows": len(U), "row_step_seconds": round(medians[0], 6), "over_floor": round(medians[1], 2)
    }  # fmt: skip


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--eps", default="1/300")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="also write benchmarks/results/NAME.json", metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "verideq": verideq.__version__,
        "torch": torch.__version__,
        "dense": dense(options.width, options.batch, options.eps, options.rounds),
        "tighter": tighter(128, 8, "1/100", max(3, options.rounds // 2)),
        "quadratic": monotone(40, 8, options.rounds),
        "branch-and-bound": monotone(40, 2, options.rounds),
    }
    line = json.dumps(figures)
    print(line)
    if options.out:
        Path(__file__).parent.joinpath("results", f"{options.out}.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
