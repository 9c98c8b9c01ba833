"""A pass that prunes others must be sure: repeats within a study, from Optuna's choice to the
answer.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import replace

import optuna
import pytest
from conftest import CPU, tiny_sweep

from kdexp.config import Selection, Sweep
from kdexp.distill.randomness import seed_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.search.objective import NOT_SURE
from kdexp.search.remembered import misremembered
from kdexp.search.scheduler import finished
from kdexp.search.storage import StudyError
from kdexp.search.study import OpenStudy, check_study
from kdexp.search.sweep import EpochDone, TrialFinished, TrialSkipped, run_sweep
from kdexp.select.confirm import confirm
from kdexp.select.promote import candidates, promote, sweep_of, under
from kdexp.select.reproduce import reproduce
from kdexp.selection import NothingPasses, passes, plan_of, select
from kdexp.settings import Settings

CHANNELS = [[2, 3], [2, 4], [3, 4], [3, 6], [4, 6], [4, 8], [6, 8], [6, 12]]


def repeating(bar: float = 0.25, trials: int = 14, **study) -> Sweep:
    """A search for the smallest over real digits whose passes are repeated."""
    tree = json.loads(tiny_sweep().model_dump_json())
    tree["name"] = "again"
    tree["student"] |= {"channels": [6, 12], "hidden": 16}
    tree["training"] |= {"epochs": 2, "learning_rate": 0.02}
    tree["search"]["student.channels"] = {"choices": CHANNELS}
    tree["study"] |= {"trials": trials, "objective": "smallest", "repeats": 5} | study
    tree["selection"]["accuracy_bar"] = bar
    return Sweep.model_validate_json(json.dumps(tree))


def drain(generator) -> list:
    return list(generator)


def trials_of(settings: Settings) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="again", storage=settings.storage_url).trials


def repeats_of(tracking: Tracking) -> dict[int, list[RunRecord]]:
    """The runs that repeat a trial, by its number, in their order."""
    found: dict[int, list[RunRecord]] = {}
    runs = tracking.find("trial", {})
    for run in sorted(runs, key=lambda run: int(run.tags["kdexp.trial"])):
        if "kdexp.repeats" in run.tags and run.status == "FINISHED":
            found.setdefault(int(run.tags["kdexp.repeats"]), []).append(run)
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory, empty_store):
    """One that has ended, with its events."""
    from conftest import stores_in

    settings = stores_in(tmp_path_factory.mktemp("again"), empty_store)
    return settings, drain(run_sweep(repeating(), settings, Tracking(settings), CPU))


def test_a_training_is_a_training_repeats_count_in_the_budget(study) -> None:
    settings, events = study
    ended = [event for event in events if isinstance(event, TrialFinished)]
    assert len(ended) == 14
    assert repeats_of(Tracking(settings))
    assert all(
        event.sureness and event.sureness.repeats for event in ended if event.repeats is not None
    )


def test_a_repeat_has_its_recipe_with_another_seed_and_holds_out_another_fold(study) -> None:
    settings, _ = study
    tracking = Tracking(settings)
    firsts = {
        c.trial: tracking.read(c.run_id) for c in candidates(tracking.study("again"), tracking)
    }
    for number, runs in repeats_of(tracking).items():
        for repeat, run in enumerate(runs, start=1):
            assert run.tags["kdexp.repeat"] == str(repeat)
            changed = {
                key: value
                for key, value in run.params.items()
                if firsts[number].params[key] != value
            }
            assert changed == {
                "training.seed": str(seed_of(8787, "repeat", repeat)),
                "training.keep": "last",
                "data.fold": str(repeat % 5),
                "trial": run.tags["kdexp.trial"],
            }
        seen = {run.tags["kdexp.validation_sha256"] for run in [firsts[number], *runs]}
        assert len(seen) == min(len(runs) + 1, 5)


def test_only_a_sure_pass_makes_larger_proposals_needless(study) -> None:
    settings, events = study
    sure = min(
        event.outcome.size.parameters
        for event in events
        if isinstance(event, TrialFinished) and event.sureness and event.sureness.state == "sure"
    )
    for event in events:
        if isinstance(event, TrialSkipped) and "meets the bar with" in event.why:
            assert int(event.why.split()[-1].replace(",", "")) >= sure
    told = [trial for trial in trials_of(settings) if trial.constraints]
    firsts = [trial for trial in told if "repeats" not in trial.user_attrs]
    assert all(trial.constraints["accuracy"] >= NOT_SURE for trial in firsts)
    assert any(trial.constraints["accuracy"] <= 0 for trial in told)


def test_the_answer_is_sure_and_its_repeats_are_looked_at_on_test_once(study) -> None:
    settings, _ = study
    tracking = Tracking(settings)
    done = promote(
        tracking.study("again"), repeating().selection, settings, tracking, CPU, sure=True
    )
    assert done.candidate.verdict.state == "sure"
    assert done.test_repeats.samples == done.test_samples
    assert len(done.test_repeats.correct) == done.candidate.verdict.repeats
    looked = [run for run in tracking.find("trial", {}) if "test_accuracy" in run.metrics]
    assert len(looked) == done.candidate.verdict.repeats
    assert {run.tags.get("kdexp.repeats") for run in looked} == {str(done.candidate.trial)}
    assert done.run_id == repeats_of(tracking)[done.candidate.trial][0].run_id
    assert done.looks == 1
    again = promote(tracking.study("again"), repeating().selection, settings, tracking, CPU)
    assert again.test_repeats == done.test_repeats
    assert not again.new_look


def test_every_repeat_reproduces_by_its_id(study) -> None:
    settings, _ = study
    tracking = Tracking(settings)
    runs = next(iter(repeats_of(tracking).values()))
    work = reproduce(runs[-1].run_id, settings, tracking, CPU)
    assert finished(work).identical


def test_what_optuna_holds_of_trials_and_repeats_is_what_their_runs_say(study) -> None:
    settings, _ = study
    tracking, sweep = Tracking(settings), repeating()
    study_run = tracking.study("again")
    told = OpenStudy(
        optuna.load_study(study_name="again", storage=settings.storage_url), sweep
    ).told()
    assert not misremembered(told, sweep, study_run.run_id, tracking)
    number = next(number for number, one in told.items() if one.repeats is not None)
    better = replace(told[number].measured, correct=told[number].measured.samples)
    told[number] = replace(told[number], measured=better)
    assert misremembered(told, sweep, study_run.run_id, tracking) == (number,)


def stopped_after(sweep: Sweep, epochs: int, settings: Settings, tracking: Tracking) -> None:
    """The command is stopped after so many epochs, wherever it is then."""
    seen = 0
    with closing(run_sweep(sweep, settings, tracking, CPU)) as events:
        for event in events:
            seen += isinstance(event, EpochDone)
            if seen == epochs:
                return


def test_stopped_in_the_middle_of_repeats_the_same_study_comes_of_it(
    study, settings, tracking
) -> None:
    for epochs in (7, 4, 3, 5):
        stopped_after(repeating(), epochs, settings, tracking)
    drain(run_sweep(repeating(), settings, tracking, CPU))
    before, _ = study

    def seen(place: Settings) -> list[tuple]:
        return [
            (t.params, dict(t.constraints), t.values, t.user_attrs.get("measured"))
            for t in trials_of(place)
        ]

    assert seen(settings) == seen(before)
    weights = [
        sorted(
            (run.tags["kdexp.trial"], run.tags["kdexp.weights_sha256"])
            for run in Tracking(place).find("trial", {})
            if run.status == "FINISHED"
        )
        for place in (settings, before)
    ]
    assert weights[0] == weights[1]
    assert max(Counter(number for number, _ in weights[0]).values()) == 1


def test_several_workers_repeat_side_by_side(settings, tracking) -> None:
    two = replace(settings, workers=2)
    events = drain(run_sweep(repeating(trials=12), two, tracking, CPU))
    assert sum(isinstance(event, TrialFinished) for event in events) == 12
    for runs in repeats_of(tracking).values():
        drawn = [run.params["training.seed"] for run in runs]
        assert len(set(drawn)) == len(drawn)


def test_where_nothing_is_sure_the_nearest_is_named_and_what_it_would_take(
    settings, tracking
) -> None:
    sweep = repeating(bar=0.95, trials=8)
    drain(run_sweep(sweep, settings, tracking, CPU))
    run = tracking.study("again")
    with pytest.raises(NothingPasses, match="No student of study 'again' is sure to reach 95.00 %"):
        promote(run, sweep.selection, settings, tracking, CPU, sure=True)
    assert not [run for run in tracking.find("trial", {}) if "test_accuracy" in run.metrics]


def test_another_rule_judges_the_same_repeats(study) -> None:
    settings, _ = study
    tracking = Tracking(settings)
    run = tracking.study("again")
    trials, sweep = candidates(run, tracking), sweep_of(run, tracking)
    low = under(Selection(accuracy_bar=0.2), trials, run, tracking)
    high = under(Selection(accuracy_bar=0.999), trials, run, tracking)
    sure = {one.trial for one in low if passes(one, Selection(accuracy_bar=0.2))}
    assert sure
    assert sure <= {one.trial for one in trials if one.repeated.repeats}
    assert not [one for one in high if passes(one, Selection(accuracy_bar=0.999))]
    assert plan_of(sweep.study, Selection(confidence=0.99), 5).level == 0.99


def test_a_study_of_an_earlier_version_goes_on_without_repeats(settings, tracking) -> None:
    old = repeating(repeats=1, trials=4)
    drain(run_sweep(old, settings, tracking, CPU))
    stored = optuna.load_study(study_name="again", storage=settings.storage_url)
    said = json.loads(stored.user_attrs["sweep"])
    del said["study"]["repeats"]
    stored.set_user_attr("sweep", json.dumps(said))
    drain(run_sweep(repeating(trials=6), settings, tracking, CPU))
    assert not repeats_of(tracking)
    assert promote(tracking.study("again"), old.selection, settings, tracking, CPU, sure=True)


def test_more_repeats_and_trainings_may_be_asked_for_but_not_none(study) -> None:
    settings, _ = study
    assert check_study(repeating(repeats=9, trials=30), settings)
    with pytest.raises(StudyError, match="repeats 5 → 1"):
        check_study(repeating(repeats=1), settings)


def test_controls_are_repeated_in_pairs_for_what_the_teacher_gives(settings, tracking) -> None:
    sweep = repeating(trials=40, repeats=3)
    drain(run_sweep(sweep, settings, tracking, CPU))
    done = promote(tracking.study("again"), sweep.selection, settings, tracking, CPU, sure=True)
    assert len(done.gain.differences) == 3
    assert "3 pairs" in str(done.gain)


@pytest.mark.parametrize("machines", [1, 2])
def test_two_commands_share_the_repeats(settings, tracking, tmp_path, machines) -> None:
    """One stands in the middle of a trial while the other goes on, then both end: each training
    once, the budget kept, one answer.
    """
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    here = settings if machines == 1 else replace(settings, storage=shared)
    there = here if machines == 1 else replace(here, stores=tmp_path / "other")
    sweep = repeating(trials=10)
    first = run_sweep(sweep, here, tracking, CPU)
    epochs = 0
    for event in first:
        epochs += isinstance(event, EpochDone)
        if epochs == 7:
            break
    drain(run_sweep(sweep, there, tracking, CPU))
    drain(first)
    ended = [run for run in tracking.find("trial", {}) if run.status == "FINISHED"]
    assert len(ended) == 10
    assert len({run.tags["kdexp.trial"] for run in ended}) == 10
    for runs in repeats_of(tracking).values():
        assert [run.tags["kdexp.repeat"] for run in runs] == [
            str(number + 1) for number in range(len(runs))
        ]
    run = tracking.study("again")
    answers = [
        select(under(sweep.selection, candidates(run, tracking), run, tracking), sweep.selection)
        for _ in range(2)
    ]
    assert answers[0].verdict.state == "sure"
    assert answers[0] == answers[1]


def test_confirm_goes_on_from_the_studys_repeats_under_another_bar(study) -> None:
    settings, _ = study
    tracking = Tracking(settings)
    before = len(tracking.find("trial", {}))
    rule = Selection(accuracy_bar=0.35)
    done = finished(confirm(tracking.study("again"), rule, 8, False, settings, tracking, CPU))
    assert done.verdict.confirmed
    assert done.verdict.repeats.state == "sure"
    assert done.verdict.repeats.low >= 0.35
    assert len(tracking.find("trial", {})) == before, "what is more is of another kind"
    new = tracking.find("confirmation", {})
    drawn = {(run.tags["kdexp.confirms"], run.params["training.seed"]) for run in new}
    assert len(drawn) == len(new)
    assert len(done.runs) == done.verdict.repeats.repeats
    assert all("test_accuracy" in run.metrics for run in done.runs)


def test_a_repeat_is_neither_pruned_nor_ended_by_its_curve(settings, tracking) -> None:
    sweep = repeating(trials=14, early_stop=True)
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    ended = [event for event in events if isinstance(event, TrialFinished)]
    sure = min(
        (e.outcome.size.parameters for e in ended if e.sureness and e.sureness.state == "sure"),
        default=0,
    )
    for event in ended:
        if event.repeats is not None and event.outcome.state == "pruned":
            assert event.outcome.size.parameters >= sure


def test_with_a_shared_teacher_one_cache_serves_every_fold(settings, tracking) -> None:
    sweep = repeating(trials=6).replace({"teacher.per_fold": False})
    drain(run_sweep(sweep, settings, tracking, CPU))
    runs = [run for run in tracking.find("trial", {}) if run.status == "FINISHED"]
    assert {run.tags["kdexp.logits_of"] for run in runs} == {"all images"}
    assert len({run.tags["kdexp.teacher_sha256"] for run in runs}) == 1
    assert len({run.tags["kdexp.validation_sha256"] for run in runs}) > 1
    again = next(iter(repeats_of(tracking).values()))[-1]
    assert finished(reproduce(again.run_id, settings, tracking, CPU)).identical


def test_each_fold_has_a_teacher_that_has_not_seen_it(study) -> None:
    settings, _ = study
    tracking = Tracking(settings)
    runs = [run for run in tracking.find("trial", {}) if run.status == "FINISHED"]
    by_fold = {(run.params["data.fold"], run.tags["kdexp.teacher_sha256"]) for run in runs}
    assert len(by_fold) == len({fold for fold, _ in by_fold}) > 1
    for run in runs:
        teacher = tracking.read(run.tags["kdexp.teacher_run"])
        assert teacher.params["data.fold"] == run.params["data.fold"]


def test_what_is_erased_anew_for_each_seed_is_erased_for_its_repeats_teacher(
    settings, tracking
) -> None:
    sweep = repeating(trials=6).replace({"training.random_erasing": 0.5})
    drain(run_sweep(sweep, settings, tracking, CPU))
    for runs in repeats_of(tracking).values():
        for run in runs:
            assert finished(reproduce(run.run_id, settings, tracking, CPU)).identical
            break
