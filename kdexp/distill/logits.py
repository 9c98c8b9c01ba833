"""The cache of a teacher's logits: raw, in half precision, for every view of every training sample.

One file serves every temperature and every loss on logits. Where a training has fewer epochs than
there are views, it holds just what that training will draw: one row for each epoch of its seed (50
views and 5 epochs: a tenth of the teacher's work). Where trainings hold out different folds, one
file serves them all: it holds the *whole* training set, validation included, and each training
takes the columns of its own images. It is keyed by the SHA-256 of weights, data, normalisation,
views and draws, written atomically, memory-mapped, and compared each time it is opened: with its
own SHA-256, and with the live teacher on some samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdexp.config import Data, Training
from kdexp.distill.batches import pixels, views
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.evaluate import evaluate, logits_of
from kdexp.distill.models import measure, weights_hash
from kdexp.distill.train import TeacherLogits, draw, draw_erased, epochs_of
from kdexp.distill.weights import TeacherError
from kdexp.files import write_atomically

__all__ = ["Cache", "CacheProgress", "cached", "digest", "fingerprints", "mapped", "passes_left"]

SPOT_CHECKS = 256  # random (view, sample) pairs rerun through the live teacher at every start
FACTS = ("parameters", "val_correct", "val_samples")
"""What a cache says of its teacher."""
SUM = "sha256"
"""In a file's metadata: what its content is known by."""


@dataclass(frozen=True)
class CacheProgress:
    """`done` of `rows` rows are in the cache: views, or epochs."""

    done: int
    rows: int
    per: Literal["view", "epoch"]


@dataclass(frozen=True)
class Cache:
    """An opened cache."""

    file: Path
    sha256: str
    """Of its logits."""
    soft: TeacherLogits
    facts: Mapping[str, int]
    """What it says of its teacher: parameters, val_correct, val_samples."""


def cached(
    module: nn.Module,
    sha256: str,
    data: Data,
    splits: Splits,
    folder: Path,
    training: Training | None,
    validation: Split | None = None,
    whole: bool = False,
) -> Generator[CacheProgress, None, Cache]:
    """A teacher's logits out of `folder`, or filled in now. `sha256` is that of its weights.

    Given the one `training` that all students share in seed and epochs, the cache may hold its
    draws only. With `whole` it holds each view of all images, validation included, for trainings on
    any fold. `validation` is what the teacher is measured on, where that is not what these splits
    hold out. Raises TeacherError.
    """
    images = splits.whole if whole else splits.train
    own = splits.validation if validation is None else validation
    rows = _rows(data, images, None if whole else training)
    file = _file(folder, sha256, data, rows, (images, own), whole)
    if not file.exists():
        yield from _fill(module, images, own, rows, file)
    logits, facts = _open(file)
    logits_sha256 = weights_hash({"logits": logits})
    _check_sum(file, logits_sha256, facts)
    _spot_check(module, images, rows, logits, file)
    if SUM not in facts:  # a former version's: from now on it is known by what it holds
        _store(file, logits, facts)
    columns = splits.kept if whole else None
    soft = TeacherLogits(logits.to(images.labels.device), rows.per, columns)
    return Cache(file, logits_sha256, soft, {name: int(facts[name]) for name in FACTS})


def passes_left(
    sha256: str | None,
    data: Data,
    splits: Splits,
    folder: Path,
    training: Training | None,
    validation: Split | None = None,
    whole: bool = False,
) -> int:
    """How many images go through the teacher until `cached` has its logits: 0 where `folder` has
    them. `sha256` None: the teacher is not trained yet.
    """
    images = splits.whole if whole else splits.train
    own = splits.validation if validation is None else validation
    rows = _rows(data, images, None if whole else training)
    there = sha256 and _file(folder, sha256, data, rows, (images, own), whole).exists()
    return 0 if there else rows.count * len(images) + len(own)


def mapped(file: Path, sha256: str) -> Tensor:
    """A cache's logits, mapped into memory. Raises TeacherError where they are not those of this
    SHA-256.
    """
    logits, _ = _open(file)
    if (found := weights_hash({"logits": logits})) != sha256:
        raise _damaged(file, found, sha256)
    return logits


@dataclass(frozen=True)
class _Rows:
    """What each row of a cache holds: all samples in one view; or, of one training, as they are
    drawn in one epoch.
    """

    views: Int64[Tensor, "views 3"]
    samples: int
    image_size: tuple[int, int]
    count: int
    drawn_by: Training | None = None

    @property
    def per(self) -> Literal["view", "epoch"]:
        return "epoch" if self.drawn_by else "view"

    def chosen(
        self, row: int
    ) -> tuple[Int64[Tensor, "samples 3"], Int64[Tensor, "samples 4"] | None]:
        """Every sample's view in a row, and what is erased of it."""
        if self.drawn_by is None:
            return self.views[row].expand(self.samples, 3), None
        views = self.views[draw(self.drawn_by.seed, row + 1, self.samples, len(self.views))[1]]
        return views, draw_erased(self.drawn_by, row + 1, self.samples, self.image_size)


def _rows(data: Data, images: Split, training: Training | None) -> _Rows:
    """Whichever rows are fewer: one for each view, or one for each epoch of the training; with
    erasing, epochs only.
    """
    at, samples, size = views(data.augment), len(images), images.image_size
    epochs = epochs_of(training, samples) if training else len(at)
    if training is None or (epochs >= len(at) and not training.random_erasing):
        return _Rows(at, samples, size, len(at))
    return _Rows(at, samples, size, epochs, training)


def _fill(
    module: nn.Module, images: Split, validation: Split, rows: _Rows, cache: Path
) -> Generator[CacheProgress, None, None]:
    filled = []
    for row in range(rows.count):
        logits = logits_of(module, images, *rows.chosen(row))
        half = logits.to(torch.float16).cpu()
        if not torch.isfinite(half).all():
            raise TeacherError(
                "teacher: its logits hold NaN, infinity or values beyond half precision (65,504); "
                "check its weights and that data.mean and data.std are those it was trained with"
            )
        filled.append(half)
        yield CacheProgress(row + 1, rows.count, rows.per)
    own = evaluate(module, validation)
    found = measure(module, images).parameters, own.correct, own.samples
    facts = dict(zip(FACTS, map(str, found), strict=True))
    _store(cache, torch.stack(filled), facts)


def _store(cache: Path, logits: Tensor, facts: Mapping[str, str]) -> None:
    known = {**facts, SUM: _sum(weights_hash({"logits": logits}), facts)}
    # written by us: a full disk is then an OSError
    content = save({"logits": logits}, metadata=known)
    write_atomically(cache, lambda path: path.write_bytes(content))


def _sum(logits_sha256: str, facts: Mapping[str, str]) -> str:
    """What a cache is known by: its logits, and what is said of their teacher."""
    return digest(
        logits_sha256, *(f"{name} {facts[name]}" for name in sorted(facts) if name != SUM)
    )


def _check_sum(cache: Path, logits_sha256: str, facts: Mapping[str, str]) -> None:
    recorded = facts.get(SUM)
    if recorded and (found := _sum(logits_sha256, facts)) != recorded:
        raise _damaged(cache, found, recorded)


def _damaged(cache: Path, found: str, recorded: str) -> TeacherError:
    return TeacherError(
        f"{cache}: not the logits that were written (SHA-256 {found[:16]}…, recorded"
        f" {recorded[:16]}…); delete it, it will be made again"
    )


def _open(cache: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        with safe_open(cache, framework="pt") as file:
            logits, facts = file.get_tensor("logits"), file.metadata() or {}
            if missing := [name for name in FACTS if not facts.get(name, "").isdigit()]:
                raise SafetensorError(f"it does not say {missing[0]}")
            return logits, facts
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"{cache}: damaged logits cache ({error}); delete it, it will be made again"
        ) from None


@torch.no_grad()
def _spot_check(module: nn.Module, split: Split, rows: _Rows, logits: Tensor, cache: Path) -> None:
    generator = torch.Generator()
    generator.seed()  # other pairs at every start
    sample = torch.randint(len(split), (SPOT_CHECKS,), generator=generator)
    row = torch.randint(rows.count, (SPOT_CHECKS,), generator=generator)
    device, live = split.labels.device, torch.empty(SPOT_CHECKS, logits.shape[-1])
    for number in row.unique().tolist():
        at = row == number
        drawn = [
            None if part is None else part[sample[at]].to(device) for part in rows.chosen(number)
        ]
        live[at] = module(pixels(split, sample[at].to(device), *drawn)).float().cpu()
    cached = logits[row, sample].float()
    if live.shape != cached.shape or not torch.allclose(live, cached, rtol=4e-3, atol=2e-2):
        raise TeacherError(
            f"{cache}: disagrees with the live teacher on {SPOT_CHECKS} random samples; delete it,"
            " it will be made again"
        )


def _file(
    folder: Path, sha256: str, data: Data, rows: _Rows, known: tuple[Split, Split], whole: bool
) -> Path:
    """Where a teacher's logits are kept; `known`: its images, and what it is measured on."""
    images, own = (split.fingerprint for split in known)
    key = _cache_key(sha256, data, rows, (images, own), whole)
    return folder / f"logits-{key[:16]}.safetensors"


def _cache_key(sha256: str, data: Data, rows: _Rows, known: tuple[str, str], whole: bool) -> str:
    """What a cache is found by; `known`: what its images and the teacher's validation set are known
    by.
    """
    how = data.model_dump_json(include={"channels", "mean", "std", "augment"})
    by = rows.drawn_by
    drawn = [f"seed {by.seed}, epochs 1 to {rows.count}"] if by else []
    drawn += [f"random erasing {by.random_erasing}"] if by and by.random_erasing else []
    drawn += ["all images"] if whole else []
    return digest(sha256, how, *drawn, *known)


def fingerprints(splits: Splits) -> tuple[str, str]:
    """What training and validation set are known by."""
    return splits.train.fingerprint, splits.validation.fingerprint


def digest(*parts: str) -> str:
    """SHA-256 of lines."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
