"""Fresh seeds end to end on real stores: the lucky winner is found out, nothing is trained or
looked at twice.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import CPU, stores_in, tiny_sweep
from test_sweep import drain, interrupt_at, statuses

from kdexp import KdexpError
from kdexp.config import ConfigError, Selection, Sweep
from kdexp.distill import datasets as data_module
from kdexp.distill.datasets import load_splits
from kdexp.intervals import wilson_interval
from kdexp.runs.tracking import Tracking
from kdexp.search.claims import Claimant
from kdexp.search.sweep import EpochDone, run_sweep
from kdexp.select.confirm import Confirmation, Verdict, confirm
from kdexp.select.fresh import Elsewhere, Retraining, SeedDone
from kdexp.select.promote import candidates, looks, promote, recipe_of, sweep_of
from kdexp.select.reproduce import reproduce
from kdexp.selection import Candidate, NothingPasses, select
from kdexp.settings import Settings

BAR = 0.55  # between what students of 1 and of 8-16 channels can do
RULE = Selection(accuracy_bar=BAR)


def sweep_with_a_student_too_small() -> Sweep:
    tree = json.loads(tiny_sweep().model_dump_json())
    tree["name"] = "luck"
    tree["data"]["augment"] = {"flip": True, "shift": 0}
    tree["student"] = {"channels": [8, 16], "hidden": 16, "dropout": 0.0}
    tree["training"] |= {"epochs": 4, "learning_rate": 0.02, "batch_size": 32}
    tree["search"] = {"student.channels": {"choices": [[1, 1], [8, 16]]}}
    tree["study"] |= {"trials": 4, "sampler": "random"}
    tree["selection"] = {"accuracy_bar": BAR}
    return Sweep.model_validate_json(json.dumps(tree))


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store) -> Settings:
    """A finished study, whose smallest student (of no use) had luck: 99 % on validation, says its
    record.
    """
    settings = stores_in(tmp_path_factory.mktemp("confirm"), empty_store)
    tracking = Tracking(settings)
    sweep = sweep_with_a_student_too_small()
    drain(run_sweep(sweep, settings, tracking, CPU))
    every = candidates(tracking.study("luck"), tracking)
    lucky = [c for c in every if c.parameters == min(c.parameters for c in every)]
    assert 0 < len(lucky) < len(every)
    for candidate in lucky:
        assert candidate.val_accuracy < BAR
    said_to_be_right(tracking, lucky[0], lucky[0].val_samples - 3)
    return settings


def said_to_be_right(tracking: Tracking, candidate: Candidate, correct: int) -> None:
    """So many predictions on validation, says the record."""
    low, high = wilson_interval(correct, candidate.val_samples)
    accuracy = correct / candidate.val_samples
    tracking.log_metrics(
        candidate.run_id,
        {"val_accuracy": accuracy, "val_accuracy_low": low, "val_accuracy_high": high},
    )


@pytest.fixture
def store(place) -> Tracking:
    return Tracking(place)


def confirming(
    place: Settings, store: Tracking, rule: Selection = RULE, seeds: int = 2, both: bool = False
):
    return confirm(store.study("luck"), rule, seeds, both, place, store, CPU)


def untrained(place: Settings, store: Tracking) -> int:
    """The number of a fresh seed that no test has begun; all before it are trained."""
    begun = [
        int(run.name.split(" · ")[1].removeprefix("fresh seed "))
        for run in store.find("confirmation", {})
    ]
    number = max([2, *begun]) + 1
    drain(confirming(place, store, seeds=number - 1))
    return number


def trained(events) -> set[int]:
    return {event.number for event in events if isinstance(event, EpochDone)}


def of(kind, events) -> list:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """Each read of the training data, and each of test, in their order."""
    order: list[str] = []
    read = data_module._train_and_test

    def spying(*args, test):
        order.append("test" if test else "train")
        return read(*args, test=test)

    monkeypatch.setattr(data_module, "_train_and_test", spying)
    return order


def test_where_none_is_confirmed_the_nearest_is_named_and_test_is_never_loaded(
    place, store, looked
) -> None:
    before = looks(store.study("luck"), store)
    with pytest.raises(
        NothingPasses,
        match=r"No student of study 'luck' is confirmed: 1 passed .* Nearest: \d+\.\d\d %",
    ):
        drain(confirming(place, store, Selection(accuracy_bar=0.985)))
    assert "test" not in looked
    assert looks(store.study("luck"), store) == before


def test_a_winner_that_fresh_seeds_do_not_confirm_leads_to_the_next(place, store, looked) -> None:
    study, events, seen_before = store.study("luck"), [], []
    tested = {run.run_id for run in store.find("trial", {}) if "test_accuracy" in run.metrics}
    generator = confirming(place, store)
    while True:
        try:
            events.append(next(generator))
            if isinstance(events[-1], Verdict):
                seen_before.append("test" in looked)
        except StopIteration as end:
            done: Confirmation = end.value
            break
    every = candidates(study, store)
    winner = select(every, RULE)
    following = select([c for c in every if c != winner], RULE)
    verdicts = of(Verdict, events)
    assert [(v.candidate, v.confirmed) for v in verdicts] == [(winner, False), (following, True)]
    assert seen_before == [False, False]
    assert done.verdict == verdicts[1]
    assert done.tried == (verdicts[0],)
    assert store.read(winner.run_id).tags["kdexp.confirmed"].startswith("no: ")
    assert store.read(following.run_id).tags["kdexp.confirmed"].startswith("yes: ")
    fresh = [
        run
        for run in store.find("confirmation", {"mlflow.parentRunId": study.run_id})
        if "test_accuracy" in run.metrics
    ]
    assert {run.run_id for run in fresh} >= {run.run_id for run in done.runs}
    assert {run.tags["kdexp.confirms"] for run in fresh} == {following.run_id}, "and of no other"
    assert {
        run.run_id for run in store.find("trial", {}) if "test_accuracy" in run.metrics
    } == tested


def test_fresh_seeds_are_the_trials_recipe_but_for_the_seed(place, store) -> None:
    _, done = drain(confirming(place, store))
    original = recipe_of(store.read(done.verdict.candidate.run_id), store)
    recipes = [recipe_of(run, store) for run in done.runs]
    seeds = {recipe.training.seed for recipe in recipes}
    assert len(seeds) == 2
    assert original.training.seed not in seeds
    assert all(
        recipe.replace({"training.seed": original.training.seed}) == original for recipe in recipes
    )
    assert {run.tags["kdexp.teacher_sha256"] for run in done.runs} == {
        store.read(done.verdict.candidate.run_id).tags["kdexp.teacher_sha256"]
    }


def test_a_repeated_command_trains_nothing_and_looks_at_nothing(place, store, looked) -> None:
    first = drain(confirming(place, store))[1]
    looked.clear()
    events, again = drain(confirming(place, store))
    assert not trained(events)
    assert not any(event.new for event in of(SeedDone, events))
    assert "test" not in looked
    assert looked.count("train") == 1, (
        "what is on record is measured again, on images that are read once"
    )
    assert (again.verdict, again.test, again.tta, again.model) == (
        first.verdict,
        first.test,
        first.tta,
        first.model,
    )
    for run in again.runs:
        assert len(store.history(run.run_id, "test_accuracy")) == 1


def test_the_study_its_description_and_the_registered_model_say_so(place, store) -> None:
    _, done = drain(confirming(place, store))
    study, chosen = store.study("luck"), done.verdict.candidate
    means = (study.metrics["confirm_val_mean"], study.metrics["confirm_val_sd"])
    assert means == (pytest.approx(done.verdict.seeds.mean), pytest.approx(done.verdict.seeds.sd))
    assert (study.metrics["confirm_test_mean"], study.metrics["confirm_test_sd"]) == (
        done.test.mean,
        done.test.sd,
    )
    assert study.metrics["confirm_test_tta_mean"] == done.tta.mean
    assert study.tags["kdexp.confirmed_run"] == chosen.run_id
    assert done.model == "models:/luck@confirmed"
    version = store.client.get_model_version_by_alias("luck", "confirmed")
    assert version.run_id == done.runs[0].run_id
    assert str(done.verdict.seeds) in version.description
    winner = select(candidates(study, store), RULE)
    true = min(value for _, value in store.history(winner.run_id, "val_accuracy"))
    said_to_be_right(store, winner, round(true * winner.val_samples))
    # which believes no record that its weights do not bear out
    promote(study, RULE, place, store, CPU)
    said_to_be_right(store, winner, winner.val_samples - 3)
    note = store.study("luck").tags["mlflow.note.content"]
    assert f"**Confirmed: trial {chosen.trial}**" in note
    assert "**Selected: trial" in note


def test_more_seeds_train_only_those_that_are_missing(place, store) -> None:
    number = untrained(place, store)
    events, done = drain(confirming(place, store, seeds=number))
    assert trained(events) == {number}
    assert len(done.runs) == number


def test_an_interrupted_confirmation_goes_on_with_what_is_missing_and_reproduces(
    place, store
) -> None:
    number = untrained(place, store)
    interrupt_at(
        confirming(place, store, seeds=number + 1),
        lambda event: (
            isinstance(event, EpochDone) and (event.number, event.report.epoch) == (number, 2)
        ),
    )
    (left,) = [run for run in store.find("confirmation", {}) if f"seed {number}" in run.name]
    assert left.status == "KILLED"
    events, _ = drain(confirming(place, store, seeds=number + 1))
    assert trained(events) == {number, number + 1}
    first = next(event for event in events if isinstance(event, EpochDone))
    assert (first.number, first.report.epoch) in (
        (number, 2),
        (number, 3),
    ), "it goes on from its checkpoint"
    finished = store.read(left.run_id)
    assert (finished.status, "kdexp.resumed_from_epoch" in finished.tags) == (
        "FINISHED",
        True,
    ), "in the run that it had"
    _, comparison = drain(reproduce(left.run_id, place, store, CPU))
    assert comparison.identical
    assert comparison.compared == 24


def test_a_run_whose_command_was_killed_is_closed_and_its_seed_trained_again(place, store) -> None:
    number = untrained(place, store)
    begun = lambda event: isinstance(event, EpochDone) and event.number == number  # noqa: E731
    interrupt_at(confirming(place, store, seeds=number), begun)
    (left,) = [run for run in store.find("confirmation", {}) if f"seed {number}" in run.name]
    store.finish(left.run_id, "RUNNING")  # as kill -9 leaves it
    shutil.rmtree(place.stores / "checkpoints" / f"confirm-{store.study('luck').run_id}")
    events, _ = drain(confirming(place, store, seeds=number))
    assert trained(events) == {number}
    assert store.read(left.run_id).status == "KILLED"
    assert statuses(place, "confirmation")["RUNNING"] == 0


@pytest.mark.parametrize("machines", [1, 2])
def test_two_commands_share_the_seeds(place, store, tmp_path, machines) -> None:
    """What another command is at is left until last, and then waited for: also one of another
    machine, on one storage.
    """
    number = untrained(place, store)
    begun = lambda event: isinstance(event, EpochDone) and event.number == number  # noqa: E731
    interrupt_at(confirming(place, store, seeds=number), begun)
    folder = place.stores / "checkpoints" / f"confirm-{store.study('luck').run_id}"
    (checkpoint,) = folder.glob("*.checkpoint")
    here = place if machines == 1 else replace(place, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    there = here if machines == 1 else replace(here, stores=tmp_path / "other")
    with Claimant(there) as other, other.lock(f"seed {checkpoint.stem}"):
        events = interrupt_at(
            confirming(here, store, seeds=number + 1), lambda event: isinstance(event, Elsewhere)
        )
        assert trained(events) == {number + 1}
        assert events[-1] == Elsewhere(number)
    events, _ = drain(confirming(here, store, seeds=number + 1))
    assert number in trained(events)


def test_on_train_and_validation_nothing_is_held_out_and_the_teacher_is_the_trials(
    place, store
) -> None:
    events, done = drain(confirming(place, store, both=True))
    assert [event.images for event in of(Retraining, events)][-1] == "train and validation"
    sweep = sweep_of(store.study("luck"), store)
    trial = store.read(done.verdict.candidate.run_id)
    for run in done.runs:
        recipe = recipe_of(run, store)
        assert recipe.data.train_on_validation
        assert recipe.training.keep == "last"
        assert run.metrics["kept_epoch"] == recipe.training.epochs
        assert "val_accuracy" not in run.metrics
        assert "test_accuracy_tta" in run.metrics
        assert run.tags["kdexp.teacher_sha256"] == trial.tags["kdexp.teacher_sha256"]
        splits = load_splits(recipe.data)
        assert (
            splits.train.fingerprint
            == run.tags["kdexp.train_sha256"]
            != trial.tags["kdexp.train_sha256"]
        )
        held_out = load_splits(sweep.data)
        assert len(splits.train) == len(held_out.train) + len(held_out.validation)
    assert done.verdict.seeds.samples == int(trial.metrics["val_samples"]), (
        "the verdict is that of the images held out"
    )
    _, comparison = drain(reproduce(done.runs[0].run_id, place, store, CPU))
    assert comparison.identical
    assert not trained(drain(confirming(place, store, both=True))[0])


def test_with_random_erasing_the_teacher_sees_what_each_seed_erases(settings, tracking) -> None:
    tree = json.loads(tiny_sweep().model_dump_json())
    tree["training"]["random_erasing"] = 0.5
    tree["study"]["trials"] = 2
    drain(run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU))
    rule = Selection(accuracy_bar=0.0)
    _, done = drain(confirm(tracking.study("tiny"), rule, 2, True, settings, tracking, CPU))
    assert {run.tags["kdexp.logits_per"] for run in done.runs} == {"epoch"}
    assert len({run.tags["kdexp.logits_sha256"] for run in done.runs}) == 2
    _, comparison = drain(reproduce(done.runs[1].run_id, settings, tracking, CPU))
    assert comparison.identical


def test_with_another_teacher_nothing_is_trained(place, store, monkeypatch) -> None:
    monkeypatch.setattr(
        "kdexp.select.fresh.facts",
        lambda _: {"kdexp.teacher_sha256": "f" * 64, "kdexp.validation_sha256": ""},
    )
    with pytest.raises(KdexpError, match="Study 'luck' was run with another teacher"):
        drain(confirming(place, store, seeds=untrained(place, store)))


def test_a_sweep_file_holds_validation_out() -> None:
    with pytest.raises(ConfigError, match="kdexp confirm --train-and-validation"):
        tiny_sweep().replace({"data.train_on_validation": True, "training.keep": "last"})
    with pytest.raises(ConfigError, match=r"it needs training\.keep: last"):
        tiny_sweep().recipe.replace({"data.train_on_validation": True})


# --- seeds that diverge ---


@pytest.fixture(scope="module")
def steady(tmp_path_factory, empty_store) -> Settings:
    """A finished study of four trials, all of which pass; its smallest has two fresh seeds."""
    settings = stores_in(tmp_path_factory.mktemp("steady"), empty_store)
    tracking, sweep = Tracking(settings), tiny_sweep()
    drain(run_sweep(sweep, settings, tracking, CPU))
    return settings


LOW = Selection(accuracy_bar=0.1)


def again(settings: Settings, seeds: int = 2, both: bool = False) -> tuple[list, Confirmation]:
    tracking = Tracking(settings)
    return drain(confirm(tracking.study("tiny"), LOW, seeds, both, settings, tracking, CPU))


def recorded_as_diverged(run_id: str, tracking: Tracking) -> None:
    """As any version records it: the state is a tag."""
    tracking.tag(run_id, {"kdexp.state": "diverged"})


def test_a_recipe_one_of_whose_seeds_diverged_is_not_confirmed_and_the_next_is_tried(
    steady,
) -> None:
    tracking = Tracking(steady)
    _, first = again(steady)
    study, chosen = tracking.study("tiny"), first.verdict.candidate
    assert looks(study, tracking) == first.looks == 2, "each seed's model counts"
    promote(study, LOW, steady, tracking, CPU)
    assert looks(study, tracking) == 3, "and that of the selected trial"
    recorded_as_diverged(first.runs[1].run_id, tracking)
    events, second = again(steady)
    broken, held = of(Verdict, events)
    assert (broken.candidate, broken.confirmed, held.confirmed) == (chosen, False, True)
    assert broken.diverged == f"fresh seed 2 diverged (run {first.runs[1].run_id})"
    assert broken.seeds.mean >= LOW.accuracy_bar, "its mean alone would do"
    said = tracking.read(chosen.run_id).tags["kdexp.confirmed"]
    assert said.startswith("no: ")
    assert broken.diverged in said
    assert tracking.read(held.candidate.run_id).tags["kdexp.confirmed"].startswith("yes: ")
    assert second.tried == (broken,)
    assert second.looks == looks(study, tracking) == 5
    study = tracking.study("tiny")
    assert study.tags["kdexp.confirmed_run"] == held.candidate.run_id
    assert broken.diverged in study.tags["mlflow.note.content"]


def test_so_is_one_that_diverges_on_train_and_validation(steady) -> None:
    tracking = Tracking(steady)
    _, first = again(steady, both=True)
    recorded_as_diverged(first.runs[0].run_id, tracking)
    events, second = again(steady, both=True)
    chosen = first.verdict.candidate
    verdicts = [verdict for verdict in of(Verdict, events) if verdict.candidate == chosen]
    assert [verdict.confirmed for verdict in verdicts] == [True, False]
    assert (
        verdicts[1].diverged
        == f"fresh seed 1 diverged on train and validation (run {first.runs[0].run_id})"
    )
    assert tracking.read(chosen.run_id).tags["kdexp.confirmed"].startswith("no: ")
    assert second.verdict.candidate != chosen
    assert second.verdict.confirmed


def test_where_all_diverge_none_is_confirmed_and_nothing_is_looked_at(steady, looked) -> None:
    tracking = Tracking(steady)
    before = looks(tracking.study("tiny"), tracking)
    for _ in candidates(tracking.study("tiny"), tracking):
        try:
            recorded_as_diverged(again(steady)[1].runs[0].run_id, tracking)
        except NothingPasses:
            break
    looked.clear()
    known = looks(tracking.study("tiny"), tracking)
    with pytest.raises(
        NothingPasses,
        match=r"is confirmed: 4 passed .* none with fresh seeds .* diverged .*lower learning rates",
    ):
        again(steady)
    assert "test" not in looked
    assert looks(tracking.study("tiny"), tracking) == known >= before


def test_another_bar_takes_the_same_seeds_and_says_what_holds_now(place, store) -> None:
    done = drain(confirming(place, store))[1]
    lucky, before = done.tried[0].candidate.run_id, len(store.find("confirmation", {}))
    for bar, required in ((0.985, "required ≥ 98.50 %"), (BAR, "required ≥ 55.00 %")):
        with suppress(NothingPasses):
            assert (
                drain(confirming(place, store, Selection(accuracy_bar=bar)))[1].verdict
                == done.verdict
            )
        assert store.read(lucky).tags["kdexp.confirmed"].endswith(required)
    assert len(store.find("confirmation", {})) == before
