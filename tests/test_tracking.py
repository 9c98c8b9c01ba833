"""Every epoch's metrics reach MLflow, in few requests, however a run ends; on a real store."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import CPU, tiny_sweep
from mlflow.exceptions import MlflowException
from sqlalchemy import event
from sqlalchemy.orm import Session

from kdexp.distill.train import EPOCH_METRICS, EpochReport
from kdexp.files import write_ahead
from kdexp.patience import whole
from kdexp.runs import recording as runs
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import prepare
from kdexp.runs.recording import Entry, Recording, recorded
from kdexp.runs.tracking import EpochMetrics, Tracking, TrackingError, _may_pass
from kdexp.settings import Settings
from kdexp.workers.work import Ended, Epoch, Prepared

RECIPE = tiny_sweep().recipe


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, empty_store) -> Prepared:
    """Data and teacher, made once: what is tested here is where the metrics go."""
    settings = Settings(stores=tmp_path_factory.mktemp("prepared"))
    tracking = Tracking(settings)
    making = prepare(RECIPE, Bench(settings, tracking, CPU, tracking.experiment("x")))
    while True:
        try:
            next(making)
        except StopIteration as end:
            return end.value


@contextmanager
def a_run(prepared: Prepared, tracking: Tracking) -> Iterator[Recording]:
    bench = Bench(Settings(), tracking, CPU, tracking.experiment("x"))
    with recorded(RECIPE, prepared, bench, Entry("train", "x")) as recording:
        yield recording


def an_epoch(epoch: int) -> EpochReport:
    return EpochReport(
        epoch=epoch, epochs=1000, loss=1 / epoch, distillation_loss=2.0, student_loss=3.0, val_accuracy=0.5, val_correct=9,
        val_loss=1.0, learning_rate=0.1, seconds=0.01, weights=None,
    )  # fmt: skip


def record(recording: Recording, *epochs: int) -> None:
    for epoch in epochs:
        report = an_epoch(epoch)
        row = {"epoch": epoch, "time_ms": epoch} | {
            name: getattr(report, name) for name in EPOCH_METRICS
        }
        recording.take(Epoch(recording.run_id, report, row, safe=epoch))
    recording.ended = Ended(0, 0, recording.run_id, "complete", None, 0, 0, {})


def epochs_in_store(tracking: Tracking, run_id: str) -> list[int]:
    """The epochs that MLflow holds, the same for each metric."""
    steps = {
        name: [step for step, _ in tracking.history(run_id, f"epoch/{name}")]
        for name in EPOCH_METRICS
    }
    assert len(set(map(tuple, steps.values()))) == 1
    return steps["loss"]


@pytest.fixture
def requests(tracking, monkeypatch) -> list[int]:
    """How many per-epoch metrics each request to MLflow carried."""
    real, carried = tracking.client.log_batch, []

    def counting(run_id, metrics=(), **rest):
        carried.append(sum(metric.key.startswith("epoch/") for metric in metrics))
        return real(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(tracking.client, "log_batch", counting)
    return carried


def test_every_epoch_is_in_the_store_after_a_normal_end(prepared, tracking) -> None:
    with a_run(prepared, tracking) as running:
        trained = [report.epoch for report in running.epochs()]
    assert tracking.read(running.run_id).status == "FINISHED"
    assert epochs_in_store(tracking, running.run_id) == trained == [1, 2, 3]


def test_every_epoch_is_in_the_store_after_pruning(prepared, tracking) -> None:
    with a_run(prepared, tracking) as running:
        list(running.epochs(last=2))
    run = tracking.read(running.run_id)
    assert (run.status, run.tags["kdexp.state"]) == ("FINISHED", "pruned")
    assert epochs_in_store(tracking, running.run_id) == [1, 2]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")]
)
def test_every_epoch_is_in_the_store_after_an_interrupt_or_a_failure(
    prepared, tracking, error, status
) -> None:
    def stopped_in_the_middle(running: Recording) -> None:
        for report in running.epochs():
            if report.epoch == 2:
                raise error

    with pytest.raises(error), a_run(prepared, tracking) as running:
        stopped_in_the_middle(running)
    assert tracking.read(running.run_id).status == status
    assert epochs_in_store(tracking, running.run_id) == [1, 2]


def test_many_epochs_take_few_requests(prepared, tracking, requests, monkeypatch) -> None:
    monkeypatch.setattr(runs, "DELIVER_SECONDS", 1000.0)
    with a_run(prepared, tracking) as running:
        record(running, *range(1, 301))
    assert epochs_in_store(tracking, running.run_id) == list(range(1, 301))
    carried = [count for count in requests if count]
    assert sum(carried) == 300 * len(EPOCH_METRICS)
    assert len(carried) <= 4, "the first epoch at once, then batches"
    assert max(carried) <= 1000, "MLflow's limit"


def test_a_long_training_is_seen_before_its_end(prepared, tracking, monkeypatch) -> None:
    monkeypatch.setattr(runs, "DELIVER_SECONDS", 1000.0)
    with a_run(prepared, tracking) as running:
        record(running, 1, 2, 3)
        assert epochs_in_store(tracking, running.run_id) == [1], "close upon each other they wait"
        running.delivered -= 1000.0  # as if so many seconds had passed
        record(running, 4)
        assert epochs_in_store(tracking, running.run_id) == [1, 2, 3, 4]
        assert tracking.read(running.run_id).status == "RUNNING"


def test_a_delivery_that_is_repeated_stores_nothing_twice(prepared, tracking, settings) -> None:
    run_id = tracking.start(tracking.experiment("x"), "train", "x", {}, {})
    epochs = [
        EpochMetrics(epoch, 1_700_000_000_000 + epoch, {"epoch/loss": 1 / epoch})
        for epoch in (1, 2)
    ]
    tracking.log_epochs(run_id, epochs)
    tracking.log_epochs(run_id, epochs)
    with closing(sqlite3.connect(settings.stores / "mlflow.db")) as database:
        assert database.execute("select count(*) from metrics").fetchone() == (2,)


@pytest.mark.parametrize("from_epoch", [1, 2, 4])
def test_a_store_that_fails_in_the_middle_is_heard_of_and_nothing_is_finished(
    prepared, tracking, monkeypatch, from_epoch
) -> None:
    real = tracking.client.log_batch

    def failing(run_id, metrics=(), **rest):
        if any(metric.key.startswith("epoch/") and metric.step >= from_epoch for metric in metrics):
            raise MlflowException("disk I/O error")
        return real(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(tracking.client, "log_batch", failing)
    with pytest.raises(TrackingError, match="disk I/O error"), a_run(prepared, tracking) as running:
        record(running, 1, 2, 3, 4)
    run = tracking.read(running.run_id)
    assert run.status == "FAILED"
    assert "disk I/O error" in run.tags["kdexp.error"]


def test_what_a_failing_store_refused_is_delivered_once_it_answers_again(
    prepared, tracking, monkeypatch
) -> None:
    monkeypatch.setattr(runs, "DELIVER_SECONDS", 0.0)
    real, failures = tracking.client.log_batch, iter([None, MlflowException("disk I/O error")])

    def failing_once(run_id, metrics=(), **rest):
        if any(metric.key.startswith("epoch/") for metric in metrics) and (
            error := next(failures, None)
        ):
            raise error
        return real(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(tracking.client, "log_batch", failing_once)
    with pytest.raises(TrackingError), a_run(prepared, tracking) as running:
        record(running, 1, 2, 3)
    assert tracking.read(running.run_id).status == "FAILED"
    assert epochs_in_store(tracking, running.run_id) == [1, 2]


def test_the_embedded_store_is_written_ahead_and_the_file_alone_is_whole(
    tracking, settings, tmp_path
) -> None:
    """conftest copies mlflow.db while the process that made it still has it open."""
    with closing(sqlite3.connect(settings.stores / "mlflow.db")) as database:
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
    made = Settings(stores=tmp_path / "made")
    Tracking(made)
    copy = tmp_path / "copy.db"
    copy.write_bytes((made.stores / "mlflow.db").read_bytes())
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        assert database.execute("select count(*) from experiments").fetchone() == (1,)


def test_a_database_in_use_stays_as_it_is(tmp_path: Path, monkeypatch) -> None:
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: real(path, timeout=0))
    with closing(real(tmp_path / "x.db", isolation_level=None)) as database:
        database.execute("create table numbers (number)")
        database.execute("begin exclusive")
        write_ahead(tmp_path / "x.db")
        database.execute("rollback")
        assert database.execute("pragma journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize(
    "busy",
    ["QueuePool limit of size 5 overflow 10 reached", "FATAL: sorry, too many clients already"],
)
def test_a_busy_store_is_waited_for_though_its_server_calls_that_a_bad_request(busy: str) -> None:
    refused = (
        "API request to endpoint /api/2.0/mlflow/runs/search failed with error code 400 != 200."
        " Response body: "
    )
    assert _may_pass(
        MlflowException(f"BAD_REQUEST: (sqlalchemy.exc.TimeoutError) {busy}, connection timed out")
    )
    assert _may_pass(MlflowException(f"{refused}'BAD_REQUEST: {busy}'"))
    assert not _may_pass(MlflowException(f"{refused}'BAD_REQUEST: no such parameter'"))


def test_a_stop_in_a_transaction_is_heard_after_it(tracking: Tracking) -> None:
    """Else the database stays locked, and what is to be closed waits for that."""
    run = tracking.start(tracking.experiment("stopped"), "trial", "one", {}, {})
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    event.listen(Session, "after_flush_postexec", stop, once=True)
    with pytest.raises(KeyboardInterrupt):
        tracking.tag(run, {"first": "said"})
    assert tracking.read(run).tags["first"] == "said"
    tracking.tag(run, {"second": "said"})
    assert tracking.read(run).tags["second"] == "said"


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_whole_hears_the_first_stop_at_its_end_and_a_second_at_once(fails: bool) -> None:
    said = []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), whole():
        os.kill(os.getpid(), signal.SIGINT)
        said.append("whole")
        if fails:
            raise ValueError("it failed besides")
    with pytest.raises(KeyboardInterrupt), whole():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        said.append("not whole")
    assert said == ["whole"]
    with whole():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
