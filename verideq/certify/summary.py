"""The numbers of a run: verdicts counted by eps, with 95 % intervals. `summary.json` holds what `summarise` returns."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from scipy.special import betaincinv

from verideq.attacks.suites import warnings_of
from verideq.status import Status

ACCOUNT = ("attack", "attack_margin", "first_margin", "blind")
"""What a line says of the attacks of a suite: see `Verdict`."""
REJECTED = "the checker refused"
"""How the reason of a sample begins whose certificate was proposed and not accepted; `rejected` counts these."""


def interval95(k: int, n: int) -> tuple[float, float]:
    """The exact two-sided 95 % interval of a proportion (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        k: successes, ``0 <= k <= n``.
        n: trials; with none, nothing is known.

    Returns:
        Lower and upper end, as fractions of one.

    Raises:
        ValueError: `k` is negative or above `n`.

    >>> interval95(0, 0)
    (0.0, 1.0)
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes of {n} trials: give 0 <= k <= n")
    # The quantiles of beta(k, n - k + 1) and beta(k + 1, n - k).
    lower = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 0.025))
    upper = 1.0 if k == n else float(betaincinv(k + 1, n - k, 0.975))
    return lower, upper


def summarise(records: Iterable[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Count the verdicts of a run, whole or interrupted.

    Args:
        records: the lines of ``results.jsonl``, in any order.
        meta: ``run.json``: `model`, `data`, `version`, `attack` and `radius` are read.

    Returns:
        ``summary.json``: `model, data, version, results`, one result an eps in rising order. `checked` is true when
        something was certified and the checker accepted all of it; `by_method` adds up to `certified`. Under a suite of
        attacks `by_attack` and `warnings`. And `radii`, if radii were asked for.

    Raises:
        ValueError: a status that does not exist.
    """
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    records = list(records)
    for record in records:
        groups.setdefault((float(record["eps"]), str(record["norm"])), []).append(record)
    with_attack = meta.get("attack", "none") != "none"
    results = [_count(eps, norm, groups[eps, norm], with_attack) for eps, norm in sorted(groups)]
    summary = {key: meta.get(key) for key in ("model", "data", "version")} | {"results": results}
    return summary | {"radii": _radii(records, with_attack)} if meta.get("radius") else summary


def _radii(records: Iterable[Mapping[str, Any]], with_attack: bool) -> dict[str, Any]:
    """Median and mean over the samples. What is not certified counts as 0, what no attack broke as infinite."""
    samples = {record["index"]: record for record in records}
    certified = [float(record["radius"] or 0) for record in samples.values()]
    attacked = [attacked_radius(record) for record in samples.values()] if with_attack else []
    return {
        "n": len(samples),
        **{f"certified_{name}": value for name, value in _middle(certified).items()},
        **{f"attacked_{name}": value for name, value in _middle(attacked).items()},
    }


def attacked_radius(record: Mapping[str, Any]) -> float:
    """Where a sample was broken: at 0 if the model is wrong on it, nowhere (infinite) if no attack has broken it."""
    if record["status"] == Status.MISCLASSIFIED:
        return 0.0
    return math.inf if record["attacked_radius"] is None else float(record["attacked_radius"])


def _middle(values: list[float]) -> dict[str, float | None]:
    found = {"median": statistics.median(values), "mean": statistics.fmean(values)} if values else {}
    return {name: found[name] if math.isfinite(found.get(name, math.inf)) else None for name in ("median", "mean")}


def _count(eps: float, norm: str, records: list[Mapping[str, Any]], with_attack: bool) -> dict[str, Any]:
    n = len(records)
    statuses = Counter(Status(r["status"]) for r in records)
    proved = [r for r in records if r["status"] == Status.CERTIFIED]
    clean = sum(r["prediction"] is not None and r["prediction"] == r["label"] for r in records)
    attacked = sum(r["attacked"] is True for r in records) if with_attack else None
    account = _account(records) if any(key in r for r in records for key in ACCOUNT) else {}
    return {
        "eps": eps,
        "norm": norm,
        "n": n,
        **{status.value.lower(): statuses[status] for status in Status},
        "rejected": sum(REJECTED in str(r["reason"] or "") for r in records),
        "clean": clean,
        "attacked": attacked,
        "checked": bool(proved) and all(r["checked"] is True for r in proved),
        "by_method": dict(sorted(Counter(str(r["method"]) for r in proved).items())),
        "seconds": sum(float(r["seconds"] or 0) for r in records),
        "clean_interval": list(interval95(clean, n)),
        "attacked_interval": None if attacked is None else list(interval95(attacked, n)),
        "certified_interval": list(interval95(len(proved), n)),
        **account,
    }


def _account(records: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a suite: `by_attack`, broken samples by what broke them, and `warnings`."""
    mine = [r for r in records if r["attacked"] is not None and r["attack"] is not None]
    last = [0.0 if r["attack_margin"] is None else float(r["attack_margin"]) for r in mine]
    broken = [r["attack"] if r["attacked"] is False else None for r in mine]
    return {
        "by_attack": dict(Counter(name for name in broken if name is not None).most_common()),
        "warnings": warnings_of(broken, [bool(r["blind"]) for r in mine], [r["first_margin"] for r in mine], last),
    }
