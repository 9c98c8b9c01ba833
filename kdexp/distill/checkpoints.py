"""Checkpoints of trainings under way: what each goes on from, and what it has measured so far.

One file for each training, replaced after its epochs, and the one before it. A file begins with the
SHA-256 of the rest: one that is torn or damaged is not used, the one before it is. Nothing is sent
to MLflow before it is in a checkpoint, with its time stamp: what is sent again after a crash is
then the same, and stored once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdexp.distill.train import Snapshot
from kdexp.files import write_atomically

__all__ = ["CHECKPOINT_SECONDS", "Checkpoint", "Checkpoints", "Kept", "State"]

State = Literal["running", "complete", "pruned", "diverged"]
"""Where a training stands, or how it ended."""

CHECKPOINT_SECONDS = 1.0
"""Where epochs are shorter, not each of them is kept: so much training may be lost."""
DIGEST = hashlib.sha256().digest_size


class Kept(NamedTuple):
    """The epoch whose weights are to be kept so far."""

    epoch: int
    val_correct: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A trial's training after an epoch."""

    run_id: str
    environment: Mapping[str, str]
    """What its last bits depend on: elsewhere it does not go on, it begins again."""
    state: State
    bad_step: int | None
    history: Sequence[Mapping[str, int | float]]
    """What each epoch measured, and when."""
    kept: Kept | None
    snapshot: Snapshot

    def to_bytes(self) -> bytes:
        """The file's content."""
        kept = self.kept
        record = {
            "run_id": self.run_id,
            "environment": dict(self.environment),
            "state": self.state,
            "bad_step": self.bad_step,
            "history": [dict(row) for row in self.history],
            "kept": [kept.epoch, kept.val_correct] if kept else None,
            "epoch": self.snapshot.epoch,
            "best": self.snapshot.best,
        }
        text = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8).copy()
        tensors = {f"snapshot/{name}": tensor for name, tensor in self.snapshot.tensors.items()}
        tensors |= {
            f"kept/{name}": tensor for name, tensor in (kept.weights if kept else {}).items()
        }
        # Cloned: one tensor may be kept and gone on from, and safetensors stores no memory twice.
        body = save(
            {
                "record": torch.from_numpy(text),
                **{name: tensor.clone() for name, tensor in tensors.items()},
            }
        )
        return hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, content: bytes) -> Checkpoint:
        """Raises ValueError where the content is not whole, or of another version."""
        digest, body = content[:DIGEST], content[DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("damaged checkpoint")
        tensors = load(body)
        record: dict[str, Any] = json.loads(tensors.pop("record").numpy().tobytes())
        kept = record["kept"]
        return cls(
            run_id=record["run_id"],
            environment=record["environment"],
            state=record["state"],
            bad_step=record["bad_step"],
            history=record["history"],
            kept=Kept(kept[0], kept[1], _part("kept/", tensors)) if kept else None,
            snapshot=Snapshot(record["epoch"], record["best"], _part("snapshot/", tensors)),
        )


class Checkpoints:
    """The checkpoints of one study, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        """Replace a training's checkpoint; the former one stays beside it."""
        content, path = checkpoint.to_bytes(), self._path(name)

        def write(temporary: Path) -> None:
            temporary.write_bytes(content)
            if path.exists():
                path.replace(self._former(name))

        write_atomically(path, write)

    def load(self, name: str) -> Checkpoint | None:
        """A training's last whole checkpoint; None where there is none."""
        for path in (self._path(name), self._former(name)):
            try:
                return Checkpoint.from_bytes(path.read_bytes())
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                # not there, or damaged: the one before it
                continue
        return None

    def remove(self, name: str) -> None:
        """A training has ended."""
        self._path(name).unlink(missing_ok=True)
        self._former(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """The study has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.checkpoint"

    def _former(self, name: str) -> Path:
        return self.folder / f"{name}.former"


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
