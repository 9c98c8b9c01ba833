"""A sweep that is stopped or killed and started again: nothing repeated, nothing lost, no run left
RUNNING.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import typer
from conftest import until

from kdexp import KdexpError, cli
from system.conftest import runs, started, trials, wait_for_trial


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_continues(
    kdexp, tiny_file: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    process = started(tmp_path)
    wait_for_trial(process, 1)
    time.sleep(0.7)  # into trial 2
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    if kind == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert errors.startswith("kdexp: Stopped; finished trials are kept")
        assert "kdexp sweep tiny.yaml --set training.epochs=40" in errors
        assert runs(tmp_path, "trial")["RUNNING"] == runs(tmp_path, "study")["RUNNING"] == 0
    before = trials(tmp_path)
    assert set(before) >= {0, 1}

    again = kdexp("sweep", "tiny.yaml", "--set", "training.epochs=40")
    assert again.returncode == 0, again.stderr
    assert "Selected: trial" in again.stdout
    assert trials(tmp_path) == {0: 1, 1: 1, 2: 1, 3: 1}
    for run_kind in ("trial", "study", "teacher"):
        assert runs(tmp_path, run_kind)["RUNNING"] == 0
    assert runs(tmp_path, "teacher") == {"FINISHED": 1}


def test_two_processes_share_a_study_and_the_last_one_selects(
    tiny_file: Path, tmp_path: Path
) -> None:
    both = [started(tmp_path, "--trials", "6") for _ in range(2)]
    outputs = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert trials(tmp_path) == dict.fromkeys(range(6), 1)
    assert runs(tmp_path, "teacher") == {"FINISHED": 1}
    assert runs(tmp_path, "trial") == {"FINISHED": 6}
    assert sum("Selected: trial" in out for out, _ in outputs) >= 1
    trained = [
        line.split()[1]
        for out, _ in outputs
        for line in out.splitlines()
        if line.startswith("trial ") and "parameters" in line and "val " in line
    ]
    assert sorted(int(number) for number in trained if number.isdigit()) == list(range(6))


def test_when_one_of_two_processes_is_killed_the_other_takes_its_trial(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    first, second = (started(tmp_path, "--trials", "6") for _ in range(2))
    wait_for_trial(first)
    first.kill()
    first.communicate()
    out, errors = second.communicate(timeout=180)
    assert second.returncode == 0, errors
    assert trials(tmp_path) == dict.fromkeys(range(6), 1)
    assert runs(tmp_path, "trial")["RUNNING"] == 0
    assert "Selected: trial" in out or "Selected: trial" in kdexp("select", "tiny").stdout


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_a_stop_while_libraries_are_loaded_is_said_too(tiny_file: Path, tmp_path: Path) -> None:
    process = started(tmp_path)
    until(
        lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(),
        "torch is being imported",
        60,
    )
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("kdexp: Stopped"), errors
    assert "kdexp sweep tiny.yaml --set training.epochs=40" in errors
    assert len(errors.splitlines()) == 1


WAYS_OUT = {
    "Ctrl-C while a lost process is noticed": (EOFError, KeyboardInterrupt, 130, "Stopped."),
    "a process is lost": (EOFError, typer.Abort, 1, "A process that this one had started is gone."),
    "Ctrl-C, then a failure on the way out": (KeyboardInterrupt, KdexpError, 130, "why"),
    "a failure": (ValueError, KdexpError, 1, "why"),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_a_ctrl_c_is_one_whatever_else_goes_wrong_with_it(way: str, monkeypatch, capsys) -> None:
    first, then, code, says = WAYS_OUT[way]

    def app(*_: object, **__: object) -> None:
        try:
            raise first
        finally:
            raise then("why")

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["kdexp", "sweep", "x.yaml"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(f"kdexp: {says}")
