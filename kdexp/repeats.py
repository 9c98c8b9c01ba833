"""Which recipe is trained again, and what its repeats prove: sure, hopeless, or still open. Pure.

A repeat is trained with a fresh seed and holds out a fresh fold. A recipe's first training is what
made it a candidate, so its luck does not count: the verdict rests on repeats alone.

    sure        the lower end of its repeats' mean is at least the bar
    hopeless    no repeats are left, or it would hardly become sure by the last one
    open        neither

With e = 1 - level, whatever the recipes' true accuracies are:

- A recipe that is truly under the bar is found sure with probability e at most, looks counted
  in.
- That any recipe of a study is found sure that has more than 1 + tolerance times the errors that
  the bar allows, has probability e at most, all recipes that are tried counted in. (Such a
  tolerance is usual in determining feasibility: Andradottir & Kim 2010, Naval Res. Logist. 57:119.)

What is counted:

*Seeds and images.* n trainings on fresh folds of N images are as good as n N / (1 + s) independent
images, where s is what seeds add to the images' variance, in units of that: a quasi-binomial
(McCullagh & Nelder 1989, Generalized Linear Models, 4.5). It is estimated from all repeats of the
study and a stated prior. A fold that is held out m times is as good as N m / (m + s): never more
than N. The lower end is Wilson's, of so many images.

*Looking after every repeat.* After k of at most K repeats (k / K)^2 of a recipe's error is spent
(Lan & DeMets 1983, Biometrika 70:659; powers: Kim & DeMets 1987, Biometrika 74:149). The quantiles
are those of a Brownian motion (Armitage, McPherson & Rowe 1969, J. R. Stat. Soc. A 132:235), so the
ends of all looks hold together (Jennison & Turnbull 1989, J. R. Stat. Soc. B 51:305).

*Trying several recipes.* Each gets a part of what is left of the study's e, and gives it back if it
is found sure: the fallback procedure (Wiens & Dmitrienko 2005, J. Biopharm. Stat. 15:929; one by
one: Tian & Ramdas 2021, Stat. Methods Med. Res. 30:976). From sure to smaller costs nothing; only
failures do.

*Which comes next* proves nothing, so a model may choose it: see `next_repeat`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import stdev
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from kdexp.intervals import wilson_interval

__all__ = [
    "Measure",
    "Plan",
    "Repeated",
    "State",
    "Verdict",
    "boundaries",
    "next_repeat",
    "seed_variance",
    "verdict",
    "verdicts",
]

State = Literal["sure", "hopeless", "open"]
Floats = NDArray[np.float64]

# what seeds add to the images' variance, before any repeat (0.2 points, 6,000 images, 92.4 %:
# docs/results.md), and how many degrees of freedom that counts for
SEEDS, SEEDS_WEIGHT = 0.35, 10.0
SPENDING: Final = 2.0  # power of the share of repeats done: 3 is close to O'Brien & Fleming 1979
PART: Final = 0.25  # of the error that is left, for the recipe that is tried next
HOPELESS: Final = 0.1  # probability to become sure
WORTH: Final = 0.004  # expected saving of log size for each training that it may take
SHARED: Final = 0.7  # of the variance of images that is common to all students (docs/results.md)
SPREAD, SPREAD_WEIGHT = 0.04, 4.0  # of log errors around the law of sizes, before any trial
SLOPE, SLOPE_SD = -0.1, 0.1  # of log errors over log size, before any trial
NEAR: Final = math.log(2)  # log errors over what the bar allows: beyond, it is not about size
AT_ONCE: Final = 2  # repeats of one recipe under way
LIKELY: Final = 0.05  # probability to meet the bar
POINTS: Final = 200  # of the grid that densities are integrated on


@dataclass(frozen=True)
class Measure:
    """What one training came to on the images it held out."""

    correct: int
    samples: int
    fold: int

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return self.correct / self.samples


@dataclass(frozen=True)
class Repeated:
    """A recipe that was trained: its first training, and its repeats that have ended, in order."""

    trial: int
    size: int
    first: Measure
    repeats: tuple[Measure, ...] = ()
    under_way: int = 0
    """How many of its repeats have begun and not ended."""
    diverged: bool = False
    """It came to nothing, at first or in a repeat: never repeated (again), never sure."""
    since: int | None = None
    """The number of the trial that was its first repeat (under way or ended), which orders the
    recipes that are tried. Default: its own.
    """
    settled: State = "open"
    """What was decided and told: it stands, whatever later repeats say of the seeds' variance."""

    @property
    def begun(self) -> bool:
        """Whether a repeat of it has begun."""
        return bool(self.repeats) or self.under_way > 0


@dataclass(frozen=True)
class Plan:
    """What is to be proved, and with what."""

    bar: float
    level: float = 0.95
    """Of each recipe against the bar; of the study's answer, all that were tried counted in,
    against the bar less the tolerance.
    """
    most: int = 9
    """Repeats of one recipe."""
    folds: int = 10
    """The k-th repeat of a recipe holds out fold k mod folds."""
    limit: int | None = None
    """Size over which nothing is repeated."""
    tolerance: float = 0.02
    """Share of the errors that the bar allows: 0.02 is 0.15 points at 92.4 %."""


@dataclass(frozen=True)
class Verdict:
    """What a recipe's repeats prove."""

    state: State
    mean: float
    """Accuracy over all repeats, each fold weighed by what it tells; without any, of the first
    training.
    """
    sd: float | None
    """From repeat to repeat (n - 1); None of fewer than two."""
    low: float
    """Lower end of the mean: sure where it is at least the bar. 0 without repeats."""
    repeats: int
    most: int


def verdict(recipe: Repeated, every: Sequence[Repeated], plan: Plan) -> Verdict:
    """What is known of one recipe, beside `every` recipe of its study (itself among them)."""
    return _Study(every, plan).verdict(recipe)


def verdicts(every: Sequence[Repeated], plan: Plan) -> dict[int, Verdict]:
    """Of every recipe, by trial."""
    study = _Study(every, plan)
    return {recipe.trial: study.verdict(recipe) for recipe in every}


def next_repeat(every: Sequence[Repeated], plan: Plan, left: int) -> int | None:
    """The number of the trial to repeat next; None where the search should go on.

    `left` is how many trainings may still begin. The next is the recipe whose repeats are expected
    to save most,

        probability to become sure * log(smallest sure size / its size) / repeats until the last

    and none where that is little. With nothing sure yet and few trainings left, it is the recipe
    that is likeliest to become sure, so that a study ends with an answer.
    """
    if left <= 0:
        return None
    study = _Study(every, plan)
    able = [recipe for recipe in every if study.able(recipe)]
    if under_way := [recipe for recipe in able if recipe.under_way]:
        # more of one rather than one more: every recipe that is tried costs a part of the error
        able = [recipe for recipe in under_way if recipe.under_way < AT_ONCE]
    able = [recipe for recipe in able if study.passing(recipe) >= LIKELY]
    if not able:
        return None
    # rounded: what is equal but for the order of a sum goes by size and number
    promise = {recipe.trial: round(study.promise(recipe, left), 9) for recipe in able}
    if study.smallest is None and left <= plan.most + AT_ONCE:
        best = max(able, key=lambda recipe: (promise[recipe.trial], -recipe.size, -recipe.trial))
        return best.trial if promise[best.trial] > HOPELESS / 10 else None
    worth = {
        recipe.trial: promise[recipe.trial]
        * math.log(study.reference / recipe.size)
        / (plan.most - len(recipe.repeats))
        for recipe in able
    }
    best = max(able, key=lambda recipe: (worth[recipe.trial], -recipe.trial))
    return best.trial if worth[best.trial] >= WORTH else None


def seed_variance(every: Sequence[Repeated]) -> float:
    """What seeds add to the variance of images, in units of that: at least 0.

    The squared distances of a recipe's repeats from their mean hold both; what the images of fresh
    folds come to is taken off. The prior counts as SEEDS_WEIGHT degrees of freedom.
    """
    found, freedom = SEEDS * SEEDS_WEIGHT, SEEDS_WEIGHT
    for recipe in every:
        repeats, count = recipe.repeats, len(recipe.repeats)
        total = sum(each.samples for each in repeats)
        mean = sum(each.correct for each in repeats) / total if total else 1.0
        if count < 2 or not 0 < mean < 1:
            continue
        off = ((each.correct - each.samples * mean) ** 2 / each.samples for each in repeats)
        held = Counter(each.fold for each in repeats).values()
        images = count - sum(times * times for times in held) / count
        found += sum(off) / (mean * (1 - mean)) - images
        freedom += count - 1
    return max(0.0, found / freedom)


@lru_cache(maxsize=4096)
def boundaries(error: float, information: tuple[float, ...], most: int) -> tuple[float, ...]:
    """How many standard errors over the bar the mean must be at each look, so that a recipe at the
    bar gets over one of them with probability `error` at the last.

    `information` of each look is in any unit. A look that adds none keeps the boundary.
    """
    z: list[float] = []
    x = mass = np.empty(0)
    limit, before = 0.0, 0.0
    for look, known in enumerate(information, 1):
        spend = error * ((look / most) ** SPENDING - ((look - 1) / most) ** SPENDING)
        step = math.sqrt(max(0.0, known - before))
        if look > 1 and step * step < 1e-3 * known:
            z.append(limit / math.sqrt(known))
            continue
        limit = -float(ndtri(spend)) * step if look == 1 else _crossed(x, mass, step, spend)
        grid = np.linspace(-8 * math.sqrt(known), limit, POINTS)
        density = (
            _normal(grid / step) / step
            if look == 1
            else _normal((grid[:, None] - x) / step) @ mass / step
        )
        x, mass = grid, density * _trapezoid(grid)
        z.append(limit / math.sqrt(known))
        before = known
    return tuple(z)


class _Study:
    """All recipes of a study, and what follows from them together."""

    def __init__(self, every: Sequence[Repeated], plan: Plan) -> None:
        self.every, self.plan = every, plan
        self.seeds = seed_variance(every)
        self.allowed = min(max(1 - plan.bar, 1e-3), 0.9)
        """Share of errors at the bar, where its logarithm is defined."""
        self._tolerated = plan.tolerance * (1 - plan.bar)
        self._counted: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}

    def verdict(self, recipe: Repeated) -> Verdict:
        """What a recipe's repeats prove."""
        low, repeats = self._low(recipe, self._errors[recipe.trial]), recipe.repeats
        accuracies = [each.accuracy for each in repeats]
        return Verdict(
            state=self._state(recipe),
            mean=self._known(repeats)[0] if repeats else recipe.first.accuracy,
            sd=stdev(accuracies) if len(repeats) > 1 else None,
            low=low,
            repeats=len(repeats),
            most=self.plan.most,
        )

    def able(self, recipe: Repeated) -> bool:
        """Whether another repeat of it may begin, and would serve."""
        within = self.plan.limit is None or recipe.size <= self.plan.limit
        return (
            within
            and not recipe.diverged
            and len(recipe.repeats) + recipe.under_way < self.plan.most
            and (self.smallest is None or recipe.size < self.smallest)
            and self._near(recipe)
            and self._state(recipe) == "open"
        )

    @cached_property
    def smallest(self) -> int | None:
        """The smallest size that is sure."""
        return min((r.size for r in self.every if r.trial in self._sure), default=None)

    @property
    def reference(self) -> float:
        """The size that a repeat would save something of."""
        return self.smallest or 2 * max(recipe.size for recipe in self.every)

    def promise(self, recipe: Repeated, left: int) -> float:
        """The probability that it would be sure at its last repeat, within `left` more of them.

        Predictive power (Spiegelhalter, Freedman & Blackburn 1986, Controlled Clinical Trials 7:8).
        """
        done, samples = recipe.repeats, recipe.first.samples
        last = min(self.plan.most, len(done) + left)
        if last <= len(done) or not self._near(recipe):
            return 0.0
        rest = ((look % self.plan.folds, samples) for look in range(len(done) + 1, last + 1))
        images = self._images((*((each.fold, each.samples) for each in done), *rest))
        total = images[-1]
        most_errors = 1 - self.plan.bar - self._margin(recipe, images)
        weight, errors = 0.0, 0.0
        if done:
            mean, now = self._known(done)
            weight, errors = now / total, 1 - mean
        needed = (most_errors - weight * errors) / (1 - weight) if weight < 1 else 0.0
        if needed <= 0:
            return 0.0
        expected, variance = self._expected[recipe.trial]
        noise = self.plan.bar / (self.allowed * total * (1 - weight))
        return float(ndtr((math.log(needed) - expected) / math.sqrt(variance + noise)))

    def _margin(self, recipe: Repeated, images: Sequence[float]) -> float:
        """How much over the bar the mean must be at the last of these looks."""
        alone, among = (
            boundaries(error, _relative(images), self.plan.most)[-1]
            for error in (1 - self.plan.level, self._errors[recipe.trial])
        )
        error = math.sqrt(self.plan.bar * (1 - self.plan.bar) / images[-1])
        return max(alone * error, among * error - self._tolerated)

    def passing(self, recipe: Repeated) -> float:
        """The probability that it truly meets the bar."""
        expected, variance = self._expected[recipe.trial]
        return float(ndtr((math.log(self.allowed) - expected) / math.sqrt(variance)))

    @cached_property
    def _errors(self) -> dict[int, float]:
        """Each recipe's part of the error, by trial; of one that was not tried, what it would
        get.
        """
        return self._tried[0]

    @property
    def _sure(self) -> set[int]:
        return self._tried[1]

    @cached_property
    def _tried(self) -> tuple[dict[int, float], set[int]]:
        tried = sorted(
            (recipe for recipe in self.every if recipe.begun),
            key=lambda r: (r.trial if r.since is None else r.since, r.trial),
        )
        left, errors, sure = 1 - self.plan.level, dict[int, float](), set[int]()
        for recipe in tried:
            errors[recipe.trial] = PART * left
            if recipe.diverged or recipe.settled == "hopeless":
                proved = False
            elif recipe.settled == "sure":
                proved = True
            else:
                proved = self._low(recipe, PART * left) >= self.plan.bar
            if proved:
                sure.add(recipe.trial)
            else:
                left *= 1 - PART
        return {recipe.trial: errors.get(recipe.trial, PART * left) for recipe in self.every}, sure

    def _state(self, recipe: Repeated) -> State:
        if recipe.trial in self._sure:
            return "sure"
        if recipe.settled == "hopeless" or recipe.diverged:
            return "hopeless"
        if not recipe.repeats:
            return "open"
        return "hopeless" if self.promise(recipe, self.plan.most) < HOPELESS else "open"

    def _low(self, recipe: Repeated, part: float) -> float:
        """What is at least the bar where both are: its own lower end; and that of its part of the
        study's error, with the tolerance.
        """
        alone, among = self._end(recipe, 1 - self.plan.level), self._end(recipe, part)
        return min(alone, among + self._tolerated)

    def _end(self, recipe: Repeated, error: float) -> float:
        """The highest of the lower ends at every look, all of which hold together."""
        known = [self._known(recipe.repeats[: n + 1]) for n in range(len(recipe.repeats))]
        z = boundaries(error, _relative([images for _, images in known]), self.plan.most)
        ends = (
            wilson_interval(mean * int(images), int(images), quantile)[0]
            for (mean, images), quantile in zip(known, z)
        )
        return max(ends, default=0.0)

    def _known(self, repeats: Sequence[Measure]) -> tuple[float, float]:
        """Their mean accuracy, and how many independent images it is as good as."""
        mean = images = 0.0
        for fold in {each.fold: None for each in repeats}:
            same = [each for each in repeats if each.fold == fold]
            samples = sum(each.samples for each in same)
            worth = samples / (len(same) + self.seeds)
            mean += worth * sum(each.correct for each in same) / samples
            images += worth
        return mean / images, images

    def _images(self, held: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
        """The same at each look, where only folds and numbers of images are known."""
        if held not in self._counted:
            looks = (held[: n + 1] for n in range(len(held)))
            self._counted[held] = tuple(
                self._known([Measure(0, samples, fold) for fold, samples in look])[1]
                for look in looks
            )
        return self._counted[held]

    def _near(self, recipe: Repeated) -> bool:
        near = _log_errors(recipe.first) < math.log(self.allowed) + NEAR
        return not recipe.diverged and (near or bool(recipe.repeats))

    @cached_property
    def _expected(self) -> dict[int, tuple[float, float]]:
        """The logarithm of each recipe's true share of errors, and its variance, by trial.

        All is normal: log errors = a + b log size + what the rest of a recipe makes of it + what a
        fold's images have in common + what is left; a, b and the recipes' parts are predicted
        together from all trainings (best linear unbiased prediction, Henderson 1975, Biometrics
        31:423). The luck of a first training is thereby shrunk away, and what repeats say of one
        recipe is learned for those of like size, and for the study's own images.
        """
        near = [recipe for recipe in self.every if self._near(recipe)]
        seen = [(i, m) for i, recipe in enumerate(near) for m in (recipe.first, *recipe.repeats)]
        sizes = np.log([max(1, recipe.size) for recipe in near])
        x = sizes - sizes.mean() if len(near) else sizes
        owner = np.array([i for i, _ in seen], dtype=int)
        fold = np.array([measure.fold for _, measure in seen], dtype=int)
        y = np.array([_log_errors(measure) for _, measure in seen]) - math.log(self.allowed)
        noise = np.sqrt([self._noise(measure) for _, measure in seen])
        spread = self._spread(x, [_log_errors(recipe.first) for recipe in near], near)
        law = 1 + SLOPE_SD**2 * np.outer(x, x)
        true = law + spread * np.eye(len(near))
        images = np.where(fold[:, None] == fold, SHARED, 0.0) + np.diag(
            np.full(len(seen), 1 - SHARED + self.seeds)
        )
        both = true[np.ix_(owner, owner)] + images * np.outer(noise, noise)
        gain = np.linalg.solve(both, true[owner]).T
        mean = SLOPE * x + gain @ (y - SLOPE * x[owner]) + math.log(self.allowed)
        variance = np.diag(true) - np.einsum("ij,ji->i", gain, true[owner])
        return {
            recipe.trial: (float(m), max(float(v), 1e-9))
            for recipe, m, v in zip(near, mean, variance)
        }

    def _spread(self, x: Floats, y: Sequence[float], near: Sequence[Repeated]) -> float:
        """The variance of log errors around the law, of which noise is no part."""
        found, freedom = SPREAD**2 * SPREAD_WEIGHT, SPREAD_WEIGHT
        if len(near) > 2 and np.ptp(x) > 0:
            slope, start = np.polyfit(x, y, 1)
            off = np.asarray(y) - start - slope * x
            own = np.mean([self._noise(recipe.first) for recipe in near])
            found += float(off @ off - (len(near) - 2) * (1 - SHARED + self.seeds) * own)
            freedom += len(near) - 2
        return max(found / freedom, 0.01**2)

    def _noise(self, measure: Measure) -> float:
        """The images' variance of log errors, near the bar."""
        return self.plan.bar / (self.allowed * measure.samples)


def _log_errors(measure: Measure) -> float:
    return math.log((measure.samples - measure.correct + 0.5) / (measure.samples + 0.5))


def _relative(images: Sequence[float]) -> tuple[float, ...]:
    """In units of the first, and rounded: the same boundaries serve often."""
    return tuple(round(each / images[0], 3) for each in images)


def _normal(z: Floats) -> Floats:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _trapezoid(grid: Floats) -> Floats:
    weights = np.full(len(grid), grid[1] - grid[0])
    weights[[0, -1]] /= 2
    return weights


def _crossed(x: Floats, mass: Floats, step: float, spend: float) -> float:
    """What a motion that is at x with these chances is beyond after a step, so probably."""

    def beyond(limit: float) -> float:
        return float(mass @ ndtr((x - limit) / step)) - spend

    return float(brentq(beyond, x[0], x[-1] + 10 * step))
