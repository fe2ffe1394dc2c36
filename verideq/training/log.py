"""What a training run writes down: sums within an epoch, a line an epoch, the same lines as a table."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verideq.distributed import World
from verideq.training.objective import Terms

Epoch = dict[str, Any]


@dataclass
class Sums:
    """What the steps of an epoch add up to; JSON-ready, because a checkpoint within an epoch holds it.

    Args:
        steps: taken so far.
        seconds: spent so far.
        cpu_seconds: of processors, by this process.
        totals: by name: sums over steps, or over samples.
        solver: the most steps of any equilibrium and sample.
    """

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    solver: int = 0

    def add(self, terms: Terms, gradient: float, solver: int, world: World) -> None:
        """One more step."""
        self.steps += 1
        self.solver = max(self.solver, world.most(solver))
        shown = {"loss": terms.loss * world.size, **{f"{name}_loss": part for name, part in terms.parts.items()}}
        shown["error"] = terms.wrong.double().mean()
        if terms.open is not None:
            shown["interval_error"] = terms.open.double().mean()
        if terms.growth is not None:
            shown["bound_growth"] = terms.growth
        values = {name: float(value.detach()) for name, value in shown.items()}
        values = world.means(values) | {"gradient": gradient}
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The mean of everything over the steps so far."""
        return {name: value / self.steps for name, value in self.totals.items()}


def line_of(epoch: int, eps: float, rate: float, sums: Sums, validation: Epoch) -> Epoch:
    """What ``log.jsonl`` holds of an epoch; ``null`` for what the recipe does not compute."""
    means = sums.means()
    return {
        "epoch": epoch,
        "eps": eps,
        "learning_rate": rate,
        "loss": means["loss"],
        **{f"{name}_loss": means.get(f"{name}_loss") for name in ("certified", "clean", "attacked", "penalty")},
        "train_error": means["error"],
        "train_interval_error": means.get("interval_error"),
        "bound_growth": means.get("bound_growth"),
        "gradient": means["gradient"],
        "solver_steps": sums.solver,
        **validation,
        "seconds": round(sums.seconds, 3),
        "cpu_seconds": round(sums.cpu_seconds, 3),
    }


class Log:
    """``log.jsonl``, a line an epoch, and ``log.csv``, the same as a table.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.table = folder / "log.jsonl", folder / "log.csv"

    def cut(self, epochs: int) -> None:
        """Keep the first lines only: what an interrupted run wrote after its checkpoint is worked out again."""
        lines = self.path.read_text(encoding="utf-8").splitlines()[:epochs] if self.path.exists() else []
        self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self._tabulate()

    def append(self, line: Epoch) -> None:
        """One more epoch."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._tabulate()

    def _tabulate(self) -> None:
        records = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        out = io.StringIO()
        if records:
            writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        partial = self.table.with_name(self.table.name + ".partial")
        partial.write_text(out.getvalue(), encoding="utf-8")
        partial.replace(self.table)
