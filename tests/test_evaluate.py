"""Accuracy and its interval."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdexp.distill.batches import pixels
from kdexp.distill.evaluate import evaluate, logits_of, wilson_interval
from kdexp.intervals import paired_interval


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (Wilson's score without
    # correction)
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_equals_the_published_one(correct, samples, low, high) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_estimate_and_stays_in_range(pair) -> None:
    correct, samples = pair
    low, high = wilson_interval(correct, samples)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= correct / samples <= high + 1e-12


def test_a_network_that_knows_the_answers_scores_1(digits) -> None:
    split = digits.validation

    class Oracle(nn.Module):
        def forward(self, images):
            start = self.seen
            self.seen += len(images)
            return torch.nn.functional.one_hot(split.labels[start : self.seen], 10).float()

    oracle = Oracle()
    oracle.seen = 0
    result = evaluate(oracle, split)
    assert (result.accuracy, result.samples) == (1.0, len(split))
    assert result.loss == pytest.approx(float(torch.log(torch.e + torch.tensor(9.0)) - 1), rel=1e-5)


def test_evaluation_leaves_the_network_as_it_was(digits) -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)
    ).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = logits_of(module, digits.validation), logits_of(module, digits.validation)
    assert torch.equal(first, second)
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_flip_augmentation_averages_the_probabilities_of_an_image_and_its_mirror_image(
    digits,
) -> None:
    split = digits.validation
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    result = evaluate(module, split, mirrored=True)
    images = pixels(split, torch.arange(len(split)))
    mean = (module(images).softmax(1) + module(images.flip(3)).softmax(1)) / 2
    assert result.correct == int((mean.argmax(1) == split.labels).sum())
    assert result.loss == pytest.approx(
        nn.functional.nll_loss(mean.log(), split.labels).item(), rel=1e-5
    )
    assert result.loss != pytest.approx(evaluate(module, split).loss, rel=1e-3)


def test_the_paired_interval_equals_the_published_one() -> None:
    """Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33:2850, on Bentur et al.: 1 of 21
    gained, 7 lost.
    """
    assert paired_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_the_paired_interval_of_two_that_are_right_on_the_same_images_is_not_empty() -> None:
    z2 = 1.959964**2
    assert paired_interval(0, 0, 300) == pytest.approx((-z2 / (300 + z2), z2 / (300 + z2)))


@given(
    st.integers(1, 5000).flatmap(
        lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))
    )
)
def test_the_paired_interval_holds_the_difference_and_is_turned_around_with_it(triple) -> None:
    gained, lost, samples = triple[0], min(triple[1], triple[2] - triple[0]), triple[2]
    low, high = paired_interval(gained, lost, samples)
    assert -1 <= low < high <= 1
    assert low - 1e-9 <= (gained - lost) / samples <= high + 1e-9
    assert paired_interval(lost, gained, samples) == pytest.approx((-high, -low), abs=1e-8)


def test_the_paired_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    generator, shares, samples = torch.Generator().manual_seed(8787), (0.06, 0.03, 0.91), 287
    draws = torch.multinomial(
        torch.tensor(shares), 2000 * samples, replacement=True, generator=generator
    ).view(2000, samples)
    ends = [
        paired_interval(int((draw == 0).sum()), int((draw == 1).sum()), samples) for draw in draws
    ]
    assert sum(low <= 0.03 <= high for low, high in ends) / 2000 == pytest.approx(0.95, abs=0.015)
