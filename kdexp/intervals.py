"""How sure a measured accuracy is: Wilson's interval of a share, Tango's of the difference of two
on the same images, and the lower end of a mean over seeds. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

from scipy.optimize import brentq
from scipy.special import bdtrik, stdtrit  # the binomial distribution and Student's t, inverted

__all__ = [
    "luckiest",
    "mean_interval",
    "mean_low",
    "paired_interval",
    "wilson_interval",
    "wilson_low",
]

TINY = 1e-18  # in the place of a spread of 0, at an end


def wilson_interval(correct: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, z standard errors wide each way (default 95 %).

    Wilson 1927, J. Am. Stat. Assoc. 22:209. Within [0, 1] and never empty, also at 0 and at all
    correct.
    """
    share, spread = correct / samples, z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_low(accuracy: float, samples: int, level: float) -> float:
    """The accuracy that is exceeded at that (one-sided) confidence level: 0.95 leaves 5 % below,
    not 2.5 %.
    """
    return wilson_interval(accuracy * samples, samples, NormalDist().inv_cdf(level))[0]


def mean_low(accuracies: Sequence[float], samples: int, level: float) -> float:
    """The same of a recipe's mean over all seeds and all images, given accuracies of some seeds on
    the same images.

    Two things are finite, the seeds and the images. Their distances to the mean m add up in
    squares:

        low = m - sqrt((t s / sqrt(N))^2 + (m - wilson_low(m))^2)
        t: Student's quantile of N - 1 degrees

    Zou & Donner 2008, Statistics in Medicine 27:1693 (for one side: Howe 1974, J. Am. Stat. Assoc.
    69:789). With endless images it is the t-interval, without spread among the seeds Wilson's.
    Seeds share their images, so s holds a part of the images' noise again: that errs to the safe
    side.
    """
    mean, count = fmean(accuracies), len(accuracies)
    seeds = float(stdtrit(count - 1, level)) * stdev(accuracies) / math.sqrt(count)
    return max(0.0, mean - math.hypot(seeds, mean - wilson_low(mean, samples, level)))


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's two-sided interval of the mean of two values or more."""
    mean, count = fmean(values), len(values)
    quantile = float(stdtrit(count - 1, (1 + level) / 2))
    half = quantile * stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def luckiest(accuracy: float, samples: int, models: int) -> float:
    """What the luckiest of so many models, all truly of this accuracy, shows on so many images of
    its own: the median of their maximum, which is the 0.5^(1 / models) quantile of one.
    """
    return math.ceil(bdtrik(0.5 ** (1 / models), samples, accuracy)) / samples


def paired_interval(
    gained: int, lost: int, samples: int, z: float = 1.959964
) -> tuple[float, float]:
    """Tango's score interval of the difference of two shares on the same samples, z standard errors
    wide each way (default 95 %): how much more often the one is right than the other.

    `gained` samples only the one has right, `lost` only the other. The ends are the differences d
    whose score is ± z, with q the likeliest share of lost samples were d the true difference:

        score(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d)))

    Tango 1998, Statistics in Medicine 17:891. Never empty, also where nothing is gained or lost.
    """
    difference = (gained - lost) / samples

    def score(d: float) -> float:
        a, b = 2 * samples, (2 * samples - gained + lost) * d - gained - lost
        q = (math.sqrt(max(b * b + 4 * a * lost * d * (1 - d), 0.0)) - b) / (2 * a)
        spread = samples * (2 * q + d * (1 - d))
        above = gained - lost - samples * d
        return above / math.sqrt(max(spread, TINY)) if above else 0.0

    edge = 1 - 1e-12
    low = -1.0 if difference == -1 else brentq(lambda d: score(d) - z, -edge, difference)
    high = 1.0 if difference == 1 else brentq(lambda d: score(d) + z, difference, edge)
    return float(low), float(high)
