"""The report: what its page says is what the records hold, whatever a study came to."""

from __future__ import annotations

import base64
import io
import math
import random
import re
import statistics
import tarfile
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import PIL.Image
import pytest
import torch
from browser.test_ui import words
from conftest import CPU, drain, migrated_store, stores_in, tiny_sweep
from system.conftest import Kdexp, kdexp_here  # noqa: F401 - a fixture

from kdexp import KdexpError
from kdexp.config import Choices, Range, Selection, Sweep
from kdexp.distill.datasets import load_splits
from kdexp.distill.evaluate import logits_of
from kdexp.distill.inputs import Input
from kdexp.environment import cpu_name
from kdexp.files import check_output, write_output
from kdexp.intervals import luckiest
from kdexp.runs import svg
from kdexp.runs.describe import linked
from kdexp.runs.records import NOTE, recipe_of, sealed
from kdexp.runs.tracking import Tracking, TrackingAway
from kdexp.search.learned import importances, not_trained
from kdexp.search.sweep import TrialFinished, run_sweep
from kdexp.select import page
from kdexp.select.benchmark import benchmark
from kdexp.select.confirm import confirm
from kdexp.select.mistakes import Bin, Mistakes, mistakes_of
from kdexp.select.promote import promote, sweep_of
from kdexp.select.report import Measured, Report, gathered
from kdexp.select.variants import load_variant, made, splits_of
from kdexp.select.verify import verify
from kdexp.selection import AS_TRAINED, requirement
from kdexp.settings import Settings

LOW = Selection(accuracy_bar=0.2)
WITNESS = Path(__file__).parent / "witness" / "c3d1cbb.tar.xz"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Settings:
    """Stores with the tiny study, its model selected."""
    settings = stores_in(tmp_path_factory.mktemp("report"), migrated_store())
    tracking = Tracking(settings)
    drain(run_sweep(tiny_sweep(), settings, tracking, CPU))
    promote(tracking.study("tiny"), LOW, settings, tracking, CPU)
    return settings


@pytest.fixture
def store(place) -> Tracking:
    return Tracking(place)


@pytest.fixture
def report(place, store) -> Report:
    return gathered(store.study("tiny"), LOW, place, store)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


# --- what it says ------------------------------------------------------------------------------


def test_the_page_begins_with_the_model_and_how_sure_that_is(report, store) -> None:
    run = store.read(store.study("tiny").tags["kdexp.selected_run"])
    low, high = (run.metrics[f"test_accuracy_{end}"] for end in ("low", "high"))
    text = words(page.html(report))
    head = text[: text.index("Accuracy against size")]
    assert f"{int(run.metrics['parameters']):,} parameters · " in head
    assert f"{percent(run.metrics['test_accuracy'])} on test" in head
    assert (
        f"{100 * low:.2f} to {100 * high:.2f} %, {int(run.metrics['test_samples'])} images" in head
    )
    teacher = store.read(run.tags["kdexp.teacher_run"])
    assert f"the teacher ({int(teacher.metrics['parameters']):,} parameters)" in head
    assert f"its teacher {percent(run.metrics['teacher_val_accuracy'])}" in head
    assert "trial 0, the sweep file's own values" in head
    assert "One training only" in head
    assert "kdexp confirm tiny" in head


def test_every_trial_stands_in_it_with_the_numbers_of_its_run(report, store) -> None:
    text = words(page.html(report))
    runs = store.find("trial", {})
    assert len(runs) == 4
    for run in runs:
        own = run.metrics
        assert run.run_id in text
        assert f"{int(own['parameters']):,} {int(own['multiply_adds']):,}" in text
        low, high = own["val_accuracy_low"], own["val_accuracy_high"]
        assert f"{percent(own['val_accuracy'])} {100 * low:.2f} to {100 * high:.2f} %" in text
    assert sum("test_accuracy" in run.metrics for run in runs) == 1
    assert len([row for row in report.rows if row.test]) == 1


def test_no_student_on_the_frontier_is_beaten_in_both(report) -> None:
    rows = report.rows
    assert any(row.frontier for row in rows)
    for row in rows:
        beaten = any(
            other.sized <= row.sized
            and other.val.accuracy >= row.val.accuracy
            and (other.sized, other.val.accuracy) != (row.sized, row.val.accuracy)
            for other in rows
        )
        assert not (row.frontier and beaten)


def test_it_says_how_to_do_it_again(report, store) -> None:
    run_id = store.study("tiny").tags["kdexp.selected_run"]
    text = words(page.html(report))
    assert f"kdexp reproduce {run_id}" in text
    assert "kdexp predict models:/tiny@smallest IMAGES" in text
    assert 'mlflow.pytorch.load_model("models:/tiny@smallest")' in text
    assert "of shape (any number, 1, 8, 8)" in text
    assert "for each of 10 classes: 0, 1, 2" in text
    assert store.read(run_id).tags["kdexp.weights_sha256"] in text
    assert "learning_rate: 0.01" in text


def test_it_says_what_it_took(report) -> None:
    text = words(page.html(report))
    assert "of training, added up over all trials: 4 trained to the end" in text
    assert "The test set was looked at for 1 model, each once." in text
    assert "one seed each, that says little" in text, "what distillation gained"


def test_what_it_gets_wrong_is_what_its_accuracy_leaves(report, store) -> None:
    run = store.read(store.study("tiny").tags["kdexp.selected_run"])
    assert "confusion.json" in sealed(run)
    found = mistakes_of(run, AS_TRAINED, store)
    assert found is not None
    right = round(run.metrics["val_accuracy"] * run.metrics["val_samples"])
    assert (found.images, found.images - found.wrong) == (run.metrics["val_samples"], right)
    text = words(page.html(report))
    assert f"{found.wrong} of {found.images} validation images" in text
    true, taken, n, total = found.pairs(1)[0]
    assert f"Most often it takes {true} for {taken} ({n} of {total})" in text


def test_how_sure_it_is_and_where_it_was_surest_and_wrong(report, store) -> None:
    run = store.read(store.study("tiny").tags["kdexp.selected_run"])
    found = mistakes_of(run, AS_TRAINED, store)
    assert found is not None
    assert sum(each.images for each in found.bins) == found.images
    assert sum(each.right for each in found.bins) == found.images - found.wrong
    assert len(found.surest) == min(found.wrong, 12)
    sure = [each.probability for each in found.surest]
    assert sure == sorted(sure, reverse=True)
    recipe = recipe_of(run, store)
    splits = load_splits(recipe.data, Path("data"))
    student = load_variant(run, recipe, AS_TRAINED, splits.validation, store)
    logits = logits_of(student, splits.validation).double()
    wrong = logits.argmax(1) != splits.validation.labels
    assert sure[0] == pytest.approx(float(logits.softmax(1).max(1).values[wrong].max()))
    shown = [PIL.Image.open(io.BytesIO(base64.b64decode(each.png))) for each in found.surest]
    held = {image.numpy().tobytes() for image in splits.validation.images[wrong]}
    assert all(image.size == (8, 8) and image.tobytes() in held for image in shown)
    for each in found.surest:
        assert each.true != each.taken
        assert found.counts[each.true, each.taken] >= 1
    text = page.html(report)
    assert text.count('src="data:image/png;base64,') == len(shown)
    assert f"{100 * found.calibration_error:.1f} points off" in words(text)


def test_a_calibration_error_is_the_mean_distance_by_images() -> None:
    bins = (Bin(3, 1, 0.5), Bin(7, 7, 0.9))
    known = Mistakes(("a", "b"), {(0, 0): 8, (0, 1): 2}, bins)
    assert known.calibration_error == pytest.approx((0.5 + 0.7) / 10)


def test_what_a_former_version_counted_is_shown_without_pictures(report) -> None:
    counted = Mistakes(("a", "b"), {(0, 0): 3, (0, 1): 2})
    text = page.html(replace(report, mistakes=counted))
    assert "2 of 5 validation images" in words(text)
    assert "base64" not in text
    assert "believed" not in text


def test_accuracy_is_shown_against_each_size_and_beside_luck(report) -> None:
    text = page.html(report)
    units = re.findall(r'<label for="size-\d">([^<]+)</label>', text)
    assert units == ["parameters", "multiply-adds", "bytes"]
    for unit in units:
        assert f">{unit} (log scale)</text>" in text
    assert text.count(' name="size"') == 3
    by_bytes = replace(report, rule=report.rule.model_copy(update={"size": "bytes"}))
    first = re.findall(r'<label for="size-1">([^<]+)</label>', page.html(by_bytes))
    assert first == ["bytes"]
    lucky = luckiest(LOW.accuracy_bar, report.rows[0].val.images, len(report.rows))
    assert f"luck: to {100 * lucky:.2f} %" in words(text)
    drawn = random.Random(7)
    best = [
        max(sum(drawn.random() < 0.9 for _ in range(200)) for _ in range(20)) / 200
        for _ in range(301)
    ]
    assert luckiest(0.9, 200, 20) == pytest.approx(statistics.median(best), abs=0.006)


def test_forms_are_shown_once_they_were_measured(place, store) -> None:
    pytest.importorskip("onnxruntime")
    before = gathered(store.study("tiny"), LOW, place, store)
    run = before.answer.run
    assert run
    assert f"kdexp benchmark {run.run_id}" in words(page.html(before))
    recipe = recipe_of(run, store)
    done = made(run, recipe, "int8", splits_of(run, recipe, place), store)
    after = gathered(store.study("tiny"), LOW, place, store)
    assert [form.variant for form in after.forms] == [AS_TRAINED, "int8"]
    own = done.metrics
    assert f"int8 {int(own['int8/model_bytes']):,}" in words(page.html(after))
    change = own["int8/val_accuracy"] - own["val_accuracy"]
    assert after.forms[1].change == pytest.approx(change)
    assert after.timed is None
    assert "p90" not in words(page.html(after))

    measured = benchmark(run.run_id, None, place, store)
    last = gathered(store.study("tiny"), LOW, place, store)
    assert last.timed is not None
    assert last.timed.seconds == {form.variant: form.latency for form in measured.forms}
    text = words(page.html(last))
    for form in measured.forms:
        assert f"{1000 * form.latency.p50:.3f} {1000 * form.latency.p90:.3f}" in text
    assert f"on one thread of {cpu_name()}, with torch {version('torch')}" in text
    recipe, cpu = recipe_of(run, store), torch.device("cpu")
    verify(store.read(run.run_id), recipe, AS_TRAINED, splits_of(run, recipe, place), store, cpu)


def test_the_same_records_give_the_same_page(place, store, report) -> None:
    again = gathered(store.study("tiny"), LOW, place, store)
    assert page.html(again) == page.html(report)


# --- what a study may have come to -------------------------------------------------------------


def test_where_nothing_meets_the_bar_it_says_what_was_nearest(place, store) -> None:
    rule = Selection(accuracy_bar=1.0)
    found = gathered(store.study("tiny"), rule, place, store)
    assert found.answer.state == "nothing"
    text = words(page.html(found))
    assert "Nothing meets the bar" in text
    assert "reaches validation accuracy 1. Best:" in text
    assert all(run.run_id in text for run in store.find("trial", {}))
    assert "kdexp reproduce" not in text


def test_a_study_that_is_not_finished_says_so(tiny, settings, tracking) -> None:
    with closing(run_sweep(tiny, settings, tracking, CPU)) as events:
        for event in events:
            if isinstance(event, TrialFinished) and event.done == 2:
                break
    found = gathered(tracking.study("tiny"), LOW, settings, tracking)
    assert not found.cost.finished
    text = words(page.html(found))
    assert "This study is not finished" in text
    assert re.search(r"[2-4] of 4 trials have begun", text)
    assert found.answer.state == "unseen"
    assert "The test set was not looked at." in text
    page.keep(page.html(found), tracking.study("tiny"), tracking)


def test_a_study_without_a_trial_has_a_page_too(tiny, settings, tracking) -> None:
    experiment = tracking.experiment("tiny")
    run_id = tracking.start(experiment, "study", "study tiny", {}, {"kdexp.study": "tiny"})
    tracking.log_text(run_id, "sweep.json", tiny.model_dump_json())
    found = gathered(tracking.study("tiny"), LOW, settings, tracking)
    text = words(page.html(found))
    assert "No trial of study 'tiny' has finished" in text
    assert "stands in Optuna’s storage, which is not here" in text
    assert not (settings.stores / "optuna.db").exists(), "reading makes no store"


def test_a_sure_model_is_said_to_be_sure_and_shows_its_repeats(settings, tracking) -> None:
    study = {"objective": "smallest", "trials": 8, "repeats": 4}
    sweep = changed(name="small", study=study, selection={"accuracy_bar": 0.15})
    drain(run_sweep(sweep, settings, tracking, CPU))
    done = promote(tracking.study("small"), sweep.selection, settings, tracking, CPU, sure=True)
    found = gathered(tracking.study("small"), sweep.selection, settings, tracking)
    assert found.answer.state == "sure"
    assert found.answer.run
    assert found.answer.run.run_id == done.run_id, "the model is a repeat's"
    assert found.answer.row
    assert found.answer.row.candidate.trial == done.candidate.trial
    assert found.answer.over == done.test_repeats
    text = words(page.html(found))
    assert "Sure by repeats" in text
    assert f"at 95 % above {percent(done.candidate.verdict.low)}" in text
    assert f"{percent(done.test_accuracy)}" in text
    assert f"{found.cost.repeats} of these were repeats" in text
    assert "Under the bar on test" not in text
    high = replace(found, rule=found.rule.model_copy(update={"accuracy_bar": 0.999}))
    assert "Under the bar on test" in words(page.html(high))
    skipped = not_trained(found.sweep, tracking.study("small").run_id, settings)
    assert found.cost.not_trained == skipped

    # with another bar kdexp confirm goes on where the study's own repeats ended
    rule = Selection(accuracy_bar=0.12)
    _, again = drain(confirm(tracking.study("small"), rule, 3, False, settings, tracking, CPU))
    found = gathered(tracking.study("small"), rule, settings, tracking)
    assert found.answer.state == "confirmed"
    assert found.answer.row.candidate.trial == again.verdict.candidate.trial
    assert found.answer.run.run_id == again.runs[0].run_id
    assert found.answer.over == again.test


def test_fresh_seeds_confirm_a_model_or_take_it_away(tiny, settings, tracking) -> None:
    drain(run_sweep(tiny, settings, tracking, CPU))
    promote(tracking.study("tiny"), LOW, settings, tracking, CPU)
    study = tracking.study("tiny")
    rule = Selection(accuracy_bar=0.1)
    _, done = drain(confirm(study, rule, 2, False, settings, tracking, CPU))
    found = gathered(tracking.study("tiny"), rule, settings, tracking)
    assert found.answer.state == "confirmed"
    assert found.answer.run
    assert found.answer.run.run_id == done.runs[0].run_id
    assert found.answer.over == done.test
    text = words(page.html(found))
    assert "Confirmed by fresh seeds" in text
    assert f"{percent(done.test.mean)} ± {100 * done.test.sd:.2f} on test" in text
    assert "kdexp predict models:/tiny@confirmed IMAGES" in text
    assert found.mistakes, "counted for the confirmed model"

    other = gathered(tracking.study("tiny"), LOW, settings, tracking)
    assert other.answer.state == "once", "they spoke of another bar"
    for run in tracking.find("trial", {}):
        refused = f"no: 15.00 % ± 1.00 over 2 fresh seeds, required {requirement(LOW)}"
        tracking.tag(run.run_id, {"kdexp.confirmed": refused})
    none = gathered(tracking.study("tiny"), LOW, settings, tracking)
    assert none.answer.state == "nothing"
    text = words(page.html(none))
    assert "was not confirmed by fresh seeds: trial" in text
    assert "Nothing is sure to meet the bar" in text, "one training met it"


def changed(**parts) -> Sweep:
    """The tiny sweep with other values."""
    tree = tiny_sweep().model_dump(mode="json")
    for key, value in parts.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return Sweep.model_validate(tree, strict=False)


def test_records_of_a_former_version_have_a_page(tmp_path) -> None:
    with tarfile.open(WITNESS) as archive:
        archive.extractall(tmp_path, filter="data")
    settings = Settings(stores=tmp_path / "mlruns")
    tracking = Tracking(settings, make=False)
    studies = tracking.find("study", {})
    assert studies
    for study in studies:
        rule = sweep_of(study, tracking).selection
        text = words(page.made(study, rule, settings, tracking))
        assert f"Study {study.tags['kdexp.study']} :" in text


def test_what_was_not_recorded_is_left_out() -> None:
    assert Measured.recorded({"val_accuracy": 0.5}, "val") == Measured(0.5, None, None)
    known = Measured.recorded({"val_accuracy": 0.5, "val_samples": 100}, "val")
    assert known.images == 100
    assert known.interval
    assert known.interval[0] < 0.5 < known.interval[1]


# --- one file, safe to open --------------------------------------------------------------------


class Tags(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags_of(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(text)
    return parser.found


def test_the_page_asks_the_network_for_nothing_and_is_small(report) -> None:
    text = page.html(report)
    assert len(text.encode()) < 1_000_000
    found = tags_of(text)
    assert len(found) > 300
    loads = [
        value
        for _, attributes in found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "srcset")
    ]
    assert loads
    assert all(value and value.startswith(("#", "data:")) for value in loads)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_what_people_have_named_is_text_and_never_markup(report) -> None:
    evil = "<script>alert(1)</script>"
    again = replace(
        report.again,
        takes=Input(1, 8, 8, (evil, "b")),
        hashes={evil: evil},
        versions={evil: evil},
        recipe=evil,
    )
    rows = tuple(
        replace(row, network=evil, standing=evil, candidate=replace(row.candidate, run_id=evil))
        for row in report.rows
    )
    answer = replace(report.answer, row=rows[0], said=evil, beside=(evil,))
    hostile = replace(
        report,
        study=evil,
        rows=rows,
        answer=answer,
        teacher=replace(report.teacher, network=evil),
        mistakes=Mistakes((evil, "b"), {(0, 0): 3, (0, 1): 2, (1, 1): 4, (1, 0): 1}),
        confirmations={1: evil},
        looks=tuple(replace(look, what=evil) for look in report.looks),
        learned=replace(report.learned, rules=(evil,), importance={evil: 1.0}),
        again=again,
    )
    text = page.html(hostile)
    assert not [tag for tag, _ in tags_of(text) if tag == "script"]
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15


def test_a_study_of_a_thousand_trials_stays_under_a_megabyte(report) -> None:
    one = report.rows[0]
    random.seed(1)
    rows = tuple(
        replace(
            one,
            candidate=replace(one.candidate, trial=n, parameters=500 + n, run_id=f"{n:032x}"),
            sized=500 + n,
            val=replace(one.val, accuracy=random.random()),
            frontier=False,
            test=None,
        )
        for n in range(3000)
    )
    points = tuple((row, random.uniform(0.1, 1)) for row in rows)
    slices = tuple(replace(slice, points=points) for slice in report.learned.slices)
    many = replace(report, rows=rows, learned=replace(report.learned, slices=slices))
    text = page.html(many)
    assert len(text.encode()) < 1_000_000
    assert "more are in MLflow" in text


def test_every_dot_says_which_trial_it_is() -> None:
    dots = [
        svg.Dot(100 * 2**n, 0.5 + n / 20, (0.4, 0.9), n > 3, n == 5, n < 2, f"trial {n} <&>")
        for n in range(8)
    ]
    drawn = svg.frontier(dots, 0.7, 20_000, 0.9, 0.6, "parameters")
    titles = re.findall(r"<use [^>]*><title>([^<]*)</title></use>", drawn)
    assert sorted(titles) == [f"trial {n} &lt;&amp;&gt;" for n in range(8)]
    assert drawn == svg.frontier(dots, 0.7, 20_000, 0.9, 0.6, "parameters")
    assert ">1,000</text>" in drawn
    for colour in ("#0072b2", "#999999"):  # over the bar, under it; with and without a rim
        assert len(re.findall(rf'<g style="fill: {colour}; stroke: #\w+', drawn)) >= 1


# --- what the search learned -------------------------------------------------------------------


def test_importance_is_of_accuracy_and_finds_what_decides() -> None:
    search = {
        "distillation.alpha": Range(low=0.0, high=1.0),
        "training.learning_rate": Range(low=1e-4, high=1e-1, log=True),
        "student.channels": Choices(choices=((2, 4), (4, 8))),
    }
    drawn = random.Random(3)
    trained = [
        (
            {
                "distillation.alpha": (alpha := drawn.random()),
                "training.learning_rate": 10 ** drawn.uniform(-4, -1),
                "student.channels": drawn.choice([[2, 4], [4, 8]]),
            },
            0.9 - (alpha - 0.5) ** 2,
        )
        for _ in range(60)
    ]
    # a control's value, outside of what is searched, is no part of it
    trained.append(({**trained[0][0], "distillation.alpha": -1.0}, 0.99))
    found = importances(search, trained)
    assert next(iter(found)) == "distillation.alpha"
    assert math.isclose(sum(found.values()), 1)
    alike = [(values, 0.9) for values, _ in trained]
    assert importances(search, alike) == {}, "where all are as accurate nothing explains it"


def test_few_trials_say_nothing_of_importance_and_the_page_says_that(report) -> None:
    assert report.learned.importance == {}
    text = words(page.html(report))
    assert "4 recipes were trained to the end: too few to say which value matters most" in text
    assert len(report.learned.slices) == 3


def test_a_control_that_a_log_scale_cannot_show_is_left_out_of_that_picture(report) -> None:
    from kdexp.select import report as module

    log = Range(low=0.01, high=1.0, log=True)
    search = {**report.sweep.search, "distillation.alpha": log}
    found = module._slices(report.rows, report.sweep.model_copy(update={"search": search}))
    alphas = [value for _, value in found[0].points]
    assert len(alphas) == len(report.rows) - 1
    assert min(alphas) > 0


def test_an_end_of_the_range_that_the_smallest_share_is_named(report) -> None:
    from kdexp.select import report as module

    low = report.sweep.search["training.learning_rate"].low
    rows = [
        replace(
            row,
            values={**row.values, "training.learning_rate": low, "distillation.alpha": n / 10},
            val=replace(row.val, accuracy=0.9),
        )
        for n, row in enumerate(report.rows[:3])
    ]
    (said,) = module._rules(rows, report.sweep, LOW)
    assert f"all have training.learning_rate = {low}, the low end" in said
    assert "lower search.training.learning_rate.low" in said
    assert not module._rules(rows[:2], report.sweep, LOW), "two are no pattern"


# --- where it is kept --------------------------------------------------------------------------


def test_the_report_is_kept_with_the_study_and_linked_once(place, store) -> None:
    study = store.study("tiny")
    for _ in range(2):
        assert page.kept(study, LOW, place, store) == ""
    study = store.study("tiny")
    assert "report.html" in sealed(study)
    link = f"/runs/{study.run_id}/artifacts/report.html?workflowType=machine_learning"
    assert study.tags[NOTE].count(link) == 1
    first = study.tags[NOTE].split("\n\n")[1]
    assert first.endswith(f"[report](#/experiments/{study.experiment_id}{link})")


def test_a_report_that_fails_takes_nothing_from_a_sweep(place, store, monkeypatch) -> None:
    def broken(*_: object) -> str:
        raise TrackingAway("No answer from MLflow")

    monkeypatch.setattr(page, "made", broken)
    said = page.kept(store.study("tiny"), LOW, place, store)
    assert said == "No report was written: No answer from MLflow (kdexp report tiny tries it again)"


def test_a_link_is_put_beside_the_others_or_nowhere() -> None:
    text = "**first**\n\n[selected run](#a) · [all trials](#b)\n\nmore"
    assert linked(text, "report", "#c").split("\n\n")[1].endswith("[all trials](#b) · [report](#c)")
    assert linked("no links here", "report", "#c") == "no links here"
    once = linked(text, "report", "#c")
    assert linked(once, "report", "#c") == once


def test_a_file_that_cannot_be_written_is_one_line(tmp_path) -> None:
    def write(path: Path) -> None:
        path.write_text("é", "utf-8")

    with pytest.raises(KdexpError, match=r"--output .*: is a folder; name a file in it"):
        check_output("--output", tmp_path, "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(KdexpError, match=r"--output .*: cannot be written: .*; name another file"):
        write_output("--output", tmp_path / "file" / "report.html", write)
    write_output("--output", tmp_path / "new" / "report.html", write)
    assert (tmp_path / "new" / "report.html").read_text("utf-8") == "é"
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_command_writes_the_file_and_says_where(
    place,
    tmp_path,
    kdexp_here: Kdexp,  # noqa: F811
    monkeypatch,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or True)
    stores = f"--stores={place.stores}"
    done = kdexp_here("report", "tiny", stores, "--output", "x.html", "--open", "--bar", "0.2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Written:  x.html\n"
    text = (tmp_path / "x.html").read_text("utf-8")
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert opened == [(tmp_path / "x.html").as_uri()]
    assert kdexp_here("report", "tiny", stores).returncode == 0
    assert (tmp_path / "tiny-report.html").exists()
    unknown = kdexp_here("report", "tinny", stores)
    assert unknown.returncode == 1
    assert unknown.stderr == "kdexp: No study 'tinny' in the embedded store. Studies there: tiny.\n"
    folder = kdexp_here("report", "tiny", stores, "--output", str(tmp_path))
    assert folder.returncode == 1
    assert "is a folder" in folder.stderr
