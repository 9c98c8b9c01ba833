"""What Optuna was told of a study's trials, against what their own runs record.

The search goes by the one, every verdict by the other. Where they do not agree, a database was
changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from kdexp.config import Sweep, flatten
from kdexp.runs.outcome import Outcome
from kdexp.runs.tracking import RunRecord, Tracking, as_param
from kdexp.search.objective import constraints, unsure, values
from kdexp.search.study import Told
from kdexp.selection import size_of

__all__ = ["misremembered"]


def misremembered(
    told: Mapping[int, Told], sweep: Sweep, parent_run: str, tracking: Tracking
) -> tuple[int, ...]:
    """The trials, trained to their end, of which Optuna holds something else than their run."""
    runs = {
        run.tags["kdexp.trial"]: run
        for run in tracking.find("trial", {"mlflow.parentRunId": parent_run})
    }
    whole = {number: runs.get(str(number)) for number in told}
    return tuple(
        number
        for number, run in whole.items()
        if run
        and run.tags.get("kdexp.state") == "complete"
        and not _agree(told[number], run, sweep, tracking)
    )


def _agree(told: Told, run: RunRecord, sweep: Sweep, tracking: Tracking) -> bool:
    end, aim, rule = Outcome.recorded(run), sweep.study.objective, sweep.selection
    size = size_of(end.size, rule.size)
    if told.measured:
        correct = round(end.val_accuracy * end.val_samples)
        if (told.measured.correct, told.measured.samples) != (correct, end.val_samples):
            return False
    if not _near(told.values, values(aim, size, end.val_accuracy)):
        return False
    # of a repeat: what all repeats together came to
    if told.limits and told.repeats is None and (end.val_samples or not rule.confidence):
        if sweep.repeats:
            rule = rule.model_copy(update={"confidence": None})
        limits = constraints(aim, size, end.val_accuracy, rule, end.val_samples)
        limits = unsure(limits) if sweep.repeats else limits
        same = told.limits.keys() == limits.keys()
        if not same or not _near(told.limits.values(), limits.values()):
            return False
    for path, value in flatten(told.recipe).items() if told.recipe else ():
        if path in sweep.search and run.params.get(path, text := as_param(value)) != text:
            return False
    if told.curve is None:
        return True
    curve = [value for _, value in tracking.history(run.run_id, "epoch/val_accuracy")]
    return _near(told.curve, curve)


def _near(one: Iterable[float], other: Iterable[float]) -> bool:
    pairs = list(zip_longest(one, other, fillvalue=math.nan))
    return all(math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12) for first, second in pairs)
