"""What repeats prove: the quantiles, the seeds, the parts of the error; and which recipe is next."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from kdexp.intervals import wilson_interval, wilson_low
from kdexp.repeats import (
    AT_ONCE,
    PART,
    SEEDS,
    Measure,
    Plan,
    Repeated,
    _Study,
    boundaries,
    next_repeat,
    seed_variance,
    verdict,
    verdicts,
)

BAR, IMAGES = 0.924, 6000
PLAN = Plan(BAR)


def at(accuracy: float, fold: int = 0, images: int = IMAGES) -> Measure:
    return Measure(round(accuracy * images), images, fold)


def recipe(
    trial: int, size: int, first: float, *repeats: float, folds: int = 10, **more
) -> Repeated:
    measures = tuple(at(accuracy, k % folds) for k, accuracy in enumerate(repeats, 1))
    return Repeated(trial, size, at(first), measures, **more)


accuracies = st.floats(0.90, 0.95)
studies = st.lists(
    st.builds(
        lambda size, first, repeats: (size, first, repeats),
        st.integers(1000, 100_000),
        accuracies,
        st.lists(accuracies, max_size=9),
    ),
    min_size=1,
    max_size=6,
).map(lambda drawn: [recipe(n, size, first, *rest) for n, (size, first, rest) in enumerate(drawn)])


# ---- one recipe ----


def test_one_look_is_the_normal_quantile_and_two_are_those_of_two_correlated_ones() -> None:
    assert boundaries(0.05, (1.0,), 1) == pytest.approx([1.644854], abs=1e-4)
    first, second = boundaries(0.05, (1.0, 2.0), 2)
    assert first == pytest.approx(2.241403, abs=1e-5)  # a quarter of 0.05 is spent
    both = multivariate_normal([0, 0], [[1, 0.5**0.5], [0.5**0.5, 1]]).cdf([first, second])
    assert 1 - both == pytest.approx(0.05, abs=2e-5)


@pytest.mark.parametrize(("error", "most"), [(0.02, 9), (0.004, 5)])
def test_a_motion_without_drift_crosses_as_often_as_is_allowed(error, most) -> None:
    steps = np.random.default_rng(7).normal(size=(400_000, most)).cumsum(1)
    z = boundaries(error, tuple(range(1, most + 1)), most)
    crossed = (steps / np.sqrt(range(1, most + 1)) >= z).any(1).mean()
    assert crossed == pytest.approx(error, abs=4 * (error / 400_000) ** 0.5)


def test_a_look_that_tells_nothing_new_changes_nothing() -> None:
    assert boundaries(0.05, (1.0, 1.0, 2.0), 9)[1] == boundaries(0.05, (1.0, 2.0), 9)[0]


def test_without_repeats_nothing_is_proved() -> None:
    only = recipe(3, 5000, 0.99)
    found = verdict(only, [only], PLAN)
    assert (found.state, found.mean, found.sd, found.low, found.repeats, found.most) == (
        "open",
        0.99,
        None,
        0.0,
        0,
        9,
    )


def test_a_verdict_in_numbers() -> None:
    tried = recipe(0, 20_000, 0.93, 0.929, 0.931, 0.930)
    found = verdict(tried, [tried], PLAN)
    assert found.mean == pytest.approx(0.930)
    assert found.sd == pytest.approx(0.001)
    # no seeds' variance beyond the prior's: the three hardly differ
    seeds = seed_variance([tried])
    assert seeds < SEEDS
    images = int(3 * IMAGES / (1 + seeds))
    alone, among = (
        _wilson(found.mean, images, boundaries(error, (1.0, 2.0, 3.0), 9)[-1])
        for error in (1 - PLAN.level, PART * (1 - PLAN.level))
    )
    assert found.low == pytest.approx(min(alone, among + PLAN.tolerance * (1 - BAR)), abs=1e-9)
    assert found.state == ("sure" if found.low >= BAR else "open")


def _wilson(mean: float, images: int, z: float) -> float:
    return wilson_interval(mean * images, images, z)[0]


def test_one_repeat_that_is_all_there_may_be_is_a_wilson_interval_of_fewer_images() -> None:
    tried = recipe(0, 20_000, 0.93, 0.94)
    images = int(IMAGES / (1 + SEEDS))
    for tolerance, error in ((0.0, 0.05 * PART), (1.0, 0.05)):
        found = verdict(tried, [tried], replace(PLAN, most=1, tolerance=tolerance))
        assert found.low == pytest.approx(wilson_low(0.94, images, 1 - error), abs=1e-9)


def test_clearly_over_is_sure_and_clearly_under_is_hopeless() -> None:
    over, under = recipe(0, 50_000, 0.94, 0.942, 0.941), recipe(1, 5000, 0.925, 0.917, 0.916)
    found = verdicts([over, under], PLAN)
    assert [found[0].state, found[1].state] == ["sure", "hopeless"]


def test_at_the_last_repeat_there_is_a_verdict() -> None:
    tried = recipe(0, 20_000, 0.93, *[0.9245] * 9)
    assert verdict(tried, [tried], PLAN).state == "hopeless"


def test_small_data_are_not_sure_before_the_images_are_there() -> None:
    plan = Plan(0.98, folds=6)
    perfect = [
        Repeated(0, 100, at(1.0, 0, 287), tuple(at(1.0, k % 6, 287) for k in range(1, n + 1)))
        for n in range(1, 10)
    ]
    states = [verdict(each, [each], plan).state for each in perfect]
    assert states[0] == "open"
    assert states[-1] == "sure"


@given(st.lists(accuracies, min_size=1, max_size=9), st.integers(1, 20), st.data())
def test_more_correct_never_makes_a_recipe_less_sure(repeats, more, data) -> None:
    one = recipe(0, 20_000, 0.93, *repeats)
    place = data.draw(st.integers(0, len(repeats) - 1))
    better = list(one.repeats)
    better[place] = replace(better[place], correct=better[place].correct + more)
    two = replace(one, repeats=tuple(better))
    ends = []
    for each in (one, two):
        study = _Study([each], PLAN)
        study.seeds = SEEDS  # how far repeats differ is another question
        ends.append(study._low(each, 0.02))
    assert ends[1] >= ends[0]


@given(st.lists(accuracies, min_size=1, max_size=9))
def test_repeats_on_one_fold_are_never_surer_than_on_fresh_ones(repeats) -> None:
    lows = []
    for folds in (1, 3, 10):
        study = _Study([one := recipe(0, 20_000, 0.93, *repeats, folds=folds)], PLAN)
        study.seeds = SEEDS
        lows.append(study._low(one, 0.02))
        assert study._known(one.repeats)[1] <= IMAGES * len({m.fold for m in one.repeats})
    if len(set(repeats)) == 1:
        assert lows == sorted(lows)


def test_images_held_out_twice_tell_nothing_new_of_images() -> None:
    many = recipe(0, 20_000, 0.93, *[0.93] * 9, folds=1)
    study = _Study([many], PLAN)
    study.seeds = 0.0
    assert study._known(many.repeats) == (pytest.approx(0.93), IMAGES)
    study.seeds = 0.5
    assert study._known(many.repeats)[1] == pytest.approx(IMAGES * 9 / 9.5)


def test_the_weights_of_folds_are_those_of_the_smallest_variance() -> None:
    uneven = Repeated(0, 1, at(0.9), (at(0.90, 1), at(0.92, 1), at(0.94, 2)))
    study = _Study([uneven], PLAN)
    study.seeds = 0.5
    mean, images = study._known(uneven.repeats)
    # image noise 1 a fold, seed noise 0.5 a training
    shares = np.array([1 / 1.25, 1 / 1.5])
    assert mean == pytest.approx(shares @ [0.91, 0.94] / shares.sum())
    assert images == pytest.approx(IMAGES * shares.sum())


# ---- all recipes of a study ----


@given(studies, st.randoms())
@settings(max_examples=30, deadline=None)
def test_the_order_in_which_recipes_are_given_is_nothing(study, random) -> None:
    shuffled = list(study)
    random.shuffle(shuffled)
    one, two = verdicts(study, PLAN), verdicts(shuffled, PLAN)
    assert {trial: v.low for trial, v in one.items()} == pytest.approx(
        {trial: v.low for trial, v in two.items()}
    )
    assert next_repeat(study, PLAN, 20) == next_repeat(shuffled, PLAN, 20)


@given(studies)
@settings(max_examples=30, deadline=None)
def test_what_is_next_is_open_smaller_than_the_sure_and_has_repeats_left(study) -> None:
    found = verdicts(study, PLAN)
    sure = [r.size for r in study if found[r.trial].state == "sure"]
    following = next_repeat(study, PLAN, 20)
    if following is None:
        return
    assert found[following].state == "open"
    assert len(study[following].repeats) < PLAN.most
    assert study[following].size < min(sure, default=10**9)


def test_seeds_differ_as_the_prior_says_until_repeats_say_otherwise() -> None:
    assert seed_variance([]) == seed_variance([recipe(0, 1, 0.9, 0.93)]) == SEEDS
    alike = [recipe(n, 1, 0.9, *[0.93] * 9) for n in range(20)]
    assert seed_variance(alike) == 0
    random = np.random.default_rng(3)
    drawn = [
        Repeated(
            n,
            1,
            at(0.9),
            tuple(
                Measure(int(random.binomial(IMAGES, 0.93 + random.normal(0, 0.004))), IMAGES, k)
                for k in range(1, 10)
            ),
        )
        for n in range(200)
    ]
    assert seed_variance(drawn) == pytest.approx(0.004**2 * IMAGES / (0.93 * 0.07), rel=0.1)


def test_a_failure_costs_a_part_of_the_error_and_a_success_nothing() -> None:
    fails, passes = recipe(0, 9000, 0.93, 0.915), recipe(1, 50_000, 0.94, 0.945, 0.945, 0.945)
    fresh = recipe(2, 20_000, 0.93)
    whole = PART * 0.05
    assert _Study([passes, fresh], PLAN)._errors == pytest.approx({1: whole, 2: whole})
    assert _Study([fails, passes, fresh], PLAN)._errors == pytest.approx(
        {0: whole, 1: whole * (1 - PART), 2: whole * (1 - PART)}
    )


def test_recipes_are_tried_in_the_order_of_their_first_repeats() -> None:
    one = recipe(0, 9000, 0.93, 0.915, since=8)
    two = recipe(1, 9000, 0.93, 0.915, since=5)
    errors = _Study([one, two], PLAN)._errors
    assert errors[1] > errors[0]


def test_what_was_settled_stands() -> None:
    lucky = recipe(0, 9000, 0.93, 0.92, settled="sure")
    gone = recipe(1, 8000, 0.93, 0.93, settled="hopeless")
    found = verdicts([lucky, gone], PLAN)
    assert [found[0].state, found[1].state] == ["sure", "hopeless"]
    assert next_repeat([lucky, gone], PLAN, 20) is None


@pytest.mark.parametrize("left", [0, 1, 5, 50])
def test_with_nothing_trained_or_nothing_near_the_bar_nothing_is_repeated(left) -> None:
    assert next_repeat([], PLAN, left) is None
    assert next_repeat([recipe(0, 9000, 0.5), recipe(1, 9000, 0.6)], PLAN, left) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_clear_pass_is_repeated_from_the_first_trial_on(count) -> None:
    study = [recipe(n, 20_000, 0.94) for n in range(count)]
    assert next_repeat(study, PLAN, 30) == 0


def test_the_smaller_of_two_that_promise_the_same_is_repeated() -> None:
    study = [recipe(0, 40_000, 0.94), recipe(1, 20_000, 0.94)]
    assert next_repeat(study, PLAN, 30) == 1


def test_neither_what_diverged_nor_what_is_too_large_nor_what_is_larger_than_the_sure() -> None:
    assert next_repeat([recipe(0, 20_000, 0.94, diverged=True)], PLAN, 30) is None
    assert next_repeat([recipe(0, 20_000, 0.94)], replace(PLAN, limit=19_999), 30) is None
    sure = recipe(1, 15_000, 0.94, 0.94, 0.94, 0.94)
    assert next_repeat([recipe(0, 20_000, 0.94), sure], PLAN, 30) is None


def test_workers_share_a_recipe_and_leave_the_others_alone() -> None:
    two = recipe(0, 30_000, 0.94), recipe(1, 20_000, 0.94)
    for under_way in range(1, AT_ONCE):
        assert next_repeat([replace(two[0], under_way=under_way), two[1]], PLAN, 30) == 0
    assert next_repeat([replace(two[0], under_way=AT_ONCE), two[1]], PLAN, 30) is None


def test_under_way_counts_towards_the_most() -> None:
    tried = recipe(0, 30_000, 0.94, 0.926, 0.926, since=4)
    assert next_repeat([tried], replace(PLAN, most=4), 30) in (0, None)
    assert next_repeat([replace(tried, under_way=1)], replace(PLAN, most=3), 30) is None


def test_when_few_trainings_are_left_the_likeliest_comes_first_whatever_its_size() -> None:
    study = [recipe(0, 90_000, 0.938), recipe(1, 20_000, 0.929), recipe(2, 15_000, 0.926)]
    assert next_repeat(study, PLAN, 5) == 0


# ---- what it all comes to ----


class World:
    """Trainings of recipes of one true accuracy. A fold's images are as hard for all of them."""

    def __init__(self, random: np.random.Generator, true: float, images: int, sd: float) -> None:
        self.random, self.true, self.images, self.sd = random, true, images, sd
        self.folds: dict[int, int] = {}

    def train(self, fold: int) -> Measure:
        if fold not in self.folds:
            self.folds[fold] = int(self.random.binomial(self.images, self.true))
        seed = round(self.images * self.random.normal(0, self.sd))
        return Measure(min(self.images, self.folds[fold] + seed), self.images, fold)


@pytest.mark.parametrize(
    ("bar", "images", "folds", "sd"),
    [
        (0.924, 6000, 10, 0.002),
        (0.924, 6000, 3, 0.002),
        (0.924, 6000, 1, 0.002),
        (0.98, 287, 6, 0.004),
        (0.98, 287, 1, 0.004),
    ],
)
def test_a_recipe_at_the_bar_is_found_sure_no_oftener_than_the_level_leaves(
    bar, images, folds, sd
) -> None:
    plan, random, wrong, studies = Plan(bar, folds=folds), np.random.default_rng(5), 0, 1000
    for _ in range(studies):
        world = World(random, bar, images, sd)
        repeats = tuple(world.train(k % folds) for k in range(1, plan.most + 1))
        tried = Repeated(0, 20_000, repeats[0], repeats)
        wrong += _Study([tried], plan)._end(tried, 1 - plan.level) >= bar
    assert wrong / studies <= 0.05 + 2 * (0.05 * 0.95 / studies) ** 0.5


def test_of_many_recipes_under_the_bar_one_is_found_sure_in_few_studies() -> None:
    random, wrong, studies, count = np.random.default_rng(5), 0, 150, 6
    for _ in range(studies):
        world = World(random, BAR - PLAN.tolerance * (1 - BAR), IMAGES, 0.002)
        every = [Repeated(n, 20_000, at(0.93)) for n in range(count)]
        for trial, fold in itertools.product(range(count), range(1, 10)):
            more = (*every[trial].repeats, world.train(fold))
            every[trial] = replace(every[trial], repeats=more)
            study = _Study(every[: trial + 1], PLAN)
            if trial in study._sure:
                wrong += 1
                break
    assert wrong / studies <= 0.05
