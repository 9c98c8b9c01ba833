"""The fresh seeds of a trial: each found where a former command has trained it, or trained now.

A seed follows from the study's and the trial's number. Commands that run at the same time share the
work: a claim on each seed says who is at it, on whatever machine. One that was interrupted goes on
from its last checkpoint, in the run that it had.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdexp import KdexpError
from kdexp.config import Recipe, Sweep, Training
from kdexp.distill.checkpoints import Checkpoint, Checkpoints
from kdexp.distill.datasets import Splits, load_splits
from kdexp.distill.randomness import seed_of
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import TeacherProgress, prepare
from kdexp.runs.recording import Entry, Form, facts, goes_on_here, recorded
from kdexp.runs.records import FOLDS, REPEAT, REPEATS, recipe_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.search.claims import Claimant
from kdexp.search.scheduler import EpochDone
from kdexp.search.space import fresh_values
from kdexp.select.mistakes import keep_mistakes
from kdexp.select.variants import same_images
from kdexp.select.verify import verify, verify_record
from kdexp.selection import AS_TRAINED, Candidate
from kdexp.settings import Settings
from kdexp.workers.work import Prepared

__all__ = [
    "TRAIN_AND_VALIDATION",
    "TRAIN_ONLY",
    "Elsewhere",
    "Retrainer",
    "Retraining",
    "SeedDone",
    "SeedEvent",
]

TRAIN_ONLY, TRAIN_AND_VALIDATION = "train", "train and validation"


@dataclass(frozen=True)
class Retraining:
    """A candidate's turn to be trained with so many fresh seeds, on these images."""

    candidate: Candidate
    seeds: int
    images: str


@dataclass(frozen=True)
class SeedDone:
    """A fresh seed (from 1) is trained; not `new` where a former command had done it."""

    number: int
    run: RunRecord
    new: bool


@dataclass(frozen=True)
class Elsewhere:
    """Another command trains this seed: it is waited for."""

    number: int


SeedEvent = TeacherProgress | EpochDone | Retraining | SeedDone | Elsewhere


@dataclass(frozen=True)
class _Seed:
    """One fresh seed of a candidate on these images."""

    number: int
    candidate: Candidate
    recipe: Recipe
    images: str

    @property
    def name(self) -> str:
        """Of its checkpoint and its claim."""
        return (
            f"{self.candidate.run_id}-{self.recipe.training.seed}-{self.images.replace(' ', '-')}"
        )

    def tags(self, study: RunRecord) -> dict[str, str]:
        """What finds its run."""
        return {
            "mlflow.parentRunId": study.run_id,
            "kdexp.confirms": self.candidate.run_id,
            "kdexp.seed": str(self.recipe.training.seed),
            "kdexp.trained_on": self.images,
        }

    def repeat(self, study: RunRecord) -> dict[str, str]:
        """What finds the trial that trained just this, where the study repeats."""
        return {
            "mlflow.parentRunId": study.run_id,
            REPEATS: str(self.candidate.trial),
            REPEAT: str(self.number),
        }


@dataclass(frozen=True)
class Retrainer:
    """What all trainings of one command share."""

    study: RunRecord
    sweep: Sweep
    settings: Settings
    tracking: Tracking
    device: torch.device
    claimant: Claimant
    ready: dict[tuple[str, Training | None, int], Prepared] = field(default_factory=dict)
    """Data and teacher, the last that were needed: by the images, and by the draws and the fold
    that the teacher's cache is for.
    """

    images: dict[str, Splits] = field(default_factory=dict)
    """Those that runs were checked on, by their data's recipe."""

    @property
    def bench(self) -> Bench:
        """What its trainings work with."""
        return Bench(self.settings, self.tracking, self.device, self.study.experiment_id)

    @property
    def folder(self) -> Path:
        """Where checkpoints are."""
        return self.settings.stores / "checkpoints" / f"confirm-{self.study.run_id}"

    def train(
        self, candidate: Candidate, seeds: int, images: str
    ) -> Generator[SeedEvent, None, list[RunRecord]]:
        """The runs of a candidate's first fresh seeds, those that are missing trained one after
        another.
        """
        yield Retraining(candidate, seeds, images)
        trial = self.tracking.read(candidate.run_id)
        recipe = _on(images, recipe_of(trial, self.tracking))
        every = [self._seed(number + 1, candidate, recipe, images) for number in range(seeds)]
        runs: dict[int, RunRecord] = {}
        for patient in (False, True):  # first what no other command is at
            for seed in (seed for seed in every if seed.number not in runs):
                if patient:
                    yield Elsewhere(seed.number)
                with self.claimant.lock(f"seed {seed.name}", patient) as ours:
                    if ours:
                        runs[seed.number] = yield from self._find_or_train(seed, trial)
        return [runs[seed.number] for seed in every]

    def check(self, run: RunRecord) -> None:
        """That a run which a verdict is to rest on is as it was recorded. Raises RecordError."""
        recipe = recipe_of(run, self.tracking)
        verify(run, recipe, AS_TRAINED, self._images(run, recipe), self.tracking, self.device)

    def keep_mistakes(self, run: RunRecord) -> None:
        """Count what its student gets wrong, for the study's page."""
        recipe = recipe_of(run, self.tracking)
        images = self._images(run, recipe)
        keep_mistakes(run, recipe, AS_TRAINED, images, self.tracking, self.device)

    def check_trial(self, run: RunRecord) -> None:
        """That a trial is of this recipe and size; its accuracy is what fresh seeds are asked for.
        Raises RecordError.
        """
        recipe = recipe_of(run, self.tracking)
        verify_record(run, recipe, AS_TRAINED, self._images(run, recipe), self.tracking)

    def _images(self, run: RunRecord, recipe: Recipe) -> Splits:
        """Those of a run, which are read once for all that share them. Raises KdexpError where they
        are others here.
        """
        key = recipe.data.model_dump_json()
        if key not in self.images:
            self.images[key] = load_splits(recipe.data, self.settings.data_dir)
        same_images(run, recipe, self.images[key])
        return self.images[key]

    def _seed(self, number: int, candidate: Candidate, recipe: Recipe, images: str) -> _Seed:
        if self.sweep.repeats:
            fresh = fresh_values(self.sweep, number, int(self.study.tags[FOLDS]))
            if images != TRAIN_ONLY:  # nothing is held out
                del fresh["data.fold"]
        else:
            seed = seed_of(self.sweep.study.seed, "confirmation", candidate.trial, number)
            fresh = {"training.seed": seed}
        return _Seed(number, candidate, recipe.replace(fresh), images)

    def _find_or_train(
        self, seed: _Seed, trial: RunRecord
    ) -> Generator[SeedEvent, None, RunRecord]:
        known = self.tracking.find("confirmation", seed.tags(self.study), self.study.experiment_id)
        run = next(
            (run for run in [*self._repeats(seed), *known] if run.status == "FINISHED"), None
        )
        if run is None:
            prepared = yield from self._prepared(seed, trial)
            run_id = yield from self._train(seed, prepared, known)
            yield SeedDone(seed.number, run := self.tracking.read(run_id), new=True)
        else:
            self.check(run)
            yield SeedDone(seed.number, run, new=False)
        return run

    def _repeats(self, seed: _Seed) -> list[RunRecord]:
        """The study's own training of this seed, if it went to its end."""
        if not self.sweep.repeats or seed.images != TRAIN_ONLY:
            return []
        runs = self.tracking.find("trial", seed.repeat(self.study), self.study.experiment_id)
        return [run for run in runs if run.tags.get("kdexp.state") in ("complete", "diverged")]

    def _prepared(
        self, seed: _Seed, trial: RunRecord
    ) -> Generator[TeacherProgress, None, Prepared]:
        """Data and teacher, which must be the trial's."""
        # erased anew by each seed
        training = seed.recipe.training if seed.recipe.training.random_erasing else None
        fold, shared = seed.recipe.data.fold, self.sweep.teacher.shared
        one_for_all = shared and training is None
        key = seed.images, training, 0 if one_for_all else fold
        if key not in self.ready:
            self.ready.clear()
            own = {} if one_for_all else {"data.fold": fold}
            recipe = _on(seed.images, self.sweep.recipe).replace(own)
            whole = self.sweep.repeats and one_for_all and seed.images == TRAIN_ONLY
            self.ready[key] = yield from prepare(recipe, self.bench, training=training, whole=whole)
        ready = self.ready[key].on(fold)
        here, same = facts(ready), trial.params.get("data.fold", "0") == str(fold)
        for tag, what in (
            *([("kdexp.teacher_sha256", "teacher")] if same or shared else []),
            *([("kdexp.validation_sha256", "validation data")] if same else []),
        ):
            if (then := trial.tags.get(tag, here[tag])) != here[tag]:
                raise KdexpError(
                    f"Study '{self.sweep.name}' was run with another {what} (SHA-256 {then[:12]}…,"
                    f" here {here[tag][:12]}…): put the former {what} back, fresh seeds would not"
                    " compare with its trials."
                )
        return ready

    def _train(
        self, seed: _Seed, prepared: Prepared, known: Sequence[RunRecord]
    ) -> Generator[EpochDone, None, str]:
        checkpoints = Checkpoints(self.folder)
        begun = _going_on(checkpoints.load(seed.name), seed.recipe, prepared)
        begun = begun if begun and self.tracking.there(begun.run_id) else None
        for run in known:  # we hold the lock: a run still marked RUNNING was left by a dead process
            if run.status == "RUNNING" and not (begun and run.run_id == begun.run_id):
                self.tracking.finish(run.run_id, "KILLED")
        form = Form.of(begun.environment) if begun else None
        images = "" if seed.images == TRAIN_ONLY else f" · {seed.images}"
        name = f"trial {seed.candidate.trial} · fresh seed {seed.number}{images}"
        tags = {**seed.tags(self.study), "kdexp.study": self.sweep.name}
        entry = Entry("confirmation", name, self.study.run_id, tags)
        with recorded(seed.recipe, prepared, self.bench, entry, form, begun) as recording:
            for report in recording.epochs(checkpoints, seed.name, resumed=begun is not None):
                yield EpochDone(seed.number, report)
        checkpoints.remove(seed.name)
        return recording.run_id


def _on(images: str, recipe: Recipe) -> Recipe:
    """The recipe on these images; without images held out there is no best epoch, so the last one
    is kept.
    """
    if images == TRAIN_ONLY:
        return recipe
    return recipe.replace({"data.train_on_validation": True, "training.keep": "last"})


def _going_on(found: Checkpoint | None, recipe: Recipe, prepared: Prepared) -> Checkpoint | None:
    """The checkpoint, if a training goes on from it here in the same bits."""
    same = (
        found
        and found.environment["threads"] == str(torch.get_num_threads())
        and goes_on_here(found, recipe, prepared)
    )
    return found if same else None
