"""What a student gets wrong on validation: how often it takes which class for which, how sure it is
of its answers, and the images of which it was surest and wrong.

Counted once its model is selected, and kept with its run as `confusion.json`. The test split is not
touched.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from kdexp import KdexpError
from kdexp.config import Recipe, Variant
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.evaluate import logits_of
from kdexp.distill.images import png_of
from kdexp.runs.records import log_text, sealed, text_of
from kdexp.runs.tracking import RunRecord, Tracking, TrackingAway
from kdexp.select.variants import load_variant
from kdexp.selection import AS_TRAINED

__all__ = ["Bin", "Mistakes", "Wrong", "keep_mistakes", "mistakes_of"]

BINS = 10  # of probability, of equal width
SHOWN = 12  # images
LONGEST = 64  # pixels of a shown image


@dataclass(frozen=True)
class Bin:
    """The images whose answer had a probability in one tenth of 0 to 1."""

    images: int
    right: int
    probability: float
    """On average."""


@dataclass(frozen=True)
class Wrong:
    """An image that was taken for another class."""

    true: int
    taken: int
    probability: float
    """That the student gave its answer."""
    png: str
    """In base64."""


@dataclass(frozen=True)
class Mistakes:
    """A confusion matrix: how many images of one class (the first) were taken for another (the
    second); without the pairs that never came. A former version kept no more than that.
    """

    classes: tuple[str, ...]
    counts: Mapping[tuple[int, int], int]
    bins: tuple[Bin, ...] = ()
    """Without those that hold no image."""
    surest: tuple[Wrong, ...] = ()
    """Of the wrong ones, the surest first."""

    @property
    def images(self) -> int:
        """All that were looked at."""
        return sum(self.counts.values())

    @property
    def wrong(self) -> int:
        """Those that were taken for another class."""
        return sum(count for (true, taken), count in self.counts.items() if true != taken)

    @cached_property
    def of_class(self) -> Counter[int]:
        """How many images there are of each class."""
        found = Counter[int]()
        for (true, _), count in self.counts.items():
            found[true] += count
        return found

    @property
    def calibration_error(self) -> float:
        """How far probability and share of right answers are apart, over all images (ECE: Guo et
        al. 2017, arXiv:1706.04599, equation 3).
        """
        apart = sum(abs(each.right - each.images * each.probability) for each in self.bins)
        return apart / self.images

    def pairs(self, most: int) -> list[tuple[str, str, int, int]]:
        """The most confused: a class, what it was taken for, how often, and of how many images."""
        wrong = [(-n, pair) for pair, n in self.counts.items() if pair[0] != pair[1]]
        return [
            (self.classes[true], self.classes[taken], -n, self.of_class[true])
            for n, (true, taken) in islice(sorted(wrong), most)
        ]

    def worst(self, most: int) -> list[tuple[str, int, int]]:
        """The classes that are found least often: how many images of it are right, and of how
        many.
        """
        found = [
            (self.counts.get((each, each), 0) / total, each, total)
            for each, total in self.of_class.items()
        ]
        return [
            (self.classes[each], self.counts.get((each, each), 0), total)
            for share, each, total in sorted(found)[:most]
            if share < 1
        ]


def keep_mistakes(
    run: RunRecord,
    recipe: Recipe,
    variant: Variant,
    splits: Splits,
    tracking: Tracking,
    device: torch.device,
) -> None:
    """Count them and keep them with the run, if that has not been done. A count that cannot be kept
    holds no model back.
    """
    if recipe.data.train_on_validation:
        return
    like = splits.validation.to(device)
    try:
        if _place(variant) in sealed(run):
            return
        module = load_variant(run, recipe, variant, like, tracking).to(device)
        found = _looked_at(logits_of(module, like).cpu(), splits.validation)
        kept = asdict(found) | {"counts": [[*pair, n] for pair, n in sorted(found.counts.items())]}
        log_text(run.run_id, _place(variant), json.dumps(kept, ensure_ascii=False), tracking)
    except TrackingAway:
        raise
    except KdexpError:
        return


def mistakes_of(run: RunRecord, variant: Variant, tracking: Tracking) -> Mistakes | None:
    """As a run holds them; None where it does not. Raises RecordError."""
    place = _place(variant)
    if place not in sealed(run):
        return None
    stored = json.loads(text_of(run, place, tracking))
    return Mistakes(
        tuple(stored["classes"]),
        {(true, taken): count for true, taken, count in stored["counts"]},
        tuple(Bin(**each) for each in stored.get("bins", ())),
        tuple(Wrong(**each) for each in stored.get("surest", ())),
    )


def _looked_at(logits: Float[Tensor, "images classes"], split: Split) -> Mistakes:
    sure, taken = logits.double().softmax(1).max(1)
    labels = split.labels.cpu()
    counts = Counter(zip(labels.tolist(), taken.tolist(), strict=True))
    order = sure.masked_fill(taken == labels, -1).argsort(descending=True, stable=True)
    wrong = [at for at in order[:SHOWN].tolist() if taken[at] != labels[at]]
    return Mistakes(
        split.classes,
        counts,
        _bins(sure.tolist(), (taken == labels).tolist()),
        tuple(
            Wrong(
                int(labels[at]),
                int(taken[at]),
                float(sure[at]),
                base64.b64encode(png_of(split.images[at].cpu().numpy(), LONGEST)).decode(),
            )
            for at in wrong
        ),
    )


def _bins(sure: Sequence[float], right: Sequence[bool]) -> tuple[Bin, ...]:
    of = [min(int(BINS * each), BINS - 1) for each in sure]
    found = []
    for number in range(BINS):
        held = [at for at, own in enumerate(of) if own == number]
        if held:
            mean = sum(sure[at] for at in held) / len(held)
            found.append(Bin(len(held), sum(right[at] for at in held), mean))
    return tuple(found)


def _place(variant: Variant) -> str:
    return "confusion.json" if variant == AS_TRAINED else f"confusion-{variant}.json"
