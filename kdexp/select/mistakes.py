"""What a student gets wrong: how often it takes which class for which, on validation.

Counted once its model is selected, and kept with its run as `confusion.json`. The test split is not
touched.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch

from kdexp import KdexpError
from kdexp.config import Recipe, Variant
from kdexp.distill.datasets import Splits
from kdexp.distill.evaluate import logits_of
from kdexp.runs.records import log_text, sealed, text_of
from kdexp.runs.tracking import RunRecord, Tracking, TrackingAway
from kdexp.select.variants import load_variant
from kdexp.selection import AS_TRAINED

__all__ = ["Mistakes", "keep_mistakes", "mistakes_of"]


@dataclass(frozen=True)
class Mistakes:
    """A confusion matrix: how many images of one class (the first) were taken for another (the
    second); without the pairs that never came.
    """

    classes: tuple[str, ...]
    counts: Mapping[tuple[int, int], int]

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
        taken = logits_of(module, like).argmax(1).tolist()
        counts = Counter(zip(like.labels.tolist(), taken, strict=True))
        rows = [[true, answer, count] for (true, answer), count in sorted(counts.items())]
        text = json.dumps({"classes": like.classes, "counts": rows}, ensure_ascii=False)
        log_text(run.run_id, _place(variant), text, tracking)
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
    counts = {(true, taken): count for true, taken, count in stored["counts"]}
    return Mistakes(tuple(stored["classes"]), counts)


def _place(variant: Variant) -> str:
    return "confusion.json" if variant == AS_TRAINED else f"confusion-{variant}.json"
