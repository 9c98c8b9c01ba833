"""What commands print with --json: their answers as plain values, under names that stay.

Accuracies are 0 to 1, times seconds, what was not measured null. Keys are added, never renamed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import singledispatch
from typing import Any

from kdexp.repeats import Verdict
from kdexp.select.benchmark import Benchmark, Form
from kdexp.select.confirm import Confirmation
from kdexp.select.confirm import Verdict as Tried
from kdexp.select.export import Exported
from kdexp.select.listing import StudyRow, TrialRow
from kdexp.select.promote import Gain, Promotion
from kdexp.select.status import Status
from kdexp.selection import AS_TRAINED, Candidate, FreshSeeds, passes

__all__ = ["plain", "text"]

Value = dict[str, Any]


def text(answer: Any) -> str:
    """A command's answer as it is printed. No NaN can be in it."""
    return json.dumps(plain(answer), indent=2, ensure_ascii=False, allow_nan=False)


@singledispatch
def plain(answer: Any) -> Any:
    """A command's answer as dicts and lists of numbers and texts."""
    raise TypeError(f"{type(answer).__name__} is no command's answer")


@plain.register
def _(rows: list) -> list[Value]:  # type: ignore[type-arg]
    """Of kdexp list and status."""
    return [plain(row) for row in rows]


@plain.register
def _(row: StudyRow | TrialRow) -> Value:
    """A row of kdexp list."""
    return asdict(row)


@plain.register
def _(found: Status) -> Value:
    """Of kdexp status."""
    return asdict(found)


@plain.register
def _(done: Promotion) -> Value:
    """Of kdexp select."""
    chosen = done.candidate
    return {
        "study": done.study,
        "run_id": done.run_id,
        "model": done.model or None,
        "trial": chosen.trial,
        "variant": chosen.variant,
        **_sizes(chosen),
        "goal": done.rule.goal,
        "accuracy_bar": done.rule.accuracy_bar,
        "sure": chosen.verdict is not None,
        "repeats": _verdict(chosen.verdict),
        "val_accuracy": done.val_accuracy,
        "val_interval": list(done.val_interval),
        "test_accuracy": done.test_accuracy,
        "test_interval": list(done.test_interval),
        "test_samples": done.test_samples,
        "test_accuracy_tta": done.test_accuracy_tta,
        "test_repeats": _seeds(done.test_repeats),
        "looks": done.looks,
        "distillation": _gain(done.gain),
        "candidates": [
            {
                "trial": one.trial,
                "run_id": one.run_id,
                "variant": one.variant,
                **_sizes(one),
                "val_accuracy": one.val_accuracy,
                "repeats": _verdict(one.verdict),
                "passes": passes(one, done.rule),
            }
            for one in done.trials
        ],
    }


@plain.register
def _(done: Confirmation) -> Value:
    """Of kdexp confirm."""
    return {
        **_tried(done.verdict),
        "run_ids": [run.run_id for run in done.runs],
        "model": done.model or None,
        "trained_on": done.images,
        "test": _seeds(done.test),
        "test_tta": _seeds(done.tta),
        "looks": done.looks,
        "not_confirmed": [_tried(one) for one in done.tried],
    }


@plain.register
def _(done: Exported) -> Value:
    """Of kdexp export."""
    return {
        "file": str(done.file),
        "file_bytes": done.file_bytes,
        "shape": list(done.shape),
        **asdict(done.size),
        "val_accuracy": done.validation.accuracy,
        "val_interval": list(done.validation.interval),
        "val_samples": done.validation.samples,
        "val_held_out": done.held_out,
        "trained_val_accuracy": done.trained_accuracy,
    }


@plain.register
def _(done: Benchmark) -> Value:
    """Of kdexp benchmark."""
    return {
        "run_id": done.run_id,
        "chosen": done.chosen.variant,
        "val_samples": done.samples,
        "val_held_out": done.held_out,
        "missing": done.missing or None,
        "forms": [_form(done, form) for form in done.forms],
    }


def _form(done: Benchmark, form: Form) -> Value:
    difference, interval = done.against(form)
    first = form.variant == AS_TRAINED
    return {
        "variant": form.variant,
        "bytes": form.bytes,
        "file_bytes": form.file_bytes,
        "multiply_adds": form.multiply_adds,
        "activation_bytes": form.activation_bytes,
        "val_accuracy": form.accuracy,
        "val_interval": list(done.interval(form)),
        "over_as_trained": None if first else difference,
        "over_as_trained_interval": None if first else list(interval),
        "same_answers": form.same,
        "p50_seconds": form.latency.p50,
        "p90_seconds": form.latency.p90,
        "images_a_second": form.latency.images_a_second,
    }


def _tried(found: Tried) -> Value:
    chosen = found.candidate
    return {
        "trial": chosen.trial,
        "trial_run_id": chosen.run_id,
        **_sizes(chosen),
        "accuracy_bar": found.rule.accuracy_bar,
        "confirmed": found.confirmed,
        "diverged": found.diverged or None,
        "val": _seeds(found.seeds),
        "repeats": _verdict(found.repeats),
    }


def _sizes(one: Candidate) -> Value:
    return {
        "parameters": one.parameters,
        "multiply_adds": one.multiply_adds,
        "bytes": one.bytes,
        "activation_bytes": one.activation_bytes,
    }


def _verdict(found: Verdict | None) -> Value | None:
    return asdict(found) if found else None


def _seeds(found: FreshSeeds | None) -> Value | None:
    if found is None:
        return None
    several = len(found.correct) > 1
    return {
        "mean": found.mean,
        "sd": found.sd if several else None,
        "accuracies": list(found.accuracies),
        "samples": found.samples,
    }


def _gain(found: Gain | None) -> Value | None:
    if found is None:
        return None
    interval = found.interval
    return {
        "mean": found.mean,
        "interval": list(interval) if interval else None,
        "pairs": len(found.differences),
    }
