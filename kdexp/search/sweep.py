"""A sweep: data and teacher once, then the trials by a pool of workers, as a stream of events."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass

import torch

from kdexp import KdexpError
from kdexp.config import Range, Recipe, Student, Sweep, Training, flatten
from kdexp.deadline import Deadline
from kdexp.distill.datasets import Splits
from kdexp.distill.execution import best_pack
from kdexp.distill.inspection import changed
from kdexp.distill.packs import Lane, Source
from kdexp.environment import commit
from kdexp.runs import describe, views
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import TeacherProgress, prepare
from kdexp.runs.recording import log_datasets
from kdexp.runs.records import FOLDS, INPUT, SURE, input_text, log_text
from kdexp.runs.tracking import Tracking, TrackingError, TrackingGone, too_long
from kdexp.search.claims import Claimant
from kdexp.search.live import LivePage
from kdexp.search.objective import Passing
from kdexp.search.remembered import misremembered
from kdexp.search.scheduler import (
    EpochDone,
    Scheduler,
    TrialEvent,
    TrialFailed,
    TrialFinished,
    TrialGivenUp,
    TrialSkipped,
    TrialStarted,
    TrialTaken,
    WorkerLost,
    leave,
)
from kdexp.search.storage import StudyError
from kdexp.search.study import Begun, OpenStudy, check_facts, check_study, open_study
from kdexp.selection import check_bar, check_reachable, plan_of
from kdexp.settings import Settings, without_credentials
from kdexp.workers.pool import Pool, PoolSize, pool_size
from kdexp.workers.processes import warm_up
from kdexp.workers.work import Prepared

__all__ = [
    "EpochDone",
    "Misremembered",
    "NothingLeft",
    "TeacherReady",
    "TrialFailed",
    "TrialFinished",
    "TrialGivenUp",
    "TrialSkipped",
    "TrialStarted",
    "TrialTaken",
    "WorkerLost",
    "check_judging",
    "is_whole",
    "pack_size",
    "run_sweep",
    "shared_training",
    "students_to_try",
]

log = logging.getLogger("kdexp")
STUDENTS = 50  # choices tried before the teacher is trained, about
IMAGES = "images.json"  # on a study's run: the digest of each image's pixels, by its file's name


@dataclass(frozen=True)
class TeacherReady:
    """Data and teacher are ready; `done` trials were finished before."""

    prepared: Prepared
    done: int


@dataclass(frozen=True)
class NothingLeft:
    """The study ends before its budget: of many proposals in a row none was worth training."""

    done: int
    smallest: Passing | None
    """Whose size none of them was below; without one, all were over the limit, or trained
    before.
    """


@dataclass(frozen=True)
class Misremembered:
    """Trials of which Optuna's storage holds something else than their own runs."""

    trials: tuple[int, ...]


Event = Misremembered | TeacherProgress | TeacherReady | PoolSize | TrialEvent | NothingLeft


def run_sweep(
    sweep: Sweep,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
    deadline: Deadline | None = None,
) -> Generator[Event, None, int]:
    """Run or continue a study until its trials are done; yield what happens.

    Returns how many trials other commands are still training: with 0 the study is finished. Close
    the generator to stop cleanly.
    """
    experiment_id, begun, gone = _home(sweep, settings, tracking)
    sweep = begun.sweep if begun else sweep
    for note in _uneven(sweep):
        log.warning(note)
    bench = Bench(settings, tracking, device, experiment_id)
    if pool_size(settings, device, sweep.study.trials).workers > 1:
        warm_up()
    shared = shared_training(sweep, settings, device)
    prepared = yield from prepare(
        sweep.recipe,
        bench,
        training=shared,
        students=students_to_try(sweep),
        losses=sweep.losses,
        whole=is_whole(sweep),
        check=lambda splits: _check_images(sweep, begun, splits, tracking),
    )
    check_judging(sweep, prepared.splits)
    # Only now, when all that a typing error can break has been tried, is there a study that must
    # stay as it began.
    study = open_study(
        sweep,
        settings,
        lambda mark: _new_parent_run(sweep, tracking, experiment_id, mark),
        gone,
        prepared.splits.folds,
    )
    finished, sure = False, study.sure if sweep.repeats else []
    page = LivePage(sweep, study.parent_run, experiment_id, study.done, sure, tracking)
    with Claimant(settings) as claimant:
        try:
            study.bind(_facts(prepared))
            _record(sweep, study, prepared, bench)
            yield TeacherReady(prepared, study.done)
            if wrong := misremembered(study.told(), sweep, study.parent_run, tracking):
                yield Misremembered(wrong)
            size = pool_size(settings, device, study.left - study.others(claimant))
            yield size
            pack = pack_size(sweep, settings, prepared.source, size, study.left)
            pool = Pool(size, prepared, str(device))
            scheduler = Scheduler(study, prepared, bench, claimant, pool, pack, deadline)
            with closing(scheduler.run()) as events:
                for event in events:
                    if isinstance(event, TrialFinished):
                        page.trial_ended(event)
                    yield event
            if study.exhausted:
                yield NothingLeft(study.done, study.smallest)
            if sweep.repeats:
                tracking.tag(study.parent_run, {SURE: " ".join(map(str, study.sure))})
            finished = True
        finally:
            page.stop(finished)
            others = leave(study, tracking, claimant, finished)
        if not others:
            # nobody takes a trial now: a command that has raised the budget may be at one already
            with claimant.turn:
                if not study.under_way:
                    study.checkpoints(settings).clear()
    return others


def _record(sweep: Sweep, study: OpenStudy, prepared: Prepared, bench: Bench) -> None:
    """Open the study's run, with what its trials share."""
    run_id, splits, tracking = study.parent_run, prepared.splits, bench.tracking
    if splits.inspection:
        log_text(run_id, IMAGES, json.dumps(splits.inspection.digests, indent=0), tracking)
    tracking.finish(run_id, "RUNNING")
    shared = {"kdexp.shared_storage": "yes"} if bench.settings.storage else {}
    tracking.tag(run_id, {FOLDS: str(splits.folds), **shared})
    log_text(run_id, "sweep.json", sweep.model_dump_json(indent=2), tracking)
    log_text(run_id, INPUT, input_text(splits.train), tracking)
    log_datasets(run_id, sweep.data, splits, tracking)
    with tracking.at_once(), suppress(KdexpError):  # pages that are shown otherwise stop no sweep
        tags = views.of_sweep(sweep, time.time_ns() // 1_000_000)
        tracking.tag_experiment(bench.experiment_id, tags)


def students_to_try(sweep: Sweep) -> list[Student]:
    """Students that must be buildable. One takes 60 ms to try: of thousands a few stand for all,
    what fails later is left out.
    """
    every = sweep.student_choices
    some = every[:: max(len(every) // STUDENTS, 1)]
    return [sweep.recipe.replace(choice).student for choice in some]


def check_judging(sweep: Sweep, splits: Splits) -> None:
    """That the bar can be met with so many validation images. Raises KdexpError."""
    if sweep.repeats:
        plan = plan_of(sweep.study, sweep.selection, splits.folds)
        check_reachable(plan, len(splits.validation))
    else:
        check_bar(sweep.selection, len(splits.validation))


def pack_size(sweep: Sweep, settings: Settings, source: Source, size: PoolSize, left: int) -> int:
    """How many trials train as one, unless the settings say: what is fastest for one worker."""
    if settings.pack or size.workers > 1:
        return settings.pack or 1
    return best_pack(Lane.of(sweep.recipe), source, left)


def _home(sweep: Sweep, settings: Settings, tracking: Tracking) -> tuple[str, Begun | None, str]:
    """The experiment of a study's runs, whatever it is called by now; the study, if there is one;
    and its run, if that is gone.

    Raises KdexpError where one of the two stores has lost what the other still builds upon.
    """
    name = sweep.name
    # before Optuna is asked: a study that another command makes meanwhile is in both
    recorded = tracking.studies(name)
    begun = check_study(sweep, settings)
    if begun is None:
        for run in recorded:
            trials = [
                t
                for t in tracking.find("trial", {"mlflow.parentRunId": run.run_id})
                if t.status == "FINISHED"
            ]
            if trials:
                place = without_credentials(settings.storage_url.partition("?")[0])
                raise KdexpError(
                    f"Study '{name}' has {len(trials)} trials in {tracking.shown} (run"
                    f" {run.run_id}), but Optuna's storage {place} does not know it, so its search"
                    " cannot go on: put that database back (or name it with --storage), or begin"
                    f" anew under another name (--set name={name}-2)."
                )
        return tracking.experiment(name), None, ""
    try:
        return tracking.read(begun.parent_run).experiment_id, begun, ""
    except TrackingGone as error:
        if not begun.done:
            # nothing is lost: its trials begin again
            return tracking.experiment(name), begun, begun.parent_run
        if error.restore:
            how = (
                f"is deleted in {tracking.shown}: restore it ({error.restore}), and each of its"
                " trials that is deleted too"
            )
        else:
            how = (
                f"{tracking.shown} does not hold: put that back, or name the store that does"
                " (--stores, --tracking-uri)"
            )
        raise KdexpError(
            f"Study '{name}' has {begun.done} trials in Optuna's storage, recorded below MLflow run"
            f" {begun.parent_run}, which {how}; or begin anew under another name (--set"
            f" name={name}-2)."
        ) from None


def shared_training(sweep: Sweep, settings: Settings, device: torch.device) -> Training | None:
    """What the teacher's cache may rely on; places of a pack that are taken over are in epochs of
    their own, and repeats that share it have seeds of their own.
    """
    if is_whole(sweep):
        return None
    alone = settings.pack == 1 or (settings.pack is None and device.type == "cpu")
    together = (
        alone
        or not (sweep.study.early_stop or sweep.study.pruner != "none")
        or sweep.training.random_erasing
    )
    return sweep.shared_training if together else None


def is_whole(sweep: Sweep) -> bool:
    """Whether one cache of the teacher's logits serves repeats on every fold."""
    return sweep.repeats and sweep.teacher.shared and not sweep.training.random_erasing


def _uneven(sweep: Sweep) -> list[str]:
    """What is searched where the steps of a range do not end at its end."""
    notes = []
    for path, found in sweep.search.items():
        if isinstance(found, Range) and found.step is not None and found.last != found.high:
            second, last = round(found.low + found.step, 10), found.last
            between = (
                []
                if second >= last
                else [f"{second}"]
                if second + found.step >= last
                else [f"{second}", "…"]
            )
            searched = ", ".join(
                [f"{found.low}", *between, *([f"{last}"] if last > found.low else [])]
            )
            notes.append(
                f"search.{path}: steps of {found.step} from {found.low} do not end at {found.high};"
                f" what is searched is {searched}"
            )
    return notes


def _facts(prepared: Prepared) -> dict[str, str]:
    return {**_images(prepared.splits), "teacher": prepared.teacher.sha256}


def _images(splits: Splits) -> dict[str, str]:
    return {
        "training data": splits.train.fingerprint,
        "validation data": splits.validation.fingerprint,
    }


def _check_images(sweep: Sweep, begun: Begun | None, splits: Splits, tracking: Tracking) -> None:
    """That the images are those the study began with, before a teacher is trained on others. Raises
    StudyError.
    """
    here, known = _images(splits), begun.facts if begun else {}
    if begun is None or splits.inspection is None:
        return check_facts(sweep, known, here)
    same = all(known.get(name, value) == value for name, value in here.items())
    try:
        then = json.loads(tracking.read_text(begun.parent_run, IMAGES))
        # test images among them: trials would be looked at on others
        differ = changed(then, splits.inspection.digests)
    except (TrackingError, ValueError):
        differ = (
            ""
            if same
            else (
                "which ones is not on record, and an earlier kdexp may have read the same files"
                " differently"
            )
        )
    if differ or not same:
        raise StudyError(
            f"Study '{sweep.name}' began with other images than are in {sweep.data.path} now:"
            f" {differ or 'the same files, in other classes or splits'}. Its trials would not"
            " compare: put the former images back, or rename the sweep (--set"
            f" name={sweep.name}-2)."
        )


def _new_parent_run(sweep: Sweep, tracking: Tracking, experiment_id: str, mark: str) -> str:
    for run in tracking.studies(sweep.name):
        if run.tags.get("kdexp.study_mark") == mark:
            return run.run_id  # made by a process that died before it could tell Optuna
    params = {
        path: value
        for path, value in flatten(sweep).items()
        if path.split(".")[0] not in Recipe.model_fields
    }
    for path in too_long(params):
        log.warning(
            f"{path} is too long for an MLflow param: it is shortened there, and stands whole in"
            " the study's sweep.json"
        )
    return tracking.start(
        experiment_id,
        "study",
        f"study {sweep.name}",
        params=params,
        tags={
            "kdexp.study": sweep.name,
            "kdexp.study_mark": mark,
            **({"mlflow.source.git.commit": commit()} if commit() != "none" else {}),
            "mlflow.note.content": describe.of_study(sweep),
        },
    )
