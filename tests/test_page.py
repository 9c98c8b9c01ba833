"""The study's page: what its descriptions say, the views beside them, and how it is kept up while a
sweep runs.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from dataclasses import replace
from typing import get_args

import pytest
from conftest import CPU, drain, tiny_sweep, until
from mlflow.exceptions import MlflowException

from kdexp import config
from kdexp.config import Selection
from kdexp.distill.models import Size
from kdexp.repeats import Verdict as Sureness
from kdexp.runs import describe, views
from kdexp.runs.outcome import Outcome
from kdexp.runs.plots import BLUE, GREY, ORANGE
from kdexp.runs.records import INPUT, NOTE, PARTS, answer_of
from kdexp.runs.tracking import Tracking
from kdexp.search import live
from kdexp.search.live import LivePage
from kdexp.search.scheduler import TrialFinished
from kdexp.search.sweep import run_sweep
from kdexp.select.promote import promote
from kdexp.selection import Candidate, NothingPasses

RULE = Selection(accuracy_bar=0.96, limit=10_000)


def ended(accuracy: float, parameters: int = 5_000) -> Outcome:
    size = Size(parameters, 10 * parameters, 4 * parameters)
    return Outcome("run", "complete", size, accuracy, 400, 20, 20)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (ended(0.97), "meets the bar of 96.00%"),
        (ended(0.937), "misses the bar of 96.00% by 2.30 points"),
        (
            ended(0.97, 20_000),
            "meets the bar of 96.00%, but is over the limit of 10,000 parameters",
        ),
    ],
)
def test_a_trials_first_line_says_whether_it_meets_the_bar(outcome, said, tiny) -> None:
    assert describe._judged(outcome, RULE) == said


@pytest.mark.parametrize(
    ("accuracy", "images", "said"),
    [
        (0.97, 400, ""),
        (0.96, 400, ""),
        (0.95, 400, "1.00 points under the bar (95 % interval of 400 images: 92.40% to 96.74%)"),
        (0.95, 400, "may differ by chance"),
        (0.95, 10_000, "more than chance"),
    ],
)
def test_a_model_that_is_under_the_bar_on_test_says_so_and_what_that_says(
    accuracy, images, said
) -> None:
    text = describe.short_on_test(RULE, accuracy, images)
    assert said in text
    assert bool(text) == bool(said)


def test_what_one_training_cannot_say_at_the_confidence_asked_for_is_said() -> None:
    sure = RULE.model_copy(update={"confidence": 0.95})
    assert "not at 95 % confidence" in describe._judged(ended(0.962), sure)


def test_a_trial_says_in_words_what_it_has_in_place_of_the_defaults(tiny) -> None:
    recipe = tiny.recipe.replace(
        {
            "student.channels": [2, 4],
            "distillation.alpha": 1.0,
            "training.learning_rate": 0.00123456,
        }
    )
    assert describe._changes(recipe, tiny.recipe) == [
        "channels 2-4 for 4-8",
        "alpha 1 for 0.3",
        "learning rate 0.00123 for 0.01",
    ]
    assert not describe._changes(tiny.recipe, tiny.recipe)


def chosen(**more) -> Candidate:
    return Candidate("a" * 32, 8, 6_698, 90_000, 26_792, 0.9895, 400, **more)


def an_answer(candidate: Candidate, trials=()) -> describe.Answer:
    return describe.Answer(
        study="digits",
        experiment_id="1",
        study_run="b" * 32,
        run_id="a" * 32,
        candidate=candidate,
        rule=RULE,
        val_accuracy=0.9895,
        test_accuracy=0.964,
        test_interval=(0.94, 0.98),
        test_samples=359,
        test_repeats=None,
        gain="",
        trials=trials or [candidate],
        alias="smallest",
        load="load()",
    )


def test_a_studys_first_line_is_the_answer_and_how_sure_it_is() -> None:
    first, links = describe.answered(an_answer(chosen())).split("\n\n")[:2]
    assert first == (
        "**6,698 parameters · 27 KB · 96.40% on test** (met the bar of 96.00% once, by 98.95% on"
        " validation: not sure, `kdexp confirm digits`)"
    )
    for address in (
        f"[selected run](#/experiments/1/runs/{'a' * 32}?workflowType=machine_learning)",
        "viewStateShareKey=kdexp&compareRunsMode=CHART",
        "viewStateShareKey=kdexp-why",
        "[model @smallest](#/models/digits?workflowType=machine_learning)",
    ):
        assert address in links
    verdict = Sureness("sure", 0.9774, 0.011, 0.9626, repeats=8, most=9)
    first = describe.answered(an_answer(chosen(verdict=verdict))).split("\n\n")[0]
    assert first.endswith("(sure to meet the bar of 96.00%: 97.74% on validation over 8 repeats)")


def test_a_description_of_many_trials_is_not_cut_off() -> None:
    many = [replace(chosen(), trial=n, parameters=5_000 + n) for n in range(300)]
    text = describe.answered(an_answer(many[7], many))
    assert len(text) < 8_000
    assert "270 more: [all trials]" in text
    assert "5,007 | 98.95% | yes **(selected)**" in text


def test_every_link_of_a_description_opens_the_pages_for_training() -> None:
    text = describe.answered(an_answer(chosen()))
    links = [part.partition(")")[0] for part in text.split("](#")[1:]]
    assert len(links) > 4
    assert all("workflowType=machine_learning" in link for link in links)


def test_a_view_is_what_the_ui_reads(tiny) -> None:
    (tag,) = views.of_sweep(tiny, 1_700_000_000_000).items()
    key, view = tag[0], json.loads(tag[1])
    assert key == "mlflow.sharedViewState.kdexp"
    assert (view["name"], view["createdAt"]) == ("kdexp: trials", 1_700_000_000_000)
    state = json.loads(view["state"])
    assert state["searchFilter"] == "tags.`kdexp.kind` = 'trial'"
    assert {f"params.`{path}`" for path in tiny.search} < set(state["selectedColumns"])
    (parallel,) = [c for c in state["compareRunCharts"] if c["type"] == "PARALLEL"]
    assert parallel["selectedParams"] == list(tiny.search)
    assert parallel["selectedMetrics"][-1] == "val_accuracy"
    assert len(tag[1]) < 20_000


def test_repeats_have_a_view_of_their_own(tiny) -> None:
    study = tiny.study.model_copy(update={"objective": "smallest", "repeats": 5})
    found = views.of_sweep(tiny.model_copy(update={"study": study}), 0)
    filters = {
        key.rpartition(".")[2]: json.loads(json.loads(value)["state"])["searchFilter"]
        for key, value in found.items()
    }
    assert filters["kdexp"].endswith("tags.`kdexp.repeats` IS NULL")
    assert filters["kdexp-repeats"].endswith("tags.`kdexp.repeats` IS NOT NULL")


# --- as a sweep writes it ---


def test_a_sweep_leaves_its_page_behind(tiny, settings, tracking: Tracking) -> None:
    drain(run_sweep(tiny, settings, tracking, CPU))
    study = tracking.study("tiny")
    assert set(tracking.inputs(study.run_id)) == {"training", "validation"}
    assert study.tags["mlflow.source.git.commit"]
    assert json.loads(tracking.read_text(study.run_id, INPUT))["classes"] == [
        str(n) for n in range(10)
    ]
    trials = tracking.find("trial", {})
    for run in trials:
        over = run.metrics["val_accuracy"] >= tiny.selection.accuracy_bar
        assert run.tags["mlflow.runColor"] == (BLUE if over else GREY)
        assert ("meets" if over else "misses") in run.tags[NOTE].splitlines()[0]
        assert json.loads(tracking.read_text(run.run_id, INPUT))["classes"] == [
            str(n) for n in range(10)
        ]

    done = promote(study, tiny.selection, settings, tracking, CPU)
    study = tracking.study("tiny")
    assert study.tags[NOTE].startswith(f"**{done.candidate.parameters:,} parameters · ")
    assert "kdexp.selected_note" not in study.tags
    colours = {run.run_id: run.tags["mlflow.runColor"] for run in tracking.find("trial", {})}
    assert [run for run, colour in colours.items() if colour == ORANGE] == [done.run_id]
    why = tracking.experiment_tags(study.experiment_id)["mlflow.sharedViewState.kdexp-why"]
    shown = json.loads(json.loads(why)["state"])["searchFilter"]
    controls = [run.run_id for run in trials if run.tags["kdexp.trial"] in ("0", "1")]
    assert all(run in shown for run in [*controls, done.run_id])

    # another bar, another choice of colours
    most = max(run.metrics["val_accuracy"] for run in trials)
    other = promote(
        study, Selection(accuracy_bar=most, goal="most_accurate"), settings, tracking, CPU
    )
    again = {run.run_id: run for run in tracking.find("trial", {})}
    assert again[other.run_id].tags["mlflow.runColor"] == ORANGE
    assert sum(run.tags["mlflow.runColor"] == GREY for run in again.values()) >= 1


def test_what_a_former_version_wrote_of_a_study_stays_in_its_description(tracking) -> None:
    former = {"kdexp.selected_note": "selected then", "kdexp.confirmed_note": "confirmed then"}
    assert answer_of(former) == "confirmed then\n\nselected then"
    now = former | {f"{PARTS}selected": "selected now"}
    assert answer_of(now) == "confirmed then\n\nselected now"


def test_a_study_that_finds_nothing_says_so_and_what_was_nearest(tiny, settings, tracking) -> None:
    drain(run_sweep(tiny, settings, tracking, CPU))
    rule = Selection(accuracy_bar=1.0)
    with pytest.raises(NothingPasses):
        promote(tracking.study("tiny"), rule, settings, tracking, CPU)
    study = tracking.study("tiny")
    first = study.tags[NOTE].splitlines()[0]
    assert first.startswith("**No student of study 'tiny' reaches validation accuracy 1.** Best:")
    assert tracking.download(study.run_id, "frontier.png", settings.stores).exists()
    promote(study, tiny.selection, settings, tracking, CPU)
    answer = tracking.study("tiny").tags[NOTE]
    with pytest.raises(NothingPasses):
        promote(tracking.study("tiny"), rule, settings, tracking, CPU)
    assert tracking.study("tiny").tags[NOTE] == answer, "a question more takes no answer away"


def test_views_that_cannot_be_written_stop_no_sweep(tiny, settings, tracking, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise MlflowException("no permission")

    monkeypatch.setattr(tracking.client, "set_experiment_tag", refused)
    drain(run_sweep(tiny, settings, tracking, CPU))
    assert promote(tracking.study("tiny"), tiny.selection, settings, tracking, CPU).run_id


def test_the_page_is_kept_up_while_a_sweep_runs(tiny, settings, tracking, monkeypatch) -> None:
    monkeypatch.setattr(live, "EVERY", 0.0)
    notes = []
    events = run_sweep(tiny, settings, tracking, CPU)
    for event in events:
        if isinstance(event, TrialFinished) and event.done == 3:
            break
        if notes == [] and isinstance(event, TrialFinished) and event.done == 2:
            until(lambda: "of 4 trials" in tracking.study("tiny").tags[NOTE], "the page")
            notes.append(tracking.study("tiny").tags[NOTE])
    (note,) = notes
    assert re.match(
        r"\*\*[12] of 4 trials · smallest over the bar so far [\d,]+ parameters · ", note
    )
    assert "left** (written at " in note
    assert "path=progress.png" in note
    assert "A *study*: 4 trials search" in note
    study = tracking.study("tiny")
    assert tracking.download(study.run_id, "progress.png", settings.stores).stat().st_size > 5_000
    events.close()
    stopped = tracking.study("tiny").tags[NOTE]
    assert stopped.startswith("Stopped: the same command goes on. **3 of 4 trials")


def a_page(tiny, tracking) -> LivePage:
    run = tracking.start(tracking.experiment("tiny"), "study", "study tiny", {}, {})
    return LivePage(tiny, run, tracking.experiment("tiny"), 0, [], tracking)


def an_end(done: int) -> TrialFinished:
    return TrialFinished(done, ended(0.97), done)


def test_a_page_is_written_once_a_minute_at_most(tiny, tracking, monkeypatch) -> None:
    page, written = a_page(tiny, tracking), []
    monkeypatch.setattr(page, "_write", lambda stopped: written.append(page.done))
    for done in range(1, 10):
        page.trial_ended(an_end(done))
    assert not written, "not in the first minute"
    page.due -= live.EVERY
    for done in range(10, 20):
        page.trial_ended(an_end(done))
    until(lambda: written == [10], "the page")


def test_a_server_that_hangs_or_is_away_delays_and_fails_nothing(
    tiny, tracking, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.DEBUG, "kdexp")
    page, answers = a_page(tiny, tracking), threading.Event()
    monkeypatch.setattr(live, "EVERY", 0.0)
    monkeypatch.setattr(live, "LAST_SECONDS", 0.1)

    def hangs(*_: object, **__: object) -> None:
        answers.wait(30)
        raise MlflowException("API request to http://x failed with error code 503 != 200")

    monkeypatch.setattr(page.tracking.client, "search_runs", hangs)
    page.due, started = 0.0, time.monotonic()
    for done in range(1, 5):
        page.trial_ended(an_end(done))
    page.stop(finished=True)
    assert time.monotonic() - started < 5
    answers.set()
    assert page.writer is not None
    page.writer.join(10)
    assert "the study's page was not written" in caplog.text


def test_the_smallest_so_far_is_one_that_is_sure_where_trials_are_repeated(tiny, tracking) -> None:
    study = tiny.study.model_copy(update={"objective": "smallest", "repeats": 5})
    page = a_page(tiny.model_copy(update={"study": study}), tracking)
    trials = [replace(chosen(), trial=n, parameters=5_000 + n) for n in range(3)]
    assert page._smallest(trials) is None
    sure = Sureness("sure", 0.98, None, 0.97, repeats=2, most=4)
    page.trial_ended(TrialFinished(7, ended(0.97), 7, repeats=2, sureness=sure))
    assert page._smallest(trials) == trials[2]


@pytest.mark.parametrize("unit", get_args(config.Size))
def test_a_view_has_the_size_that_the_study_selects_by(unit: str) -> None:
    sweep = tiny_sweep()
    rule = sweep.selection.model_copy(update={"size": unit})
    tags = views.of_sweep(sweep.model_copy(update={"selection": rule}), 0)
    state = json.loads(tags[views.VIEW_TAG + views.TRIALS])["state"]
    assert f"metrics.`{views.METRIC[unit]}`" in json.loads(state)["selectedColumns"]
