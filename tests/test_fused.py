"""Sweeps of fused trials: asked for together, trained as one batch, told one by one, reproduced
alone.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import drain

from kdexp.config import Sweep
from kdexp.distill.models import ModelError
from kdexp.runs.recording import Recording, begin
from kdexp.search.study import Trial
from kdexp.search.sweep import EpochDone, TrialFailed, TrialFinished, TrialStarted, run_sweep
from kdexp.select.promote import candidates
from kdexp.select.reproduce import reproduce
from kdexp.selection import select

CPU = torch.device("cpu")


@pytest.fixture
def fused(tiny: Sweep) -> Sweep:
    """A study over what lanes may differ in, and over two sizes, which cannot share a pack."""
    return Sweep.model_validate(
        tiny.model_dump()
        | {
            "search": {
                "distillation.alpha": {"low": 0.0, "high": 1.0},
                "training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
                "student.dropout": {"low": 0.0, "high": 0.3},
                "student.hidden": {"choices": (8, tiny.student.hidden)},
            },
            "study": tiny.study.model_dump() | {"trials": 8},
        }
    )


def test_every_trial_of_a_fused_study_is_asked_trained_and_told_once(
    fused, settings, tracking
) -> None:
    events, others = drain(run_sweep(fused, replace(settings, pack=4), tracking, CPU))
    assert others == 0
    assert sorted(e.number for e in events if isinstance(e, TrialStarted)) == list(range(8))
    assert sorted(e.number for e in events if isinstance(e, TrialFinished)) == list(range(8))
    first = next(number for number, e in enumerate(events) if isinstance(e, EpochDone))
    assert sum(isinstance(e, TrialStarted) for e in events[:first]) > 1, (
        "no two trials trained together"
    )
    found = candidates(tracking.study(fused.name), tracking)
    assert [c.trial for c in found] == list(range(8))
    for run in tracking.find("trial", {"kdexp.study": fused.name}):
        assert run.status == "FINISHED"
        epochs = [epoch for epoch, _ in tracking.history(run.run_id, "epoch/val_accuracy")]
        assert epochs == list(range(1, fused.training.epochs + 1))


def test_a_fused_trial_is_reproduced_bit_for_bit_from_its_run_id(
    fused, settings, tracking, tmp_path
) -> None:
    drain(run_sweep(fused, replace(settings, pack=4), tracking, CPU))
    places = set()
    for run in tracking.find("trial", {"kdexp.study": fused.name})[:4]:
        _, comparison = drain(reproduce(run.run_id, settings, tracking, CPU))
        assert comparison.identical, comparison.differences[:3]
        assert not comparison.environment
        how = json.loads(tracking.download(run.run_id, "environment.json", tmp_path).read_text())
        places.add((how["lanes"], how["lane"]))
    assert len(places) > 1
    assert max(int(lanes) for lanes, _ in places) > 1


def that_prunes(fused: Sweep) -> Sweep:
    """All its trials train as one."""
    search = {
        path: dimension
        for path, dimension in fused.model_dump()["search"].items()
        if path != "student.hidden"
    }
    study = fused.study.model_dump() | {"pruner": "median"}
    return Sweep.model_validate(fused.model_dump() | {"study": study, "search": search})


def test_the_place_of_a_pruned_trial_is_taken_over_and_both_reproduce(
    fused, settings, tracking, monkeypatch
) -> None:
    pruning = that_prunes(fused)
    real = Trial.report

    def report(self: Trial, report) -> bool:
        real(self, report)
        return self.number in (2, 4) and report.epoch == 1

    monkeypatch.setattr(Trial, "report", report)
    events, _ = drain(run_sweep(pruning, replace(settings, pack=4), tracking, CPU))
    monkeypatch.undo()
    finished = {e.number: e.outcome for e in events if isinstance(e, TrialFinished)}
    assert sorted(finished) == list(range(8))
    assert {number for number, result in finished.items() if result.state == "pruned"} == {2, 4}
    order = [(type(e), e.number) for e in events if isinstance(e, TrialStarted | TrialFinished)]
    successor = order[order.index((TrialFinished, 2)) + 1]
    assert successor[0] is TrialStarted, "the free place was left empty"
    runs = tracking.find("trial", {"kdexp.study": pruning.name})
    assert {run.status for run in runs} == {"FINISHED"}, "none was begun and dropped"
    for number in (2, successor[1], 0):
        _, comparison = drain(reproduce(finished[number].run_id, settings, tracking, CPU))
        assert comparison.identical, (number, comparison.differences[:3])


def test_a_successor_that_cannot_be_opened_costs_itself_alone(
    fused, settings, tracking, monkeypatch
) -> None:
    """In the slot of a pruned trial: the others of its pack train on, and it is tried again."""
    opened = []

    def report(self: Trial, report) -> bool:
        return self.number == 2 and report.epoch == 1

    def opening(recipe, prepared, bench, entry, form, resumed=None):
        opened.append(entry.tags["kdexp.trial"])
        if len(opened) == 5:
            raise ModelError("does not fit")
        return begin(recipe, prepared, bench, entry, form, resumed)

    monkeypatch.setattr(Trial, "report", report)
    monkeypatch.setattr("kdexp.search.scheduler.begin", opening)
    events, _ = drain(run_sweep(that_prunes(fused), replace(settings, pack=4), tracking, CPU))
    (failed,) = (event for event in events if isinstance(event, TrialFailed))
    assert str(failed.number) == opened[4]
    assert opened.count(opened[4]) == 2
    assert sorted(e.number for e in events if isinstance(e, TrialFinished)) == list(range(8))


def test_a_failure_in_one_pack_closes_every_run_of_it(
    fused, settings, tracking, monkeypatch
) -> None:
    def broken(self: Recording, epoch) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recording, "take", broken)
    with pytest.raises(OSError, match="No space"):
        drain(run_sweep(fused, replace(settings, pack=4), tracking, CPU))
    monkeypatch.undo()
    runs = tracking.find("trial", {"kdexp.study": fused.name})
    assert len(runs) > 1
    assert {run.status for run in runs} == {"FAILED"}
    events, _ = drain(run_sweep(fused, replace(settings, pack=4), tracking, CPU))
    assert sorted(e.number for e in events if isinstance(e, TrialFinished)) == list(range(8))


@pytest.mark.parametrize("pack", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_early_stopping_saves_epochs_and_selects_the_same_model(
    tiny, settings, tracking, tmp_path, pack
) -> None:
    """A random search proposes the same trials with and without: what is ended could not have been
    selected.
    """
    study = {"trials": 12, "sampler": "random", "objective": "smallest", "repeats": 1}
    search = {
        "student.channels": {"choices": ((2, 4), (3, 6), (4, 8), (6, 12))},
        "training.learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
    }
    found = {}
    for early in (False, True):
        sweep = Sweep.model_validate(
            tiny.model_dump()
            | {"name": f"early-{early}", "search": search, "study": study | {"early_stop": early}}
            | {
                "selection": {"accuracy_bar": 0.6},
                "training": tiny.training.model_dump() | {"epochs": 6},
            }
        )
        events, _ = drain(run_sweep(sweep, replace(settings, pack=pack), tracking, CPU))
        assert len([e for e in events if isinstance(e, TrialFinished)]) == 12
        chosen = select(candidates(tracking.study(sweep.name), tracking), sweep.selection)
        found[early] = chosen.parameters, sum(isinstance(e, EpochDone) for e in events)
    assert found[True][0] == found[False][0]
    assert found[True][1] < 0.9 * found[False][1], found
