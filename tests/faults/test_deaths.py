"""kill -9 at each moment of a sweep at which something is half done: the same command then comes to
the same study.
"""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from faults.conftest import (
    REPEATING,
    SWEEP,
    Dies,
    Facts,
    Life,
    embedded,
    facts,
    no_run_is_left_open,
    statuses,
    told,
    unbroken,
    written,
)

pytestmark = pytest.mark.slow

MOMENTS = {
    "in the middle of a step": Dies("kdexp.distill.packs:Stacked.step", call=60),
    "in the middle of the first step": Dies("kdexp.distill.packs:Stacked.step", call=55),
    "between two epochs": Dies("kdexp.runs.recording:Recording.take", call=6),
    "between an epoch and its checkpoint": Dies("kdexp.workers.work:_Training.keep", call=7),
    "before a checkpoint is written": Dies("kdexp.distill.checkpoints:Checkpoints.save", call=6),
    "after a checkpoint is written": Dies(
        "kdexp.distill.checkpoints:Checkpoints.save", call=6, after=True
    ),
    "while a checkpoint is written": Dies("kdexp.files:os.fsync", call=13),
    "while the teacher's checkpoint is written": Dies("kdexp.files:os.fsync", call=1),
    "between the former checkpoint and the new one": Dies(
        "pathlib:Path.replace", call=2, after=True, only=".checkpoint"
    ),
    "while the teacher is trained": Dies("kdexp.distill.packs:Stacked.step", call=15),
    "before the teacher's weights are written": Dies(
        "kdexp.distill.teacher:write_atomically", only="weights.safetensors"
    ),
    "while the cache is filled": Dies("kdexp.distill.logits:logits_of", call=2),
    "before the cache is in its place": Dies("pathlib:Path.replace", call=1, only="logits-"),
    "before the teacher's run is closed": Dies("kdexp.runs.tracking:Tracking.finish", call=1),
    "before the study is set up": Dies("kdexp.search.study:_enqueue_controls", call=1),
    "between its controls": Dies("optuna.study:Study.enqueue_trial", call=1, after=True),
    "after Optuna is asked": Dies("optuna.study:Study.ask", call=3, after=True),
    "before a trial is claimed": Dies("kdexp.search.claims:Claimant.take", call=3),
    "after a trial is claimed": Dies("kdexp.search.claims:Claimant.take", call=3, after=True),
    "while a result is told": Dies("optuna.study:Study.tell", call=2),
    "between two proposed values": Dies("kdexp.search.study:suggest", call=10, after=True),
    "before a run is made": Dies("kdexp.runs.tracking:Tracking.start", call=4),
    "after a run is made": Dies("kdexp.runs.tracking:Tracking.start", call=4, after=True),
    "before a run's record is written": Dies("kdexp.runs.recording:_log_record", call=2),
    "after a run's record is written": Dies("kdexp.runs.recording:_log_record", call=2, after=True),
    "while metrics are sent": Dies("kdexp.runs.tracking:Tracking.log_epochs", call=3, after=True),
    "before a run is concluded": Dies("kdexp.runs.recording:_conclude", call=2),
    "after a run is concluded, before it is closed": Dies(
        "kdexp.runs.recording:_conclude", call=2, after=True
    ),
    "after a run is closed, before Optuna is told": Dies(
        "kdexp.search.study:OpenStudy.tell", call=2
    ),
    "after Optuna is told": Dies("kdexp.search.study:OpenStudy.tell", call=2, after=True),
    "after the last trial": Dies("kdexp.search.sweep:leave", call=1),
    "before the look at test": Dies("kdexp.select.promote:look_at_test", call=1),
    "after the look at test": Dies("kdexp.select.promote:look_at_test", call=1, after=True),
    "before the model is registered": Dies("kdexp.runs.tracking:Tracking.register", call=1),
    "after the model is registered": Dies(
        "kdexp.runs.tracking:Tracking.register", call=1, after=True
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(place: Path, whole: Facts, moment: str) -> None:
    assert Life(place, SWEEP, MOMENTS[moment]).end().code == -signal.SIGKILL, (
        "the moment never came"
    )
    again = Life(place, SWEEP).end()
    assert again.code == 0, again.err
    assert "Selected: trial" in again.out
    assert facts(place) == whole
    assert no_run_is_left_open(place)
    assert statuses(place)["teacher", "FINISHED"] == 1


IN_REPEATS = (
    Dies("kdexp.search.study:OpenStudy._enqueue_repeat", call=1, after=True),
    Dies("kdexp.runs.tracking:Tracking.start", call=2, only="kdexp.repeats", after=True),
    Dies("kdexp.runs.recording:Recording.take", call=1, only="fold=2"),
    Dies("kdexp.search.study:OpenStudy.tell", call=2),
    Dies("kdexp.search.study:OpenStudy._pooled", call=1, after=True),
)
"""Between the choice of a repeat and its trial; with its run made; in the middle of it; measured and
not told; while it is told.
"""


def test_killed_in_the_middle_of_repeats(
    tmp_path: Path, repeating: tuple[Facts, list[tuple]]
) -> None:
    place = written(tmp_path / "place", **REPEATING)
    for moment in IN_REPEATS:
        assert Life(place, SWEEP, moment).end().code == -signal.SIGKILL, (moment, "never came")
    end = Life(place, SWEEP).end()
    assert end.code == 0, end.err
    assert re.search(r"Sure: +\d of \d repeats", end.out)
    assert (facts(place), told(embedded(place))) == repeating
    assert no_run_is_left_open(place)


def test_killed_while_the_store_is_made(place: Path, whole: Facts) -> None:
    (place / "mlruns" / "mlflow.db").unlink()
    assert Life(place, SWEEP, Dies("kdexp.files:os.fsync")).end().code == -signal.SIGKILL
    assert not (place / "mlruns" / "mlflow.db").exists()
    assert Life(place, SWEEP).end().code == 0
    assert facts(place) == whole


def test_killed_at_every_step_of_the_way(tmp_path: Path, whole: Facts) -> None:
    """Forty lives of one study, each cut short at a random moment."""
    place = written(tmp_path / "place", training__epochs=4, study__retries=100)
    dice = random.Random(8787)
    kills = 0
    while kills < 40:
        life = Life(place, SWEEP)
        life.process.join(dice.uniform(0.2, 2.5))
        if not life.process.is_alive():
            break
        life.kill()
        life.process.join()
        kills += 1
    end = Life(place, SWEEP).end()
    assert end.code == 0, end.err
    assert facts(place) == whole
    assert no_run_is_left_open(place)


@pytest.mark.parametrize("kind", ["workers", "pack"])
def test_twenty_kills_of_a_longer_sweep(tmp_path: Path, kind: str) -> None:
    """By two workers, or fused: killed twenty times, the study equals an unbroken one, bit for
    bit.
    """
    changes = {
        "training__epochs": 30,
        "study__sampler": "random",
        "study__trials": 8,
        "study__retries": 100,
    }
    extra = (
        ["--workers", "2", "--pack", "1"]
        if kind == "workers"
        else ["--workers", "1", "--pack", "4"]
    )
    arguments = ["sweep", "tiny.yaml", "--threads", "1", *extra]
    expected = unbroken(tmp_path / "unbroken", arguments, **changes)
    place, dice = written(tmp_path / "place", **changes), random.Random(1)
    kills = 0
    while kills < 20:
        life = Life(place, arguments)
        life.process.join(dice.uniform(1.0, 4.0))
        if not life.process.is_alive():
            break
        life.kill()
        life.process.join()
        kills += 1
        time.sleep(dice.uniform(0, 0.5))
    end = Life(place, arguments).end()
    assert end.code == 0, end.err
    assert facts(place) == expected
    assert no_run_is_left_open(place)
    print(f"{kills} kills")
