"""How often the selected model's true accuracy is under the bar: as selected, with --confidence,
after confirm, with both.

    python -m benchmarks.honesty [--repetitions 2000] [--candidates 200] [--images 6000]
                                 [--shared 0.7] [--seed-sd 0.002]
    python -m benchmarks.honesty --measure-shared

A simulation around the real selector (`selection.select`) and the real verdict
(`selection.confirms`). Each repetition draws a study whose candidates' sizes are log-uniform from
2,000 to 100,000 parameters. A candidate's *true* accuracy, the mean over all seeds on endless
images, follows a power law of its size, less what its hyperparameters lose (half-normal, sd 0.3
points):

    error(size) = 7.6 % * (size / 15,000)^-0.075 + |N(0, 0.3 points)|        the bar: 92.4 %

which fits 92.0 % at 7,606 and 93.4 % at 98,954 parameters. One training of it adds N(0, seed-sd) to
the accuracy, and measuring that on the validation images adds sampling noise. All models are
measured on the same images: a share of them (`--shared`) is easy or hard for all alike, which makes
the errors of two models correlate by that much. The noise of each model alone is exactly binomial.

The columns: the share of selected models that are truly under the bar, with its standard error; by
how many points their true accuracy is over it, on average; their size over that of the smallest
candidate that truly passes (median); how many candidates were trained with fresh seeds; in how many
studies none was left to select.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.report import Row, print_report
from kdexp.config import Data, Distillation, Selection, Student, Training
from kdexp.distill.datasets import load_splits
from kdexp.distill.evaluate import logits_of
from kdexp.distill.models import build
from kdexp.distill.packs import Lane
from kdexp.distill.train import train
from kdexp.environment import configure
from kdexp.selection import Candidate, FreshSeeds, NothingPasses, confirms, select

BAR = 0.924
SMALLEST, LARGEST = 2_000, 100_000  # parameters
AT_THE_BAR, EXPONENT = 15_000, 0.075
LOST = 0.003  # by hyperparameters that are not the best, sd


@dataclass(frozen=True)
class Study:
    """Candidates with what nobody knows, their true accuracies, and a way to measure a model of any
    accuracy.
    """

    candidates: tuple[Candidate, ...]
    true: np.ndarray
    measure: Callable[[float], int]
    """Correct predictions of a new training of a recipe."""

    @property
    def smallest_passing(self) -> int | None:
        """The size that a selector without noise would find."""
        sizes = [c.parameters for c in self.candidates if self.true[c.trial] >= BAR]
        return min(sizes, default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    if options.measure_shared:
        measure_shared()
        return
    rows = list(simulate(options))
    title = (
        f"{options.repetitions:,} studies of {options.candidates} candidates around a bar of"
        f" {BAR:.1%}, {options.images:,} validation images ({options.shared:.0%} shared),"
        f" seed-to-seed sd {100 * options.seed_sd:.2f} points"
    )
    print_report(title, rows, {"rows": rows, **vars(options)})


def simulate(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each way to select; all see the same studies."""
    for confidence in (None, options.confidence):
        for seeds in (0, *options.seeds):
            generator = np.random.default_rng(options.seed)
            rule = Selection(accuracy_bar=BAR, confidence=confidence)
            yield _row(
                rule,
                seeds,
                [
                    _selected(draw(options, generator), rule, seeds)
                    for _ in range(options.repetitions)
                ],
            )


def draw(options: argparse.Namespace, generator: np.random.Generator) -> Study:
    """A study, measured once."""
    count = options.candidates
    sizes = np.exp(generator.uniform(np.log(SMALLEST), np.log(LARGEST), count)).astype(int)
    error = (1 - BAR) * (sizes / AT_THE_BAR) ** -EXPONENT + np.abs(generator.normal(0, LOST, count))
    # how many fresh seeds are drawn changes no other study
    stream = np.random.default_rng(generator.integers(2**63))
    shared = np.sort(stream.uniform(size=round(options.shared * options.images)))

    def measure(true: float) -> int:
        accuracy = float(np.clip(true + stream.normal(0, options.seed_sd), 0, 1))
        alike = int(np.searchsorted(shared, accuracy))  # the shared images that are easy enough
        return alike + int(stream.binomial(options.images - len(shared), accuracy))

    found = [measure(true) / options.images for true in 1 - error]
    candidates = [
        Candidate(str(n), n, int(s), int(s), int(s), a, options.images)
        for n, (s, a) in enumerate(zip(sizes, found))
    ]
    return Study(tuple(candidates), 1 - error, measure)


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


@dataclass(frozen=True)
class Found:
    """What one way to select made of one study."""

    over: float
    """Its true accuracy less the bar."""
    larger: float | None
    """Its size over that of the smallest truly passing candidate; None where there is none."""
    retrained: int
    """How many candidates were trained with fresh seeds."""


def _selected(study: Study, rule: Selection, seeds: int) -> Found | None:
    """The selector, and where `seeds` are asked for the confirmation; None where nothing is left to
    select.
    """
    left, tried = list(study.candidates), 0
    try:
        chosen = select(left, rule)
        while seeds:
            tried += 1
            fresh = FreshSeeds(
                tuple(study.measure(study.true[chosen.trial]) for _ in range(seeds)),
                chosen.val_samples or 0,
            )
            if confirms(fresh, rule):
                break
            left.remove(chosen)
            chosen = select(left, rule)
    except NothingPasses:
        return None
    best = study.smallest_passing
    return Found(
        float(study.true[chosen.trial]) - BAR, chosen.parameters / best if best else None, tried
    )


def _row(rule: Selection, seeds: int, every: Sequence[Found | None]) -> Row:
    found = [each for each in every if each]
    under = float(np.mean([each.over < 0 for each in found]))
    larger = [each.larger for each in found if each.larger]
    return {
        "confidence": str(rule.confidence or "none"),
        "fresh_seeds": seeds,
        "under_bar_%": round(100 * under, 1),
        "se": round(100 * float(np.sqrt(under * (1 - under) / len(found))), 1),
        "over_bar_points": round(100 * float(np.mean([each.over for each in found])), 2),
        "size_ratio": round(float(np.median(larger)), 2),
        "retrained": round(float(np.mean([each.retrained for each in found])), 1),
        "none_%": round(100 * (1 - len(found) / len(every)), 1),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.honesty", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--shared", type=float, default=0.7)
    parser.add_argument("--measure-shared", action="store_true")
    parser.add_argument("--seed-sd", type=float, default=0.002)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3])
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=8787)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
