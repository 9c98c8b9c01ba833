"""The teacher: trained once, or read from a checkpoint; alone, or several as one."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdexp import __version__
from kdexp.config import Data, Distillation, Teacher, Training, identity
from kdexp.distill.checkpoints import CHECKPOINT_SECONDS, Checkpoint, Checkpoints, Kept
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.evaluate import wilson_interval
from kdexp.distill.execution import choose
from kdexp.distill.guard import check_network, stored_correct
from kdexp.distill.logits import (
    SUM,
    CacheProgress,
    cached,
    digest,
    fingerprints,
    mapped,
    passes_left,
)
from kdexp.distill.models import build, layout_of, outline, weights_hash
from kdexp.distill.packs import Lane, fresh
from kdexp.distill.train import EpochReport, TeacherLogits, epochs_of, train
from kdexp.distill.weights import Found, TeacherError, find_weights, read_weights
from kdexp.files import write_atomically
from kdexp.surroundings import expanded

__all__ = [
    "CachedTeacher",
    "Ensemble",
    "Missing",
    "TeacherError",
    "WeightsRead",
    "lane_of",
    "last_epoch",
    "missing",
    "network_of",
    "prepare_teacher",
    "read_weights",
]

WEIGHTS, HISTORY = "weights.safetensors", "history.json"


class Ensemble(nn.Module):
    """Several networks as one: the mean of their raw logits."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch."""
        return torch.stack([member(images) for member in self.members]).mean(0)


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
    start_sha256: str | None = None
    """Of the weights that its training began from; None: they were drawn."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickled for another process without the logits: there they are mapped from the same
        file.
        """
        small = {name: value for name, value in vars(self).items() if name != "soft"}
        soft = self.soft
        return small | {"device": soft.logits.device, "per": soft.per, "columns": soft.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, per, columns = (state.pop(name) for name in ("device", "per", "columns"))
        logits = mapped(state["cache"], state["logits_sha256"])
        vars(self).update(state, soft=TeacherLogits(logits.to(device), per, columns))

    @property
    def of_all_images(self) -> bool:
        """Whether its logits are those of validation images too: they serve every fold."""
        return self.soft.columns is not None

    def on(self, kept: Int64[Tensor, " training"]) -> CachedTeacher:
        """The same for a training on the images at these places of the whole training set; it must
        be `of_all_images`.
        """
        if not self.of_all_images:
            raise ValueError(
                "a cache of one fold's training images serves no other fold: prepare it whole"
            )
        return replace(self, soft=replace(self.soft, columns=kept))

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
    whole: bool = False,
) -> Generator[EpochReport | CacheProgress | WeightsRead, None, CachedTeacher]:
    """The teacher of a recipe with its logits, out of `folder` or made now; yields progress while
    it makes them.

    It holds out what its students do; where it is shared, fold 0, whatever they hold out. It is
    measured on that. Its training may begin from a checkpoint's weights (`teacher.start`).
    `weights` overrides the recipe's checkpoint (reproduction takes it from the run's record). Given
    the one `training` that all students share in seed and epochs, the cache may hold its draws
    only; with `whole` it serves trainings on every fold. Raises TeacherError.
    """
    module = network_of(teacher, splits.train)
    given = weights or (expanded(teacher.weights) if teacher.weights else None)
    held = teacher.data(data)
    own = splits if data == held else splits.cut_by(held)
    start = None
    if given is None:
        start = _start(teacher, splits.train)
        home = yield from _trained(teacher, held, own, folder, start)
        module.load_state_dict(_own_weights(home, module))
    else:
        found = find_weights(given, module)
        module.load_state_dict(found.state)
        home = _stored(module, folder)
        if weights is None:
            yield WeightsRead(found.said)
    module.to(splits.train.labels.device, memory_format=layout_of(module)).eval()  # type: ignore[call-overload]
    sha256 = weights_hash(module.state_dict())
    with FileLock(home / "lock"):  # N processes that start together fill it once
        cache = yield from cached(
            module, sha256, data, splits, folder, training, own.validation, whole
        )
    history = (
        tuple(json.loads((home / HISTORY).read_text("utf-8"))) if (home / HISTORY).exists() else ()
    )
    return CachedTeacher(
        sha256=sha256,
        logits_sha256=cache.sha256,
        soft=cache.soft,
        **cache.facts,
        weights=home / WEIGHTS,
        history=history,
        cache=cache.file,
        start_sha256=weights_hash(start.state) if start else None,
    )


def network_of(teacher: Teacher, like: Split) -> nn.Module:
    """The teacher's network; of several members one that holds them all."""
    if teacher.members == 1:
        return build(teacher, like)
    return Ensemble([build(teacher, like) for _ in range(teacher.members)])


def _start(teacher: Teacher, like: Split) -> Found | None:
    """The weights that the training of each member begins from, of the checkpoint that the recipe
    names; a head for other classes is drawn from its seed. Raises TeacherError.
    """
    if teacher.start is None:
        return None
    module = fresh(lane_of(teacher), like)
    wider = outline(teacher, replace(like, classes=(*like.classes, "one more"))).state_dict()
    head = {name for name, own in module.state_dict().items() if own.shape != wider[name].shape}
    return find_weights(expanded(teacher.start), module, head)


def _trained(
    teacher: Teacher, data: Data, splits: Splits, folder: Path, start: Found | None
) -> Generator[EpochReport | WeightsRead, None, Path]:
    """The home of a recipe's weights and history; trained now where they are not there."""
    home = _home(teacher, data, splits, folder, start)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):  # N processes that start together train it once
        if not (home / WEIGHTS).exists() and teacher.members == 1:
            check_network(teacher, splits.train)
            if start:
                yield WeightsRead(start.said)
            yield from _train(teacher, data, splits, home, start)
        elif not (home / WEIGHTS).exists():
            homes = []
            # each at home where it would be alone: more members train only the new
            for alone in _members(teacher):
                own = _start(alone, splits.train)
                homes.append((yield from _trained(alone, data, splits, folder, own)))
            _unite(homes, Ensemble([build(teacher, splits.train) for _ in homes]), home)
    return home


@dataclass(frozen=True)
class Missing:
    """What is to be done until a teacher is ready."""

    trainings: int
    """Of its networks."""
    passes: int
    """Images that go through it for its logits."""


def missing(
    teacher: Teacher,
    data: Data,
    splits: Splits,
    folder: Path,
    training: Training | None = None,
    whole: bool = False,
) -> Missing:
    """What `prepare_teacher` would have to do with the same arguments. Nothing is written. Raises
    TeacherError.
    """
    module, held = network_of(teacher, splits.train), teacher.data(data)
    own = splits if data == held else splits.cut_by(held)
    home = _home(teacher, held, own, folder, _start(teacher, splits.train))
    trainings, sha256 = 0, None
    if teacher.weights:
        module.load_state_dict(find_weights(expanded(teacher.weights), module).state)
        sha256 = weights_hash(module.state_dict())
    elif (home / WEIGHTS).exists():
        sha256 = weights_hash(_own_weights(home, module))
    else:
        homes = [
            _home(alone, held, own, folder, _start(alone, splits.train))
            for alone in _members(teacher)
        ]
        trainings = sum(not (home / WEIGHTS).exists() for home in homes)
    left = passes_left(sha256, data, splits, folder, training, own.validation, whole)
    return Missing(trainings, left)


def _home(teacher: Teacher, data: Data, splits: Splits, folder: Path, start: Found | None) -> Path:
    """Where a teacher of these images is kept. The weights that it began from count, not where they
    were read.
    """
    recipe = identity(teacher.model_copy(update={"start": None}))
    begun = [f"start {weights_hash(start.state)}"] if start else []
    return folder / digest(recipe, identity(data), *fingerprints(splits), *begun)[:16]


def _members(teacher: Teacher) -> list[Teacher]:
    """Each network of an ensemble as it is trained alone."""
    if teacher.members == 1:
        return [teacher]
    numbers = range(teacher.members)
    return [teacher.model_copy(update={"members": 1, "seed": teacher.seed + n}) for n in numbers]


def _unite(homes: Sequence[Path], ensemble: Ensemble, home: Path) -> None:
    """The weights of all members in one file; their mean history."""
    for member, own in zip(ensemble.members, homes, strict=True):
        member.load_state_dict(_own_weights(own, member))
    epochs = zip(*(json.loads((own / HISTORY).read_text("utf-8")) for own in homes), strict=True)
    _write(
        home,
        ensemble.state_dict(),
        [{name: fmean(row[name] for row in rows) for name in rows[0]} for rows in epochs],
    )


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
        return weights_hash(read_weights(home / WEIGHTS, module)) == weights_hash(
            module.state_dict()
        )
    except TeacherError:  # none, or a damaged file
        return False


def _train(
    teacher: Teacher, data: Data, splits: Splits, home: Path, start: Found | None
) -> Generator[EpochReport, None, None]:
    last = last_epoch(teacher, len(splits.train))
    lane, checkpoints = lane_of(teacher), Checkpoints(home)
    lane = replace(lane, start=start.state) if start else lane
    how = choose([lane], splits.train)
    begun = checkpoints.load("teacher")
    made_by = {"kdexp": __version__, "torch": torch.__version__, **how.record(0)}
    begun = begun if begun and begun.environment == made_by else None
    kept, history = (begun.kept, list(begun.history)) if begun else (None, [])
    saved = time.monotonic()
    reports = train([lane], splits, data, how=how, resumed=[begun.snapshot if begun else None])
    for (report,) in islice(reports, last - (begun.snapshot.epoch if begun else 0)):
        assert report is not None
        assert report.snapshot is not None
        if not report.finite:
            raise TeacherError(
                f"teacher: its training diverged in epoch {report.epoch} (loss {report.loss},"
                f" learning rate {report.learning_rate:.3g}); lower teacher.learning_rate"
            )
        kept = Kept(report.epoch, report.val_correct, report.weights) if report.weights else kept
        history.append(
            {
                name: getattr(report, name)
                for name in (
                    "epoch",
                    "loss",
                    "val_accuracy",
                    "val_loss",
                    "learning_rate",
                    "seconds",
                )
            }
        )
        if time.monotonic() - saved >= CHECKPOINT_SECONDS or report.epoch == last:
            checkpoints.save(
                "teacher",
                Checkpoint("", made_by, "complete", None, history, kept, report.snapshot()),
            )
            saved = time.monotonic()
        yield replace(report, epochs=last)
    assert kept is not None
    stored_correct(teacher, kept.weights, kept.val_correct, splits.validation)
    _write(home, kept.weights, history)
    checkpoints.remove("teacher")


def lane_of(teacher: Teacher) -> Lane:
    """How one network of a teacher is trained."""
    recipe = teacher.model_copy(update={"keep": "last"}) if teacher.epoch else teacher
    return Lane(recipe, recipe, Distillation(alpha=0.0))


def last_epoch(teacher: Teacher, samples: int) -> int:
    """The epoch after which its training ends. Raises TeacherError."""
    epochs = epochs_of(teacher, samples)
    if teacher.epoch and teacher.epoch > epochs:
        raise TeacherError(
            f"teacher.epoch: {teacher.epoch} is never reached, max_steps ends the training in epoch"
            f" {epochs}"
        )
    return teacher.epoch or epochs


def _write(
    home: Path,
    state: Mapping[str, Tensor],
    history: Sequence[Mapping[str, int | float]] | None = None,
) -> None:
    """The history, where there is one, and then the weights: where they are, all is."""
    if history is not None:
        write_atomically(home / HISTORY, lambda path: path.write_text(json.dumps(history), "utf-8"))
    content = save(
        {name: value.contiguous() for name, value in state.items()},
        metadata={SUM: weights_hash(state)},
    )
    write_atomically(home / WEIGHTS, lambda path: path.write_bytes(content))


def _own_weights(home: Path, module: nn.Module) -> dict[str, Tensor]:
    """The weights that kdexp keeps in a home, which know their SHA-256 (a former version's did
    not). Raises TeacherError.
    """
    state = read_weights(home / WEIGHTS, module)
    with safe_open(home / WEIGHTS, framework="pt") as file:
        recorded = (file.metadata() or {}).get(SUM)
    if recorded and (found := weights_hash(state)) != recorded:
        raise TeacherError(
            f"{home / WEIGHTS}: not the weights that were written (SHA-256 {found[:16]}…, recorded"
            f" {recorded[:16]}…); delete {home}, the teacher is then trained again"
        )
    return state
