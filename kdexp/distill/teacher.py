"""The teacher: trained once, or read from a checkpoint; alone or several as one; and its logits cache.

The cache holds raw logits in half precision for every (view, training sample), so that one file serves every
temperature and every loss on logits. Where a training has fewer epochs than there are views, it holds just what
that training will draw: one row for each epoch of its seed (50 views and 5 epochs: a tenth of the teacher's
work). It is keyed by the SHA-256 of weights, data, normalisation, views and draws, written atomically,
memory-mapped, and compared each time it is opened: with its own SHA-256, and with the live teacher on some samples.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from filelock import FileLock
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdexp import __version__
from kdexp.config import Data, Distillation, Teacher, Training, identity
from kdexp.distill.checkpoints import CHECKPOINT_SECONDS, Checkpoint, Checkpoints, Kept
from kdexp.distill.data import Split, Splits, pixels, views
from kdexp.distill.evaluate import evaluate, logits_of, wilson_interval
from kdexp.distill.execution import choose
from kdexp.distill.guard import check_network, stored_correct
from kdexp.distill.models import build, layout_of, measure, weights_hash
from kdexp.distill.packs import Lane
from kdexp.distill.train import EpochReport, TeacherLogits, draw, draw_erased, epochs_of, train
from kdexp.distill.weights import TeacherError, find_weights, read_weights
from kdexp.files import write_atomically
from kdexp.surroundings import expanded

__all__ = [
    "CacheProgress",
    "CachedTeacher",
    "Ensemble",
    "TeacherError",
    "WeightsRead",
    "prepare_teacher",
    "read_weights",
]

SPOT_CHECKS = 256  # random (view, sample) pairs rerun through the live teacher at every start
WEIGHTS, HISTORY = "weights.safetensors", "history.json"
FACTS = ("parameters", "val_correct", "val_samples")
"""What a cache says of its teacher."""
SUM = "sha256"
"""In a file's metadata: what its content is known by."""


class Ensemble(nn.Module):
    """Several networks as one: the mean of their raw logits."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch."""
        return torch.stack([member(images) for member in self.members]).mean(0)


@dataclass(frozen=True)
class CacheProgress:
    """`done` of `rows` rows are in the cache: views, or epochs."""

    done: int
    rows: int
    per: Literal["view", "epoch"]


@dataclass(frozen=True)
class WeightsRead:
    """The checkpoint that the recipe names was read; `said`: what of it was taken."""

    said: str


@dataclass(frozen=True)
class CachedTeacher:
    """What a student needs of its teacher, and what the record needs to know of it."""

    sha256: str
    logits_sha256: str
    soft: TeacherLogits
    parameters: int
    val_correct: int
    val_samples: int
    weights: Path
    history: tuple[Mapping[str, int | float], ...]
    cache: Path

    def __getstate__(self) -> dict[str, Any]:
        """Pickled for another process without the logits: there they are mapped from the same file."""
        small = {name: value for name, value in vars(self).items() if name != "soft"}
        return small | {"device": self.soft.logits.device, "per": self.soft.per}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, per = state.pop("device"), state.pop("per")
        logits, _ = _open(state["cache"])
        if (found := weights_hash({"logits": logits})) != state["logits_sha256"]:
            raise _damaged(state["cache"], found, state["logits_sha256"])
        vars(self).update(state, soft=TeacherLogits(logits.to(device), per))

    @property
    def val_accuracy(self) -> float:
        """The teacher's own validation accuracy."""
        return self.val_correct / self.val_samples

    @property
    def val_interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return wilson_interval(self.val_correct, self.val_samples)


def prepare_teacher(
    teacher: Teacher,
    data: Data,
    splits: Splits,
    folder: Path,
    weights: Path | None = None,
    training: Training | None = None,
) -> Generator[EpochReport | CacheProgress | WeightsRead, None, CachedTeacher]:
    """The teacher of a recipe with its logits, out of `folder` or made now; yields progress while it makes them.

    `weights` overrides the recipe's checkpoint (reproduction takes it from the run's record). Given the one
    `training` that all students share in seed and epochs, the cache may hold its draws only. Raises TeacherError.
    """
    module = _built(teacher, splits.train)
    given = weights or (expanded(teacher.weights) if teacher.weights else None)
    if given is None:
        home = yield from _trained(teacher, data, splits, folder)
        module.load_state_dict(_own_weights(home, module))
    else:
        found = find_weights(given, module)
        module.load_state_dict(found.state)
        home = _stored(module, folder)
        if weights is None:
            yield WeightsRead(found.said)
    module.to(splits.train.labels.device, memory_format=layout_of(module)).eval()  # type: ignore[call-overload]
    sha256 = weights_hash(module.state_dict())
    rows = _rows(data, splits, training)
    cache = folder / f"logits-{_cache_key(sha256, data, splits, rows)[:16]}.safetensors"
    with FileLock(home / "lock"):  # N processes that start together fill it once
        if not cache.exists():
            yield from _fill(module, splits, rows, cache)
        logits, facts = _open(cache)
        logits_sha256 = weights_hash({"logits": logits})
        _check_sum(cache, logits_sha256, facts)
        _spot_check(module, splits.train, rows, logits, cache)
        if SUM not in facts:  # a former version's: from now on it is known by what it holds
            _store(cache, logits, facts)
    history = tuple(json.loads((home / HISTORY).read_text("utf-8"))) if (home / HISTORY).exists() else ()
    return CachedTeacher(
        sha256=sha256,
        logits_sha256=logits_sha256,
        soft=TeacherLogits(logits.to(splits.train.labels.device), rows.per),
        parameters=int(facts["parameters"]),
        val_correct=int(facts["val_correct"]),
        val_samples=int(facts["val_samples"]),
        weights=home / WEIGHTS,
        history=history,
        cache=cache,
    )


def _built(teacher: Teacher, like: Split) -> nn.Module:
    """The teacher's network; of several members one that holds them all."""
    if teacher.members == 1:
        return build(teacher, like)
    return Ensemble([build(teacher, like) for _ in range(teacher.members)])


def _trained(teacher: Teacher, data: Data, splits: Splits, folder: Path) -> Generator[EpochReport, None, Path]:
    """The home of a recipe's weights and history; trained now where they are not there."""
    home = folder / _digest(identity(teacher), identity(data), *_fingerprints(splits))[:16]
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):  # N processes that start together train it once
        if not (home / WEIGHTS).exists() and teacher.members == 1:
            check_network(teacher, splits.train)
            yield from _train(teacher, data, splits, home)
        elif not (home / WEIGHTS).exists():
            homes = []
            for number in range(teacher.members):  # each at home where it would be alone: more members train only the new
                alone = teacher.model_copy(update={"members": 1, "seed": teacher.seed + number})
                homes.append((yield from _trained(alone, data, splits, folder)))
            _unite(homes, Ensemble([build(teacher, splits.train) for _ in homes]), home)
    return home


def _unite(homes: Sequence[Path], ensemble: Ensemble, home: Path) -> None:
    """The weights of all members in one file; their mean history."""
    for member, own in zip(ensemble.members, homes, strict=True):
        member.load_state_dict(_own_weights(own, member))
    epochs = zip(*(json.loads((own / HISTORY).read_text("utf-8")) for own in homes), strict=True)
    _write(home, ensemble.state_dict(), [{name: fmean(row[name] for row in rows) for name in rows[0]} for rows in epochs])


def _stored(module: nn.Module, folder: Path) -> Path:
    """The home of weights that were given."""
    home = folder / f"given-{weights_hash(module.state_dict())[:16]}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        if not _holds(home, module):
            _write(home, module.state_dict())
    return home


def _holds(home: Path, module: nn.Module) -> bool:
    """Whether a home has the module's weights."""
    try:
        return weights_hash(read_weights(home / WEIGHTS, module)) == weights_hash(module.state_dict())
    except TeacherError:  # none, or a damaged file
        return False


def _train(teacher: Teacher, data: Data, splits: Splits, home: Path) -> Generator[EpochReport, None, None]:
    last = _last_epoch(teacher, len(splits.train))
    recipe = teacher.model_copy(update={"keep": "last"}) if teacher.epoch else teacher
    lane, checkpoints = Lane(recipe, recipe, Distillation(alpha=0.0)), Checkpoints(home)
    how = choose([lane], splits.train)
    begun, made_by = checkpoints.load("teacher"), {"kdexp": __version__, "torch": torch.__version__, **how.record(0)}
    begun = begun if begun and begun.environment == made_by else None
    kept, history = (begun.kept, list(begun.history)) if begun else (None, [])
    saved = time.monotonic()
    reports = train([lane], splits, data, how=how, resumed=[begun.snapshot if begun else None])
    for (report,) in islice(reports, last - (begun.snapshot.epoch if begun else 0)):
        assert report is not None
        assert report.snapshot is not None
        if not report.finite:
            raise TeacherError(
                f"teacher: its training diverged in epoch {report.epoch} (loss {report.loss}, learning rate "
                f"{report.learning_rate:.3g}); lower teacher.learning_rate"
            )
        kept = Kept(report.epoch, report.val_correct, report.weights) if report.weights else kept
        history.append(
            {name: getattr(report, name) for name in ("epoch", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds")}
        )
        if time.monotonic() - saved >= CHECKPOINT_SECONDS or report.epoch == last:
            checkpoints.save("teacher", Checkpoint("", made_by, "complete", None, history, kept, report.snapshot()))
            saved = time.monotonic()
        yield replace(report, epochs=last)
    assert kept is not None
    stored_correct(teacher, kept.weights, kept.val_correct, splits.validation)
    _write(home, kept.weights, history)
    checkpoints.remove("teacher")


def _last_epoch(teacher: Teacher, samples: int) -> int:
    epochs = epochs_of(teacher, samples)
    if teacher.epoch and teacher.epoch > epochs:
        raise TeacherError(f"teacher.epoch: {teacher.epoch} is never reached, max_steps ends the training in epoch {epochs}")
    return teacher.epoch or epochs


def _write(home: Path, state: Mapping[str, Tensor], history: Sequence[Mapping[str, int | float]] | None = None) -> None:
    """The history, where there is one, and then the weights: where they are, all is."""
    if history is not None:
        write_atomically(home / HISTORY, lambda path: path.write_text(json.dumps(history), "utf-8"))
    content = save({name: value.contiguous() for name, value in state.items()}, metadata={SUM: weights_hash(state)})
    write_atomically(home / WEIGHTS, lambda path: path.write_bytes(content))


def _own_weights(home: Path, module: nn.Module) -> dict[str, Tensor]:
    """The weights that kdexp keeps in a home, which know their SHA-256 (a former version's did not). Raises TeacherError."""
    state = read_weights(home / WEIGHTS, module)
    with safe_open(home / WEIGHTS, framework="pt") as file:
        recorded = (file.metadata() or {}).get(SUM)
    if recorded and (found := weights_hash(state)) != recorded:
        raise TeacherError(
            f"{home / WEIGHTS}: not the weights that were written (SHA-256 {found[:16]}…, recorded {recorded[:16]}…); "
            f"delete {home}, the teacher is then trained again"
        )
    return state


@dataclass(frozen=True)
class _Rows:
    """What each row of a cache holds: all samples in one view; or, of one training, as they are drawn in one epoch."""

    views: Int64[Tensor, "views 3"]
    samples: int
    image_size: tuple[int, int]
    count: int
    drawn_by: Training | None = None

    @property
    def per(self) -> Literal["view", "epoch"]:
        return "epoch" if self.drawn_by else "view"

    def chosen(self, row: int) -> tuple[Int64[Tensor, "samples 3"], Int64[Tensor, "samples 4"] | None]:
        """Every sample's view in a row, and what is erased of it."""
        if self.drawn_by is None:
            return self.views[row].expand(self.samples, 3), None
        views = self.views[draw(self.drawn_by.seed, row + 1, self.samples, len(self.views))[1]]
        return views, draw_erased(self.drawn_by, row + 1, self.samples, self.image_size)


def _rows(data: Data, splits: Splits, training: Training | None) -> _Rows:
    """Whichever rows are fewer: one for each view, or one for each epoch of the training; with erasing, epochs only."""
    at, samples, size = views(data.augment), len(splits.train), splits.train.image_size
    epochs = epochs_of(training, samples) if training else len(at)
    if training is None or (epochs >= len(at) and not training.random_erasing):
        return _Rows(at, samples, size, len(at))
    return _Rows(at, samples, size, epochs, training)


def _fill(module: nn.Module, splits: Splits, rows: _Rows, cache: Path) -> Generator[CacheProgress, None, None]:
    filled = []
    for row in range(rows.count):
        logits = logits_of(module, splits.train, *rows.chosen(row))
        half = logits.to(torch.float16).cpu()
        if not torch.isfinite(half).all():
            raise TeacherError(
                "teacher: its logits hold NaN, infinity or values beyond half precision (65,504); "
                "check its weights and that data.mean and data.std are those it was trained with"
            )
        filled.append(half)
        yield CacheProgress(row + 1, rows.count, rows.per)
    own = evaluate(module, splits.validation)
    facts = dict(zip(FACTS, map(str, (measure(module, splits.train).parameters, own.correct, own.samples)), strict=True))
    _store(cache, torch.stack(filled), facts)


def _store(cache: Path, logits: Tensor, facts: Mapping[str, str]) -> None:
    known = {**facts, SUM: _sum(weights_hash({"logits": logits}), facts)}
    content = save({"logits": logits}, metadata=known)  # written by us: a full disk is then an OSError
    write_atomically(cache, lambda path: path.write_bytes(content))


def _sum(logits_sha256: str, facts: Mapping[str, str]) -> str:
    """What a cache is known by: its logits, and what is said of their teacher."""
    return _digest(logits_sha256, *(f"{name} {facts[name]}" for name in sorted(facts) if name != SUM))


def _check_sum(cache: Path, logits_sha256: str, facts: Mapping[str, str]) -> None:
    recorded = facts.get(SUM)
    if recorded and (found := _sum(logits_sha256, facts)) != recorded:
        raise _damaged(cache, found, recorded)


def _damaged(cache: Path, found: str, recorded: str) -> TeacherError:
    return TeacherError(
        f"{cache}: not the logits that were written (SHA-256 {found[:16]}…, recorded {recorded[:16]}…); delete it, it will "
        f"be made again"
    )


def _open(cache: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        with safe_open(cache, framework="pt") as file:
            logits, facts = file.get_tensor("logits"), file.metadata() or {}
            if missing := [name for name in FACTS if not facts.get(name, "").isdigit()]:
                raise SafetensorError(f"it does not say {missing[0]}")
            return logits, facts
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"{cache}: damaged logits cache ({error}); delete it, it will be made again") from None


@torch.no_grad()
def _spot_check(module: nn.Module, split: Split, rows: _Rows, logits: Tensor, cache: Path) -> None:
    generator = torch.Generator()
    generator.seed()  # other pairs at every start
    sample = torch.randint(len(split), (SPOT_CHECKS,), generator=generator)
    row = torch.randint(rows.count, (SPOT_CHECKS,), generator=generator)
    device, live = split.labels.device, torch.empty(SPOT_CHECKS, logits.shape[-1])
    for number in row.unique().tolist():
        at = row == number
        drawn = [None if part is None else part[sample[at]].to(device) for part in rows.chosen(number)]
        live[at] = module(pixels(split, sample[at].to(device), *drawn)).float().cpu()
    cached = logits[row, sample].float()
    if live.shape != cached.shape or not torch.allclose(live, cached, rtol=4e-3, atol=2e-2):
        raise TeacherError(
            f"{cache}: disagrees with the live teacher on {SPOT_CHECKS} random samples; delete it, it will be made again"
        )


def _cache_key(sha256: str, data: Data, splits: Splits, rows: _Rows) -> str:
    how = data.model_dump_json(include={"channels", "mean", "std", "augment"})
    by = rows.drawn_by
    drawn = [f"seed {by.seed}, epochs 1 to {rows.count}"] if by else []
    drawn += [f"random erasing {by.random_erasing}"] if by and by.random_erasing else []
    return _digest(sha256, how, *drawn, *_fingerprints(splits))


def _fingerprints(splits: Splits) -> tuple[str, str]:
    return splits.train.fingerprint, splits.validation.fingerprint


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
