"""The selection rule: smallest over the bar, ties, limits, the other direction, the nearest miss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdexp.config import Selection
from kdexp.selection import Candidate, NothingPasses, passes, select, size_of

candidate = st.builds(
    Candidate,
    run_id=st.text("0123456789abcdef", min_size=4, max_size=4),
    trial=st.integers(0, 99),
    parameters=st.integers(1, 50),
    multiply_adds=st.integers(1, 50),
    bytes=st.integers(1, 50),
    val_accuracy=st.sampled_from([0.8, 0.9, 0.91, 0.924, 0.93, 1.0]),
)
candidates = st.lists(candidate, max_size=12, unique_by=lambda c: c.trial)
rules = st.builds(
    Selection,
    accuracy_bar=st.sampled_from([0.0, 0.85, 0.9, 0.924, 0.99]),
    size=st.sampled_from(["parameters", "multiply_adds", "bytes"]),
    limit=st.none() | st.integers(1, 60),
    goal=st.sampled_from(["smallest", "most_accurate"]),
)


def made(trial: int, parameters: int, accuracy: float) -> Candidate:
    return Candidate(f"run{trial}", trial, parameters, 10 * parameters, 4 * parameters, accuracy)


@given(candidates, rules)
def test_the_selected_one_passes_and_nothing_that_passes_is_better(trials, rule) -> None:
    if not any(passes(c, rule) for c in trials):
        with pytest.raises(NothingPasses):
            select(trials, rule)
        return
    chosen = select(trials, rule)
    assert chosen in trials
    assert chosen.val_accuracy >= rule.accuracy_bar
    assert rule.limit is None or size_of(chosen, rule.size) <= rule.limit
    for other in (c for c in trials if passes(c, rule)):
        if rule.goal == "smallest":
            assert size_of(chosen, rule.size) <= size_of(other, rule.size)
            if size_of(chosen, rule.size) == size_of(other, rule.size):
                assert chosen.val_accuracy >= other.val_accuracy
        else:
            assert chosen.val_accuracy >= other.val_accuracy


@given(candidates, rules, st.randoms())
def test_the_order_of_the_trials_does_not_matter(trials, rule, random) -> None:
    if any(passes(c, rule) for c in trials):
        shuffled = random.sample(trials, len(trials))
        assert select(trials, rule) == select(shuffled, rule)


@given(candidates, rules)
def test_a_lower_bar_never_selects_a_larger_model(trials, rule) -> None:
    rule = rule.model_copy(update={"goal": "smallest"})
    lower = rule.model_copy(update={"accuracy_bar": rule.accuracy_bar / 2})
    if any(passes(c, rule) for c in trials):
        assert size_of(select(trials, lower), rule.size) <= size_of(select(trials, rule), rule.size)


def test_a_model_exactly_at_the_bar_passes() -> None:
    assert select([made(0, 5, 0.924)], Selection(accuracy_bar=0.924)).trial == 0


def test_a_tie_in_size_goes_to_the_more_accurate() -> None:
    assert select([made(0, 5, 0.93), made(1, 5, 0.94), made(2, 9, 0.99)], Selection()).trial == 1


def test_when_nothing_passes_the_nearest_miss_is_named() -> None:
    trials = [made(0, 50, 0.910), made(1, 20, 0.921), made(2, 10, 0.5)]
    with pytest.raises(NothingPasses) as error:
        select(trials, Selection(accuracy_bar=0.93), "fm")
    assert str(error.value).startswith("No student of study 'fm' reaches validation accuracy 0.93. Best: 0.9210 (20 parameters")
    assert "--bar" in str(error.value)


def test_when_all_are_too_large_the_smallest_is_named() -> None:
    with pytest.raises(NothingPasses, match=r"is within 3 bytes\. Smallest: 40 bytes"):
        select([made(2, 10, 0.99), made(3, 20, 0.99)], Selection(limit=3, size="bytes"))


def test_no_trial_at_all_is_said() -> None:
    with pytest.raises(NothingPasses, match="No trial"):
        select([], Selection())
