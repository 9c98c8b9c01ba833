"""The MLflow UI as a browser shows it: kdexp ui serves a study's pages on 127.0.0.1."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import needs
from system.conftest import command, environment, kdexp_here, tiny_file  # noqa: F401 - fixtures

pytestmark = pytest.mark.browser
SECONDS = 90  # for a page of the UI to show what it should


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    needs(found is not None, "Chromium")
    return str(found)


def page_text(chromium: str, url: str, profile: Path, until: str) -> str:
    """The page's text once `until` is on it, as a real browser renders it."""
    deadline, text = time.monotonic() + SECONDS, ""
    while until not in text and time.monotonic() < deadline:
        done = subprocess.run(
            [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1600,1400",
             f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", url],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        text = re.sub(
            r"\s+",
            " ",
            re.sub(
                r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", " ", done.stdout, flags=re.S)
            ),
        )
    return text


def test_a_study_can_be_browsed(kdexp_here, tiny_file, tmp_path, chromium) -> None:  # noqa: F811
    swept = kdexp_here("sweep", "tiny.yaml")
    assert swept.returncode == 0, swept.stderr
    selected = re.findall(r"Run ID: +([0-9a-f]{32})", swept.stdout)[-1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        command("ui", "--port", str(port)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        timer = threading.Timer(120, server.kill)
        timer.start()
        printed = []
        for line in server.stdout:
            printed.append(line)
            if "Ctrl-C" in line:
                break
        timer.cancel()
        trials_page = next(line.split()[-1] for line in printed if line.startswith("tiny"))
        study_page = next(line.split()[-1] for line in printed if line.split()[0] == "study")
        assert trials_page.startswith(f"http://127.0.0.1:{port}/#/experiments/")

        listed = page_text(chromium, trials_page, tmp_path / "profile", "study tiny")
        assert "study tiny" in listed
        shown = page_text(chromium, study_page, tmp_path / "profile", "Selected: trial")
        assert "Selected: trial" in shown
        run = page_text(
            chromium,
            study_page.rsplit("/", 1)[0] + f"/{selected}",
            tmp_path / "profile",
            "soft labels",
        )
        for text in (
            "Selected by study",
            "student",
            "teacher",
            "temperature",
            "val_accuracy",
            "distillation.alpha",
            f"kdexp reproduce {selected}",
        ):
            assert text in run
        busy = kdexp_here("ui", "--port", str(port))
        assert busy.returncode == 1
        assert (
            f"Port {port} of 127.0.0.1 is taken; choose another: kdexp ui --port {port + 1}"
            in busy.stderr
        )
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0, "the server outlived the command"
