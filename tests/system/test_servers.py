"""The same command on two machines: a study in PostgreSQL, its runs on an MLflow server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from conftest import needs
from mlflow.tracking import MlflowClient

from system.conftest import command, environment

pytestmark = pytest.mark.postgresql


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def postgresql(tmp_path_factory) -> Iterator[str]:
    """A PostgreSQL server of its own, as its own user (it refuses to run as root)."""
    bins = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    needs(bool(bins), "PostgreSQL's server programs")
    folder, port = Path(f"/tmp/kdexp-postgresql-{os.getpid()}"), free_port()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run(
        [*as_user, bins[-1], "-D", folder, "-A", "trust", "-U", "kdexp"],
        check=True,
        capture_output=True,
    )
    server = subprocess.Popen(
        [
            *as_user,
            bins[-1].with_name("postgres"),
            "-D",
            folder,
            "-p",
            str(port),
            "-h",
            "127.0.0.1",
            "-k",
            folder,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"postgresql://kdexp:pass@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on loopback."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
         "--artifacts-destination", str(tmp_path / "server-artifacts"), "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def test_two_machines_share_a_study(
    postgresql: str, mlflow_server: str, tiny_file: Path, tmp_path: Path
) -> None:
    machines = []
    # each with a folder of its own: they share nothing but the two servers
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_file, tmp_path / name)
        arguments = [
            "sweep",
            "tiny.yaml",
            "--trials",
            "6",
            "--storage",
            postgresql,
            "--tracking-uri",
            mlflow_server,
        ]
        machines.append(
            subprocess.Popen(
                command(*arguments),
                cwd=tmp_path / name,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [machine.communicate(timeout=400) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(
        errors for _, errors in outputs
    )
    study = optuna.load_study(study_name="tiny", storage=postgresql)
    assert [trial.state.name for trial in study.trials[:6]] == ["COMPLETE"] * 6
    assert study.trials[0].user_attrs["control"] == "documented defaults"
    assert sum("control" in trial.user_attrs for trial in study.trials) == 2
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.`kdexp.kind` = 'trial'")
    assert sorted(int(run.data.tags["kdexp.trial"]) for run in runs) == list(range(6))
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(client.search_runs([experiment.experiment_id], "tags.`kdexp.kind` = 'study'")) == 1
    assert any("Selected: trial" in out for out, _ in outputs)
    selected = client.get_model_version_by_alias("tiny", "smallest")
    assert client.get_run(selected.run_id).data.metrics["test_accuracy"] > 0
    assert len(client.search_model_versions("name = 'tiny'")) == 1, "one of them registers"
    assert len(client.get_metric_history(selected.run_id, "test_accuracy")) == 1, (
        "one of them looks at test"
    )
