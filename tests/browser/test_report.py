"""The report as a browser that was never there shows it: whole, without a script, without the
network.
"""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest

from browser.test_ui import chromium, dom, kdexp, place, printed, served, studies, words

pytestmark = pytest.mark.browser
REFUSED = "violates the following Content Security Policy"


def console(browser: str, file: Path, profile: Path) -> list[str]:
    """What a page says to the browser's console, errors and what it was refused among it."""
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "<html" in done.stdout, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_report_opens_without_an_error_and_asks_the_network_for_nothing(
    place,
    studies,
    tmp_path,
    chromium,
) -> None:
    file = tmp_path / "tiny.html"
    kdexp(place, "report", "tiny", "--output", str(file))
    page = dom(chromium, file.as_uri(), tmp_path / "p", "on test", "Do it again")
    shown = words(page)
    for run in studies.find("trial", {"kdexp.study": "tiny"}):
        assert run.run_id in shown
    assert page.count("<title>trial ") >= 4, "a word on every dot"
    assert console(chromium, file, tmp_path / "q") == []

    # this test can fail: what the page would fetch is refused, and the console says so
    text = file.read_text("utf-8")
    file.write_text(text.replace("</main>", "<img src='http://127.0.0.1:9/x.png'></main>"), "utf-8")
    assert any(REFUSED in line for line in console(chromium, file, tmp_path / "r"))


def test_a_sweep_leaves_its_report_one_click_from_the_studys_page(
    printed, studies, tmp_path, chromium
) -> None:
    study = studies.study("tiny")
    assert "<!DOCTYPE html>" in studies.read_text(study.run_id, "report.html")
    page = dom(chromium, printed["tiny", "result"], tmp_path / "p", "Selected: trial")
    link = re.search(r'href="([^"]+)"[^>]*>report<', page)
    assert link
    home = printed["tiny", "result"].partition("#")[0]
    page = home + html.unescape(link[1])
    # MLflow shows the page itself
    dom(chromium, page, tmp_path / "p", "report.html", "<iframe")
