"""A run's record held against itself, and its numbers against its own weights: before anything
rests on them.

What a record says twice it must say alike: a recipe stands in config.json and in the params, a file
beside its SHA-256, an accuracy beside its interval. And what its weights come to can be measured
again.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from kdexp.config import Recipe, Variant, flatten
from kdexp.distill.compact import as_stored, compact
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.evaluate import evaluate
from kdexp.distill.models import measure
from kdexp.environment import differing, own_networks, record
from kdexp.files import sha256_of
from kdexp.intervals import wilson_interval
from kdexp.reading import study_name
from kdexp.runs.records import (
    ARTIFACTS,
    WEIGHTS,
    RecordError,
    environment_of_run,
    load_student,
    sealed,
    weights_of,
)
from kdexp.runs.tracking import LONGEST, RunRecord, Tracking, TrackingAway, TrackingError, as_param
from kdexp.select.variants import load_variant, metrics_of, prefix_of
from kdexp.selection import AS_TRAINED

__all__ = [
    "ROUNDING",
    "Difference",
    "contradictions",
    "lost",
    "unsealed",
    "verify",
    "verify_record",
]

ROUNDING = 2
"""Images that may be on the other side of a tie where the same weights are measured in another
order of sums ...
"""
ELSEWHERE = 0.005
"""... and which share of them besides on another device or processor."""
# characters of a shortened param that say what was recorded, not that it was shortened
SURE = LONGEST - 200
MACHINE = ("device", "cpu", "cpu_capability", "torch")
log = logging.getLogger("kdexp")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in two records, or in two places of one."""

    what: str
    original: str
    again: str
    by: float = math.inf
    """How far two numbers are apart."""


def verify(
    run: RunRecord,
    recipe: Recipe,
    variant: Variant,
    splits: Splits,
    tracking: Tracking,
    device: torch.device,
) -> None:
    """Hold a finished run against itself, and its numbers against its student with the stored
    weights.

    Raises RecordError with the first thing that is not as recorded: then nothing may rest on this
    run.
    """
    verify_record(run, recipe, variant, splits, tracking)
    if run.tags.get(WEIGHTS) and not recipe.data.train_on_validation:
        _accuracy(run, recipe, variant, splits.validation, tracking, device)


def verify_record(
    run: RunRecord, recipe: Recipe, variant: Variant, splits: Splits, tracking: Tracking
) -> None:
    """The same without its accuracy, where that is to be found out anew. Raises RecordError."""
    found = contradictions(run, recipe, tracking)
    if found:
        first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise _false(
            run, f"{first.what} is {first.original} by its record and {first.again} in fact{more}"
        )
    if run.tags.get(WEIGHTS):
        _sizes(run, recipe, variant, splits.validation, tracking)
    elif run.tags.get("kdexp.state") != "diverged":  # in its first epoch, then there are none
        raise _false(
            run, f"{WEIGHTS} is missing, so nobody can tell whether its weights are its own"
        )
    _say_what_changed(run, recipe, tracking)


def _say_what_changed(run: RunRecord, recipe: Recipe, tracking: Tracking) -> None:
    """The user's own modules may have been edited since: harmless or not, what comes of the weights
    shows it.
    """
    here = own_networks(recipe)
    changed = differing(
        {name: value for name, value in environment_of_run(run, tracking).items() if name in here},
        here,
    )
    if changed:
        log.warning(
            "run %s: not what it was trained with any more: %s", run.run_id, ", ".join(changed)
        )


def _sizes(
    run: RunRecord, recipe: Recipe, variant: Variant, like: Split, tracking: Tracking
) -> None:
    """Of a variant the bytes are those of its file, whose SHA-256 is on record."""
    student, recorded = load_student(run, recipe, like, tracking), metrics_of(run, variant)
    trained = variant == AS_TRAINED
    size = measure(student, like) if trained else measure(compact(student, like), as_stored(like))
    found = {"parameters": size.parameters, "multiply_adds": size.multiply_adds}
    same_torch = environment_of_run(run, tracking).get("torch") == version("torch")
    if size.activation_bytes and same_torch and "activation_bytes" in recorded:
        found["activation_bytes"] = size.activation_bytes  # another torch may take other steps
    for name, value in (found | ({"model_bytes": size.bytes} if trained else {})).items():
        if int(recorded[name]) != value:
            raise _false(
                run,
                f"{prefix_of(variant)}{name} is recorded as {int(recorded[name]):,}, its student"
                f" has {value:,}",
            )


def _accuracy(
    run: RunRecord,
    recipe: Recipe,
    variant: Variant,
    validation: Split,
    tracking: Tracking,
    device: torch.device,
) -> None:
    """On validation, with the stored weights. Another order of sums may move an image or two, which
    is said.
    """
    samples, name = len(validation), f"{prefix_of(variant)}val_accuracy"
    if (then := int(run.metrics.get("val_samples", samples))) != samples:
        raise _false(run, f"val_samples is recorded as {then:,}, there are {samples:,} images")
    module = load_variant(run, recipe, variant, validation, tracking)
    found = evaluate(module.to(device), validation.to(device))
    recorded = metrics_of(run, variant)["val_accuracy"]
    apart = abs(found.correct - recorded * samples)
    if apart > allowance(run, recipe, samples, tracking, device) + 0.5:
        raise _false(
            run,
            f"{name} is recorded as {recorded:.2%}, its stored student has {found.accuracy:.2%}",
        )
    if apart >= 0.5:
        log.warning(
            f"run {run.run_id}: {name} is recorded as {recorded:.4f}, its stored student has"
            f" {found.accuracy:.4f}: {round(apart)} of {samples:,} images apart, as another order"
            " of sums may leave them"
        )


def allowance(
    run: RunRecord, recipe: Recipe, samples: int, tracking: Tracking, device: torch.device
) -> int:
    """By how many images two measurements of the same weights may be apart, here and where the run
    was trained.
    """
    then = environment_of_run(run, tracking)
    here = record(device.type, recipe, torch.get_num_threads())
    return (
        ROUNDING
        if all(then.get(name) == here[name] for name in MACHINE)
        else ROUNDING + math.ceil(ELSEWHERE * samples)
    )


def contradictions(run: RunRecord, recipe: Recipe, tracking: Tracking) -> list[Difference]:
    """Where a record does not agree with itself; nothing is trained or measured for it."""
    return [
        *_params(run, recipe),
        *_files(run, tracking),
        *_weights(run, tracking),
        *_numbers(run, tracking),
        *_role(run, tracking),
        *_looks(run, tracking),
        *_teacher(run, tracking),
    ]


def lost(run: RunRecord, tracking: Tracking) -> list[str]:
    """The runs that a record names and that are not in the store any more, in words. Nothing else
    is lost with them.
    """
    named = {
        tag: run.tags[tag] for tag in ("mlflow.parentRunId", "kdexp.teacher_run") if tag in run.tags
    }
    return [
        f"{tag}: run {run_id} is not in this store"
        for tag, run_id in named.items()
        if not tracking.there(run_id)
    ]


def unsealed(run: RunRecord, tracking: Tracking) -> list[str]:
    """Files of a run whose SHA-256 is not on record."""
    return [place for place in tracking.places(run.run_id) if place not in sealed(run)]


def same_param(stored: str, text: str) -> bool:
    """Whether a param says this. A long one is shortened, by earlier versions without saying so."""
    return stored == text or (len(text) == len(stored) == LONGEST and stored[:SURE] == text[:SURE])


def _params(run: RunRecord, recipe: Recipe) -> Iterator[Difference]:
    for path, value in flatten(recipe).items():
        text = as_param(value)
        if not same_param(run.params.get(path, text), text):
            yield Difference(f"{path} (params, config.json)", run.params[path], text)


def _files(run: RunRecord, tracking: Tracking) -> Iterator[Difference]:
    with tempfile.TemporaryDirectory() as temporary:
        for place, recorded in sealed(run).items():
            try:
                found = sha256_of(tracking.download(run.run_id, place, Path(temporary)))
            except TrackingAway:
                raise
            except TrackingError:
                found = "not there"
            if found != recorded:
                yield Difference(f"file {place} ({ARTIFACTS})", recorded[:16], found[:16])


def _weights(run: RunRecord, tracking: Tracking) -> Iterator[Difference]:
    recorded = run.tags.get(WEIGHTS)
    if not recorded:
        return
    try:
        weights_of(run, tracking)
    except TrackingAway:
        raise
    except TrackingError:
        yield Difference("weights.safetensors (kdexp.weights_sha256)", recorded[:16], "not there")
    except RecordError as error:
        yield Difference(
            "weights.safetensors (kdexp.weights_sha256)",
            recorded[:16],
            str(error).partition("SHA-256 ")[2][:16],
        )


def _numbers(run: RunRecord, tracking: Tracking) -> Iterator[Difference]:
    """Metrics that follow from others."""
    metrics = run.metrics
    for name, accuracy in metrics.items():
        prefix, _, last = name.rpartition("/")
        if prefix == "epoch" or last not in ("val_accuracy", "test_accuracy"):
            continue
        samples = metrics.get(
            f"{name.removesuffix('accuracy')}samples",
            metrics.get(last.replace("accuracy", "samples")),
        )
        if samples is None:
            continue
        if not 0 <= accuracy <= 1 or samples < 1:
            yield Difference(f"{name} of {samples:g} images", repr(accuracy), "no share of them")
            continue
        correct = round(accuracy * samples)
        if not math.isclose(accuracy, correct / samples, rel_tol=1e-6):
            yield Difference(
                f"{name} of {int(samples):,} images",
                repr(accuracy),
                f"nearest {correct / samples!r}",
            )
        ends = zip(("low", "high"), wilson_interval(correct, int(samples)), strict=True)
        for end, value in ((f"{name}_{end}", value) for end, value in ends):
            if end in metrics and not math.isclose(metrics[end], value, rel_tol=1e-6, abs_tol=1e-9):
                yield Difference(f"{end} (of {name})", repr(metrics[end]), repr(value))
    histories = {name: tracking.history(run.run_id, name) for name in metrics}
    for name, points in histories.items():
        latest = [repr(value) for step, value in points if step == points[-1][0]]
        if repr(metrics[name]) not in latest:
            yield Difference(
                f"{name} (its history)", repr(metrics[name]), ", ".join(latest) or "no history"
            )
    seconds = [value for _, value in histories.get("epoch/seconds", [])]
    if "train_seconds" in metrics and not math.isclose(
        metrics["train_seconds"], sum(seconds), rel_tol=1e-9
    ):
        yield Difference(
            "train_seconds (sum of epoch/seconds)",
            repr(metrics["train_seconds"]),
            repr(sum(seconds)),
        )


def _role(run: RunRecord, tracking: Tracking) -> Iterator[Difference]:
    """What kind of run it is, and whose."""
    tags, kind = run.tags, run.tags.get("kdexp.kind", "—")
    for own, tag in (
        ("trial", "kdexp.trial"),
        ("confirmation", "kdexp.confirms"),
        ("reproduction", "kdexp.reproduces"),
    ):
        if (kind == own) != (tag in tags):
            yield Difference(
                f"kdexp.kind (and {tag})", kind, own if tag in tags else f"{tag} is missing"
            )
    if kind == "trial" and "trial" not in run.params:
        yield Difference("trial (params, kdexp.trial)", "—", tags.get("kdexp.trial", "—"))
    if kind in ("trial", "confirmation") and "kdexp.study" not in tags:
        yield Difference("kdexp.study", "—", _study_of(run, tracking) or "—")
    said = {
        ("kdexp.trial", "params trial"): run.params.get("trial"),
        ("kdexp.seed", "params training.seed"): run.params.get("training.seed"),
        ("kdexp.reproduces", "mlflow.parentRunId"): tags.get("mlflow.parentRunId"),
        ("kdexp.study", "run in mlflow.parentRunId"): _study_of(run, tracking),
    }
    for (tag, where), value in said.items():
        # é may be spelt in two ways
        if tag in tags and value is not None and study_name(tags[tag]) != study_name(value):
            yield Difference(f"{tag} ({where})", tags[tag], value)
    images = (
        "train and validation" if run.params.get("data.train_on_validation") == "true" else "train"
    )
    if tags.get("kdexp.trained_on", images) != images:
        yield Difference(
            "kdexp.trained_on (params data.train_on_validation)", tags["kdexp.trained_on"], images
        )


def _looks(run: RunRecord, tracking: Tracking) -> Iterator[Difference]:
    """Whether the test split was looked at: a number that is gone would allow a second look."""
    looked = any(name.rpartition("/")[2] == "test_accuracy" for name in run.metrics)
    told = "kdexp.test_looked_at" in run.tags
    if told != looked:
        yield Difference(
            "test_accuracy (kdexp.test_looked_at)",
            "a look" if told else "no look",
            "a number" if looked else "no number",
        )
    # alone it is a look that was broken off: nobody saw a number
    if looked and "test" not in tracking.inputs(run.run_id):
        yield Difference("test_accuracy (dataset input)", "no look", "a number")


def _teacher(run: RunRecord, tracking: Tracking) -> Iterator[Difference]:
    """The run of its teacher, which holds that teacher's weights."""
    where, weights = run.tags.get("kdexp.teacher_run"), run.tags.get("kdexp.teacher_sha256")
    if where is None or weights is None:
        if where != weights:
            yield Difference(
                "kdexp.teacher_run (kdexp.teacher_sha256)", where or "—", (weights or "—")[:16]
            )
        return
    if not tracking.there(where):
        return
    teacher = tracking.read(where)
    if (found := teacher.tags.get("kdexp.weights_sha256", "none")) != weights:
        yield Difference("kdexp.teacher_run (its weights)", weights[:16], found[:16])
    accuracy = teacher.metrics.get("val_accuracy")
    if accuracy is not None and run.metrics.get("teacher_val_accuracy", accuracy) != accuracy:
        yield Difference(
            "teacher_val_accuracy (kdexp.teacher_run)",
            repr(run.metrics["teacher_val_accuracy"]),
            repr(accuracy),
        )


def _study_of(run: RunRecord, tracking: Tracking) -> str | None:
    """The study that the run above this one is of; None where that cannot be known."""
    parent = run.tags.get("mlflow.parentRunId")
    if run.tags.get("kdexp.kind") == "reproduction" or (parent and not tracking.there(parent)):
        return None
    return tracking.read(parent).tags.get("kdexp.study", "none") if parent else "none"


def _false(run: RunRecord, what: str) -> RecordError:
    return RecordError(
        f"Run {run.run_id} is not as it was recorded: {what}. Nothing is done with it: put it back"
        f" from a copy of the store; kdexp reproduce {run.run_id} trains it anew and names all that"
        " differs"
    )
