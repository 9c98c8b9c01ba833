"""Which student a command is about: a run's by its ID, or the registered one by the registry's
address.
"""

from __future__ import annotations

from typing import get_args

from kdexp import KdexpError
from kdexp.config import Precision, Variant
from kdexp.runs.records import WEIGHTS
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.select.variants import folder_of
from kdexp.selection import AS_TRAINED

__all__ = ["check_no_study", "check_student", "student_named"]

FORMS: dict[str, Variant] = {folder_of(form): form for form in (AS_TRAINED, *get_args(Precision))}


def student_named(name: str, command: str, tracking: Tracking) -> tuple[RunRecord, Variant]:
    """The run of a student with weights, by the run's ID (then as trained) or by the registry's
    address, models:/NAME@ALIAS (then in the form that is registered).

    Raises KdexpError, which names `command`.
    """
    run_id, folder = tracking.model_version(name) if name.startswith("models:") else (name, "model")
    run = tracking.read(run_id)
    check_student(run, command, tracking)
    if folder not in FORMS:
        raise KdexpError(
            f"{name}: run {run_id} registered '{folder}', which is no model of kdexp's; give a run"
            f" ID: kdexp {command} {run_id}"
        )
    return run, FORMS[folder]


def check_student(run: RunRecord, command: str, tracking: Tracking) -> None:
    """That a run holds a student's weights. Raises KdexpError."""
    kind = run.tags.get("kdexp.kind")
    check_no_study(run, command, tracking)
    if kind in (None, "teacher"):
        raise KdexpError(
            f"Run {run.run_id} is {f'a {kind}' if kind else 'not of kdexp'}; only students go with"
            f" kdexp {command}."
        )
    if not run.tags.get(WEIGHTS):
        raise KdexpError(
            f"Run {run.run_id} holds no weights (status {run.status},"
            f" {run.tags.get('kdexp.state', 'no state recorded')}); {command} a finished one."
        )


def check_no_study(run: RunRecord, command: str, tracking: Tracking) -> None:
    """That a run is not a whole study, where a single training is meant. Raises KdexpError."""
    if run.tags.get("kdexp.kind") == "study":
        trials = tracking.find("trial", {"mlflow.parentRunId": run.run_id})
        example = run.tags.get("kdexp.selected_run") or (trials[0].run_id if trials else "…")
        raise KdexpError(
            f"Run {run.run_id} is a whole study; {command} one of its trials: kdexp"
            f" {command} {example}"
        )
