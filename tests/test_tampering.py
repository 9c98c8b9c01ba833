"""Every single thing that a run's record holds is changed, and then taken away: each time it is
noticed and named.

The list is made from the record itself, so that what is recorded one day is tried too. One tiny
study is trained, and one of its runs reproduced, once; each test then changes one thing in the
stores, looks, and changes it back.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CPU, stores_in, tiny_sweep
from safetensors.torch import load_file, save_file

from kdexp import KdexpError
from kdexp.config import Selection
from kdexp.intervals import wilson_interval
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import prepare
from kdexp.runs.records import RecordError, recipe_of
from kdexp.runs.tracking import Tracking
from kdexp.search.objective import constraints
from kdexp.search.remembered import misremembered
from kdexp.search.study import open_study
from kdexp.search.sweep import Misremembered, run_sweep
from kdexp.select.confirm import confirm
from kdexp.select.export import export
from kdexp.select.fresh import SeedDone
from kdexp.select.promote import candidates, promote, sweep_of
from kdexp.select.reproduce import Checked, compared, reproduce
from kdexp.select.verify import contradictions, verify
from kdexp.selection import AS_TRAINED, Candidate
from kdexp.settings import Settings
from kdexp.workers.work import Prepared

SWEEP = tiny_sweep().replace(
    {
        "training.epochs": 2,
        "teacher.epochs": 1,
        "study.trials": 2,
        "data.augment.flip": True,
        "selection.accuracy_bar": 0.05,
    }
)

UNNOTICED = {
    "mlflow.": "written for people, or by MLflow: a description, a name, a user, a source",
    "kdexp.mark": "random: it lets a run be found whose making was cut short",
    "kdexp.error": "a former failure, in words",
    "kdexp.selected": "every select writes it anew",
    "kdexp.test_looked_at": "a time; that there was a look is noticed",
    "kdexp.model_version": "a place in the registry",
}
"""What may be changed without a word, and why."""
KEPT = ("mlflow.parentRunId",)
"""But not these."""


class Store(NamedTuple):
    """The study, the run that is tampered with, and its reproduction."""

    settings: Settings
    tracking: Tracking
    run_id: str
    again_id: str
    prepared: Prepared

    def sql(self, query: str, *values: Any) -> list:
        with (
            closing(sqlite3.connect(self.settings.stores / "mlflow.db", timeout=60)) as database,
            database,
        ):
            return database.execute(query, values).fetchall()

    def before(self) -> str:
        """What is said before any training, in one text."""
        try:
            run = self.tracking.read(self.run_id)
            return "\n".join(
                map(str, contradictions(run, recipe_of(run, self.tracking), self.tracking))
            )
        except KdexpError as error:
            return str(error)

    def named(self) -> str:
        """All that is said of the run, in one text."""
        try:
            done = compared(
                self.run_id, self.again_id, self.prepared, self.settings, self.tracking, CPU
            )
        except KdexpError as error:
            return str(error)
        rows = [f"{d.what} {d.original} {d.again}" for d in (*done.differences, *done.environment)]
        return "\n".join([*rows, *done.unrecorded, *done.unknown, *done.notes])


def drain(generator: Any) -> Any:
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Store:
    """A study whose selected run is also looked at on test, registered, and trained again."""
    settings = stores_in(tmp_path_factory.mktemp("tampering"), empty_store)
    tracking = Tracking(settings)
    drain(run_sweep(SWEEP, settings, tracking, CPU))
    done = promote(tracking.study("tiny"), SWEEP.selection, settings, tracking, CPU)
    comparison = drain(reproduce(done.candidate.run_id, settings, tracking, CPU))
    assert comparison.identical, comparison.differences
    run = tracking.read(done.candidate.run_id)
    bench = Bench(settings, tracking, CPU, run.experiment_id)
    prepared = drain(prepare(recipe_of(run, tracking), bench, training=SWEEP.training))
    return Store(settings, tracking, run.run_id, comparison.again.run_id, prepared)


@pytest.fixture(autouse=True)
def as_before(store: Store, tmp_path: Path) -> Iterator[None]:
    """Whatever a test does to database and artifacts, the next one finds them as they were."""
    stores, files = store.settings.stores, store.settings.stores / "artifacts"
    with (
        closing(sqlite3.connect(stores / "mlflow.db")) as database,
        closing(sqlite3.connect(tmp_path / "db")) as copy,
    ):
        database.backup(copy)
    shutil.copytree(files, tmp_path / "artifacts")
    yield
    with (
        closing(sqlite3.connect(stores / "mlflow.db")) as database,
        closing(sqlite3.connect(tmp_path / "db")) as copy,
    ):
        copy.backup(database)
    shutil.rmtree(files)
    shutil.copytree(tmp_path / "artifacts", files)


def excused(name: str) -> bool:
    return name not in KEPT and any(name.startswith(begin) for begin in UNNOTICED)


def another(value: Any) -> Any:
    """Something else of the same kind."""
    if isinstance(value, int | float):
        return value + 1
    text = str(value)
    for one, two in (("true", "false"), ("complete", "pruned"), ("epoch", "view")):
        if text in (one, two):
            return two if text == one else one
    if text.replace(".", "").isdigit():
        return str(int(text) + 1) if text.isdigit() else str(float(text) + 1)
    return ("0" if text[0] != "0" else "1") + text[1:] if len(text) > 30 else f"{text}x"


def test_the_untouched_record_is_identical_and_says_what_that_covers(store: Store) -> None:
    done = compared(
        store.run_id, store.again_id, store.prepared, store.settings, store.tracking, CPU
    )
    assert done.identical
    assert (done.unrecorded, done.unknown, done.notes) == ((), (), ())
    assert {"weights.safetensors", "model_summary.txt", "3 data sets", "student weights"} <= set(
        done.covered
    )
    assert any("final metrics" in what for what in done.covered)
    assert any("params" in what for what in done.covered)


KNOWN_BY = {
    "kdexp.weights_sha256": "student weights",
    "kdexp.teacher_sha256": "teacher weights",
    "kdexp.train_sha256": "training data",
    "kdexp.validation_sha256": "validation data",
    "kdexp.logits_sha256": "logits",
    "kdexp.artifacts": "SHA-256 of",
}
TOGETHER = {"metrics": 7, "latest_metrics": 1, "params": 12, "tags": 1}
"""So many rows are changed before one look: where each is named by itself anyway, a look at a time
is minutes more.
"""


@pytest.mark.parametrize("how", ["changed", "taken away"])
@pytest.mark.parametrize("table", sorted(TOGETHER))
def test_each_metric_param_and_tag_of_a_record(store: Store, table: str, how: str) -> None:
    """`metrics` holds every value there was, `latest_metrics` the last of each, which is what is
    read first.
    """
    rows = store.sql(
        f"select rowid, key, value from {table} where run_uuid = ? order by rowid", store.run_id
    )
    assert len(rows) >= {"metrics": 28, "latest_metrics": 21, "params": 40, "tags": 15}[table]
    rows = [row for row in rows if not excused(row[1])]
    silent = []
    for group in (
        rows[first : first + TOGETHER[table]] for first in range(0, len(rows), TOGETHER[table])
    ):
        kept = [store.sql(f"select * from {table} where rowid = ?", row)[0] for row, _, _ in group]
        for row, _, value in group:
            if how == "changed":
                store.sql(f"update {table} set value = ? where rowid = ?", another(value), row)
            else:
                store.sql(f"delete from {table} where rowid = ?", row)
        said = store.before()
        if not all(named(key, said) for _, key, _ in group):
            said += store.named()
        silent += [key for _, key, _ in group if not named(key, said)]
        for (row, _, value), whole in zip(group, kept, strict=True):
            if how == "changed":
                store.sql(f"update {table} set value = ? where rowid = ?", value, row)
            else:
                store.sql(f"insert into {table} values ({', '.join('?' * len(whole))})", *whole)
    assert not silent
    assert store.named() == ""


def named(key: str, said: str) -> bool:
    return key in said or KNOWN_BY.get(key, key.removeprefix("epoch/")) in said


def test_each_file_of_a_record_changed_cut_and_taken_away(store: Store) -> None:
    (root,) = (
        path.parent
        for path in store.settings.stores.rglob("config.json")
        if path.parts[-3] == store.run_id
    )
    files = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(files) > 8, "the run's own five, and its MLflow model"
    silent = []
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        cut = content[:middle]
        for how in (flipped, cut, b"", None) if file.parent == root else (flipped, None):
            file.unlink()
            if how is not None:
                file.write_bytes(how)
            if file.name not in store.before():
                silent.append((file.name, how and len(how)))
            file.write_bytes(content)
    assert not silent


@pytest.mark.parametrize("column", ["name", "digest", "dataset_source", "dataset_profile"])
@pytest.mark.parametrize("role", ["training", "validation", "test"])
def test_each_data_set_of_a_record(store: Store, role: str, column: str) -> None:
    query = f"select dataset_uuid, {column} from datasets where name like ?"
    ((dataset, value),) = store.sql(query, f"%-{role}")
    store.sql(f"update datasets set {column} = ? where dataset_uuid = ?", f" {value}", dataset)
    assert f"{role} input" in store.named()


@pytest.mark.parametrize("role", ["training", "validation", "test"])
def test_a_data_set_that_is_taken_out_of_a_record(store: Store, role: str) -> None:
    inputs = (
        "select input_uuid from inputs join datasets on source_id = dataset_uuid where name like ?"
        " and destination_id = ?"
    )
    ((one,),) = store.sql(inputs, f"%-{role}", store.run_id)
    store.sql("delete from inputs where input_uuid = ?", one)
    assert role in store.named()


def test_a_status_that_was_changed(store: Store) -> None:
    store.sql("update runs set status = 'FAILED' where run_uuid = ?", store.run_id)
    with pytest.raises(KdexpError, match="did not finish"):
        drain(reproduce(store.run_id, store.settings, store.tracking, CPU))


def test_what_is_checked_before_any_training_is_said_before_any_training(store: Store) -> None:
    store.sql(
        "update params set value = '7' where run_uuid = ? and key = 'teacher.epochs'", store.run_id
    )
    for event in reproduce(store.run_id, store.settings, store.tracking, CPU):
        if isinstance(event, Checked):
            assert [difference.what for difference in event.differences] == [
                "teacher.epochs (params, config.json)"
            ]
            return
    pytest.fail("nothing was checked")


# --- what other commands rest on ---


def file_of(store: Store, run_id: str, name: str) -> Path:
    (found,) = (path for path in store.settings.stores.rglob(name) if run_id in path.parts)
    return found


def zeroed(file: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)


def other_trial(store: Store) -> Candidate:
    """The trial that was not selected, and so not looked at on test."""
    return next(
        c
        for c in candidates(store.tracking.study("tiny"), store.tracking)
        if c.run_id != store.run_id
    )


def select(store: Store) -> Any:
    return promote(
        store.tracking.study("tiny"), SWEEP.selection, store.settings, store.tracking, CPU
    )


def forged(store: Store, run_id: str, **metrics: float) -> None:
    """As if it had been recorded so in the first place: every number that hangs on another with
    it.
    """
    for table in ("metrics", "latest_metrics"):
        for name, value in metrics.items():
            store.sql(
                f"update {table} set value = ? where run_uuid = ? and key = ?", value, run_id, name
            )


def test_a_zeroed_student_is_not_selected_again(store: Store) -> None:
    assert not select(store).new_look
    zeroed(file_of(store, store.run_id, "weights.safetensors"))
    with pytest.raises(
        RecordError,
        match=r"file weights\.safetensors \(kdexp\.artifacts\) is [0-9a-f]{16} by its record and",
    ):
        select(store)
    store.sql("delete from tags where key = 'kdexp.artifacts'")  # as a former version recorded it
    with pytest.raises(
        RecordError,
        match=r"weights\.safetensors \(kdexp\.weights_sha256\) is [0-9a-f]{16} by its record and",
    ):
        select(store)
    with pytest.raises(RecordError, match=r"is not as it was recorded: .* kdexp reproduce"):
        export(store.run_id, "float32", None, store.settings, store.tracking)


def test_before_a_model_is_registered_its_accuracy_is_measured_again(store: Store) -> None:
    chosen = other_trial(store)
    low, high = wilson_interval(280, 287)
    forged(
        store, chosen.run_id, val_accuracy=280 / 287, val_accuracy_low=low, val_accuracy_high=high
    )
    with pytest.raises(RecordError) as error:
        select(store)
    assert (
        f"val_accuracy is recorded as 97.56%, its stored student has {chosen.val_accuracy:.2%}"
        in str(error.value)
    )
    run = store.tracking.read(chosen.run_id)
    assert not any("test" in name for name in run.metrics)
    assert not {"kdexp.selected", "kdexp.model_version", "kdexp.test_looked_at"} & run.tags.keys()
    assert [v.run_id for v in store.tracking.client.search_model_versions("name = 'tiny'")] == [
        store.run_id
    ]


def test_an_image_more_or_less_is_said_and_no_reason_to_stop(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    correct = round(store.tracking.read(store.run_id).metrics["val_accuracy"] * 287) + 1
    low, high = wilson_interval(correct, 287)
    forged(
        store,
        store.run_id,
        val_accuracy=correct / 287,
        val_accuracy_low=low,
        val_accuracy_high=high,
    )
    select(store)
    assert "1 of 287 images apart" in caplog.text


@pytest.mark.parametrize("name", ["parameters", "multiply_adds", "model_bytes", "activation_bytes"])
def test_a_student_that_is_said_to_be_smaller_is_not_selected(store: Store, name: str) -> None:
    chosen = other_trial(store)
    forged(store, chosen.run_id, **{name: 7.0})
    rule = Selection(accuracy_bar=0.05, size=name.replace("model_", ""))  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=f"{name} is recorded as 7, its student has"):
        promote(store.tracking.study("tiny"), rule, store.settings, store.tracking, CPU)


def test_a_selection_rule_that_was_changed_is_not_used(store: Store) -> None:
    study = store.tracking.study("tiny")
    file = file_of(store, study.run_id, "sweep.json")
    file.write_text(file.read_text().replace('"accuracy_bar": 0.05', '"accuracy_bar": 0.01'))
    with pytest.raises(
        RecordError,
        match=(
            r"sweep\.json is not the file that was recorded \(SHA-256 [0-9a-f]+…, recorded"
            r" [0-9a-f]+…"
        ),
    ):
        sweep_of(study, store.tracking)


def test_an_exported_file_that_was_changed_since_is_not_handed_out(
    store: Store, tmp_path: Path
) -> None:
    done = export(store.run_id, "int8", tmp_path / "a.onnx", store.settings, store.tracking)
    again = export(store.run_id, "int8", tmp_path / "b.onnx", store.settings, store.tracking)
    assert done.file.read_bytes() == again.file.read_bytes()
    comparison = compared(
        store.run_id, store.again_id, store.prepared, store.settings, store.tracking, CPU
    )
    assert comparison.identical, comparison.differences
    assert not comparison.notes
    file = file_of(store, store.run_id, "model.onnx")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordError, match="variants/int8/model.onnx"):
        export(store.run_id, "int8", tmp_path / "c.onnx", store.settings, store.tracking)
    assert not (tmp_path / "c.onnx").exists()
    file.write_bytes(done.file.read_bytes())
    for name in ("int8/model_bytes", "int8/parameters", "int8/val_accuracy"):
        before = store.tracking.read(store.run_id).metrics[name]
        forged(store, store.run_id, **{name: before / 2})
        assert name in store.named()
        forged(store, store.run_id, **{name: before})


def test_fresh_seeds_that_were_changed_confirm_nothing(store: Store) -> None:
    def confirmed() -> list:
        return list(
            confirm(
                store.tracking.study("tiny"),
                SWEEP.selection,
                2,
                False,
                store.settings,
                store.tracking,
                CPU,
            )
        )

    seeds = [event.run for event in confirmed() if isinstance(event, SeedDone)]
    assert len(seeds) == 2
    zeroed(file_of(store, seeds[1].run_id, "weights.safetensors"))
    with pytest.raises(RecordError, match=f"Run {seeds[1].run_id} is not as it was recorded"):
        confirmed()


@pytest.mark.parametrize(
    "change",
    ["trial_values set value = value / 2", "trial_params set param_value = param_value / 2"],
)
def test_what_optuna_holds_against_a_trials_own_run_is_said_as_a_study_goes_on(
    store: Store, change: str
) -> None:
    def wrong() -> list:
        return [
            e.trials
            for e in run_sweep(SWEEP, store.settings, store.tracking, CPU)
            if isinstance(e, Misremembered)
        ]

    assert wrong() == []
    with closing(sqlite3.connect(store.settings.stores / "optuna.db")) as database, database:
        ((trial,),) = database.execute("select trial_id from trials where number = 1")
        also = "and param_name = 'distillation.temperature'" if "params" in change else ""
        database.execute(f"update {change} where trial_id = ? {also}", (trial,))
    assert wrong() == [(1,)]
    with closing(sqlite3.connect(store.settings.stores / "optuna.db")) as database, database:
        database.execute(f"update {change.replace('/', '*')} where trial_id = ? {also}", (trial,))
    assert wrong() == []


def test_each_thing_that_optuna_holds_of_a_trial_is_compared_with_its_run(store: Store) -> None:
    study = open_study(SWEEP, store.settings, lambda mark: pytest.fail("there is one"))
    aimed = SWEEP.model_copy(
        update={"study": SWEEP.study.model_copy(update={"objective": "smallest", "repeats": 1})}
    )
    one = study.told()[1]
    (run,) = store.tracking.find("trial", {"kdexp.trial": "1"})
    accuracy, size = run.metrics["val_accuracy"], int(run.metrics["parameters"])
    curve = [value for _, value in store.tracking.history(run.run_id, "epoch/val_accuracy")]
    limits = constraints("smallest", size, accuracy, aimed.selection, 287)
    right = replace(one, values=(float(size),), limits=limits, curve=curve)
    assert one.recipe is not None
    wrong = {
        "value": replace(right, values=(size - 1.0,)),
        "limit": replace(right, limits={name: value - 1 for name, value in limits.items()}),
        "no such limit": replace(right, limits={**limits, "size": -1.0}),
        "curve": replace(right, curve=[*curve[:-1], 0.99]),
        "a longer curve": replace(right, curve=[*curve, 0.99]),
        "params": replace(right, recipe=one.recipe.replace({"training.learning_rate": 0.02})),
    }
    assert misremembered({1: right}, aimed, study.parent_run, store.tracking) == ()
    found = {
        what: misremembered({1: told}, aimed, study.parent_run, store.tracking)
        for what, told in wrong.items()
    }
    assert found == dict.fromkeys(wrong, (1,))


def test_a_study_or_teacher_run_that_was_deleted_is_said_and_no_reason_to_stop(
    store: Store,
) -> None:
    run = store.tracking.read(store.run_id)
    parent, teacher = run.tags["mlflow.parentRunId"], run.tags["kdexp.teacher_run"]
    for gone in (parent, teacher):
        store.sql("update runs set lifecycle_stage = 'deleted' where run_uuid = ?", gone)
    done = beside(store)
    assert done.identical, done.differences
    assert done.notes == (
        f"mlflow.parentRunId: run {parent} is not in this store",
        f"kdexp.teacher_run: run {teacher} is not in this store",
    )
    verify(
        run, recipe_of(run, store.tracking), AS_TRAINED, store.prepared.splits, store.tracking, CPU
    )


def test_where_the_weights_are_others_the_test_split_is_not_looked_at_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroed(file_of(store, store.again_id, "weights.safetensors"))
    monkeypatch.setattr("kdexp.select.reproduce.load_test", lambda *_: pytest.fail("a new look"))
    done = beside(store)
    assert [difference.what for difference in done.differences] == ["weights.safetensors"]
    assert done.notes[0].startswith(
        "test accuracy not measured again: the weights are not the same"
    )
    assert done.unknown == ()


def test_without_the_sum_of_its_weights_a_run_confirms_nothing(store: Store) -> None:
    store.sql("delete from tags where run_uuid = ? and key = 'kdexp.weights_sha256'", store.run_id)
    run = store.tracking.read(store.run_id)
    recipe = recipe_of(run, store.tracking)
    with pytest.raises(RecordError, match=r"kdexp.weights_sha256 is missing"):
        verify(run, recipe, AS_TRAINED, store.prepared.splits, store.tracking, CPU)


# --- records of other versions ---


def of_another_version(store: Store, *lacking: str) -> None:
    """The run as a version recorded it that did not know this: its source was another."""
    file = file_of(store, store.run_id, "environment.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": "0123456789abcdef"}))
    for name in ("kdexp.artifacts", *lacking):
        for table in ("metrics", "latest_metrics", "params", "tags"):
            store.sql(f"delete from {table} where run_uuid = ? and key = ?", store.run_id, name)


def beside(store: Store) -> Any:
    return compared(
        store.run_id, store.again_id, store.prepared, store.settings, store.tracking, CPU
    )


def test_a_metric_that_a_former_version_did_not_record_is_no_difference(store: Store) -> None:
    of_another_version(
        store,
        "epoch/val_loss",
        "val_samples",
        "kdexp.weights_sha256",
        "training.ema",
        "kdexp.logits_per",
    )
    done = beside(store)
    assert done.identical, done.differences
    assert {
        "val_loss",
        "val_samples",
        "student weights",
        "param training.ema",
        "tag kdexp.logits_per",
    } <= set(done.unrecorded)
    assert any(what.startswith("SHA-256 of config") for what in done.unrecorded)
    assert done.compared == 10, "five metrics of two epochs are left"
    assert done.weights == "", "nothing is said of what is not on record"
    assert [difference.what for difference in done.environment] == ["source"]


def test_a_metric_that_this_version_does_not_know_any_more_is_no_difference(store: Store) -> None:
    of_another_version(store)
    store.tracking.log_metrics(store.run_id, {"sharpness": 3.0, "epoch/grad_norm": 1.5})
    store.tracking.tag(store.run_id, {"kdexp.trial_id": "7"})
    done = beside(store)
    assert done.identical, done.differences
    assert set(done.unknown) == {"sharpness", "grad_norm", "tag kdexp.trial_id"}


def test_a_metric_of_some_epochs_only_is_a_difference_in_any_version(store: Store) -> None:
    of_another_version(store)
    store.sql(
        "delete from metrics where run_uuid = ? and key = 'epoch/loss' and step = 1", store.run_id
    )
    assert [difference.what for difference in beside(store).differences] == ["loss, epoch 1"]


def test_where_another_order_of_sums_moved_an_image_that_is_said_and_no_difference(
    store: Store,
) -> None:
    correct = round(store.tracking.read(store.run_id).metrics["val_accuracy"] * 287)
    for apart, identical in ((1, True), (5, False)):
        low, high = wilson_interval(correct + apart, 287)
        forged(
            store,
            store.run_id,
            val_accuracy=(correct + apart) / 287,
            val_accuracy_low=low,
            val_accuracy_high=high,
        )
        if apart == 1:
            assert not beside(store).identical, "the same code measures in the same order"
            of_another_version(store)
        done = beside(store)
        assert done.identical == identical
        assert any(note.startswith("val_accuracy: ") for note in done.notes) == identical


@pytest.mark.parametrize("name", ["config-c3d1cbb.json"])
def test_a_config_that_was_stored_by_a_former_version_gives_the_same_recipe(
    store: Store, name: str
) -> None:
    """The files are as they were written then; what they mean stands in today's words."""
    stored = (Path(__file__).parent / "witness" / name).read_text()
    file_of(store, store.run_id, "config.json").write_text(stored)
    recipe = recipe_of(store.tracking.read(store.run_id), store.tracking)
    how = {
        "distillation.alpha": 0.7,
        "distillation.temperature": 2.5,
        "distillation.loss": "decoupled",
    }
    then = {"distillation.scale_by_t_squared": True}  # the default of then, whatever it is now
    assert recipe == tiny_sweep().recipe.replace({**how, **then, "training.ema": 0.99})
