"""What Optuna was told of a study's trials, against what their own runs record.

The search goes by the one, every verdict by the other. Where they do not agree, a database was changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from kdexp.config import Sweep, flatten
from kdexp.objective import constraints, values
from kdexp.study import Told
from kdexp.tracking import RunRecord, Tracking, as_param

__all__ = ["misremembered"]

SIZES = {"parameters": "parameters", "multiply_adds": "multiply_adds", "bytes": "model_bytes"}


def misremembered(told: Mapping[int, Told], sweep: Sweep, parent_run: str, tracking: Tracking) -> tuple[int, ...]:
    """The trials, trained to their end, of which Optuna holds something else than their run."""
    runs = {run.tags["kdexp.trial"]: run for run in tracking.find("trial", {"mlflow.parentRunId": parent_run})}
    whole = {number: runs.get(str(number)) for number in told}
    return tuple(
        number
        for number, run in whole.items()
        if run and run.tags.get("kdexp.state") == "complete" and not _agree(told[number], run, sweep, tracking)
    )


def _agree(told: Told, run: RunRecord, sweep: Sweep, tracking: Tracking) -> bool:
    aim, rule, metrics = sweep.study.objective, sweep.selection, run.metrics
    size, accuracy, samples = int(metrics[SIZES[rule.size]]), metrics["val_accuracy"], int(metrics.get("val_samples", 0))
    if not _near(told.values, values(aim, size, accuracy)):
        return False
    limits = constraints(aim, size, accuracy, rule, samples) if samples or not rule.confidence else told.limits
    if told.limits and not (told.limits.keys() == limits.keys() and _near(told.limits.values(), limits.values())):
        return False
    chosen = {path: as_param(value) for path, value in flatten(told.recipe).items()} if told.recipe else {}
    if any(run.params.get(path, text) != text for path, text in chosen.items() if path in sweep.search):
        return False
    return told.curve is None or _near(told.curve, [value for _, value in tracking.history(run.run_id, "epoch/val_accuracy")])


def _near(one: Iterable[float], other: Iterable[float]) -> bool:
    pairs = list(zip_longest(one, other, fillvalue=math.nan))
    return all(math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12) for first, second in pairs)
