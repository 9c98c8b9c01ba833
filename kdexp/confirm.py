"""Is the selected model over the bar, or was it the luckiest of many? Its recipe trained again with fresh seeds.

    kdexp confirm STUDY

The best of many noisy trials overstates itself; seeds that took part in no choice do not. The first recipe, in the
rule's order, whose fresh seeds meet the bar is confirmed; it alone is looked at on test, each of its models once.
Every seed follows from the study's and the trial: the same command finds what is trained and trains what is not.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from kdexp import KdexpError
from kdexp.config import Recipe, Selection, Sweep
from kdexp.distill.checkpoints import Checkpoint, Checkpoints
from kdexp.distill.packs import Execution
from kdexp.distill.randomness import seed_of
from kdexp.promote import candidates, look_at_test, looks, one_at_a_time, register, sweep_of, tell
from kdexp.records import recipe_of
from kdexp.runner import Prepared, TeacherProgress, facts, goes_on_here, prepare, started
from kdexp.selection import Candidate, FreshSeeds, NothingPasses, confirms, requirement, select
from kdexp.settings import Settings
from kdexp.tracking import RunRecord, Tracking
from kdexp.trials import EpochDone

__all__ = ["Confirmation", "Elsewhere", "Retraining", "SeedDone", "Verdict", "confirm"]

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


@dataclass(frozen=True)
class Verdict:
    """What fresh seeds say of a candidate."""

    candidate: Candidate
    seeds: FreshSeeds
    rule: Selection

    @property
    def confirmed(self) -> bool:
        """Whether they confirm it."""
        return confirms(self.seeds, self.rule)

    def __str__(self) -> str:
        low = f", lower end {100 * self.seeds.held_against(self.rule):.2f} %" if self.rule.confidence else ""
        return f"{self.seeds}{low}"


@dataclass(frozen=True)
class Confirmation:
    """The confirmed recipe, and the one look at test of each of its models."""

    verdict: Verdict
    tried: tuple[Verdict, ...]
    """Those before it that were not confirmed."""
    runs: tuple[RunRecord, ...]
    """Of the models that were looked at, the registered one first."""
    images: str
    test: FreshSeeds
    tta: FreshSeeds | None
    """The same with flip test-time augmentation; None where the recipe does not flip."""
    looks: int
    """How many of the study's trials have been looked at on test, here and before."""
    model: str
    """Where MLflow loads the first of the models from; empty where the network cannot be exported."""


Event = TeacherProgress | EpochDone | Retraining | SeedDone | Elsewhere | Verdict


def confirm(
    study: RunRecord,
    rule: Selection,
    seeds: int,
    train_and_validation: bool,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
) -> Generator[Event, None, Confirmation]:
    """Find the first trial, in the order of `rule`, that fresh seeds confirm, and look at it on test.

    With `train_and_validation` its models are trained once more, with the same seeds, on all images but test's, and
    these are looked at. Close the generator to stop cleanly. Raises NothingPasses where no trial is confirmed.
    """
    work = _Work(study, sweep_of(study, tracking), settings, tracking, device)
    left, tried = candidates(study, tracking), list[Verdict]()
    while True:
        chosen = _next(left, rule, tried, work.sweep.name)
        runs = yield from work.train(chosen, seeds, TRAIN_ONLY)
        verdict = Verdict(chosen, _measured(runs, "val_accuracy", "val_samples"), rule)
        said = "yes" if verdict.confirmed else "no"
        tracking.tag(chosen.run_id, {"kdexp.confirmed": f"{said}: {verdict}, required {requirement(rule)}"})
        yield verdict
        if verdict.confirmed:
            break
        tried.append(verdict)
        left.remove(chosen)
    images = TRAIN_AND_VALIDATION if train_and_validation else TRAIN_ONLY
    if train_and_validation:
        runs = yield from work.train(chosen, seeds, images)
    done = _look(verdict, tried, runs, images, work)
    _report(done, work)
    return done


def _next(left: Sequence[Candidate], rule: Selection, tried: Sequence[Verdict], study: str) -> Candidate:
    """The next candidate in the rule's order. Raises NothingPasses."""
    try:
        return select(left, rule, study)
    except NothingPasses:
        if not tried:
            raise
    nearest = max(tried, key=lambda verdict: verdict.seeds.held_against(rule))
    raise NothingPasses(
        f"No student of study '{study}' is confirmed: {len(tried)} passed as trained in it, none with fresh seeds "
        f"({requirement(rule)}). Nearest: {nearest} (trial {nearest.candidate.trial}, {nearest.candidate.parameters:,} "
        f"parameters). Lower the bar (--bar), train longer (training.epochs), or add larger students to 'search'."
    )


def _measured(runs: Sequence[RunRecord], accuracy: str, samples: str) -> FreshSeeds:
    count = int(runs[0].metrics[samples])
    return FreshSeeds(tuple(round(run.metrics[accuracy] * count) for run in runs), count)


# --- training ---


@dataclass(frozen=True)
class _Seed:
    """One fresh seed of a candidate on these images."""

    number: int
    candidate: Candidate
    recipe: Recipe
    images: str

    @property
    def name(self) -> str:
        """Of its checkpoint and its lock."""
        return f"{self.candidate.run_id}-{self.recipe.training.seed}-{self.images.replace(' ', '-')}"

    def tags(self, study: RunRecord) -> dict[str, str]:
        """What finds its run."""
        return {
            "mlflow.parentRunId": study.run_id,
            "kdexp.confirms": self.candidate.run_id,
            "kdexp.seed": str(self.recipe.training.seed),
            "kdexp.trained_on": self.images,
        }


@dataclass(frozen=True)
class _Work:
    """What all trainings of one command share."""

    study: RunRecord
    sweep: Sweep
    settings: Settings
    tracking: Tracking
    device: torch.device
    ready: dict[str, Prepared] = field(default_factory=dict)
    """Data and teacher, by the images to train on."""

    @property
    def folder(self) -> Path:
        """Where checkpoints and locks are."""
        return self.settings.stores / "checkpoints" / f"confirm-{self.study.run_id}"

    def train(self, candidate: Candidate, seeds: int, images: str) -> Generator[Event, None, list[RunRecord]]:
        """The runs of a candidate's first fresh seeds, those that are missing trained one after another."""
        yield Retraining(candidate, seeds, images)
        trial = self.tracking.read(candidate.run_id)
        recipe = _on(images, recipe_of(trial, self.tracking))
        every = [self._seed(number + 1, candidate, recipe, images) for number in range(seeds)]
        runs: dict[int, RunRecord] = {}
        for patient in (False, True):  # first what no other command is at
            for seed in (seed for seed in every if seed.number not in runs):
                if patient:
                    yield Elsewhere(seed.number)
                with _turn(self.folder / f"{seed.name}.lock", patient) as ours:
                    if ours:
                        runs[seed.number] = yield from self._find_or_train(seed, trial)
        return [runs[seed.number] for seed in every]

    def _seed(self, number: int, candidate: Candidate, recipe: Recipe, images: str) -> _Seed:
        value = seed_of(self.sweep.study.seed, "confirmation", candidate.trial, number)
        return _Seed(number, candidate, recipe.replace({"training.seed": value}), images)

    def _find_or_train(self, seed: _Seed, trial: RunRecord) -> Generator[Event, None, RunRecord]:
        known = self.tracking.find("confirmation", seed.tags(self.study))
        run = next((run for run in known if run.status == "FINISHED"), None)
        if run is None:
            prepared = yield from self._prepared(seed, trial)
            run_id = yield from self._train(seed, prepared, known)
            yield SeedDone(seed.number, run := self.tracking.read(run_id), new=True)
        else:
            yield SeedDone(seed.number, run, new=False)
        return run

    def _prepared(self, seed: _Seed, trial: RunRecord) -> Generator[TeacherProgress, None, Prepared]:
        """Data and teacher, which must be the trial's."""
        if seed.images not in self.ready:
            recipe = _on(seed.images, self.sweep.recipe)
            prepare_it = prepare(recipe, self.settings, self.tracking, self.study.experiment_id, self.device)
            self.ready[seed.images] = yield from prepare_it
        here = facts(self.ready[seed.images])
        for tag, what in (("kdexp.teacher_sha256", "teacher"), ("kdexp.validation_sha256", "validation data")):
            if (then := trial.tags.get(tag, here[tag])) != here[tag]:
                raise KdexpError(
                    f"Study '{self.sweep.name}' was run with another {what} (SHA-256 {then[:12]}…, here "
                    f"{here[tag][:12]}…): put the former {what} back, fresh seeds would not compare with its trials."
                )
        return self.ready[seed.images]

    def _train(self, seed: _Seed, prepared: Prepared, known: Sequence[RunRecord]) -> Generator[EpochDone, None, str]:
        checkpoints = Checkpoints(self.folder)
        begun = _going_on(checkpoints.load(seed.name), seed.recipe, prepared)
        for run in known:  # ours is the lock: whoever trained there is gone
            if run.status == "RUNNING" and not (begun and run.run_id == begun.run_id):
                self.tracking.finish(run.run_id, "KILLED")
        how, place = Execution.recorded(begun.environment) if begun else (None, 0)
        images = "" if seed.images == TRAIN_ONLY else f" · {seed.images}"
        with started(
            seed.recipe,
            prepared,
            self.tracking,
            self.study.experiment_id,
            "confirmation",
            f"trial {seed.candidate.trial} · fresh seed {seed.number}{images}",
            parent=self.study.run_id,
            tags=seed.tags(self.study) | {"kdexp.study": self.sweep.name},
            how=how,
            place=place,
            keep=partial(checkpoints.save, seed.name),
            resumed=begun,
        ) as running:
            for report in running.epochs():
                yield EpochDone(seed.number, report.numbers)
        checkpoints.remove(seed.name)
        return running.run_id


def _on(images: str, recipe: Recipe) -> Recipe:
    """The recipe on these images; without images held out there is no best epoch, so the last one is kept."""
    if images == TRAIN_ONLY:
        return recipe
    return recipe.replace({"data.train_on_validation": True, "training.keep": "last"})


def _going_on(found: Checkpoint | None, recipe: Recipe, prepared: Prepared) -> Checkpoint | None:
    """The checkpoint, if a training goes on from it here in the same bits."""
    same = found and found.environment["threads"] == str(torch.get_num_threads()) and goes_on_here(found, recipe, prepared)
    return found if same else None


@contextmanager
def _turn(lock: Path, patient: bool) -> Iterator[bool]:
    """Whether what the lock stands for is ours in here; patiently, it will be."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = FileLock(lock)
    try:
        file.acquire(blocking=patient)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file.release()


# --- test, once ---


def _look(verdict: Verdict, tried: Sequence[Verdict], runs: Sequence[RunRecord], images: str, work: _Work) -> Confirmation:
    """Look at the confirmed recipe's models on test, where that has not been done, and register the first."""
    tracking, name, trial = work.tracking, work.sweep.name, verdict.candidate.trial
    recipe = recipe_of(runs[0], tracking)
    with one_at_a_time(work.settings):
        for number, run in enumerate(runs, start=1):
            if "test_accuracy" not in (known := tracking.read(run.run_id)).metrics:
                why = f"**Confirms** trial {trial} of study *{name}*: fresh seed {number} of {len(runs)}."
                look_at_test(known, recipe, why, work.settings, tracking, work.device)
        found = tuple(tracking.read(run.run_id) for run in runs)
        test = _measured(found, "test_accuracy", "test_samples")
        text = f"Fresh seed 1 of trial {trial}: validation accuracy {verdict.seeds}; test accuracy {test}"
        model = register(found[0], recipe, name, "confirmed", text, work.settings, tracking)
    tta = _measured(found, "test_accuracy_tta", "test_samples") if recipe.data.augment.flip else None
    return Confirmation(verdict, tuple(tried), found, images, test, tta, looks(work.study, tracking), model)


def _report(done: Confirmation, work: _Work) -> None:
    """Tags, metrics and description of the study's run."""
    chosen, tracking, study = done.verdict.candidate, work.tracking, work.study
    failed = "; ".join(f"trial {v.candidate.trial} ({v.candidate.parameters:,} parameters): {v}" for v in done.tried)
    text = (
        f"**Confirmed: trial {chosen.trial}**, run `{chosen.run_id}`: {chosen.parameters:,} parameters, validation accuracy "
        f"**{done.verdict}** (required: {requirement(done.verdict.rule)}), test accuracy **{done.test}**"
        + (f", with flip test-time augmentation {done.tta}" if done.tta else "")
        + f", trained on {done.images}. "
        + (f'The first of them: `mlflow.pytorch.load_model("{done.model}")`. ' if done.model else "")
        + f"Train it again: `kdexp reproduce {done.runs[0].run_id}`."
        + (f"\n\nNot confirmed: {failed}." if failed else "")
    )
    tell(study, "confirmed", text, tracking)
    tracking.tag(study.run_id, {"kdexp.confirmed_run": chosen.run_id, "kdexp.confirmed": str(done.verdict)})
    tracking.log_metrics(
        study.run_id,
        {
            "confirm_val_mean": done.verdict.seeds.mean,
            "confirm_val_sd": done.verdict.seeds.sd,
            "confirm_test_mean": done.test.mean,
            "confirm_test_sd": done.test.sd,
            **({"confirm_test_tta_mean": done.tta.mean, "confirm_test_tta_sd": done.tta.sd} if done.tta else {}),
        },
    )
