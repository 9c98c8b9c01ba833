"""Search spaces as people write them: steps that do not fit, thousands of choices, pruners at their
edges, large grids.
"""

from __future__ import annotations

import json
import time

import pytest
from conftest import tiny_sweep

from cases.conftest import Case
from kdexp.config import Range, Sweep
from kdexp.runs.tracking import LONGEST, Tracking
from kdexp.search.sweep import STUDENTS


def test_a_step_that_does_not_divide_its_range_is_said_once_in_our_words(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    done = case.kd(
        "sweep",
        "tiny.yaml",
        "--workers",
        "1",
        "--set",
        "search.student.hidden={low: 8, high: 30, step: 8}",
    )
    assert done.returncode == 0, done.stderr
    said = (
        "search.student.hidden: steps of 8 from 8 do not end at 30; what is searched is 8, 16, 24"
    )
    assert (done.stdout + done.stderr + caplog.text).count(said) == 1
    assert "site-packages" not in case.printed


def test_the_last_value_of_a_range_is_that_of_its_steps() -> None:
    assert Range(low=8, high=30, step=8).last == 24
    assert Range(low=8, high=32, step=8).last == 32
    assert Range(low=0.0, high=0.3, step=0.1).last == 0.3, (
        "three steps, whatever binary fractions say"
    )
    assert Range(low=0.0, high=1.0, step=0.3).last == 0.9
    assert Range(low=8, high=12, step=8).last == 8
    assert Range(low=0.0, high=1.0).last == 1.0


def test_choices_too_long_for_an_mlflow_param_are_shortened_there_and_whole_in_the_record(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    numbers = list(range(8, 3000, 2))
    assert len(numbers) > 10 * STUDENTS
    done = case.kd(
        "sweep",
        "tiny.yaml",
        "--workers",
        "1",
        "--set",
        f"search.student.hidden={{choices: {numbers}}}",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "search.student.hidden.choices is too long for an MLflow param"
        in done.stdout + done.stderr + caplog.text
    )
    monkeypatch.chdir(case.folder)
    from kdexp.settings import Settings

    tracking = Tracking(Settings())
    study = tracking.study("tiny")
    assert len(study.params["search.student.hidden.choices"]) == LONGEST
    assert study.params["search.student.hidden.choices"].endswith("the run's artifacts hold all")
    assert (
        json.loads(tracking.read_text(study.run_id, "sweep.json"))["search"]["student.hidden"][
            "choices"
        ]
        == numbers
    )


@pytest.mark.parametrize(
    "settings", ["study.pruner=hyperband study.sampler=tpe", "study.early_stop=true"]
)
def test_epochs_in_the_search_go_with_what_ends_trials_early(case: Case, settings: str) -> None:
    changes = [
        *settings.split(),
        "study.objective=accuracy",
        "search.training.epochs={low: 1, high: 3}",
        "study.trials=5",
    ]
    done = case.kd(
        "sweep",
        "tiny.yaml",
        "--workers",
        "1",
        *(word for change in changes for word in ("--set", change)),
    )
    assert done.returncode == 0, done.stderr


def grid(**search: object) -> str:
    study = {"objective": "accuracy", "sampler": "grid", "trials": 3}
    return json.dumps(
        json.loads(tiny_sweep().model_dump_json()) | {"search": search, "study": study}
    )


def test_a_grid_of_ten_thousand_points_is_read_in_a_second() -> None:
    rates = [0.01 + number / 10**4 for number in range(100)]
    temperatures = [5.0 + number / 10 for number in range(100)]
    text = grid(
        **{
            "training.learning_rate": {"choices": rates},
            "distillation.temperature": {"choices": temperatures},
        }
    )
    since = time.process_time()
    sweep = Sweep.model_validate_json(text)
    assert len(sweep.beyond_controls) == 9_999
    assert time.process_time() - since < 2.0


def test_a_grid_leaves_out_what_is_the_same_once_defaults_are_filled_in() -> None:
    text = grid(
        **{"student.blocks": {"choices": [None, 1, 2]}, "training.seed": {"choices": [8787, 1]}}
    )
    points = [tuple(point.values()) for point in Sweep.model_validate_json(text).beyond_controls]
    assert points == [(None, 1), (2, 8787), (2, 1)]
