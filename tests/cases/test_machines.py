"""Machines as they are: locales, closed streams, ~, no home, a deep TMPDIR, no memory, a reader or
a terminal that goes.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import until
from system.conftest import command, environment, runs, started, trials, wait_for_trial

from cases.conftest import Case, one_line
from kdexp import KdexpError, cli
from kdexp.files import write_atomically
from kdexp.settings import in_one_line
from kdexp.surroundings import NO_HOME, expanded, expanded_url, homeless, open_streams
from kdexp.workers.processes import _make_room_for_sockets

# --- what is printed and written ---


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_no_character_is_too_much_for_a_terminal(monkeypatch, encoding: str) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    open_streams()
    print("α 0.3 · 92.1 % ± 0.2 … é 字 \udce4 → T²")
    screen.flush()
    shown = screen.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "0.3" in shown
    if encoding == "ascii":
        assert shown == "alpha 0.3 - 92.1 % +/- 0.2 ... \\xe9 \\u5b57 \\udce4 -> T^2\n"


def test_a_sweep_in_the_poorest_of_shells_does_all_that_it_does_elsewhere(
    case: Case, tmp_path: Path
) -> None:
    """ASCII only, a TMPDIR too deep for sockets, no stdin, warnings that are errors, threads that
    are no number, two workers; then the same store in UTF-8.
    """
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    poor = {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "TMPDIR": str(deep),
        "PYTHONWARNINGS": "error",
        "OMP_NUM_THREADS": "abc",
        "KDEXP_STORES": "",
    }
    case.write(
        "fünf.yaml",
        (tmp_path / "tiny.yaml").read_text().replace("name: tiny", "name: fünf  # für alle"),
    )
    closed = ["bash", "-c", 'exec "$@" <&-', "bash"]
    done = case.alone("sweep", "fünf.yaml", "--workers", "2", env=poor, wrapped=closed)
    assert done.returncode == 0, done.stderr
    assert "alpha 0 " in done.stdout
    assert "Selected: trial" in done.stdout
    assert runs(tmp_path, "trial") == {"FINISHED": 3}
    assert "Run ID:" in case.kd("select", "fünf").stdout


def test_what_is_printed_into_closed_streams_ends_in_no_file(case: Case, tmp_path: Path) -> None:
    done = case.alone(
        "train", "tiny.yaml", wrapped=["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"]
    )
    assert done.returncode == 0
    assert runs(tmp_path, "train") == {"FINISHED": 1}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_written_has_the_mode_that_the_umask_says(
    tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / ("n" * 255), lambda path: path.write_text("x"))
    finally:
        os.umask(before)
    assert (tmp_path / ("n" * 255)).stat().st_mode & 0o777 == mode


# --- where things are ---


def test_a_tilde_is_the_home_folder_in_flags_variables_and_sweep_files(
    case: Case, tmp_path: Path, monkeypatch
) -> None:
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    case.own()
    case.pictures("home/images/shots", 8)
    (tmp_path / "mlruns").rename(home / "mlruns")
    (tmp_path / "own.yaml").rename(home / "own.yaml")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KDEXP_STORES", "~/mlruns")
    for arguments in (["--data-dir=~/images"], ["--set", "data.path=~/images/shots"]):
        assert case.kd("train", "~/own.yaml", *arguments).returncode == 0
    one_line(
        case.kd("train", "~/own.yaml", "--data-dir=~/images", "--set", "teacher.weights=~/t.pt"),
        f"{home}/t.pt: no such",
    )
    one_line(
        case.kd("select", "x", "--stores=~nobody-of-that-name/mlruns"),
        "~nobody-of-that-name stands for a home folder",
    )
    assert (
        expanded_url("sqlite:///~/x/optuna.db?timeout=60")
        == f"sqlite:///{home}/x/optuna.db?timeout=60"
    )
    assert expanded_url("http://~/x") == "http://~/x"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("~")]


def test_what_is_called_like_a_home_and_is_there_is_meant(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~backup.yaml").write_text("")
    assert expanded("~backup.yaml") == Path("~backup.yaml")
    assert expanded("./~") == Path("./~")


def test_a_user_without_a_home_is_told_so_where_one_is_needed(monkeypatch) -> None:
    # no HOME, no entry in /etc/passwd
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("HOME", "x")
    homeless()
    assert os.environ["HOME"] == NO_HOME, "libraries ask for one as they are imported"
    monkeypatch.undo()
    monkeypatch.setenv("HOME", NO_HOME)
    with pytest.raises(
        KdexpError,
        match=r"~/x: ~ stands for a home folder, and there is none here \(HOME is not set\)",
    ):
        expanded("~/x")


def test_a_working_folder_that_was_deleted_is_said_and_help_is_given_all_the_same(
    case: Case, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "Usage: kdexp" in case.kd("--help").stdout
    assert "Usage: kdexp select" in case.kd("select", "--help").stdout
    assert case.kd("--version").returncode == 0
    one_line(
        case.kd("select", "tiny", "--stores", str(tmp_path / "mlruns")),
        "has been deleted or replaced: go to one that is there",
    )


def test_a_temporary_folder_that_is_not_there_or_too_deep_is_done_without(
    tmp_path: Path, monkeypatch
) -> None:
    from multiprocessing import process, util

    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setitem(process.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    _make_room_for_sockets()
    assert len(util.get_temp_dir()) < 60
    assert tempfile.tempdir == str(deep), "for all else it stays what the user chose"
    assert not list(deep.iterdir())


def test_a_stores_folder_that_cannot_be_made_is_one_line(case: Case) -> None:
    one_line(
        case.kd("train", "tiny.yaml", "--stores", "/proc/mlruns"),
        "/proc/mlruns",
        "choose another folder with --stores",
    )
    one_line(case.kd("sweep", "tiny.yaml", "--workers", "0"), "--workers", "1")


# --- memory ---


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"
            " tried to allocate 9 bytes"
        ),
        RuntimeError("can't start new thread"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_no_memory_is_called_so(error: Exception) -> None:
    assert in_one_line(error).startswith("No memory is left")
    assert "fewer --workers" in in_one_line(error)


def test_under_a_memory_limit_a_command_says_so_in_one_line(case: Case) -> None:
    limited = ["bash", "-c", 'ulimit -v 900000; exec "$@"', "bash"]
    one_line(case.alone("train", "tiny.yaml", wrapped=limited), "No memory is left", "ulimit -v")


# --- readers and terminals that go away ---


def test_a_message_that_begins_with_stopped_is_no_interruption(case: Case, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise KdexpError("Stopped clocks are right twice a day")

    monkeypatch.setattr(cli, "_load", fails)
    assert case.kd("train", "tiny.yaml").returncode == 1


def test_a_reader_that_goes_away_stops_the_sweep_and_the_same_command_goes_on(
    case: Case, tmp_path: Path
) -> None:
    process = started(tmp_path, "--trials", "4")
    wait_for_trial(process, 0)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(60) == 130
    assert errors.startswith(
        "kdexp: Stopped: nobody reads the output any more. Continue with the same command: kdexp"
        " sweep"
    )
    assert len(errors.splitlines()) == 1
    assert runs(tmp_path, "trial")["RUNNING"] == runs(tmp_path, "study")["RUNNING"] == 0
    again = case.alone("sweep", "tiny.yaml", "--set", "training.epochs=40", "--trials", "4")
    assert again.returncode == 0, again.stderr
    assert set(trials(tmp_path).values()) == {1}


def test_help_for_a_reader_that_is_not_there_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("--help"),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment(),
    )
    os.close(writer)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_terminal_that_is_closed_stops_all_and_the_same_command_goes_on(
    case: Case, tmp_path: Path
) -> None:
    """The system sends the hang-up to every process of the terminal."""
    process = started(tmp_path, "--workers", "2", "--trials", "6")
    wait_for_trial(process, 1)
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert errors.startswith("kdexp: Stopped; finished trials are kept")
    until(lambda: not alive(process.pid), "all its processes end", 30)
    assert runs(tmp_path, "trial")["RUNNING"] == runs(tmp_path, "study")["RUNNING"] == 0
    assert runs(tmp_path, "trial")["KILLED"] <= 2
    again = case.alone(
        "sweep", "tiny.yaml", "--set", "training.epochs=40", "--workers", "2", "--trials", "6"
    )
    assert again.returncode == 0, again.stderr
    assert set(trials(tmp_path).values()) == {1}


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_under_nohup_a_hang_up_is_not_heard(tmp_path: Path) -> None:
    code = (
        "import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nsys.argv = ['kdexp',"
        " '--help']\nfrom kdexp.cli import main\ntry: main()\nexcept SystemExit:"
        " print(signal.getsignal(signal.SIGHUP).name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "SIG_IGN"
