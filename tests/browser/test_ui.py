"""MLflow's pages as a browser that was never there shows them, by the links that kdexp ui prints on
127.0.0.1: those of the MLflow that is locked, and of its newest release where the package registry
has one.
"""

from __future__ import annotations

import html
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import needs, tiny_sweep
from system.conftest import command, environment

from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.runs.views import REPEATED, TRIALS, WHY
from kdexp.settings import Settings

pytestmark = pytest.mark.browser
SECONDS = 90  # for a page of the UI to show what it should
SMALLEST = (
    "name=small",
    "study.objective=smallest",
    "study.trials=8",
    "selection.accuracy_bar=0.3",
)


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    needs(found is not None, "Chromium")
    return str(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two studies: one that repeats nothing, and one that does."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "tiny.yaml").write_text(tiny_sweep().model_dump_json())
    for more in ((), SMALLEST):
        kdexp(folder, "sweep", "tiny.yaml", *(f"--set={value}" for value in more))
    return folder


def kdexp(
    folder: Path, *arguments: str, code: int = 0, **variables: str
) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def studies(place) -> Tracking:
    return Tracking(Settings(stores=place / "mlruns"))


@pytest.fixture(scope="module", params=["locked", pytest.param("newest", marks=pytest.mark.slow)])
def served(request, place, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The stores that are served, and the variables that let another MLflow serve them."""
    if request.param == "locked":
        return place, {}
    packages, copy = (tmp_path_factory.mktemp(name) for name in ("mlflow", "newest"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
    names = ("mlflow", "mlflow-skinny", "mlflow-tracing")
    got = subprocess.run([*pip, *names], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"the package registry could not be asked: {got.stderr.splitlines()[-1:]}")
    if list(packages.glob(f"mlflow-{version('mlflow')}.dist-info")):
        pytest.skip("the locked MLflow is the newest")
    shutil.copytree(place, copy, dirs_exist_ok=True)
    newest = {"PYTHONPATH": str(packages)}
    kdexp(copy, "doctor", "--upgrade", **newest)
    return copy, newest


@pytest.fixture(scope="module")
def printed(served) -> Iterator[dict[tuple[str, str], str]]:
    """What kdexp ui prints, by study and kind of page, while it runs."""
    port, (folder, variables) = free_port(), served
    server = subprocess.Popen(
        command("ui", "--port", str(port)),
        cwd=folder,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        timer = threading.Timer(120, server.kill)
        timer.start()
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        timer.cancel()
        yield pages(lines)
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0, "the server outlived the command"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def pages(lines: list[str]) -> dict[tuple[str, str], str]:
    """The addresses, by study and kind."""
    found, study = {}, ""
    for line in lines:
        if match := re.fullmatch(r" +(report|result|trials|models) (http\S+)", line.strip("\n")):
            found[study, match[1]] = match[2]
        else:
            study, _, answer = line.strip().partition(" ")
            found[study, "answer"] = answer.strip()
    return found


def dom(chromium: str, url: str, profile: Path, *until: str, width: int = 1600) -> str:
    """A page's HTML once all of `until` are in its words or tags, as a real browser renders it."""
    deadline, text = time.monotonic() + SECONDS, ""
    while not shows(text, until) and time.monotonic() < deadline:
        done = subprocess.run(
            [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--window-size={width},2400",
             f"--user-data-dir={profile}", "--virtual-time-budget=25000", "--dump-dom", url],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        text = done.stdout
    assert shows(text, until), f"{url}: {words(text)[:3000]}"
    return text


def shows(text: str, until: Sequence[str]) -> bool:
    said = words(text)
    return all(each in (text if each.startswith("<") else said) for each in until)


def words(text: str) -> str:
    """What a page says."""
    bare = re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.S))
    return re.sub(r"\s+", " ", html.unescape(bare))


def trials_of(study: str, tracking: Tracking) -> list[RunRecord]:
    return tracking.find("trial", {"kdexp.study": study})


def test_a_studys_page_is_the_answer(printed, studies, tmp_path, chromium) -> None:
    """Its first line, every trial with size and accuracy, the selected run in one click."""
    study = studies.study("tiny")
    page = dom(
        chromium,
        printed["tiny", "result"],
        tmp_path / "p",
        "on test (met the bar",
        "Selected: trial",
    )
    shown = words(page)
    for run in trials_of("tiny", studies):
        row = f"{run.tags['kdexp.trial']} {int(run.metrics['parameters']):,}"
        assert f"{row} {run.metrics['val_accuracy']:.2%}" in shown
    assert "Overview Model metrics" in shown, "the page of a training, not of GenAI"
    assert f"path=frontier.png&amp;run_uuid={study.run_id}" in page
    assert "digits-training" in shown, "the data set"
    assert "selected_note" not in shown, "the tags' box holds no long text"

    selected = study.tags["kdexp.selected_run"]
    link = re.search(r'href="([^"]+)"[^>]*>selected run<', page)
    assert link
    assert f"/runs/{selected}?workflowType=machine_learning" in link[1]
    home = printed["tiny", "result"].partition("#")[0]
    run = words(dom(chromium, home + html.unescape(link[1]), tmp_path / "p", "soft labels"))
    for text in (
        "Selected by study",
        "meets the bar of 20.00%",
        "student",
        "teacher",
        "temperature",
        "val_accuracy",
        "distillation.alpha",
        f"kdexp reproduce {selected}",
    ):
        assert text in run


def test_all_trials_are_shown_by_size_and_by_what_was_searched(
    printed, studies, tmp_path, chromium
) -> None:
    runs = trials_of("tiny", studies)
    assert len(runs) == 4
    url = printed["tiny", "trials"]
    assert f"viewStateShareKey={TRIALS}&compareRunsMode=CHART" in url
    page = dom(chromium, url, tmp_path / "p", "parameters vs. val_accuracy", "trial 3")
    shown = words(page)
    for chart in ("Parallel Coordinates", "Showing all runs", "epoch/val_accuracy"):
        assert chart in shown
    scatters = re.findall(r'class="scatterlayer.*?</g></g></g>', page, re.S)
    assert scatters
    assert page.count('class="point"') >= 2 * len(runs), "of both scatters"
    for path in ("alpha", "temperature", "learning_rate", "channels"):
        assert re.search(rf">[^<]*{path}[^<]*</text>", page), f"no axis for {path}"
    colours = {run.tags["mlflow.runColor"] for run in runs}
    assert len(colours) > 1
    assert "study tiny" not in shown, "trials only"

    table = words(
        dom(chromium, url.replace("CHART", "TABLE"), tmp_path / "q", "trial 3", "val_accuracy")
    )
    for run in runs:
        assert f"{int(run.metrics['parameters'])}" in table
        assert str(run.metrics["val_accuracy"])[:6] in table
    assert "selected_trial" in table


def test_repeats_are_left_out_at_first_and_can_be_seen(
    printed, studies, tmp_path, chromium
) -> None:
    runs = trials_of("small", studies)
    repeats = [run for run in runs if "kdexp.repeats" in run.tags]
    assert repeats
    url = printed["small", "trials"]
    listed = words(dom(chromium, url, tmp_path / "p", "documented defaults", "labels only"))
    assert "repeats trial" not in listed
    chosen = f"Key={REPEATED}"
    again = words(dom(chromium, url.replace(f"Key={TRIALS}", chosen), tmp_path / "q", "repeats"))
    for run in repeats:
        assert run.name in again
    chosen = f"Key={WHY}"
    why = dom(chromium, url.replace(f"Key={TRIALS}", chosen), tmp_path / "r", "What differs")
    assert "distillation.alpha" in words(why)


def test_the_model_has_a_page_and_a_port_that_is_taken_a_word(
    printed, place, tmp_path, chromium
) -> None:
    url = printed["small", "models"]
    assert "smallest" in words(dom(chromium, url, tmp_path / "p", "Version 1"))
    port = int(re.search(r":(\d+)/", url)[1])
    busy = kdexp(place, "ui", "--port", str(port), code=1)
    taken = f"Port {port} of 127.0.0.1 is taken; choose another: kdexp ui --port {port + 1}"
    assert taken in busy.stderr
