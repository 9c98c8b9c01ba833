"""A trial is stopped early only where it cannot be selected: by proof, or by more than any trial ever gained."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdexp.config import Selection
from kdexp.selection import Candidate, NothingPasses, select
from kdexp.stopping import Outcome, beaten, hopeless

RULE = Selection(accuracy_bar=0.9)
curves = st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3)


def outcomes(*curves: tuple[float, ...]) -> list[Outcome]:
    return [Outcome(number, 100 * (number + 1), curve) for number, curve in enumerate(curves)]


def test_a_larger_student_is_beaten_by_a_smaller_one_over_the_bar() -> None:
    done = outcomes((0.5, 0.91), (0.5, 0.95))
    assert beaten(150, RULE, done, 5000) == done[0]
    assert beaten(300, RULE, done, 5000) == done[0]
    assert beaten(100, RULE, done, 5000) is None, "of the same size it may still be the more accurate"
    assert beaten(50, RULE, done, 5000) is None
    assert beaten(300, RULE, outcomes((0.5, 0.89)), 5000) is None
    assert beaten(300, RULE.model_copy(update={"goal": "most_accurate"}), done, 5000) is None
    sure = RULE.model_copy(update={"confidence": 0.95})
    assert beaten(300, sure, done, 5000) == done[0]
    assert beaten(300, sure, done, 500) == done[1], "of 500 images 0.91 does not yet show 0.9"


@given(st.lists(st.tuples(st.integers(1, 9), curves), min_size=1, max_size=12), st.sampled_from([None, 0.9, 0.99]))
def test_leaving_out_whatever_is_beaten_never_changes_the_selection(trials, confidence) -> None:
    """Trials in their order, each skipped if it is beaten by those before."""
    rule = RULE.model_copy(update={"confidence": confidence})
    every = [Candidate(f"run{n}", n, size, size, size, max(curve), 200) for n, (size, curve) in enumerate(trials)]
    kept: list[Outcome] = []
    for number, (size, curve) in enumerate(trials):
        if beaten(size, rule, kept, 200) is None:
            kept.append(Outcome(number, size, tuple(curve)))

    def selected(candidates: list[Candidate]) -> str:
        try:
            return select(candidates, rule).run_id
        except NothingPasses:
            return "none"

    assert selected(every) == selected([every[outcome.trial] for outcome in kept])


def test_it_is_hopeless_only_beyond_the_greatest_gain_and_the_noise() -> None:
    done = outcomes(*[(0.70, 0.80, 0.88)] * 3, (0.60, 0.80, 0.86))  # gains: at most 0.26 points, 65 % of the error
    assert not hopeless([0.70], RULE, done, 3, 5000)
    assert not hopeless([0.64], RULE, done, 3, 5000), "0.64 + 0.26 reaches the bar"
    assert hopeless([0.60], RULE, done, 3, 5000)
    assert not hopeless([0.60], RULE, done, 3, 50), "a validation set this small cannot tell"
    assert hopeless([0.64], RULE.model_copy(update={"confidence": 0.999999}), done, 3, 5000), "it must clear more than the bar"
    assert not hopeless([0.10], RULE, done[:3], 3, 5000), "too few to judge by"
    assert not hopeless([0.1, 0.1, 0.1], RULE, done, 3, 5000), "at its end there is nothing to save"


@given(st.lists(curves, min_size=4, max_size=10))
def test_no_trial_that_ended_over_the_bar_would_have_been_given_up(finished) -> None:
    done = outcomes(*map(tuple, finished))
    for curve in finished:
        if max(curve) >= RULE.accuracy_bar:
            assert not any(hopeless(curve[:now], RULE, done, 3, 5000) for now in (1, 2))
