"""What came of a training: made once, told to Optuna, shown, selected by."""

from __future__ import annotations

from dataclasses import dataclass

from kdexp.distill.checkpoints import State
from kdexp.distill.models import Size
from kdexp.intervals import wilson_interval
from kdexp.runs.tracking import RunRecord
from kdexp.selection import Candidate

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a training ended, what it trained, and how good that is on validation."""

    run_id: str
    state: State
    size: Size
    val_accuracy: float
    val_samples: int
    """Images that the accuracy was measured on; 0 where an early version did not record it."""
    kept_epoch: int
    """The epoch whose weights are kept, from 1; 0 where none are."""
    epochs: int
    """So many were trained."""

    @classmethod
    def recorded(cls, run: RunRecord) -> Outcome:
        """As a finished run holds it."""
        metrics = run.metrics
        return cls(
            run.run_id,
            run.tags["kdexp.state"],  # type: ignore[arg-type]
            Size.recorded(metrics),
            metrics["val_accuracy"],
            int(metrics.get("val_samples", 0)),
            int(metrics.get("kept_epoch", 0)),
            int(metrics.get("epochs_trained", 0)),
        )

    def candidate(self, trial: int) -> Candidate:
        """As the selector sees it, without repeats."""
        return Candidate(
            run_id=self.run_id,
            trial=trial,
            parameters=self.size.parameters,
            multiply_adds=self.size.multiply_adds,
            bytes=self.size.bytes,
            val_accuracy=self.val_accuracy,
            val_samples=self.val_samples or None,
            activation_bytes=self.size.activation_bytes,
        )

    @property
    def val_interval(self) -> tuple[float, float]:
        """The 95 % interval of its accuracy (Wilson)."""
        correct = round(self.val_accuracy * self.val_samples)
        return wilson_interval(correct, self.val_samples)
