"""What a sweep would do, without doing it."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import CPU, drain
from rich.console import Console
from test_init import pictures

from kdexp import KdexpError
from kdexp.config import Choices, Range, Sweep
from kdexp.distill.datasets import Splits
from kdexp.runs.tracking import Tracking
from kdexp.screen import duration, show_check
from kdexp.search import check as module
from kdexp.search.check import Check, check, trial_seconds
from kdexp.search.sizes import sizes_of
from kdexp.search.sweep import run_sweep
from kdexp.settings import Settings
from kdexp.workers import rehearsal
from kdexp.workers.rehearsal import Pace


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps are timed: what they take is not what is tested."""
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)


def checked(sweep: Sweep, settings: Settings) -> Check:
    """A check, to its end."""
    return drain(check(sweep, settings, CPU, imports=1.0))[1]


def shown(done: Check, width: int = 80) -> str:
    """What a person reads."""
    console = Console(width=width, record=True, force_terminal=False, highlight=False)
    with console.capture() as captured:
        show_check(console, done)
    return captured.get()


def test_everything_is_said_and_nothing_is_left(tiny: Sweep, tmp_path: Path) -> None:
    done = checked(tiny, Settings(stores=tmp_path / "mlruns"))
    assert not list(tmp_path.iterdir())
    images = done.images
    assert (images.training, images.validation, images.test) == (1151, 287, 359)
    assert images.fewest == min(images.training, images.fewest) > 0
    assert (done.teaching.networks, done.teaching.others) == (1, 0)
    # 3 epochs of one seed are fewer than 9 views
    assert done.teaching.passes == 3 * 1151 + 287
    assert done.teaching.step is not None
    small, large = done.smallest.sized.size, done.largest.sized.size
    assert small.parameters < large.parameters
    assert done.smallest.steps == 3 * (1151 // 128)
    text = shown(done)
    for part in (
        "1,151 training, 287 validation, 359 test",
        "8 x 8 pixels",
        "to train",
        "4 trials",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_storage_is_made_to_look_for_a_study(tiny: Sweep, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'other.db'}"
    checked(tiny, Settings(stores=tmp_path / "mlruns", storage=storage))
    assert not list(tmp_path.iterdir())


def test_what_is_cached_is_not_made_again_and_trials_that_are_done_not_trained(
    tiny: Sweep, settings: Settings, tracking: Tracking
) -> None:
    half = tiny.model_copy(update={"study": tiny.study.model_copy(update={"trials": 2})})
    drain(run_sweep(half, settings, tracking, CPU))
    runs = len(tracking.find("trial", {}))
    done = checked(tiny, settings)
    assert (done.teaching.networks, done.teaching.passes, done.done) == (0, 0, 2)
    assert "there already" in shown(done)
    assert len(tracking.find("trial", {})) == runs
    whole = checked(half, settings)
    assert whole.study.most == 0
    assert "nothing is left to train" in shown(whole)


def test_repeats_on_other_folds_may_take_teachers_of_their_own(tiny: Sweep, tmp_path: Path) -> None:
    study = tiny.study.model_copy(update={"objective": "smallest", "trials": 12, "repeats": 4})
    repeating = tiny.model_copy(update={"study": study})
    done = checked(repeating, Settings(stores=tmp_path / "mlruns"))
    assert done.teaching.others == 3
    assert done.study.most > done.study.least
    one = tiny.teacher.model_copy(update={"per_fold": False})
    shared = checked(
        repeating.model_copy(update={"teacher": one}), Settings(stores=tmp_path / "mlruns")
    )
    assert shared.teaching.others == 0


def test_members_of_an_ensemble_are_counted(tiny: Sweep, tmp_path: Path) -> None:
    teacher = tiny.teacher.model_copy(update={"members": 3})
    done = checked(
        tiny.model_copy(update={"teacher": teacher}), Settings(stores=tmp_path / "mlruns")
    )
    assert done.teaching.networks == 3
    assert "3 networks to train" in shown(done)


def test_workers_and_packs_as_a_sweep_would_have_them(tiny: Sweep, tmp_path: Path) -> None:
    done = checked(tiny, Settings(stores=tmp_path / "mlruns", workers=2, pack=2))
    assert (done.pool.workers, done.pack, done.largest.how.lanes) == (2, 2, 2)
    assert done.memory > 2**26
    assert "2 trials as one" in shown(done)


def test_a_mistake_is_what_a_sweep_says(tiny: Sweep, tmp_path: Path) -> None:
    settings = Settings(stores=tmp_path / "mlruns")
    with pytest.raises(KdexpError, match="nothing to search over"):
        checked(tiny.model_copy(update={"search": {}}), settings)
    missing = tiny.data.model_copy(update={"dataset": "mnist"})
    with pytest.raises(KdexpError, match="correct --data-dir"):
        checked(
            tiny.model_copy(update={"data": missing}), replace(settings, data_dir=tmp_path / "no")
        )
    assert not list(tmp_path.iterdir())


# --- arithmetic ---


def test_one_worker_waits_for_the_scheduler_and_many_share_it() -> None:
    assert trial_seconds(10, 1, 1) == pytest.approx(11)
    assert trial_seconds(10, 0, 4) == pytest.approx(2.5)
    assert trial_seconds(0, 3, 4) == pytest.approx(3)
    found = [trial_seconds(10, 1, workers) for workers in range(1, 40)]
    assert all(more < fewer for fewer, more in pairwise(found[:10]))
    assert found[-1] == pytest.approx(1, rel=0.01)


def test_a_training_is_begun_stepped_and_evaluated() -> None:
    pace = Pace(begin=2, step=0.1, batch=0.5, memory=0)
    assert module.training_seconds(pace, 100, 4, 400) == pytest.approx(2 + 10 + 5 * 1.0)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0356, "36 ms"),
        (1.4, "1 s"),
        (35, "35 s"),
        (89, "89 s"),
        (210, "3.5 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_every_student_of_a_search_is_counted(tiny: Sweep, digits: Splits) -> None:
    search = {
        "student.channels": Choices(choices=((2, 4), (4, 8), (1, 1, 1, 1, 1))),
        "student.hidden": Range(low=8, high=24, step=8),
        "student.dropout": Range(low=0.0, high=0.5),
    }
    sweep = tiny.model_copy(update={"search": search})
    found = sizes_of(sweep, digits.train)
    # five halvings leave nothing of 8 pixels
    assert (found.students, found.unbuildable, found.whole) == (6, 3, True)
    assert found.smallest.recipe.student.hidden == 8
    assert found.largest.recipe.student.hidden == 24
    limit = found.largest.size.parameters - 1
    rule = tiny.selection.model_copy(update={"limit": limit})
    assert sizes_of(sweep.model_copy(update={"selection": rule}), digits.train).within == 5


def test_of_many_students_the_ends_are_among_those_looked_at(tiny: Sweep, digits: Splits) -> None:
    search = {"student.hidden": Range(low=1, high=4000)}
    found = sizes_of(tiny.model_copy(update={"search": search}), digits.train)
    assert not found.whole
    ends = (found.smallest.recipe.student.hidden, found.largest.recipe.student.hidden)
    assert ends == (1, 4000)


# --- against real sweeps ---


@pytest.mark.slow
def test_a_small_folder_takes_what_was_said(tmp_path: Path, monkeypatch) -> None:
    """Within a factor of 3: other work on the machine is not held back (benchmarks/estimates.py)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.estimates import estimate, kdexp

    pictures(tmp_path / "photos", {"a": 60, "b": 60})
    kdexp(["init", "photos"], tmp_path)
    assert yaml.safe_load((tmp_path / "photos.yaml").read_text())["name"] == "photos"
    few = ["photos.yaml", "--trials", "4", "--set", "training.epochs=3"]
    said, _ = kdexp(["check", *few], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photos",
        "photos.yaml",
        "sweep.schema.json",
    ]
    _, took = kdexp(["sweep", *few], tmp_path)
    every, first = estimate(said)
    assert first / 3 < took < every * 3, sys.version
