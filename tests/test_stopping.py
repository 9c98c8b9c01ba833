"""A trial is stopped early only where it cannot be selected: by proof, or by more than any trial
ever gained.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdexp.config import Selection
from kdexp.search.stopping import futile

RULE = Selection(accuracy_bar=0.9)
curves = st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3)


def test_it_is_hopeless_only_beyond_the_greatest_gain_and_the_noise() -> None:
    # gains: at most 0.26 points, 65 % of the error
    done = [(0.70, 0.80, 0.88)] * 3 + [(0.60, 0.80, 0.86)]
    assert not futile([0.70], RULE, done, 3, 5000)
    assert not futile([0.64], RULE, done, 3, 5000), "0.64 + 0.26 reaches the bar"
    assert futile([0.60], RULE, done, 3, 5000)
    assert not futile([0.60], RULE, done, 3, 50), "a validation set this small cannot tell"
    assert futile([0.64], RULE.model_copy(update={"confidence": 0.999999}), done, 3, 5000), (
        "it must clear more than the bar"
    )
    assert not futile([0.10], RULE, done[:3], 3, 5000), "too few to judge by"
    assert not futile([0.1, 0.1, 0.1], RULE, done, 3, 5000), "at its end there is nothing to save"


@given(st.lists(curves, min_size=4, max_size=10))
def test_no_trial_that_ended_over_the_bar_would_have_been_given_up(finished) -> None:
    for curve in finished:
        if max(curve) >= RULE.accuracy_bar:
            assert not any(futile(curve[:now], RULE, finished, 3, 5000) for now in (1, 2))
