"""The selection rule: smallest over the bar, ties, limits, the other direction, the nearest
miss.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdexp import KdexpError
from kdexp.config import Selection
from kdexp.intervals import mean_low, wilson_low
from kdexp.selection import (
    Candidate,
    FreshSeeds,
    NothingPasses,
    clears,
    confirms,
    passes,
    requirement,
    select,
    size_of,
)

candidate = st.builds(
    Candidate,
    run_id=st.text("0123456789abcdef", min_size=4, max_size=4),
    trial=st.integers(0, 99),
    parameters=st.integers(1, 50),
    multiply_adds=st.integers(1, 50),
    bytes=st.integers(1, 50),
    val_accuracy=st.sampled_from([0.8, 0.9, 0.91, 0.924, 0.93, 1.0]),
    val_samples=st.sampled_from([100, 6000]),
)
candidates = st.lists(candidate, max_size=12, unique_by=lambda c: c.trial)
rules = st.builds(
    Selection,
    accuracy_bar=st.sampled_from([0.0, 0.85, 0.9, 0.924, 0.99]),
    size=st.sampled_from(["parameters", "multiply_adds", "bytes"]),
    limit=st.none() | st.integers(1, 60),
    goal=st.sampled_from(["smallest", "most_accurate"]),
    confidence=st.none() | st.sampled_from([0.6, 0.95]),
)


def test_by_a_size_that_a_former_version_did_not_record_nothing_is_selected() -> None:
    rule = Selection(accuracy_bar=0.9, size="activation_bytes")
    new = replace(made(0, 9, 0.95), activation_bytes=800)
    smaller = replace(made(1, 5, 0.93), activation_bytes=900)
    assert select([new, smaller], rule) == new
    with pytest.raises(KdexpError, match=r"Trial 2 \(run run2\) has no activation_bytes on record"):
        select([new, made(2, 1, 0.99)], rule)
    assert select([new, made(2, 1, 0.99)], Selection(accuracy_bar=0.9)).trial == 2


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
    assert str(error.value).startswith(
        "No student of study 'fm' reaches validation accuracy 0.93. Best: 0.9210 (20 parameters"
    )
    assert "--bar" in str(error.value)


def test_when_all_are_too_large_the_smallest_is_named() -> None:
    with pytest.raises(NothingPasses, match=r"is within 3 bytes\. Smallest: 40 bytes"):
        select([made(2, 10, 0.99), made(3, 20, 0.99)], Selection(limit=3, size="bytes"))


def test_no_trial_at_all_is_said() -> None:
    with pytest.raises(NothingPasses, match="No trial"):
        select([], Selection())


# --- confidence ---

levels = st.floats(0.51, 0.999)
counts = st.integers(2, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_with_confidence_the_lower_end_must_clear_the_bar() -> None:
    """By the one-sided score test 0.931 lies (0.931 - 0.924) / sqrt(0.924 * 0.076 / 6000) = 2.05
    standard errors above.
    """
    near, clear = (Candidate("run", 0, 5, 5, 5, accuracy, 6000) for accuracy in (0.929, 0.931))
    assert passes(near, Selection(accuracy_bar=0.924))
    assert not passes(near, Selection(accuracy_bar=0.924, confidence=0.95))
    assert passes(clear, Selection(accuracy_bar=0.924, confidence=0.95))
    assert not passes(clear, Selection(accuracy_bar=0.924, confidence=0.99))


@given(counts, st.floats(0.01, 0.99), levels)
def test_to_clear_the_bar_with_confidence_is_to_pass_the_score_test(pair, bar, level) -> None:
    from statistics import NormalDist

    correct, samples = pair
    needed = bar + NormalDist().inv_cdf(level) * (bar * (1 - bar) / samples) ** 0.5
    if abs(correct / samples - needed) > 1e-9:
        rule = Selection(accuracy_bar=bar, confidence=level)
        assert clears(correct / samples, samples, rule) == (correct / samples > needed)


@given(candidates, rules)
def test_whoever_asks_for_confidence_gets_no_smaller_model(trials, rule) -> None:
    plain, sure = (
        rule.model_copy(update={"goal": "smallest", "confidence": level}) for level in (None, 0.9)
    )
    if any(passes(c, sure) for c in trials):
        assert size_of(select(trials, plain), rule.size) <= size_of(select(trials, sure), rule.size)


def test_without_the_number_of_images_there_is_no_confidence_but_a_selection() -> None:
    old = made(3, 5, 0.99)
    assert select([old], Selection()) == old
    with pytest.raises(KdexpError, match=r"Trial 3 \(run run3\) was recorded by a former version"):
        select([old], Selection(confidence=0.95))


def test_the_nearest_miss_says_how_sure_it_was() -> None:
    with pytest.raises(
        NothingPasses, match=r"0\.924 at 95 % confidence\. Best: 0\.9290, lower end 0\.9234"
    ):
        select(
            [Candidate("run", 0, 5, 5, 5, 0.929, 6000)],
            Selection(accuracy_bar=0.924, confidence=0.95),
        )


def test_what_is_required_is_said_in_a_few_characters() -> None:
    assert requirement(Selection(accuracy_bar=0.98)) == "≥ 98.00 %"
    assert requirement(Selection(accuracy_bar=0.98, confidence=0.95)) == "≥ 98.00 % at 95 %"


# --- fresh seeds ---

seeds = st.integers(10, 20_000).flatmap(
    lambda n: st.builds(
        FreshSeeds, st.lists(st.integers(0, n), min_size=2, max_size=6).map(tuple), st.just(n)
    )
)


@given(seeds, st.floats(0, 1))
def test_fresh_seeds_confirm_by_their_mean(fresh, bar) -> None:
    assert confirms(fresh, Selection(accuracy_bar=bar)) == (fresh.mean >= bar)


@given(st.integers(0, 6000), st.integers(2, 9))
def test_seeds_that_all_end_exactly_at_the_bar_confirm_it(correct, count) -> None:
    assert confirms(FreshSeeds((correct,) * count, 6000), Selection(accuracy_bar=correct / 6000))


@given(seeds, levels, levels)
def test_the_lower_end_lies_below_the_mean_and_falls_with_the_level(fresh, one, other) -> None:
    low, high = sorted((one, other))
    ends = [mean_low(fresh.accuracies, fresh.samples, level) for level in (high, low)]
    assert 0 <= ends[0] <= ends[1] <= fresh.mean + 1e-12


@given(st.integers(0, 6000), st.integers(2, 9), levels)
def test_without_spread_among_the_seeds_the_lower_end_is_wilsons(correct, count, level) -> None:
    accuracy = correct / 6000
    assert mean_low([accuracy] * count, 6000, level) == pytest.approx(
        wilson_low(accuracy, 6000, level), abs=1e-12
    )


def test_with_endless_images_the_lower_end_is_that_of_the_t_interval() -> None:
    """Mean 0.93, s 0.002, t(2 degrees, 0.95) = 2.920: 0.93 - 2.920 * 0.002 / sqrt(3)."""
    assert mean_low([0.928, 0.930, 0.932], 10**12, 0.95) == pytest.approx(
        0.93 - 2.919986 * 0.002 / 3**0.5, abs=1e-6
    )


def test_the_spread_is_the_standard_deviation_of_the_seeds() -> None:
    fresh = FreshSeeds((5400, 5460, 5520), 6000)
    assert (fresh.mean, fresh.sd) == (0.91, pytest.approx(0.01))
    assert str(fresh) == "91.00 % ± 1.00 over 3 fresh seeds"
    assert str(FreshSeeds((90,), 100)) == "90.00 % with 1 fresh seed", "one may be enough"
    assert not confirms(fresh, Selection(accuracy_bar=0.9, confidence=0.95))
    assert confirms(
        FreshSeeds((5458, 5460, 5462), 6000), Selection(accuracy_bar=0.9, confidence=0.95)
    )
