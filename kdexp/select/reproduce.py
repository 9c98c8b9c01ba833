"""A run trained again from its own record, and all that the record says compared: identical, or
what differs.

Recipe, teacher weights and thread count come from the run; nothing from sweep files or today's
defaults. Before any training the record is held against itself (verify.py); after it, against the
record of the new run (compare.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kdexp import KdexpError
from kdexp.config import Precision, Recipe, Variant
from kdexp.distill.datasets import load_test
from kdexp.distill.execution import compiles
from kdexp.distill.models import weights_hash
from kdexp.distill.train import EpochReport
from kdexp.environment import differing
from kdexp.files import sha256_of
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import TeacherProgress, prepare
from kdexp.runs.recording import (
    ALL_IMAGES,
    LOGITS_OF,
    Entry,
    Form,
    environment_of,
    facts,
    profile_of,
    recorded,
)
from kdexp.runs.records import RecordError, environment_of_run, recipe_of, weights_of
from kdexp.runs.tracking import RunRecord, Tracking, TrackingAway, TrackingError, dataset
from kdexp.select.compare import HASHES, Comparison, compare, covered, described, said_by
from kdexp.select.promote import on_test
from kdexp.select.students import check_no_study
from kdexp.select.variants import load_variant, prefix_of, stored
from kdexp.select.verify import Difference, contradictions, lost, unsealed
from kdexp.selection import AS_TRAINED
from kdexp.settings import Settings
from kdexp.workers.work import Prepared

__all__ = ["Checked", "Comparison", "Difference", "reproduce"]


@dataclass(frozen=True)
class Checked:
    """Before any training: what here is not as it is recorded with the run."""

    differences: tuple[Difference, ...]


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
        then = _environment(original, tracking)
        form = Form.of(then)
        if settings.threads is None:
            torch.set_num_threads(form.threads)  # another count sums in another order
        compiled = form.execution.compiled and compiles(str(device))
        execution = replace(form.execution, compiled=compiled)
        form = Form(execution, form.slot, torch.get_num_threads())
        weights = _teacher_weights(original, tracking, Path(temporary))
        training = recipe.training if original.tags.get("kdexp.logits_per") == "epoch" else None
        whole = original.tags.get(LOGITS_OF) == ALL_IMAGES
        bench = Bench(settings, tracking, device, original.experiment_id)
        prepared = yield from prepare(recipe, bench, weights, training, whole=whole)
    environment = environment_of(recipe, prepared, form)
    changed = tuple(Difference(name, *pair) for name, pair in differing(then, environment).items())
    yield Checked(
        (*contradictions(original, recipe, tracking), *_facts_differ(original, prepared), *changed)
    )
    epochs = _epochs(original, tracking)
    entry = Entry("reproduction", f"{original.name} · again", run_id, {"kdexp.reproduces": run_id})
    with recorded(recipe, prepared, bench, entry, form) as recording:
        yield from recording.epochs(last=epochs)
    comparison = compared(run_id, recording.run_id, prepared, settings, tracking, device)
    tracking.tag(
        recording.run_id, {"kdexp.reproduction": "identical" if comparison.identical else "differs"}
    )
    return comparison


def compared(
    run_id: str,
    again_id: str,
    prepared: Prepared,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
) -> Comparison:
    """All that a run's record says: against itself, the record of its reproduction, and what is
    measured now.
    """
    original, again = tracking.read(run_id), tracking.read(again_id)
    recipe = recipe_of(original, tracking)
    pair = _Pair(original, again, recipe, prepared, settings, tracking, device)
    then, here = _environment(original, tracking), _environment(again, tracking)
    return pair.compared(contradictions(original, recipe, tracking), then, here)


def _check(run: RunRecord, tracking: Tracking) -> None:
    kind = run.tags.get("kdexp.kind")
    check_no_study(run, "reproduce", tracking)
    if kind not in ("trial", "confirmation", "train", "reproduction"):
        raise KdexpError(
            f"Run {run.run_id} is {f'a {kind}' if kind else 'not of kdexp'}; only trained students"
            " can be reproduced."
        )
    if run.status != "FINISHED":
        raise KdexpError(
            f"Run {run.run_id} did not finish (status {run.status},"
            f" {run.tags.get('kdexp.state', 'no state recorded')}); there is no result to compare"
            " with. Choose a finished run."
        )


def _environment(run: RunRecord, tracking: Tracking) -> dict[str, str]:
    """What the run recorded of how and where it was trained. Raises RecordError where that makes no
    sense.
    """
    recorded = environment_of_run(run, tracking)
    try:
        Form.of(recorded)
    except (ValueError, KeyError, StopIteration) as error:
        raise RecordError(
            f"Run {run.run_id}: environment.json does not say how the run was trained"
            f" ({type(error).__name__}: {error}); put it back from a copy of the store"
        ) from None
    return recorded


def _epochs(run: RunRecord, tracking: Tracking) -> int:
    """After how many epochs the run ended."""
    curves = [
        tracking.history(run.run_id, name) for name in run.metrics if name.startswith("epoch/")
    ]
    recorded = {step for curve in curves for step, _ in curve}
    if not recorded:
        raise KdexpError(
            f"Run {run.run_id} holds no per-epoch metrics; there is nothing to compare with."
        )
    return max(recorded)


def _teacher_weights(run: RunRecord, tracking: Tracking, folder: Path) -> Path | None:
    """The teacher's weights out of its own run; None lets the recipe say how to get them again."""
    try:
        teacher = tracking.read(run.tags["kdexp.teacher_run"])
        file = tracking.download(teacher.run_id, "weights.safetensors", folder)
    except TrackingAway:
        raise
    except (KeyError, TrackingError):
        return None
    weights_of(teacher, tracking)
    return file


def _facts_differ(run: RunRecord, prepared: Prepared) -> list[Difference]:
    """Data and teacher, against the run's own record."""
    here = facts(prepared)
    return [
        Difference(what, run.tags[tag][:16], here[tag][:16])
        for tag, what in HASHES.items()
        if tag in here and run.tags.get(tag, here[tag]) != here[tag]
    ]


@dataclass(frozen=True)
class _Pair:
    """A run, its reproduction, and what both were made of."""

    original: RunRecord
    again: RunRecord
    recipe: Recipe
    prepared: Prepared
    settings: Settings
    tracking: Tracking
    device: torch.device

    def compared(
        self, before: Sequence[Difference], then: Mapping[str, str], here: Mapping[str, str]
    ) -> Comparison:
        """All that the original says against what there is again; `then` and `here` is what code
        and machine were.
        """
        by_this_code, changed = then.get("source") == here["source"], differing(then, here)
        unsaid = [name for name in here if name not in then]
        one, other = self._said(self.original), self._said(self.again)
        other |= described(self._inputs())
        measured, notes = self._measured(one["weights.safetensors"] == other["weights.safetensors"])
        differences, unrecorded, unknown, more = compare(
            one, other | measured, self._samples, bool(changed), by_this_code
        )
        loose = unsealed(self.original, self.tracking)
        return Comparison(
            original=self.original,
            again=self.again,
            compared=sum(
                isinstance(value, float) and ", epoch " in name for name, value in one.items()
            ),
            differences=(
                *before,
                *differences,
                *(Difference(name, "—", here[name]) for name in unsaid if by_this_code),
            ),
            environment=tuple(Difference(name, *pair) for name, pair in changed.items()),
            covered=tuple(covered(one, other | measured)),
            unrecorded=(
                *unrecorded,
                *([] if by_this_code else unsaid),
                *([f"SHA-256 of {', '.join(loose)}"] if loose else []),
            ),
            unknown=tuple(name for name in unknown if not (notes and _after_training(name))),
            notes=(*notes, *more, *lost(self.original, self.tracking)),
        )

    @property
    def _samples(self) -> dict[str, int]:
        return {"val": len(self.prepared.splits.validation), "test": _test_samples(self.original)}

    def _said(self, run: RunRecord) -> dict[str, str | float]:
        history = {
            name: self.tracking.history(run.run_id, name)
            for name in run.metrics
            if name.startswith("epoch/")
        }
        said = said_by(run, history, self.tracking.inputs(run.run_id))
        return said | {
            name: _known_by(run, name, self.tracking)
            for name in ("model_summary.txt", "weights.safetensors")
        }

    def _inputs(self) -> dict[str, dict[str, str]]:
        """The data sets as they are here: what MLflow holds of them both runs share."""
        splits, name = self.prepared.splits, self.recipe.data.dataset
        roles = {"training": splits.train, "validation": splits.validation}
        return {
            role: dataset(name, role, split.fingerprint, profile_of(split))
            for role, split in roles.items()
        }

    def _measured(self, same_weights: bool) -> tuple[dict[str, str | float], list[str]]:
        """What was measured of the original after its training, measured again; and what cannot
        be.
        """
        looked = [
            v
            for v in (AS_TRAINED, *get_args(Precision))
            if f"{prefix_of(v)}test_accuracy" in self.original.metrics
        ]
        made = [
            p for p in get_args(Precision) if f"{prefix_of(p)}model_bytes" in self.original.metrics
        ]
        if not (looked or made):
            return {}, []
        if not same_weights:
            return {}, [
                f"{_named(looked, made)} not measured again: the weights are not the same, it would"
                " be a new look"
            ]
        found: dict[str, str | float] = {}
        try:
            if looked:
                test = load_test(self.recipe.data, self.settings.data_dir, self.device)
                found |= described(
                    {
                        "test": dataset(
                            self.recipe.data.dataset,
                            "test",
                            test.fingerprint,
                            {"samples": len(test)},
                        )
                    }
                )
            for variant in dict.fromkeys((*looked, *made)):
                module = load_variant(
                    self.original,
                    self.recipe,
                    variant,
                    self.prepared.splits.validation,
                    self.tracking,
                )
                if variant in made:
                    found |= stored(
                        self.original, self.recipe, variant, self.prepared.splits, self.tracking
                    )
                if variant in looked:
                    found |= on_test(module.to(self.device), self.recipe, test, variant)
        except KdexpError as error:  # no images, no libraries, or a file that is named before
            return found, [f"{_named(looked, made)} not measured again: {error}"]
        return found, []


def _known_by(run: RunRecord, name: str, tracking: Tracking) -> str:
    """What the content of a file is known by."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            file = tracking.download(run.run_id, name, Path(temporary))
            return (
                weights_hash(load_file(file)) if file.suffix == ".safetensors" else sha256_of(file)
            )
        except TrackingAway:
            raise
        except TrackingError:
            return "not there"
        except (SafetensorError, OSError):
            return "unreadable"


def _named(looked: Sequence[Variant], made: Sequence[Variant]) -> str:
    variants = [str(variant) for variant in made]
    return " and ".join(
        [
            *(["test accuracy"] if looked else []),
            *([f"variants {', '.join(variants)}"] if variants else []),
        ]
    )


def _after_training(name: str) -> bool:
    """Whether something was measured of a model that was trained already."""
    return name.startswith("test") or name.partition("/")[0] in get_args(Precision)


def _test_samples(run: RunRecord) -> int:
    return next(
        (
            int(value)
            for name, value in run.metrics.items()
            if name.rpartition("/")[2] == "test_samples"
        ),
        0,
    )
