"""A sweep: trials one after another, from Optuna's choice to a finished run, as a stream of events.

Whatever stops it (Ctrl-C, kill -9, a full disk) leaves finished trials finished, and the trial that was under
way to the next process that runs the same sweep.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from kdexp.config import Choices, Recipe, Sweep, flatten
from kdexp.distill.models import build
from kdexp.distill.train import EpochReport
from kdexp.runner import Prepared, Result, TeacherProgress, prepare, started
from kdexp.settings import Settings
from kdexp.study import Ended, OpenStudy, Trial, check_study, open_study
from kdexp.tracking import Tracking
from kdexp.workers import Worker

__all__ = ["EpochDone", "TeacherReady", "TrialFinished", "TrialStarted", "run_sweep"]


@dataclass(frozen=True)
class TeacherReady:
    """Data and teacher are ready; `done` trials were finished before."""

    prepared: Prepared
    done: int


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins (again, where `retried`)."""

    number: int
    recipe: Recipe
    retried: bool


@dataclass(frozen=True)
class EpochDone:
    """An epoch of a trial."""

    number: int
    report: EpochReport


@dataclass(frozen=True)
class TrialFinished:
    """A trial has ended; `done` of the study's trials are finished now."""

    number: int
    result: Result
    done: int


Event = TeacherProgress | TeacherReady | TrialStarted | EpochDone | TrialFinished


def run_sweep(sweep: Sweep, settings: Settings, tracking: Tracking, device: torch.device) -> Generator[Event, None, int]:
    """Run or continue a study until its trials are done; yield what happens.

    Returns how many trials other processes are still training: with 0 the study is finished. Close the
    generator to stop cleanly.
    """
    experiment_id = tracking.experiment(sweep.name)
    check_study(sweep, settings)
    prepared = yield from prepare(sweep.recipe, settings, tracking, experiment_id, device)
    _check_students(sweep, prepared)
    # Only now, when all that a typing error can break has been tried, is there a study that must stay as it began.
    study = open_study(sweep, settings, lambda: _new_parent_run(sweep, tracking, experiment_id))
    with Worker(settings.stores) as worker:
        finished = False
        try:
            study.bind(_facts(prepared))
            tracking.finish(study.parent_run, "RUNNING")
            tracking.log_text(study.parent_run, "sweep.json", sweep.model_dump_json(indent=2))
            yield TeacherReady(prepared, study.done)
            while trial := study.next_trial(worker, lambda number: _ended(number, study, tracking)):
                yield from _run_trial(trial, study, prepared, tracking, experiment_id)
            finished = True
        finally:
            others = study.others(worker)
            if not others:
                tracking.finish(study.parent_run, "FINISHED" if finished else "KILLED")
    return others


def _run_trial(trial: Trial, study: OpenStudy, prepared: Prepared, tracking: Tracking, experiment_id: str) -> Iterator[Event]:
    yield TrialStarted(trial.number, trial.recipe, trial.retried)
    with started(
        trial.recipe,
        prepared,
        tracking,
        experiment_id,
        "trial",
        " · ".join(filter(None, [f"trial {trial.number}", trial.control])),
        parent=study.parent_run,
        tags={"kdexp.study": study.sweep.name, "kdexp.trial": str(trial.number)},
        params={"trial": trial.number},
    ) as running:
        trial.link(running.run_id)
        for report in running.epochs():
            yield EpochDone(trial.number, report)
            if trial.report(report):
                running.state = "pruned"
                break
    result = running.result
    assert result is not None
    study.tell(trial.number, result.state, result.val_accuracy)
    yield TrialFinished(trial.number, result, study.done)


def _ended(number: int, study: OpenStudy, tracking: Tracking) -> Ended | None:
    """How a trial ended whose worker is gone; where it did not, whatever runs it left open are closed."""
    for run in tracking.find("trial", {"mlflow.parentRunId": study.parent_run, "kdexp.trial": str(number)}):
        if run.status == "FINISHED":
            return run.tags["kdexp.state"], run.metrics["val_accuracy"]  # type: ignore[return-value]
        if run.status == "RUNNING":
            tracking.tag(run.run_id, {"kdexp.state": "interrupted"})
            tracking.finish(run.run_id, "KILLED")
    return None


def _facts(prepared: Prepared) -> dict[str, str]:
    splits = prepared.splits
    return {
        "teacher": prepared.teacher.sha256,
        "training data": splits.train.fingerprint,
        "validation data": splits.validation.fingerprint,
    }


def _new_parent_run(sweep: Sweep, tracking: Tracking, experiment_id: str) -> str:
    return tracking.start(
        experiment_id,
        "study",
        f"study {sweep.name}",
        params={path: value for path, value in flatten(sweep).items() if path.split(".")[0] not in Recipe.model_fields},
        tags={"kdexp.study": sweep.name, "mlflow.note.content": _about(sweep)},
    )


def _about(sweep: Sweep) -> str:
    rule = sweep.selection
    limit = f" with at most {rule.limit:,} {rule.size.replace('_', '-')}" if rule.limit else ""
    return (
        f"A *study*: {sweep.study.trials} trials search {', '.join(f'`{path}`' for path in sweep.search)} for the smallest "
        f"student whose validation accuracy reaches **{rule.accuracy_bar:.2%}**{limit}. Each child run is one trial. "
        f"Trial 0 is the documented defaults, trial 1 the same without the teacher (alpha = 0)."
    )


def _check_students(sweep: Sweep, prepared: Prepared) -> None:
    """Every student of a finite choice can be built for these images: found out before any training."""
    for path, dimension in sweep.search.items():
        if path.startswith("student.") and isinstance(dimension, Choices):
            for choice in dimension.choices:
                build(sweep.recipe.replace({path: choice}).student, prepared.splits.train)
