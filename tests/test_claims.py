"""Claims among commands: taken once, lost only by who is gone, refused to who has lost them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy
from conftest import tiny_sweep, until
from faults.servers import Postgresql
from filelock import FileLock
from sqlalchemy.exc import OperationalError

from kdexp.distill.models import Size
from kdexp.runs.outcome import Outcome
from kdexp.runs.schema import reaching
from kdexp.search import claims
from kdexp.search.claims import AWAY, Claimant, ClaimLost, network_drive
from kdexp.search.study import OpenStudy, check_study, open_study
from kdexp.settings import Settings

GRACE = 1.5
SHORT = {"GRACE_SECONDS": GRACE, "KEEP_SECONDS": 0.1, "POLL_SECONDS": 0.05}


@pytest.fixture(scope="module")
def server() -> Iterator[Postgresql]:
    server = Postgresql()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def postgresql(server: Postgresql) -> Iterator[Postgresql]:
    """A PostgreSQL that runs, with a fresh database."""
    with suppress(Exception):
        server.start()
    name = f"fresh{time.monotonic_ns()}"
    base = server.url.rpartition("/")[0]
    engine = sqlalchemy.create_engine(server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"create database {name}"))
    engine.dispose()
    whole, server.url = server.url, f"{base}/{name}"
    yield server
    server.url = whole


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both engines."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql").url
    return f"sqlite:///{tmp_path / 'shared.db'}?timeout=60"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT.items():
        monkeypatch.setattr(claims, name, value)


def machine(folder: Path, storage: str) -> Settings:
    """What a command of a machine of its own has: nothing but the storage is shared."""
    return Settings(stores=folder, storage=storage)


def opened(settings: Settings) -> OpenStudy:
    sweep = tiny_sweep()
    sweep = sweep.model_copy(
        update={"study": sweep.study.model_copy(update={"trials": 40, "sampler": "random"})}
    )
    check_study(sweep, settings)
    return open_study(sweep, settings, str)


def nothing(number: int) -> None:
    """Of no trial is it known how it ended."""


ENDED = Outcome("x", "complete", Size(9, 9, 9), 0.5, 287, 1, 1)


# --- a claim ---


def test_of_many_that_take_a_claim_at_once_one_has_it(storage: str, tmp_path: Path) -> None:
    """As the old takeover did not promise: it set an attribute, and so did everybody else."""
    with Claimant(machine(tmp_path / "gone", storage)) as gone:
        held = gone.take("trial 1", None)
        assert held is not None
        gone.hand_back(held, "released")
    rivals = [Claimant(machine(tmp_path / str(number), storage)) for number in range(6)]
    seen = [rival.look(["trial 1"])["trial 1"] for rival in rivals]
    assert {standing.state for standing in seen} == {"free"}
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda at: rivals[at].take("trial 1", seen[at].claim), range(6)))
    winners = [held for held in taken if held]
    assert [held.token for held in winners] == [2]
    assert sum(rival.owns(winners[0]) for rival in rivals) == 1
    for rival in rivals:
        rival.__exit__()


def test_of_many_that_claim_what_nobody_has_one_has_it(storage: str, tmp_path: Path) -> None:
    rivals = [Claimant(machine(tmp_path / str(number), storage)) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda rival: rival.take("trial 1", None), rivals))
    assert sum(held is not None for held in taken) == 1
    for rival in rivals:
        rival.__exit__()


def test_a_result_is_refused_to_who_has_lost_the_claim(storage: str, tmp_path: Path) -> None:
    with (
        Claimant(machine(tmp_path / "one", storage)) as one,
        Claimant(machine(tmp_path / "two", storage)) as two,
    ):
        held = one.take("trial 1", None)
        assert held is not None
        with one.fenced(held):
            pass
        # what follows is a thief's work, past the rules
        one._locks.hold, one._mine = lambda: None, set()
        with one._locks.transaction() as connection:
            assert claims._set(connection, "trial 1", 1, token=2, claimant=two.name)
        assert not one.owns(held)
        with pytest.raises(ClaimLost), one.fenced(held):
            raise AssertionError("nothing of this may be told")


def test_a_claim_whose_answer_was_lost_is_free_to_its_own_claimant(
    storage: str, tmp_path: Path
) -> None:
    with Claimant(machine(tmp_path, storage)) as claimant:
        claimant.take("trial 1", None)
        assert claimant.look(["trial 1"])["trial 1"].state == "held"
        claimant._mine.clear()
        assert claimant.look(["trial 1"])["trial 1"].state == "free"


@pytest.mark.postgresql
def test_a_claim_cannot_pass_on_while_its_result_is_told(
    postgresql: Postgresql, tmp_path: Path
) -> None:
    """Not even to one that would take it without asking who lives."""
    url, done = postgresql.url, threading.Event()
    with (
        Claimant(machine(tmp_path / "one", url)) as one,
        Claimant(machine(tmp_path / "two", url)) as two,
    ):
        held = one.take("trial 1", None)
        assert held is not None
        known = two.look(["trial 1"])["trial 1"].claim
        two._locks.stays_free = lambda *_: True  # type: ignore[method-assign]

        def steal() -> None:
            two.take("trial 1", known)
            done.set()

        with one.fenced(held):
            thread = threading.Thread(target=steal)
            thread.start()
            assert not done.wait(0.5), "it waits for the row"
        thread.join()
        assert not one.owns(held), "only afterwards"


# --- who lives ---


def holding(settings: Settings, names: list[str], ready, grace: dict) -> None:
    for name, value in grace.items():
        setattr(claims, name, value)
    with Claimant(settings) as claimant:
        for name in names:
            claimant.take(name, None)
        ready.set()
        time.sleep(600)


def test_what_was_killed_is_free_and_what_lives_is_not(storage: str, tmp_path: Path) -> None:
    """kill -9 of one that holds several claims."""
    context = multiprocessing.get_context("spawn")
    ready, names = context.Event(), ["trial 1", "trial 2", "trial 3"]
    process = context.Process(
        target=holding, args=(machine(tmp_path / "one", storage), names, ready, SHORT), daemon=True
    )
    process.start()
    assert ready.wait(60)
    with Claimant(machine(tmp_path / "two", storage)) as two:
        for _ in range(5):
            assert {standing.state for standing in two.look(names).values()} == {"held"}
            time.sleep(GRACE / 4)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        until(
            lambda: {standing.state for standing in two.look(names).values()} == {"free"},
            "they are free",
            20,
        )
        for name, standing in two.look(names).items():
            assert two.take(name, standing.claim) is not None


def test_asking_who_lives_does_not_disturb_another_who_asks(storage: str, tmp_path: Path) -> None:
    """A look takes a lock file's lock for a moment; two that looked at once each saw the other as
    its holder.
    """
    with Claimant(machine(tmp_path / "gone", storage)) as gone:
        gone.take("trial 1", None)
    observers = [Claimant(machine(tmp_path / str(number), storage)) for number in range(4)]
    time.sleep(0.01)

    def looks(observer: Claimant) -> set[str]:
        return {observer.look(["trial 1"])["trial 1"].state for _ in range(20)}

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(looks, observers))
    assert "held" not in seen
    for observer in observers:
        observer.__exit__()


@pytest.mark.postgresql
@pytest.mark.parametrize("seconds", [0.0, GRACE / 2, 3 * GRACE])
def test_an_outage_takes_nothing_from_the_living(
    postgresql: Postgresql, tmp_path: Path, seconds: float
) -> None:
    """Of no time, less and more than the grace. The old lease had run out for everybody when the
    server was back.
    """
    url = postgresql.url
    with (
        Claimant(machine(tmp_path / "one", url)) as one,
        Claimant(machine(tmp_path / "two", url)) as two,
    ):
        held = one.take("trial 1", None)
        assert held is not None
        assert two.look(["trial 1"])["trial 1"].state == "held"
        postgresql.kill()
        with pytest.raises(AWAY):
            two.look(["trial 1"])
        time.sleep(seconds)
        postgresql.start()
        deadline, seen = time.monotonic() + 3 * GRACE, set()
        while time.monotonic() < deadline:
            with suppress(*AWAY):
                seen.add(two.look(["trial 1"])["trial 1"].state)
            time.sleep(0.02)
        assert "free" not in seen
        assert two.look(["trial 1"])["trial 1"].state == "held", "it has taken its lock again"
        assert one.owns(held)
        with one.fenced(held):
            pass


@pytest.mark.postgresql
def test_two_breaks_of_a_connection_are_not_taken_for_one_long_one(
    postgresql: Postgresql, tmp_path: Path
) -> None:
    """Whoever looks seldom sees a living claimant without its lock twice, and it was there in
    between.
    """
    url = postgresql.url
    with (
        Claimant(machine(tmp_path / "one", url)) as one,
        Claimant(machine(tmp_path / "two", url)) as two,
    ):
        one.take("trial 1", None)
        for _ in range(3):
            with one._locks._mutex:  # type: ignore[attr-defined]
                one._locks._drop()  # type: ignore[attr-defined]
                states = iter(lambda: two.look(["trial 1"])["trial 1"].state, "doubtful")
                assert set(states) <= {"held"}, (
                    "its lock has been free for a moment, not since the last time"
                )
            until(lambda: one._locks._held, "it is back", 5)  # type: ignore[attr-defined]
            time.sleep(1.2 * GRACE)


@pytest.mark.postgresql
def test_a_former_connection_that_the_server_still_holds_is_ended(
    postgresql: Postgresql, tmp_path: Path
) -> None:
    with Claimant(machine(tmp_path, postgresql.url)) as one:
        session = one._locks
        until(lambda: session._held, "it holds its lock", 5)  # type: ignore[attr-defined]
        with session._mutex:  # type: ignore[attr-defined]
            former, session._connection, session._held = session._connection, None, False  # type: ignore[attr-defined]
        until(lambda: session._held, "its new connection does", 5)  # type: ignore[attr-defined]
        with pytest.raises(OperationalError):
            former.execute(sqlalchemy.select(1))
        former.invalidate()


# --- what is reached, and how often ---


def test_a_server_that_is_gone_without_a_word_is_noticed() -> None:
    told = reaching("postgresql://me@host/db")
    assert told["connect_timeout"] == 10
    assert told["tcp_user_timeout"] == 14_000
    assert told["keepalives_idle"] + told["keepalives_interval"] * told["keepalives_count"] == 14
    assert 14 + 10 + 2 < 30, "a living claimant is back within the grace"
    assert "connect_timeout" not in reaching("postgresql://me@host/db?connect_timeout=3"), (
        "what the URL says is left"
    )
    assert reaching("sqlite:///x.db") == {}


@pytest.mark.postgresql
def test_a_command_has_three_connections_at_most(postgresql: Postgresql, tmp_path: Path) -> None:
    """Whatever its threads do at once."""
    settings = machine(tmp_path, postgresql.url)
    watch = sqlalchemy.create_engine(postgresql.url, isolation_level="AUTOCOMMIT")
    count = sqlalchemy.text(
        "select count(*) from pg_stat_activity where datname = current_database() and pid <>"
        " pg_backend_pid()"
    )
    study, most, over = opened(settings), [0], threading.Event()

    def counting() -> None:
        with watch.connect() as connection:
            while not over.is_set():
                most[0] = max(most[0], int(connection.execute(count).scalar_one()))
                time.sleep(0.01)

    thread = threading.Thread(target=counting)
    thread.start()
    with Claimant(settings) as claimant:

        def work(_: int) -> None:
            for _ in range(3):
                trial = study.next_trial(claimant, nothing)
                assert trial is not None
                assert study.owns(trial)
                study.tell(trial.number, ENDED)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
    over.set()
    thread.join()
    watch.dispose()
    assert 1 <= most[0] <= 3
    assert study.done == 6


@pytest.mark.postgresql
def test_requests_do_not_grow_with_claimants(postgresql: Postgresql, tmp_path: Path) -> None:
    def requests(others: int) -> int:
        living = [
            Claimant(machine(tmp_path / str(number), postgresql.url)) for number in range(others)
        ]
        names = [f"trial {number}" for number in range(others)]
        for claimant, name in zip(living, names):
            claimant.__enter__()
            claimant.take(name, claimant.look([name])[name].claim)
        counted = [0]
        with Claimant(machine(tmp_path / "observer", postgresql.url)) as observer:
            observer.look(names)
            engine = observer._locks._engine  # type: ignore[attr-defined]
            observer._locks._stop.set()  # type: ignore[attr-defined]
            sqlalchemy.event.listen(
                engine, "before_cursor_execute", lambda *_: counted.__setitem__(0, counted[0] + 1)
            )
            assert {standing.state for standing in observer.look(names).values()} == {"held"}
        for claimant in living:
            claimant.__exit__()
        return counted[0]

    assert requests(8) == requests(2) <= 4


# --- studies ---


def test_two_commands_with_one_sqlite_storage_and_two_stores_leave_each_other_their_trials(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = machine(tmp_path / "one", url), machine(tmp_path / "two", url)
    first, second = opened(one), opened(two)
    with Claimant(one) as here, Claimant(two) as there:
        mine = first.next_trial(here, nothing)
        assert mine is not None
        assert second.others(there) == 1
        theirs = second.next_trial(there, nothing)
        assert theirs is not None
        assert (mine.number, theirs.number) == (0, 1)
        assert first.owns(mine)
        here.__exit__()  # as its system does for one that dies
        taken = second.next_trial(there, nothing)
        assert taken is not None
        assert (taken.number, taken.retried, taken.broken) == (
            0,
            True,
            True,
        ), "at once: there is nothing to wait for"
        assert not first.owns(mine)
        with pytest.raises(ClaimLost):
            first.tell(mine.number, ENDED)
        second.tell(taken.number, ENDED)
    assert not list((tmp_path / "one").rglob("*.lock")) or not list(
        (tmp_path / "one" / "claims").glob("*")
    )


def test_a_trial_that_is_claimed_by_nobody_is_given_time_and_then_taken(
    storage: str, tmp_path: Path
) -> None:
    """Its asker died, or is about to claim it: not judged by when it says that it began, in
    whatever time zone.
    """
    one, two = machine(tmp_path / "one", storage), machine(tmp_path / "two", storage)
    study, other = opened(one), opened(two)
    asked = study._study.ask()
    with Claimant(two) as claimant:
        since = time.monotonic()
        if storage.startswith("postgresql"):
            new = other.next_trial(claimant, nothing)
            assert new is not None
            assert (new.number, new.retried) == (1, False)
            assert other.others(claimant) == 1, "whoever asked for it may live"
            until(lambda: other.others(claimant) == 0, "nobody has claimed it", 20)
            assert time.monotonic() - since > GRACE
        taken = other.next_trial(claimant, nothing)
        assert taken is not None
        assert (taken.number, taken.retried, taken.broken) == (asked.number, True, False)


@pytest.mark.parametrize(("left", "broken"), [("released", False), ("failed", True), ("a@b", True)])
def test_a_study_of_an_earlier_version_goes_on(tmp_path: Path, left: str, broken: bool) -> None:
    settings = machine(tmp_path, f"sqlite:///{tmp_path / 'old.db'}")
    study = opened(settings)
    study._study.ask().set_user_attr("worker", left)
    with Claimant(settings) as claimant:
        trial = study.next_trial(claimant, nothing)
        assert trial is not None
        assert (trial.number, trial.retried, trial.broken) == (0, True, broken)


def test_a_trial_that_was_told_by_who_is_gone_is_not_trained_again(
    storage: str, tmp_path: Path
) -> None:
    """It had ended when its claim was looked at, and the trials had been read before."""
    one, two = machine(tmp_path / "one", storage), machine(tmp_path / "two", storage)
    study, other = opened(one), opened(two)
    with Claimant(one) as here, Claimant(two) as there:
        trial = study.next_trial(here, nothing)
        assert trial is not None
        before = other._trials()
        study.tell(trial.number, ENDED)
        study._claims[trial.number] = None  # type: ignore[assignment]
        here.__exit__()
        other._under_way(there)
        time.sleep(1.2 * GRACE)
        real, other._trials = other._trials, lambda: before  # type: ignore[method-assign]
        stale = other._under_way(there)
        other._trials = real  # type: ignore[method-assign]
        assert not any(other._take_over(frozen, standing, there) for frozen, standing in stale)


def test_a_network_drive_is_recognised_by_the_list_of_mounts() -> None:
    mounts = (
        "/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/me/disk ext4 rw"
        " 0 0\n"
    )
    assert network_drive(Path("/home/me/mlruns"), mounts) == "nfs4"
    assert network_drive(Path("/home/me/disk/mlruns"), mounts) == ""
    assert network_drive(Path("/var/mlruns"), mounts) == ""
    assert network_drive(Path("/var/mlruns"), "") == ""


def test_on_a_network_drive_it_is_said_that_locks_may_not_be_seen(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(claims, "network_drive", lambda folder, mounts: "nfs4")
    with Claimant(machine(tmp_path / "one", f"sqlite:///{tmp_path / 'shared.db'}")):
        pass
    assert f"{tmp_path} is on a network drive (nfs4)" in caplog.text


@pytest.mark.postgresql
def test_with_a_server_nothing_rests_on_locks_in_a_shared_stores(
    postgresql: Postgresql, tmp_path: Path, monkeypatch
) -> None:
    """As on a network drive whose locks do not cross machines: every lock file seems free."""
    nothing_held = lambda self: setattr(self._context, "lock_file_fd", None)  # noqa: E731
    monkeypatch.setattr(
        FileLock, "_acquire", lambda self: setattr(self._context, "lock_file_fd", 0)
    )
    monkeypatch.setattr(FileLock, "_release", nothing_held)
    settings = machine(tmp_path / "stores", postgresql.url)
    first, second = opened(settings), opened(settings)
    with Claimant(settings) as here, Claimant(settings) as there:
        mine, theirs = first.next_trial(here, nothing), second.next_trial(there, nothing)
        assert mine is not None
        assert theirs is not None
        deadline = time.monotonic() + 2 * GRACE
        while time.monotonic() < deadline:
            assert (first.others(here), second.others(there)) == (1, 1)
            time.sleep(0.1)
        third = second.next_trial(there, nothing)
        assert third is not None
        assert [trial.number for trial in (mine, theirs, third)] == [0, 1, 2]


# --- names ---


def test_what_is_locked_by_name_is_done_by_one_at_a_time(storage: str, tmp_path: Path) -> None:
    """By commands of several machines: the old lock was a file of one --stores."""
    inside, most = [0], [0]

    def work(number: int) -> None:
        with (
            Claimant(machine(tmp_path / str(number), storage)) as claimant,
            claimant.lock("test of study 1") as ours,
        ):
            assert ours
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1]


def test_who_is_not_patient_hears_that_another_is_at_it(storage: str, tmp_path: Path) -> None:
    with (
        Claimant(machine(tmp_path / "one", storage)) as one,
        Claimant(machine(tmp_path / "two", storage)) as two,
    ):
        with one.lock("seed 1"), two.lock("seed 1", patient=False) as ours:
            assert not ours
        with two.lock("seed 1", patient=False) as ours:
            assert ours
