"""Repeats that hold out another fold: one teacher, one cache of its logits, one pool of workers;
each run knows its own images and is reproduced by its ID.
"""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CPU, drain, stores_in, tiny_sweep

from kdexp.config import Recipe
from kdexp.distill.datasets import DataError, load_splits
from kdexp.distill.evaluate import evaluate
from kdexp.distill.logits import CacheProgress
from kdexp.distill.models import build
from kdexp.distill.packs import Lane
from kdexp.distill.train import EpochReport, TeacherLogits, train
from kdexp.distill.weights import read_weights
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import prepare
from kdexp.runs.recording import Entry, Form, environment_of, facts, goes_on_here, recorded
from kdexp.runs.records import recipe_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.select.export import export
from kdexp.select.reproduce import reproduce
from kdexp.select.variants import splits_of
from kdexp.select.verify import contradictions, verify
from kdexp.selection import AS_TRAINED
from kdexp.settings import Settings
from kdexp.workers.pool import Pool, PoolSize
from kdexp.workers.work import Done, Ended, Job, Prepared, Task

RECIPE = tiny_sweep().recipe.replace({"teacher.per_fold": False})


def on(fold: int, recipe: Recipe = RECIPE, **values: Any) -> Recipe:
    """The repeat of a recipe that holds out this fold, with a seed of its own."""
    return recipe.replace({"data.fold": fold, "training.seed": 100 + fold, **values})


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store) -> Settings:
    return stores_in(tmp_path_factory.mktemp("folds"), empty_store)


@pytest.fixture(scope="module")
def bench(place: Settings) -> Bench:
    tracking = Tracking(place)
    return Bench(place, tracking, CPU, tracking.experiment("folds"))


@pytest.fixture(scope="module")
def shared(bench: Bench) -> Prepared:
    """Data and teacher for every fold."""
    return drain(prepare(RECIPE, bench, whole=True))[1]


def run_of(recipe: Recipe, prepared: Prepared, bench: Bench) -> RunRecord:
    with recorded(recipe, prepared, bench, Entry("train", "repeat")) as recording:
        for _ in recording.epochs():
            pass
    return bench.tracking.read(recording.run_id)


@pytest.fixture(scope="module")
def run(shared: Prepared, bench: Bench) -> RunRecord:
    """A finished repeat on fold 2."""
    return run_of(on(2), shared.on(2), bench)


# --- data and teacher ---


def test_what_is_derived_for_a_fold_is_what_would_be_prepared_for_it(
    shared: Prepared, bench: Bench
) -> None:
    for fold in range(1, 5):
        derived = shared.on(fold)
        events, anew = drain(prepare(on(fold), bench, whole=True))
        assert not events, "neither teacher nor logits are made again"
        assert facts(derived) == facts(anew)
        assert facts(derived)["kdexp.logits_sha256"] == facts(shared)["kdexp.logits_sha256"]
        assert derived.data == on(fold).data == anew.data
        assert torch.equal(derived.teacher.soft.columns, anew.teacher.soft.columns)
        assert derived.teacher_run == anew.teacher_run == shared.teacher_run
        logits = shared.teacher.soft.logits
        assert derived.teacher.soft.logits.data_ptr() == logits.data_ptr()


def test_the_folds_last_asked_for_are_cut_once(shared: Prepared) -> None:
    fresh = replace(shared)
    assert fresh.on(1).splits is fresh.on(1).splits
    for fold in (1, 2, 3, 4, 1):
        fresh.on(fold)
    assert set(fresh.cut) == {1, 2, 3, 4}
    assert fresh.on(0) is fresh.on() is fresh
    assert fresh.on(3).on(0).splits.train.fingerprint == shared.splits.train.fingerprint
    assert not pickle.loads(pickle.dumps(fresh)).cut


def test_a_fold_that_there_is_not_is_said(shared: Prepared) -> None:
    with pytest.raises(DataError, match=r"data.fold: got 5, but there are 5 folds, 0 to 4"):
        shared.on(5)


def test_the_teacher_is_measured_on_the_images_that_it_never_saw(
    shared: Prepared, bench: Bench
) -> None:
    teacher = build(RECIPE.teacher, shared.splits.train)
    teacher.load_state_dict(read_weights(shared.teacher.weights, teacher))
    own = evaluate(teacher, shared.splits.validation)
    for fold in (0, 3):
        found = shared.on(fold).teacher
        assert (found.val_correct, found.val_samples) == (own.correct, own.samples)
    alone = drain(prepare(on(3), bench))[1]
    assert (alone.teacher.val_correct, alone.teacher.val_samples) == (own.correct, own.samples)
    (teacher_run,) = bench.tracking.find("teacher", {})
    assert teacher_run.metrics["val_accuracy"] == own.accuracy
    assert recipe_of(teacher_run, bench.tracking).data.fold == 0


def test_a_fold_prepared_first_has_the_same_teacher_recorded_as_the_one_of_fold_0(
    settings, tracking, shared: Prepared
) -> None:
    bench = Bench(settings, tracking, CPU, tracking.experiment("first"))
    events, first = drain(prepare(on(3), bench))
    assert sum(isinstance(event, EpochReport) for event in events) == RECIPE.teacher.epochs
    assert sum(isinstance(event, CacheProgress) for event in events) == 9
    assert first.teacher.sha256 == shared.teacher.sha256
    assert first.teacher.logits_sha256 != shared.teacher.logits_sha256
    (run,) = tracking.find("teacher", {})
    assert run.params["data.fold"] == "0"
    assert not contradictions(run, recipe_of(run, tracking), tracking)
    (data,) = [found for role, found in tracking.inputs(run.run_id).items() if role == "validation"]
    assert load_splits(RECIPE.data).validation.fingerprint[:8] in "".join(data.values())


def test_logits_of_one_folds_images_serve_no_other(bench: Bench) -> None:
    alone = drain(prepare(RECIPE, bench))[1]
    assert not alone.teacher.of_all_images
    with pytest.raises(ValueError, match="serves no other fold: prepare it whole"):
        alone.on(1)
    with pytest.raises(ValueError, match="teacher logits of"):
        soft = TeacherLogits(alone.teacher.soft.logits[:, :50])
        next(train([Lane.of(RECIPE)], alone.splits, RECIPE.data, soft))


def test_a_student_listens_to_the_columns_of_its_own_images(shared: Prepared) -> None:
    """To the bit as if the cache held nothing else."""
    here = shared.on(4)
    soft = here.teacher.soft
    alone = TeacherLogits(soft.logits[:, soft.columns].contiguous())
    assert torch.equal(here.splits.train.labels, shared.splits.whole.labels[soft.columns])
    every = [
        [
            report.loss
            for (report,) in train([Lane.of(on(4))], here.splits, here.data, logits)
            if report
        ]
        for logits in (soft, alone)
    ]
    assert every[0] == every[1]


# --- workers ---


def ended(pool: Pool, jobs: list[Job]) -> dict[int, Ended]:
    """What came of each job."""
    found: dict[int, Ended] = {}
    free = list(pool.workers)
    left = list(jobs)
    done = 0
    while done < len(jobs):
        while free and left:
            free.pop().give(left.pop(0))
        worker, message = pool.receive()
        if isinstance(message, Ended):
            found[message.job] = message
        elif isinstance(message, Done):
            done += 1
            free.append(worker)
        else:
            assert hasattr(message, "epochs"), message
    return found


def job(number: int, recipe: Recipe, prepared: Prepared, **values: Any) -> Job:
    form = Form.alone(recipe, prepared.splits.train)
    task = Task(str(number), recipe, environment_of(recipe, prepared, form))
    return Job(number, {0: task}, form.execution, 1, **values)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_pool_trains_on_every_fold_what_each_would_train_alone(
    shared: Prepared, workers: int
) -> None:
    folds = [1, 2, 2, 0]
    with Pool(PoolSize(workers, 1), shared, "cpu") as pool:
        jobs = [job(at, on(fold), shared.on(fold), fold=fold) for at, fold in enumerate(folds)]
        found = ended(pool, jobs)
    for at, fold in enumerate(folds):
        here = shared.on(fold)
        with Pool(PoolSize(1, 1), here, "cpu") as pool:
            (alone,) = ended(pool, [job(0, on(fold), here)]).values()
        assert found[at].correct == alone.correct
        assert all(torch.equal(found[at].weights[name], w) for name, w in alone.weights.items())


@pytest.mark.parametrize("workers", [1, 2])
def test_with_random_erasing_a_job_brings_logits_of_its_own(
    bench: Bench, shared: Prepared, workers: int
) -> None:
    erased = RECIPE.replace({"training.random_erasing": 0.5})
    first = drain(prepare(erased, bench, training=erased.training))[1]
    repeats = {fold: drain(prepare(on(fold, erased), bench, whole=True))[1] for fold in (1, 2)}
    for fold, own in repeats.items():
        teacher = own.teacher
        assert teacher.soft.per == "epoch"
        assert not teacher.of_all_images
        assert teacher.sha256 == shared.teacher.sha256
        assert teacher.val_correct == shared.teacher.val_correct
        assert facts(first.on(fold, teacher)) == facts(own)
    with Pool(PoolSize(workers, 1), first, "cpu") as pool:
        jobs = [
            job(fold, on(fold, erased), own, fold=fold, teacher=own.teacher)
            for fold, own in repeats.items()
        ]
        found = ended(pool, jobs)
    for fold, own in repeats.items():
        with Pool(PoolSize(1, 1), own, "cpu") as pool:
            (alone,) = ended(pool, [job(0, on(fold, erased), own)]).values()
        assert all(torch.equal(found[fold].weights[name], w) for name, w in alone.weights.items())


# --- the record ---


def test_a_repeat_is_on_record_with_its_own_images_and_which_logits_it_had(
    shared: Prepared, run: RunRecord, place: Settings, bench: Bench
) -> None:
    recipe, splits = recipe_of(run, bench.tracking), load_splits(on(2).data)
    assert recipe == on(2)
    assert run.params["data.fold"] == "2"
    assert run.tags["kdexp.logits_of"] == "all images"
    assert run.tags["kdexp.train_sha256"] == splits.train.fingerprint
    assert run.tags["kdexp.validation_sha256"] == splits.validation.fingerprint
    assert run.metrics["val_samples"] == len(splits.validation)
    assert run.metrics["teacher_val_accuracy"] == shared.teacher.val_accuracy
    assert "fold 2" in run.tags["mlflow.note.content"]
    assert not contradictions(run, recipe, bench.tracking)
    own = splits_of(run, recipe, place)
    assert own.validation.fingerprint == splits.validation.fingerprint
    verify(run, recipe, AS_TRAINED, own, bench.tracking, CPU)


def test_a_run_with_logits_of_its_training_images_alone_has_no_such_tag(bench: Bench) -> None:
    alone = run_of(on(1), drain(prepare(on(1), bench))[1], bench)
    assert "kdexp.logits_of" not in alone.tags
    _, comparison = drain(reproduce(alone.run_id, bench.settings, bench.tracking, CPU))
    assert comparison.identical, comparison.failure


@pytest.mark.parametrize("lost", ["nothing", "the caches", "the caches and the teacher's weights"])
def test_a_repeat_is_reproduced_by_its_id(
    run: RunRecord, place: Settings, bench: Bench, lost: str, monkeypatch
) -> None:
    if lost != "nothing":
        shutil.rmtree(place.teachers)
    if "weights" in lost:
        monkeypatch.setattr("kdexp.select.reproduce._teacher_weights", lambda *_: None)
    _, comparison = drain(reproduce(run.run_id, place, bench.tracking, CPU))
    assert comparison.identical, comparison.failure
    assert comparison.again.tags["kdexp.logits_of"] == "all images"


def test_a_repeat_with_random_erasing_is_reproduced_by_its_id(
    place: Settings, bench: Bench
) -> None:
    recipe = on(3, RECIPE, **{"training.random_erasing": 0.5})
    run = run_of(recipe, drain(prepare(recipe, bench, whole=True))[1], bench)
    assert run.tags["kdexp.logits_per"] == "epoch"
    shutil.rmtree(place.teachers)
    _, comparison = drain(reproduce(run.run_id, place, bench.tracking, CPU))
    assert comparison.identical, comparison.failure


def test_a_repeat_is_exported_and_measured_on_its_own_fold(
    run: RunRecord, place: Settings, bench: Bench, tmp_path
) -> None:
    done = export(run.run_id, "float32", tmp_path / "student.onnx", place, bench.tracking)
    assert done.validation.samples == run.metrics["val_samples"]
    assert done.validation.accuracy == pytest.approx(run.metrics["val_accuracy"], abs=0.005)


def test_a_repeat_goes_on_from_its_checkpoint(shared: Prepared, bench: Bench, tmp_path) -> None:
    from kdexp.distill.checkpoints import Checkpoints

    here, checkpoints = shared.on(2), Checkpoints(tmp_path)
    with recorded(on(2), here, bench, Entry("train", "unbroken")) as whole:
        for _ in whole.epochs():
            pass
    with (
        pytest.raises(KeyboardInterrupt),
        recorded(on(2), here, bench, Entry("train", "broken")) as recording,
    ):
        for report in recording.epochs(checkpoints, "repeat"):
            if report.epoch == 1:
                raise KeyboardInterrupt
    found = checkpoints.load("repeat")
    assert found is not None
    assert goes_on_here(found, on(2), shared.on(2))
    entry, form = Entry("train", "broken"), Form.of(found.environment)
    with recorded(on(2), here, bench, entry, form, found) as recording:
        for _ in recording.epochs(checkpoints, "repeat", resumed=True):
            pass
    one, other = (bench.tracking.read(each.run_id) for each in (whole, recording))
    assert one.tags["kdexp.weights_sha256"] == other.tags["kdexp.weights_sha256"]


def test_all_images_may_be_trained_on_whatever_fold_is_named(bench: Bench) -> None:
    recipe = on(2, **{"data.train_on_validation": True, "training.keep": "last"})
    for whole in (False, True):
        found = drain(prepare(recipe, bench, whole=whole))[1]
        assert len(found.splits.train) == len(found.splits.whole)
        assert found.splits.validation.fingerprint == load_splits(on(2).data).validation.fingerprint
        assert found.teacher.soft.samples == len(found.splits.train)
        run = run_of(recipe, found, bench)
        _, comparison = drain(reproduce(run.run_id, bench.settings, bench.tracking, CPU))
        assert comparison.identical, comparison.failure
