"""A sweep: data and teacher once, then the trials, in this process or by a crew of workers, as a stream of events."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from kdexp import KdexpError
from kdexp.config import Recipe, Sweep, Training, flatten
from kdexp.crew import Crew, WorkerLost, crew_of, run_crew
from kdexp.distill.execution import best_pack
from kdexp.distill.packs import Lane
from kdexp.objective import Passing
from kdexp.runner import Prepared, TeacherProgress, prepare
from kdexp.selection import check_bar
from kdexp.settings import Settings, without_credentials
from kdexp.study import check_study, open_study
from kdexp.tracking import Tracking, TrackingGone
from kdexp.trials import (
    EpochDone,
    TrialEvent,
    TrialFailed,
    TrialFinished,
    TrialGivenUp,
    TrialSkipped,
    TrialStarted,
    leave,
    run_trials,
)
from kdexp.workers import Worker, warm_up

__all__ = [
    "EpochDone",
    "NothingLeft",
    "TeacherReady",
    "TrialFailed",
    "TrialFinished",
    "TrialGivenUp",
    "TrialSkipped",
    "TrialStarted",
    "run_sweep",
]


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
    """Whose size none of them was below; without one, all were over the limit, or trained before."""


Event = TeacherProgress | TeacherReady | Crew | WorkerLost | TrialEvent | NothingLeft


def run_sweep(sweep: Sweep, settings: Settings, tracking: Tracking, device: torch.device) -> Generator[Event, None, int]:
    """Run or continue a study until its trials are done; yield what happens.

    Returns how many trials other commands are still training: with 0 the study is finished. Close the
    generator to stop cleanly.
    """
    experiment_id, gone = _home(sweep, settings, tracking)
    if crew_of(settings, device, sweep.study.trials).workers > 1:
        warm_up()
    shared = _shared_training(sweep, settings, device)
    students = [sweep.recipe.replace(choice).student for choice in sweep.student_choices]
    prepared = yield from prepare(sweep.recipe, settings, tracking, experiment_id, device, training=shared, students=students)
    check_bar(sweep.selection, len(prepared.splits.validation))
    # Only now, when all that a typing error can break has been tried, is there a study that must stay as it began.
    study = open_study(sweep, settings, lambda: _new_parent_run(sweep, tracking, experiment_id), gone)
    worker, finished = Worker(settings.stores), False
    try:
        study.bind(_facts(prepared))
        tracking.finish(study.parent_run, "RUNNING")
        tracking.log_text(study.parent_run, "sweep.json", sweep.model_dump_json(indent=2))
        yield TeacherReady(prepared, study.done)
        crew = crew_of(settings, device, study.left - study.others(worker))
        yield crew
        if crew.workers > 1:
            yield from run_crew(crew, study, prepared, settings, device, experiment_id)
        else:
            with worker:
                pack = settings.pack or best_pack(Lane.of(sweep.recipe), prepared.source, study.left)
                yield from run_trials(study, prepared, tracking, experiment_id, worker, study.checkpoints(settings), pack)
        if study.exhausted:
            yield NothingLeft(study.done, study.smallest)
        finished = True
    finally:
        others = leave(study, tracking, worker, finished)
    if not others:
        study.checkpoints(settings).clear()
    return others


def _home(sweep: Sweep, settings: Settings, tracking: Tracking) -> tuple[str, str]:
    """The experiment that a study's runs belong to, whatever it is called by now; and the study's run, where that is gone.

    Raises KdexpError where one of the two stores has lost what the other still builds upon.
    """
    name = sweep.name
    recorded = tracking.studies(name)  # before Optuna is asked: a study that another command makes meanwhile is in both
    begun = check_study(sweep, settings)
    if begun is None:
        for run in recorded:
            trials = [t for t in tracking.find("trial", {"mlflow.parentRunId": run.run_id}) if t.status == "FINISHED"]
            if trials:
                place = without_credentials(settings.storage_url.partition("?")[0])
                raise KdexpError(
                    f"Study '{name}' has {len(trials)} trials in {tracking.shown} (run {run.run_id}), but Optuna's storage "
                    f"{place} does not know it, so its search cannot go on: put that database back (or name it with "
                    f"--storage), or begin anew under another name (--set name={name}-2)."
                )
        return tracking.experiment(name), ""
    try:
        return tracking.read(begun.parent_run).experiment_id, ""
    except TrackingGone as error:
        if not begun.done:
            return tracking.experiment(name), begun.parent_run  # nothing is lost: its trials begin again
        if error.restore:
            how = f"is deleted in {tracking.shown}: restore it with its trials ({error.restore})"
        else:
            how = f"{tracking.shown} does not hold: put that back, or name the store that does (--stores, --tracking-uri)"
        raise KdexpError(
            f"Study '{name}' has {begun.done} trials in Optuna's storage, recorded below MLflow run {begun.parent_run}, which "
            f"{how}; or begin anew under another name (--set name={name}-2)."
        ) from None


def _shared_training(sweep: Sweep, settings: Settings, device: torch.device) -> Training | None:
    """What the teacher's cache may rely on; places of a pack that are taken over are in epochs of their own."""
    alone = settings.pack == 1 or (settings.pack is None and device.type == "cpu")
    together = alone or not (sweep.study.early_stop or sweep.study.pruner != "none") or sweep.training.random_erasing
    return sweep.shared_training if together else None


def _facts(prepared: Prepared) -> dict[str, str]:
    splits = prepared.splits
    return {
        "teacher": prepared.teacher.sha256,
        "training data": splits.train.fingerprint,
        "validation data": splits.validation.fingerprint,
    }


def _new_parent_run(sweep: Sweep, tracking: Tracking, experiment_id: str) -> str:
    for run in tracking.studies(sweep.name):
        if run.status == "RUNNING" and not tracking.find("trial", {"mlflow.parentRunId": run.run_id}, run.experiment_id):
            return run.run_id  # made by a process that died before it could tell Optuna
    return tracking.start(
        experiment_id,
        "study",
        f"study {sweep.name}",
        params={path: value for path, value in flatten(sweep).items() if path.split(".")[0] not in Recipe.model_fields},
        tags={"kdexp.study": sweep.name, "mlflow.note.content": _about(sweep)},
    )


def _about(sweep: Sweep) -> str:
    rule, unit = sweep.selection, sweep.selection.size.replace("_", "-")
    limit = f" with at most {rule.limit:,} {unit}" if rule.limit else ""
    aim = {
        "smallest": f"minimising {unit} (proposals no smaller than one that passes are not trained: their numbers are missing)",
        "accuracy": "maximising validation accuracy",
        "pareto": f"for the frontier of {unit} and validation accuracy",
    }[sweep.study.objective]
    return (
        f"A *study*: {sweep.study.trials} trials search {', '.join(f'`{path}`' for path in sweep.search)} for the smallest "
        f"student whose validation accuracy reaches **{rule.accuracy_bar:.2%}**{limit}, {aim}. Each child run is one trial. "
        f"Trial 0 is the documented defaults, trial 1 the same without the teacher (alpha = 0)."
    )
