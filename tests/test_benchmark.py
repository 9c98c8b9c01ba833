"""The forms of a student side by side: each number is that of the file, nothing of the clock is
recorded, and a floor fails.
"""

from __future__ import annotations

import importlib.util
import re
import time
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
import torch
from conftest import CPU, drain, stores_in, tiny_sweep
from rich.console import Console

from kdexp import KdexpError
from kdexp.distill.datasets import Split
from kdexp.distill.deploy import Deployed
from kdexp.distill.latency import latencies
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import prepare
from kdexp.runs.recording import Entry, recorded
from kdexp.runs.tracking import Tracking
from kdexp.screen import show_benchmark
from kdexp.select.benchmark import TIMED, below, benchmark, timed
from kdexp.select.promote import register
from kdexp.settings import Settings

RECIPE = tiny_sweep().recipe.replace({"data.channels": 3, "training.epochs": 5})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, empty_store) -> tuple[str, Settings, Tracking]:
    """A student of grey digits on three channels, with weights on record."""
    settings = stores_in(tmp_path_factory.mktemp("benchmark"), empty_store)
    tracking = Tracking(settings)
    bench = Bench(settings, tracking, CPU, tracking.experiment("tiny"))
    _, prepared = drain(prepare(RECIPE, bench))
    with recorded(RECIPE, prepared, bench, Entry("train", "train tiny")) as recording:
        list(recording.epochs())
    return recording.run_id, settings, tracking


@pytest.fixture(scope="module")
def done(trained):
    run_id, settings, tracking = trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdexp.distill.datasets.load_test", lambda *_: pytest.fail("benchmark looked at test")
        )
        return benchmark(run_id, None, settings, tracking)


def test_every_form_is_there_with_the_numbers_of_its_record(trained, done) -> None:
    run_id, _, tracking = trained
    metrics = tracking.read(run_id).metrics
    assert [form.variant for form in done.forms] == ["as trained", "float32", "float16", "int8"]
    for form in done.forms:
        prefix = "" if form.variant == "as trained" else f"{form.variant}/"
        assert form.bytes == metrics[f"{prefix}model_bytes"] < form.file_bytes
        assert form.multiply_adds == metrics[f"{prefix}multiply_adds"]
        assert form.activation_bytes == metrics[f"{prefix}activation_bytes"]
        assert form.accuracy == pytest.approx(metrics[f"{prefix}val_accuracy"])
        assert 0 < form.latency.p50 <= form.latency.p90
        assert form.latency.images_a_second > 1 / form.latency.p90
    files = [form.file_bytes for form in done.forms[1:]]
    assert files == sorted(files, reverse=True)


def test_a_form_is_compared_with_the_student_as_trained_on_the_same_images(done) -> None:
    trained, *others = done.forms
    assert (trained.gained, trained.lost, trained.same) == (0, 0, 1.0)
    for form in others:
        difference, (low, high) = done.against(form)
        assert difference == pytest.approx(form.accuracy - trained.accuracy)
        assert low <= difference <= high
        assert form.same > 0.95
    assert done.forms[1].same == 1.0, "folding changes no answer"


def test_of_the_clock_one_hidden_tag_is_recorded_and_a_second_time_nothing_else(
    trained, done
) -> None:
    run_id, settings, tracking = trained
    before = tracking.read(run_id)
    again = benchmark(run_id, None, settings, tracking)
    after = tracking.read(run_id)
    assert timed(before).seconds == {form.variant: form.latency for form in done.forms}
    assert timed(after).seconds == {form.variant: form.latency for form in again.forms}
    assert replace(after, tags=before.tags) == before
    assert {name for name in after.tags if after.tags[name] != before.tags[name]} == {TIMED}
    assert not [name for name in before.metrics if re.search("latency|p50|p90|second/", name)]
    for one, other in zip(done.forms, again.forms, strict=True):
        assert (one.accuracy, one.bytes, one.same) == (other.accuracy, other.bytes, other.same)


def test_the_floor_is_held_against_the_chosen_form(trained, done) -> None:
    run_id, settings, tracking = trained
    best = max(form.accuracy for form in done.forms)
    assert done.chosen.accuracy == best
    assert below(done, best) == ""
    assert f"below --floor {best + 0.001:.2%}" in below(done, best + 0.001)
    asked = benchmark(run_id, "int8", settings, tracking)
    assert asked.chosen.variant == "int8"
    run = tracking.read(run_id)
    address = register(run, RECIPE, "tiny", "smallest", "…", settings, tracking, "float16")
    assert benchmark(address, None, settings, tracking).chosen.variant == "float16"
    assert benchmark("models:/tiny/1", "int8", settings, tracking).chosen.variant == "int8"


def test_the_screen_shows_a_row_for_each_form_and_what_the_numbers_are(done) -> None:
    console = Console(file=StringIO(), width=80, soft_wrap=True)
    show_benchmark(console, done)
    text = console.file.getvalue()
    rows = [line for line in text.splitlines() if line.startswith(("as trained", "float", "int8"))]
    assert len(rows) == 4
    for row, form in zip(rows, done.forms, strict=True):
        assert f"{form.file_bytes:,}" in row
        assert " ms" in row
    assert "100.00 %" in rows[1]
    assert f"Chosen:   {done.chosen.variant}: val accuracy" in text


def test_without_the_libraries_there_is_the_form_as_trained_and_what_to_install(
    trained, monkeypatch
) -> None:
    run_id, settings, tracking = trained
    bare = tracking.start(tracking.experiment("tiny"), "train", "bare", {}, {})
    with pytest.raises(KdexpError, match="holds no weights"):
        benchmark(bare, None, settings, tracking)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    monkeypatch.setattr("kdexp.select.benchmark.made", _needs_libraries)
    done = benchmark(run_id, None, settings, tracking)
    assert [form.variant for form in done.forms] == ["as trained"]
    assert "pip install 'kdexp[export]'" in done.missing
    with pytest.raises(KdexpError, match="--form int8: cannot be made here"):
        benchmark(run_id, "int8", settings, tracking)


def _needs_libraries(*_: object) -> None:
    from kdexp.distill.deploy import _need_libraries

    _need_libraries()


# --- the clock ---


def test_calls_are_timed_in_turn_on_one_thread_which_is_set_back() -> None:
    calls: list[tuple[str, int, int]] = []

    def runner(name: str, seconds: float):
        def run(pixels: torch.Tensor) -> None:
            calls.append((name, len(pixels), torch.get_num_threads()))
            time.sleep(seconds)

        return run

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images = torch.zeros(150, 1, 4, 4, dtype=torch.uint8)
        found = latencies({"slow": runner("slow", 0.004), "fast": runner("fast", 0.001)}, images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {threads for *_, threads in calls} == {1}
    assert {count for _, count, _ in calls} == {1, 100}
    assert 0.004 <= found["slow"].p50 <= found["slow"].p90
    assert 0.001 <= found["fast"].p50 < found["slow"].p50
    assert found["slow"].images_a_second < 100 / 0.004
    order = [name for name, count, _ in calls if count == 1]
    assert sum(one != other for one, other in pairwise(order)) > 4


def test_files_are_opened_with_one_thread_too(trained, monkeypatch) -> None:
    run_id, settings, tracking = trained
    opened: list[int] = []

    class Seen(Deployed):
        def __init__(self, content: bytes, like: Split) -> None:
            super().__init__(content, like)
            opened.append(self.session.get_session_options().intra_op_num_threads)

    monkeypatch.setattr("kdexp.select.benchmark.Deployed", Seen)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        benchmark(run_id, None, settings, tracking)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert opened == [1, 1, 1]
