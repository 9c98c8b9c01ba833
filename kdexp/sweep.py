"""A study: Optuna proposes, the runner trains, Optuna is told. The only file that knows Optuna.

Trial 0 is the recipe's own values, trial 1 the same with alpha = 0: every study holds its baseline and its
labels-only control. Any number of processes may run the same study at once, and whatever was interrupted is
trained again, under its own trial number, by the next process that comes along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, Trial, TrialState

from kdexp import KdexpError
from kdexp.config import Choices, Range, Recipe, Sweep, differences, flatten
from kdexp.distill.models import build
from kdexp.distill.teacher import write_atomically
from kdexp.distill.train import EpochReport, seed_of
from kdexp.runner import Prepared, Result, TeacherProgress, prepare, started
from kdexp.settings import Settings, without_credentials
from kdexp.tracking import RunRecord, Tracking

__all__ = ["EpochDone", "StudyError", "TeacherReady", "TrialFinished", "TrialStarted", "run_sweep"]

CONTROLS = 2  # trials 0 and 1: never pruned, or there is nothing to compare with
SET_UP_SECONDS = 30.0


class StudyError(KdexpError):
    """A study that cannot be opened or continued."""


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
    values: dict[str, Any]
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
    generator to stop cleanly: the trial under way is left for the next run of the same command.
    """
    _check(sweep)
    _quiet()
    experiment_id = tracking.experiment(sweep.name)
    study, parent = _open(sweep, settings, tracking, experiment_id)
    prepared = yield from prepare(sweep.recipe, settings, tracking, experiment_id, device)
    _check_students(sweep, prepared)
    yield TeacherReady(prepared, _done(study))
    tracking.finish(parent.run_id, "RUNNING")
    with _Worker(settings.stores) as worker:
        status: Any = "KILLED"
        try:
            while trial := worker.next_trial(study, sweep, tracking):
                yield from _run_trial(trial, study, sweep, prepared, tracking, parent)
            status = "FINISHED"
        finally:
            others = worker.others(study)
            if not others:
                tracking.finish(parent.run_id, status)
    return others


def _run_trial(
    trial: Trial, study: optuna.Study, sweep: Sweep, prepared: Prepared, tracking: Tracking, parent: RunRecord
) -> Iterator[Event]:
    values = {path: _suggest(trial, sweep, path) for path in sweep.search} | trial.user_attrs.get("overrides", {})
    recipe = sweep.recipe.replace(values)
    reported = set(study.trials[trial.number].intermediate_values)
    yield TrialStarted(trial.number, recipe, values, retried="run_id" in trial.user_attrs)
    with started(
        recipe,
        prepared,
        tracking,
        parent.experiment_id,
        "trial",
        f"trial {trial.number}{_control(trial)}",
        parent=parent.run_id,
        tags={"kdexp.study": sweep.name, "kdexp.trial": str(trial.number), "kdexp.trial_id": str(trial._trial_id)},
        params={"trial": trial.number},
    ) as running:
        trial.set_user_attr("run_id", running.run_id)
        for report in running.epochs():
            yield EpochDone(trial.number, report)
            if report.finite and report.epoch not in reported:
                trial.report(report.val_accuracy, report.epoch)
            if report.epoch < report.epochs and trial.number >= CONTROLS and trial.should_prune():
                running.state = "pruned"
                break
    result = running.result
    assert result is not None
    _tell(study, trial.number, result.state, result.val_accuracy)
    yield TrialFinished(trial.number, result, _done(study))


def _suggest(trial: Trial, sweep: Sweep, path: str) -> Any:
    dimension = sweep.search[path]
    if isinstance(dimension, Choices):
        return json.loads(trial.suggest_categorical(path, [_stored(dimension, choice) for choice in dimension.choices]))
    whole = all(isinstance(value, int) for value in (dimension.low, dimension.high, sweep.recipe.value(path)))
    suggest: Any = trial.suggest_int if whole else trial.suggest_float
    step = {"step": dimension.step} if dimension.step is not None else {}
    return suggest(path, dimension.low, dimension.high, log=dimension.log, **step)


def _control(trial: Trial) -> str:
    return f" · {trial.user_attrs['control']}" if "control" in trial.user_attrs else ""


def _tell(study: optuna.Study, number: int, state: str, val_accuracy: float) -> None:
    if state == "complete":
        study.tell(number, val_accuracy)
    else:
        study.tell(number, state=TrialState.PRUNED)


# --- opening a study ---------------------------------------------------------------------------


def _check(sweep: Sweep) -> None:
    if not sweep.search:
        raise StudyError(
            f"search of '{sweep.name}' is empty: there is nothing to search over. Add a range or choices, for example "
            f"distillation.alpha: {{low: 0.0, high: 1.0}}; or use kdexp train for a single run."
        )


def _open(sweep: Sweep, settings: Settings, tracking: Tracking, experiment_id: str) -> tuple[optuna.Study, RunRecord]:
    """The study and its MLflow parent run, made or found; both know the other."""
    settings.stores.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.stores / ".optuna.lock"):  # on one machine, one at a time makes stores and studies
        storage = _storage(settings)
        try:
            study = optuna.create_study(storage=storage, study_name=sweep.name, direction="maximize")
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=sweep.name)
            _wait_for_set_up(study)
        study.pruner = _pruner(sweep)
        if "sweep" not in study.user_attrs:
            run_id = tracking.start(
                experiment_id,
                "study",
                f"study {sweep.name}",
                params={key: value for key, value in flatten(sweep).items() if key.split(".")[0] not in Recipe.model_fields},
                tags={"kdexp.study": sweep.name, "mlflow.note.content": _about(sweep)},
            )
            study.set_user_attr("mlflow_run_id", run_id)
            _enqueue_controls(study, sweep)
            study.set_user_attr("sweep", sweep.model_dump_json())  # last: from now on it is set up
    _check_same(study, sweep)
    parent = tracking.read(study.user_attrs["mlflow_run_id"])
    tracking.log_text(parent.run_id, "sweep.json", sweep.model_dump_json(indent=2))
    return study, parent


def _wait_for_set_up(study: optuna.Study) -> None:
    """Another machine may have made the study a moment ago; if it died over that, this one finishes the job."""
    deadline = time.monotonic() + SET_UP_SECONDS
    while "sweep" not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(0.2)


def _storage(settings: Settings) -> optuna.storages.BaseStorage:
    url = settings.storage_url
    for attempt in range(3):  # two machines that make the tables at the same moment disturb each other once
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except Exception as error:  # SQLAlchemy and the database's driver each raise their own
            if attempt < 2 and "already exists" in str(error):
                time.sleep(1)
                continue
            if isinstance(error, ImportError):
                raise StudyError(
                    f"--storage {without_credentials(url)} needs a driver that is not installed ({error}); "
                    f"for PostgreSQL: pip install 'kdexp[postgresql]'"
                ) from None
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise StudyError(
                f"Optuna storage {without_credentials(url)}: {without_credentials(first)}; "
                f"correct --storage, or start the database"
            ) from None
    raise AssertionError("unreachable")


def _check_same(study: optuna.Study, sweep: Sweep) -> None:
    """A study continues only with the recipe and search space it began with; budget and rule may change."""
    begun = _begun(study)
    free = {"study": begun.study.model_copy(update={"trials": sweep.study.trials}), "selection": sweep.selection}
    changed = differences(begun.model_copy(update=free), sweep)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise StudyError(
            f"Study '{sweep.name}' exists with another content: {changed[0]}{more}. Trials would not compare: give the "
            f"sweep another name (--set name={sweep.name}-2), or set it back."
        )


def _enqueue_controls(study: optuna.Study, sweep: Sweep) -> None:
    own = {path: _stored(dimension, sweep.recipe.value(path)) for path, dimension in sweep.search.items()}
    study.enqueue_trial(own, user_attrs={"control": "documented defaults"}, skip_if_exists=True)
    path = "distillation.alpha"
    labels_only = {key: value for key, value in own.items() if key != path}
    if path in sweep.search and 0.0 in sweep.search[path]:
        labels_only[path] = _stored(sweep.search[path], 0.0)
    # The override holds also where the search space has no alpha = 0 for Optuna to be told of.
    study.enqueue_trial(labels_only, user_attrs={"control": "labels only", "overrides": {path: 0.0}}, skip_if_exists=True)


def _stored(dimension: Choices | Range, value: Any) -> Any:
    """A value as Optuna stores it: choices travel as JSON, because a list is no category to Optuna."""
    return json.dumps(value) if isinstance(dimension, Choices) else value


def _check_students(sweep: Sweep, prepared: Prepared) -> None:
    """Every student of a finite choice can be built for these images: found out before any training."""
    for path, dimension in sweep.search.items():
        if path.startswith("student.") and isinstance(dimension, Choices):
            for choice in dimension.choices:
                build(sweep.recipe.replace({path: choice}).student, prepared.splits.train)


def _sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    """A sampler seeded by (study seed, trial number): proposals do not depend on when a study was interrupted."""
    seed = seed_of(sweep.study.seed, "sampler", number) % 2**32
    if sweep.study.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if sweep.study.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # liar: other workers' trials count as bad


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    return {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    }[sweep.study.pruner]()


def _about(sweep: Sweep) -> str:
    rule = sweep.selection
    limit = f" with at most {rule.limit:,} {rule.size.replace('_', '-')}" if rule.limit else ""
    return (
        f"A *study*: {sweep.study.trials} trials search {', '.join(f'`{path}`' for path in sweep.search)} for the smallest "
        f"student whose validation accuracy reaches **{rule.accuracy_bar:.2%}**{limit}. Each child run is one trial. "
        f"Trial 0 is the documented defaults, trial 1 the same without the teacher (alpha = 0).\n\n*Running.*"
    )


def _done(study: optuna.Study) -> int:
    trials = study.get_trials(deepcopy=False)
    return sum(trial.state.is_finished() and "over_budget" not in trial.user_attrs for trial in trials)


def _begun_before(trials: list[FrozenTrial], number: int | None = None) -> int:
    """How many trials (with a lower number) have begun within the budget."""
    begun = (trial for trial in trials if trial.state != TrialState.WAITING and "over_budget" not in trial.user_attrs)
    return sum(number is None or trial.number < number for trial in begun)


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


# --- workers -----------------------------------------------------------------------------------


class _Worker:
    """This process as a taker of trials. It holds a lock file while it lives, so that others on this machine
    can tell, also after kill -9, that it is gone and its trial is free."""

    def __init__(self, stores: Path) -> None:
        self.folder = stores / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ask = FileLock(stores / ".ask.lock")
        with self.ask:
            self.place = _place(self.folder)
        self.name = f"{uuid.uuid4().hex[:12]}@{self.place}"
        self.lock = FileLock(self.folder / f"{self.name}.lock")

    def __enter__(self) -> _Worker:
        self.lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        (self.folder / f"{self.name}.lock").unlink(missing_ok=True)

    def next_trial(self, study: optuna.Study, sweep: Sweep, tracking: Tracking) -> Trial | None:
        """The next trial to train: one whose worker is gone, else a new one; None where there is no more to take."""
        with self.ask:
            trials = study.get_trials(deepcopy=False)
            for frozen in trials:
                if frozen.state == TrialState.RUNNING and not self._alive(frozen):
                    if (trial := self._adopt(study, frozen, tracking)) is not None:
                        return trial
            begun = _begun_before(trials)
            if begun >= sweep.study.trials:
                return None
            study.sampler = _sampler(sweep, begun)
            trial = study.ask()
            trial.set_user_attr("worker", self.name)
            # Another machine, which this lock does not hold back, may have asked at the same moment.
            if _begun_before(study.get_trials(deepcopy=False), trial.number) >= sweep.study.trials:
                trial.set_user_attr("over_budget", True)
                study.tell(trial, state=TrialState.FAIL)
                return None
            return trial

    def others(self, study: optuna.Study) -> int:
        """How many trials other, living workers have under way."""
        running = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
        return sum(t.user_attrs.get("worker") != self.name and self._alive(t) for t in running)

    def _adopt(self, study: optuna.Study, frozen: FrozenTrial, tracking: Tracking) -> Trial | None:
        """Take over a dead worker's trial; None where its run was finished and only Optuna had not been told."""
        if run_id := frozen.user_attrs.get("run_id"):
            run = tracking.read(run_id)
            if run.status == "FINISHED":
                _tell(study, frozen.number, run.tags["kdexp.state"], run.metrics["val_accuracy"])
                return None
            if run.status == "RUNNING":
                tracking.tag(run_id, {"kdexp.state": "interrupted"})
                tracking.finish(run_id, "KILLED")
        study.sampler = _sampler(_begun(study), frozen.number)
        # The documented way to a Trial is ask(); an interrupted one keeps its number only by its id.
        trial = Trial(study, frozen._trial_id)
        trial.set_user_attr("worker", self.name)
        return trial

    def _alive(self, frozen: FrozenTrial) -> bool:
        name = frozen.user_attrs.get("worker")
        if name is None:  # killed between asking and signing
            return False
        if name == self.name:
            return False
        if name.partition("@")[2] != self.place:  # of another machine: its lock file is not here to try
            return True
        path = self.folder / f"{name}.lock"
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
        with contextlib.suppress(OSError):
            path.unlink()
        return False


def _begun(study: optuna.Study) -> Sweep:
    """The sweep a study began with."""
    return Sweep.model_validate_json(study.user_attrs["sweep"])


def _place(folder: Path) -> str:
    """What names a folder of workers, whatever host or container it is seen from."""
    file = folder / "place"
    if not file.exists():
        write_atomically(file, lambda path: path.write_text(uuid.uuid4().hex[:8]))
    return file.read_text()
