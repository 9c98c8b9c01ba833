"""A run trained again from its own record, and compared: identical, or what differs.

Recipe, teacher weights and thread count come from the run; nothing from sweep files or today's defaults.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdexp import KdexpError
from kdexp.distill.execution import compiles
from kdexp.distill.packs import Execution
from kdexp.distill.train import EpochReport
from kdexp.environment import differing
from kdexp.records import recipe_of
from kdexp.runner import EPOCH_METRICS, Prepared, TeacherProgress, environment_of, facts, prepare, started
from kdexp.settings import Settings
from kdexp.tracking import RunRecord, Tracking, TrackingError

__all__ = ["Checked", "Comparison", "Difference", "reproduce"]

COMPARED = tuple(name for name in EPOCH_METRICS if name != "seconds")
TAGS = {
    "kdexp.train_sha256": "training data",
    "kdexp.validation_sha256": "validation data",
    "kdexp.teacher_sha256": "teacher weights",
    "kdexp.logits_sha256": "teacher's logits",
    "kdexp.weights_sha256": "student weights",
}
ROUNDED = ("teacher's logits", "student weights")  # on another machine these never agree to the bit


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in the two runs."""

    what: str
    original: str
    again: str
    by: float = math.inf
    """How far two numbers are apart."""


@dataclass(frozen=True)
class Checked:
    """Before any training: what here is not as it is recorded with the run."""

    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """A run beside its reproduction."""

    original: RunRecord
    again: RunRecord
    compared: int
    """How many metric values were compared."""
    differences: tuple[Difference, ...]
    environment: tuple[Difference, ...]

    @property
    def identical(self) -> bool:
        """Every metric of every epoch and the SHA-256 of the weights are equal."""
        return not self.differences

    @property
    def largest(self) -> float:
        """By how much two metric values differ at most."""
        return max((d.by for d in self.differences if d.what not in ROUNDED), default=0.0)

    def within(self, tolerance: float) -> bool:
        """Whether data and teacher are the same, and metrics differ by no more than that."""
        return self.largest <= tolerance


def reproduce(
    run_id: str, settings: Settings, tracking: Tracking, device: torch.device
) -> Generator[TeacherProgress | Checked | EpochReport, None, Comparison]:
    """Train a run again as a new run linked to it; yields progress, returns the comparison.

    Raises KdexpError where the run cannot be trained again.
    """
    original = tracking.read(run_id)
    _check(original, tracking)
    recipe = recipe_of(original, tracking)
    with tempfile.TemporaryDirectory() as temporary:
        recorded = json.loads(tracking.read_text(run_id, "environment.json"))
        if settings.threads is None:
            torch.set_num_threads(int(recorded["threads"]))  # another count sums in another order
        how, place = Execution.recorded(recorded)
        how = replace(how, compiled=how.compiled and compiles(str(device)))
        weights = _teacher_weights(original, tracking, Path(temporary))
        training = recipe.training if original.tags.get("kdexp.logits_per") == "epoch" else None
        prepared = yield from prepare(recipe, settings, tracking, original.experiment_id, device, weights, training)
    environment = environment_of(recipe, prepared, how, place)
    changed = tuple(Difference(name, *pair) for name, pair in differing(recorded, environment).items())
    yield Checked((*_facts_differ(original, prepared), *changed))
    epochs = int(original.metrics["epochs_trained"])
    with started(
        recipe,
        prepared,
        tracking,
        original.experiment_id,
        "reproduction",
        f"{original.name} · again",
        parent=run_id,
        tags={"kdexp.reproduces": run_id},
        how=how,
        place=place,
    ) as running:
        for report in running.epochs():
            yield report
            if report.epoch == epochs and epochs < report.epochs:
                running.state = "pruned"
                break
    comparison = _compare(original, tracking.read(running.run_id), tracking, changed)
    tracking.tag(running.run_id, {"kdexp.reproduction": "identical" if comparison.identical else "differs"})
    return comparison


def _check(run: RunRecord, tracking: Tracking) -> None:
    kind = run.tags.get("kdexp.kind")
    if kind == "study":
        trials = tracking.find("trial", {"mlflow.parentRunId": run.run_id})
        example = run.tags.get("kdexp.selected_run") or (trials[0].run_id if trials else "…")
        raise KdexpError(f"Run {run.run_id} is a whole study; reproduce one of its trials: kdexp reproduce {example}")
    if kind not in ("trial", "confirmation", "train", "reproduction"):
        raise KdexpError(
            f"Run {run.run_id} is {f'a {kind}' if kind else 'not of kdexp'}; only trained students can be reproduced."
        )
    if run.status != "FINISHED":
        raise KdexpError(
            f"Run {run.run_id} did not finish (status {run.status}, {run.tags.get('kdexp.state', 'no state recorded')}); "
            f"there is no result to compare with. Choose a finished run."
        )


def _teacher_weights(run: RunRecord, tracking: Tracking, folder: Path) -> Path | None:
    """The teacher's weights out of its own run; None lets the recipe say how to get them again."""
    try:
        return tracking.download(run.tags["kdexp.teacher_run"], "weights.safetensors", folder)
    except (KeyError, TrackingError):
        return None


def _facts_differ(run: RunRecord, prepared: Prepared) -> list[Difference]:
    """Data and teacher, against the run's own record."""
    here = facts(prepared)
    return [
        Difference(what, run.tags[tag][:16], here[tag][:16])
        for tag, what in TAGS.items()
        if tag in here and run.tags.get(tag, here[tag]) != here[tag]
    ]


def _compare(original: RunRecord, again: RunRecord, tracking: Tracking, environment: tuple[Difference, ...]) -> Comparison:
    differences = [
        Difference(what, original.tags.get(tag, "—")[:16], again.tags.get(tag, "—")[:16])
        for tag, what in TAGS.items()
        if tag in original.tags and original.tags[tag] != again.tags.get(tag)
    ]
    compared = 0
    for name in COMPARED:
        before = dict(tracking.history(original.run_id, f"epoch/{name}"))
        after = dict(tracking.history(again.run_id, f"epoch/{name}"))
        for epoch in sorted(before.keys() | after.keys()):
            compared += 1
            one, other = before.get(epoch, math.inf), after.get(epoch, -math.inf)
            if repr(one) != repr(other):  # repr: also NaN equals itself
                apart = abs(one - other)
                by = math.inf if math.isnan(apart) else apart
                differences.append(Difference(f"{name}, epoch {epoch}", repr(one), repr(other), by))
    if compared == 0:
        raise KdexpError(f"Run {original.run_id} holds no per-epoch metrics; there is nothing to compare with.")
    return Comparison(
        original=original,
        again=again,
        compared=compared,
        differences=tuple(differences),
        environment=environment,
    )
