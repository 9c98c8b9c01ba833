"""How often the answer is truly under the bar, how large it is, and what it costs: today's rules
and repeats on fresh folds, by simulation.

    python -m benchmarks.honesty [--repetitions 1000] [--candidates 200]      static draws
    python -m benchmarks.honesty --trainings 40 80 [--repetitions 200]        whole adaptive studies
                                 [--keep docs/results/honesty.jsonl]          hours: it goes on
    python -m benchmarks.honesty --measure-shared

A simulation around the real rules: `selection.select`, `selection.confirms`, `kdexp.repeats`. A
recipe's *true* accuracy, the mean over all seeds on endless images, follows a power law of its
size, less what its hyperparameters lose:

    error(size) = 7.6 % * (size / 15,000)^-exponent + lost        the bar: 92.4 %

Exponent 0.075 fits 92.0 % at 7,606 and 93.4 % at 98,954 parameters; with 0.15 sizes differ more.
One training adds N(0, seed-sd) to the accuracy, and measuring that on the images of a fold adds
sampling noise. A share of a fold's images (`--shared`) is easy or hard for all models alike. The
noise of each model alone is exactly binomial.

*Static draws*: candidates of log-uniform sizes from 2,000 to 100,000 parameters that lose |N(0, 0.3
points)|, each trained once on fold 0. Then the rule chooses among them, and `trainings` counts
what it trains beyond.

*Adaptive studies*: the study's own Gaussian process (`study._sampler`) proposes size (30 steps) and
two hyperparameters, whose distance from an optimum loses 0.24 points on average, 0 at best. What
it is told, and which proposals are not worth training, is decided as study.py does. `trainings` is
everything together: first trainings, repeats, and what confirms. For that, today's rule keeps back
enough for `--tries` candidates.

The columns: the share of selected models that are truly under the bar, with its standard error; by
how many points they are over it, on average; their size over that of the smallest that truly
passes (median; in adaptive studies: of the whole space); trainings; in how many studies there is
no answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import optuna

from benchmarks.report import Kept, Row, print_report
from kdexp.config import Data, Distillation, Selection, Student, Sweep, Training
from kdexp.distill.datasets import load_splits
from kdexp.distill.evaluate import logits_of
from kdexp.distill.models import build
from kdexp.distill.packs import Lane
from kdexp.distill.randomness import seed_of
from kdexp.distill.train import train
from kdexp.environment import configure
from kdexp.repeats import Measure, Plan, Repeated, next_repeat, verdict
from kdexp.search.objective import DIRECTIONS, Passing, constraints, dominated, values
from kdexp.search.space import NEAR
from kdexp.search.study import IN_VAIN, NARROW, _sampler
from kdexp.selection import Candidate, FreshSeeds, NothingPasses, confirms, select

BAR = 0.924
SMALLEST, LARGEST = 2_000, 100_000  # parameters
AT_THE_BAR = 15_000
LOST = 0.003  # by hyperparameters that are not the best, sd
STEPS = 30  # of size in adaptive studies
SLOPE = 0.0053  # of accuracy over the distance to the best hyperparameters: 0.24 points on average
NAMES = ("today", "confirm", "confidence", "both", "repeats")
WORLD = ("images", "folds", "shared", "seed_sd", "level", "most_repeats", "tries")
"""Options besides those that a row says."""
NOT_SURE = 1e-3  # the constraint of what meets the bar and is not sure


class World:
    """What nobody knows: the law of sizes, and the noise."""

    def __init__(self, options: argparse.Namespace, exponent: float, seed: int) -> None:
        self.exponent, self.images, self.seed_sd = exponent, options.images, options.seed_sd
        # how many trainings are drawn changes no other study
        self.stream = np.random.default_rng(seed)
        count = round(options.shared * options.images)
        self._shared = [np.sort(self.stream.uniform(size=count)) for _ in range(options.folds)]

    def true(self, size: float, lost: float) -> float:
        """A recipe's true accuracy."""
        return 1 - (1 - BAR) * (size / AT_THE_BAR) ** -self.exponent - lost

    def train(self, true: float, fold: int = 0) -> Measure:
        """A new training of a recipe, measured on the fold that it holds out."""
        accuracy = float(np.clip(true + self.stream.normal(0, self.seed_sd), 0, 1))
        shared = self._shared[fold]
        alike = int(np.searchsorted(shared, accuracy))  # the shared images that are easy enough
        own = int(self.stream.binomial(self.images - len(shared), accuracy))
        return Measure(alike + own, self.images, fold)


@dataclass(frozen=True)
class Policy:
    """A way to an answer."""

    name: str
    confidence: float | None = None
    seeds: int = 0
    """Fresh ones that confirm the selected, on the study's own validation images."""
    repeats: bool = False
    """On fresh folds, in the study."""

    @property
    def rule(self) -> Selection:
        """What the selector and the sampler's constraints go by."""
        return Selection(accuracy_bar=BAR, confidence=self.confidence)


@dataclass(frozen=True)
class Answer:
    """What one policy made of one study; `size` is None where there is no answer."""

    size: int | None
    true: float
    smallest: float
    """That truly passes."""
    trainings: int


class Trained:
    """The recipes of a study, with their first trainings and repeats."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.every: list[Repeated] = []
        self.true: list[float] = []
        self.trainings = 0

    def add(self, size: int, true: float) -> Repeated:
        """The first training of a recipe."""
        self.true.append(true)
        self.every.append(Repeated(len(self.every), size, self._train(true, 0)))
        return self.every[-1]

    def repeat(self, trial: int) -> Repeated:
        """One more of a recipe; what is decided stays."""
        before = self.every[trial]
        fold = (len(before.repeats) + 1) % self.plan.folds
        measure = self._train(self.true[trial], fold)
        since = self.trainings if before.since is None else before.since
        self.every[trial] = replace(before, repeats=(*before.repeats, measure), since=since)
        state = verdict(self.every[trial], self.every, self.plan).state
        self.every[trial] = replace(self.every[trial], settled=state)
        return self.every[trial]

    def repeat_all(self) -> None:
        """Repeats until none is worth it."""
        while (trial := next_repeat(self.every, self.plan, 1000)) is not None:
            self.repeat(trial)

    def sure(self) -> int | None:
        """The smallest that is sure."""
        found = [(each.size, each.trial) for each in self.every if each.settled == "sure"]
        return min(found)[1] if found else None

    def selected(self, policy: Policy, most: float) -> int | None:
        """The selector's choice; confirmed where the policy says so, within so many trainings."""
        left = [
            Candidate(str(n), n, r.size, r.size, r.size, r.first.accuracy, r.first.samples)
            for n, r in enumerate(self.every)
        ]
        try:
            chosen = select(left, policy.rule)
            while policy.seeds:
                if self.trainings + policy.seeds > most:
                    return None
                fresh = [self._train(self.true[chosen.trial], 0) for _ in range(policy.seeds)]
                correct = tuple(measure.correct for measure in fresh)
                if confirms(FreshSeeds(correct, self.world.images), policy.rule):
                    break
                left.remove(chosen)
                chosen = select(left, policy.rule)
        except NothingPasses:
            return None
        return chosen.trial

    def answer(self, trial: int | None, smallest: float, before: int = 0) -> Answer:
        """As it is counted, without the trainings that came before."""
        size = None if trial is None else self.every[trial].size
        true = np.nan if trial is None else self.true[trial]
        return Answer(size, float(true), float(smallest), self.trainings - before)

    def _train(self, true: float, fold: int) -> Measure:
        self.trainings += 1
        return self.world.train(true, fold)


def static(options: argparse.Namespace, exponent: float, seed: int, policy: Policy) -> Answer:
    """Candidates drawn at random; the rule chooses among them."""
    trained = draw(options, exponent, seed)
    passing = [recipe.size for recipe, true in zip(trained.every, trained.true) if true >= BAR]
    if policy.repeats:
        trained.repeat_all()
        chosen = trained.sure()
    else:
        chosen = trained.selected(policy, np.inf)
    return trained.answer(chosen, min(passing, default=np.nan), options.candidates)


def draw(options: argparse.Namespace, exponent: float, seed: int) -> Trained:
    """Candidates of a static study, each trained once."""
    world = World(options, exponent, seed)
    trained = Trained(world, _plan(options))
    sizes = np.exp(world.stream.uniform(np.log(SMALLEST), np.log(LARGEST), options.candidates))
    for size, lost in zip(sizes.astype(int), world.stream.normal(0, LOST, len(sizes))):
        trained.add(int(size), world.true(size, abs(lost)))
    return trained


class Search:
    """An adaptive study: what study.py does, with the training simulated."""

    def __init__(self, world: World, policy: Policy, plan: Plan, seed: int) -> None:
        self.policy, self.world = policy, world
        self.trained = Trained(world, plan)
        self.best = world.stream.uniform(0.2, 0.8, 2)
        self.study = optuna.create_study(directions=DIRECTIONS["smallest"])
        self.sweep = Sweep.model_validate({"name": "simulated", "study": {"seed": seed}})
        self.smallest: Passing | None = None
        self.in_vain = 0
        self.params: dict[int, dict[str, float]] = {}

    def run(self, trainings: int) -> None:
        """Repeats where the policy has them, else what the sampler proposes."""
        while (left := trainings - self.trained.trainings) > 0 and self.in_vain < IN_VAIN:
            every, plan = self.trained.every, self.trained.plan
            trial = next_repeat(every, plan, left) if self.policy.repeats else None
            if trial is not None:
                self.repeat(trial)
            else:
                self.propose()

    def propose(self) -> None:
        """A proposal of the sampler, trained where it is worth it."""
        self.study.sampler = _sampler(self.sweep, len(self.study.trials), self.in_vain)
        trial = self.study.ask()
        params = self._suggest(trial)
        size = size_at(int(params["step"]))
        if dominated("smallest", size, self.policy.rule, self.smallest) or self._like(params):
            self.in_vain += 1
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        self.in_vain = 0
        off = np.hypot(params["one"] - self.best[0], params["other"] - self.best[1])
        recipe = self.trained.add(size, self.world.true(size, SLOPE * off))
        self.params[recipe.trial] = params
        self._tell(trial, size, recipe.first.accuracy, False)

    def _like(self, params: dict[str, float]) -> bool:
        """Whether a trial had nearly these: the same size, and numbers closer than NEAR."""
        return self.in_vain < NARROW and any(
            all(abs(params[name] - other[name]) < NEAR for name in params)
            for other in self.params.values()
        )

    def repeat(self, number: int) -> None:
        """A repeat, which is a trial of its own."""
        recipe = self.trained.repeat(number)
        self.study.enqueue_trial(self.params[number])
        self.study.sampler = optuna.samplers.RandomSampler(seed=0)
        trial = self.study.ask()
        self._suggest(trial)
        state = verdict(recipe, self.trained.every, self.trained.plan)
        self._tell(trial, recipe.size, state.mean, state.state == "sure")

    def _suggest(self, trial: optuna.Trial) -> dict[str, float]:
        return {
            "step": trial.suggest_int("step", 0, STEPS - 1),
            "one": trial.suggest_float("one", 0, 1),
            "other": trial.suggest_float("other", 0, 1),
        }

    def _tell(self, trial: optuna.Trial, size: int, accuracy: float, sure: bool) -> None:
        limits = constraints("smallest", size, accuracy, self.policy.rule, self.world.images)
        for name, limit in limits.items():
            told = max(limit, NOT_SURE) if self.policy.repeats and not sure else limit
            trial.set_constraint(name, told)
        self.study.tell(trial, values("smallest", size, accuracy))
        passes = sure if self.policy.repeats else max(limits.values()) <= 0
        if passes and (self.smallest is None or size < self.smallest.size):
            self.smallest = Passing(trial.number, size)


def adaptive(
    options: argparse.Namespace, exponent: float, seed: int, policy: Policy, trainings: int
) -> Answer:
    """A whole study; what confirms is kept back from its trainings."""
    world = World(options, exponent, seed)
    search = Search(world, policy, _plan(options), seed_of(seed, "study", 0) % 2**32)
    search.run(trainings - policy.seeds * (options.tries if policy.seeds else 0))
    trained = search.trained
    chosen = trained.sure() if policy.repeats else trained.selected(policy, trainings)
    sizes = [size_at(step) for step in range(STEPS)]
    smallest = min(size for size in sizes if world.true(size, 0) >= BAR)
    return trained.answer(chosen, smallest)


def size_at(step: int) -> int:
    """Parameters, from SMALLEST to LARGEST by a common ratio."""
    return round(SMALLEST * (LARGEST / SMALLEST) ** (step / (STEPS - 1)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    if options.measure_shared:
        measure_shared()
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = list(simulate(options, Kept(options.keep)))
    title = (
        f"{options.repetitions:,} studies around a bar of {BAR:.1%}, {options.images:,} images a"
        f" fold ({options.shared:.0%} shared), seed-to-seed sd {100 * options.seed_sd:.2f} points"
    )
    print_report(title, rows, {"rows": rows, **vars(options), "keep": str(options.keep)})


def simulate(options: argparse.Namespace, kept: Kept) -> Iterator[Row]:
    """A row for each law, number of trainings and policy; policies see the same studies."""
    for exponent in options.exponents:
        for trainings in options.trainings or (None,):
            for policy in policies(options):
                study = f"{trainings} trainings" if trainings else f"{options.candidates} drawn"
                row = {"exponent": exponent, "study": study, "policy": policy.name}
                found = [
                    _kept(kept, row, options, policy, trainings, options.seed + number)
                    for number in range(options.repetitions)
                ]
                yield row | _row(found)


def _kept(
    kept: Kept,
    row: Row,
    options: argparse.Namespace,
    policy: Policy,
    trainings: int | None,
    seed: int,
) -> Answer:
    def measure() -> Row:
        if trainings is None:
            return asdict(static(options, row["exponent"], seed, policy))
        return asdict(adaptive(options, row["exponent"], seed, policy, trainings))

    world = [getattr(options, name) for name in WORLD]
    found = kept.row(row | {"seed": seed, "world": world}, measure)
    return Answer(**{field.name: found[field.name] for field in fields(Answer)})


def policies(options: argparse.Namespace) -> list[Policy]:
    """Today's, and the one with repeats."""
    sure, seeds = options.confidence, options.seeds
    every = {
        "today": Policy("as selected"),
        "confirm": Policy(f"confirm, {seeds} seeds", seeds=seeds),
        "confidence": Policy(f"confidence {sure:g}", sure),
        "both": Policy(f"confidence {sure:g} + confirm, {seeds} seeds", sure, seeds),
        "repeats": Policy(f"repeats at {options.level:g}", repeats=True),
    }
    return [every[name] for name in options.policies]


def _row(every: Sequence[Answer]) -> Row:
    found = [each for each in every if each.size]
    under = float(np.mean([each.true < BAR for each in found])) if found else 0.0
    larger = [each.size / each.smallest for each in found if each.size]
    over, trainings = [each.true - BAR for each in found], [each.trainings for each in every]
    return {
        "under_bar_%": round(100 * under, 1),
        "se": round(100 * float(np.sqrt(under * (1 - under) / max(1, len(found)))), 1),
        "over_bar_points": round(100 * float(np.mean(over)), 2) if over else None,
        "size_ratio": round(float(np.nanmedian(larger)), 2) if larger else None,
        "trainings": round(float(np.mean(trainings)), 1),
        "none_%": round(100 * (1 - len(found) / len(every)), 1),
    }


def measure_shared() -> None:
    """Print how much the errors of Fashion-MNIST students correlate over the validation images,
    pair by pair.
    """
    configure("cpu", 1)
    data = Data(channels=1)
    splits = load_splits(data)
    right = {}
    for channels, seed in (((4, 8, 16), 1), ((4, 8, 16), 2), ((4, 8, 16), 3), ((8, 16, 32), 1)):
        student = Student(channels=channels, hidden=64, dropout=0.0)
        lane = Lane(
            student,
            Training(epochs=4, learning_rate=6e-3, seed=seed, keep="last"),
            Distillation(alpha=0.0),
        )
        *_, (report,) = train([lane], splits, data)
        module = build(student, splits.train)
        module.load_state_dict(report.weights)
        right[channels, seed] = (
            logits_of(module, splits.validation).argmax(1) == splits.validation.labels
        ).numpy()
    pairs = [
        {
            "one": str(one),
            "other": str(other),
            "correlation": round(float(np.corrcoef(right[one], right[other])[0, 1]), 3),
        }
        for one, other in combinations(right, 2)
    ]
    print_report(
        "errors on 6,000 validation images of students (channels, seed)", pairs, {"pairs": pairs}
    )


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(BAR, options.level, options.most_repeats, options.folds)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.honesty", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.075, 0.15])
    parser.add_argument("--trainings", type=int, nargs="*", default=[], help="adaptive studies")
    parser.add_argument("--candidates", type=int, default=200, help="of a static draw")
    parser.add_argument("--policies", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--shared", type=float, default=0.7)
    parser.add_argument("--measure-shared", action="store_true")
    parser.add_argument("--seed-sd", type=float, default=0.002)
    parser.add_argument("--seeds", type=int, default=3, help="that confirm")
    parser.add_argument("--tries", type=int, default=3, help="to confirm, kept back for")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--most-repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=8787)
    parser.add_argument("--keep", type=Path, help="a file of what was simulated, a line each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
