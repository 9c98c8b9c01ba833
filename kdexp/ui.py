"""The MLflow UI on the right stores, on 127.0.0.1."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console

from kdexp import KdexpError
from kdexp.runs import views
from kdexp.runs.tracking import ARTIFACTS, NOTE, RunRecord, Tracking

__all__ = ["serve"]

HOST = "127.0.0.1"
START_TIMEOUT = 120.0  # seconds; 8 on a quiet machine


def serve(tracking: Tracking, port: int, console: Console) -> None:
    """Serve until Ctrl-C; where a tracking server is given, only print its pages. Raises
    KdexpError.
    """
    if tracking.url.startswith("http"):
        for line in _pages(tracking, tracking.shown.rstrip("/")):
            console.print(line, markup=False)
        return
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise KdexpError(
                f"Port {port} of {HOST} is taken; choose another: kdexp ui --port {port + 1}"
            )
    address = f"http://{HOST}:{port}"
    mlflow = [sys.executable, "-m", "mlflow", "server"]
    command = [*mlflow, "--host", HOST, "--port", str(port), "--workers", "1"]
    console.print(f"Starting the MLflow UI on {address} …")
    # By the environment, not the command line: a URL may hold a password, and everyone can read
    # command lines. What is meant for another server of the user's was taken out of it before
    # (settings.deaf), but for its programs'.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UVICORN_", "GUNICORN_"))
    }
    environment = kept | {
        "MLFLOW_BACKEND_STORE_URI": tracking.url,
        "MLFLOW_REGISTRY_STORE_URI": tracking.url,
    }
    # A session of its own: MLflow starts further processes, and all of them must go when this one
    # does.
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        with tracking.shown_by_ui():
            _wait(server, address)
            for line in _pages(tracking, address):
                console.print(line, markup=False)
            console.print("Ctrl-C stops the UI.")
            server.wait()
    except KeyboardInterrupt:
        console.print("The UI is stopped.")
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    # a proxy does not know our 127.0.0.1
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise KdexpError(
                f"mlflow server ended at once (exit code {server.returncode}); run it by hand to"
                " see why"
            )
        try:
            with direct.open(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise KdexpError(f"mlflow server did not answer on {address} within {START_TIMEOUT:.0f} s")


def _pages(tracking: Tracking, address: str) -> Iterator[str]:
    studies = tracking.find("study", {})
    if not studies:
        yield f"{address}   (no study yet: kdexp sweep sweeps/digits.yaml)"
    for study in studies:
        name, experiment = study.tags["kdexp.study"], study.experiment_id
        view = views.TRIALS if _has_view(study, tracking) else ""
        yield f"{name:<24} {_answer(study)}"
        found = {
            "report": views.artifact_page(experiment, study.run_id, views.REPORT)
            * _has_report(study),
            "result": views.run_page(experiment, study.run_id),
            "trials": views.view_page(experiment, view),
            "models": views.model_page(name) * tracking.has_model(name),
        }
        for kind, page in found.items():
            if page:
                yield f"{'':<24} {kind} {address}/{page}"


def _answer(study: RunRecord) -> str:
    """What a study came to, or how far it is: the first line of its description, where that says
    so.
    """
    first, *_ = study.tags.get(NOTE, "").splitlines() or [""]
    says = "**" in first and not first.startswith("A *study*")
    return first.replace("**", "").replace("`", "") if says else "nothing selected yet"


def _has_report(study: RunRecord) -> bool:
    return f'"{views.REPORT}"' in study.tags.get(ARTIFACTS, "")


def _has_view(study: RunRecord, tracking: Tracking) -> bool:
    """Whether the view of a study's trials is there; that of a former version's study is made now,
    where that is allowed.
    """
    there = views.VIEW_TAG + views.TRIALS
    with suppress(KdexpError):
        if there in tracking.experiment_tags(study.experiment_id):
            return True
        from kdexp.select.promote import sweep_of  # imports torch

        tags = views.of_sweep(sweep_of(study, tracking), time.time_ns() // 1_000_000)
        tracking.tag_experiment(study.experiment_id, tags)
        return True
    return False
