"""What every command works with, as one handle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdexp.runs.tracking import Tracking
from kdexp.settings import Settings

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """Settings, the MLflow store, the device, and the experiment that runs go into."""

    settings: Settings
    tracking: Tracking
    device: torch.device
    experiment_id: str = ""
