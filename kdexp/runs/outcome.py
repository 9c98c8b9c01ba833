"""What came of a training: made once, told to Optuna, shown, selected by."""

from __future__ import annotations

from dataclasses import dataclass

from kdexp.distill.checkpoints import State
from kdexp.distill.models import Size
from kdexp.intervals import wilson_interval
from kdexp.runs.tracking import RunRecord

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
        live = metrics.get("activation_bytes")
        size = Size(
            int(metrics["parameters"]),
            int(metrics["multiply_adds"]),
            int(metrics["model_bytes"]),
            None if live is None else int(live),
        )
        return cls(
            run.run_id,
            run.tags["kdexp.state"],  # type: ignore[arg-type]
            size,
            metrics["val_accuracy"],
            int(metrics.get("val_samples", 0)),
            int(metrics.get("kept_epoch", 0)),
            int(metrics.get("epochs_trained", 0)),
        )

    @property
    def val_interval(self) -> tuple[float, float]:
        """The 95 % interval of its accuracy (Wilson)."""
        correct = round(self.val_accuracy * self.val_samples)
        return wilson_interval(correct, self.val_samples)
