"""How a model does under natural corruptions: predictions by corruption and severity, counts, and mean errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from verideq.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt

Predictions = dict[str, list[int | None]]
"""By corruption, the prediction at each severity; ``None`` where the outputs are not finite."""


def corrupted_predictions(
    outputs: Callable[[Tensor], Tensor], images: Tensor, indices: Sequence[int], names: Sequence[str], seed: int
) -> list[Predictions]:
    """What a model makes of every corruption of a batch.

    Args:
        outputs: of the model, (batch, classes).
        images: (batch, channels, height, width), in [0, 1].
        indices: (batch,) of the samples in their data set.
        names: of `verideq.data.corruptions.CORRUPTIONS`.
        seed: of the run.

    Returns:
        for every sample its predictions.
    """
    found: list[Predictions] = [{} for _ in indices]
    for name in names:
        for severity in SEVERITIES:
            result = outputs(corrupt(images, name, severity, indices=indices, seed=seed))
            known = result.isfinite().all(1).tolist()
            for sample, best, sure in zip(found, result.argmax(1).tolist(), known, strict=True):
                sample.setdefault(name, []).append(best if sure else None)
    return found


def summarise_corruptions(records: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`corruptions` of ``summary.json``, or nothing where none was asked for.

    Args:
        records: the lines of ``results.jsonl``; those of a sample agree at every eps.

    Returns:
        `n` samples; `correct`: by corruption the right predictions at each severity; `error`: by family and, as
        ``all``, over all corruptions the mean of their errors, each a mean over the severities: the mean corruption
        error, not normalised by another model's.
    """
    samples = {r["index"]: r for r in records if r.get("corrupted")}.values()
    if not samples:
        return None
    names = next(iter(samples))["corrupted"]
    correct = {
        name: [sum(r["corrupted"][name][k] == r["label"] for r in samples) for k in range(len(SEVERITIES))]
        for name in names
    }
    summary = {"n": len(samples), "correct": correct}
    errors = corruption_errors(summary)
    families = list(dict.fromkeys(CORRUPTIONS[name].family for name in names))
    by_family = {f: fmean(e for name, e in errors.items() if CORRUPTIONS[name].family == f) for f in families}
    return summary | {"error": {"all": fmean(errors.values()), **by_family}}


def corruption_errors(summary: Mapping[str, Any]) -> dict[str, float]:
    """By corruption the share of wrong predictions, the mean over the severities.

    >>> corruption_errors({"n": 10, "correct": {"fog": [10, 9, 8, 7, 6]}})
    {'fog': 0.2}
    """
    tried = {name: len(counts) * summary["n"] for name, counts in summary["correct"].items()}
    return {name: (tried[name] - sum(counts)) / tried[name] for name, counts in summary["correct"].items()}


def normalised_error(summary: Mapping[str, Any], baseline: Mapping[str, Any]) -> float | None:
    """The mean over the corruptions of a model's error over that of a baseline (Hendrycks & Dietterich, equation 1).

    Corruptions that either has not met, or under which the baseline is never wrong, do not enter; ``None``: none is
    left.
    """
    own, other = corruption_errors(summary), corruption_errors(baseline)
    ratios = [own[name] / other[name] for name in own if other.get(name, 0) > 0]
    return fmean(ratios) if ratios else None
