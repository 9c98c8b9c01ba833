"""Where to run it: stores, servers, data folder, device, threads. Never part of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "without_credentials"]


@dataclass(frozen=True)
class Settings:
    """One resolved place to run. URLs default to embedded SQLite stores under `stores`."""

    stores: Path = Path("mlruns")
    storage: str | None = None
    tracking_uri: str | None = None
    data_dir: Path | None = None
    device: str = "auto"
    threads: int | None = None

    @property
    def storage_url(self) -> str:
        """Optuna's storage. The timeout lets writers of several processes wait for each other."""
        return self.storage or f"sqlite:///{self.stores.resolve() / 'optuna.db'}?timeout=60"

    @property
    def tracking_url(self) -> str:
        """MLflow's tracking store."""
        return self.tracking_uri or f"sqlite:///{self.stores.resolve() / 'mlflow.db'}?timeout=60"

    @property
    def teachers(self) -> Path:
        """Trained teachers and their cached logits, by content."""
        return self.stores / "teachers"


def without_credentials(text: str) -> str:
    """`text` with the secrets of every URL in it masked: postgresql://me:***@host/db, http://***@host, ?password=***."""
    text = re.sub(r"://([^/\s:@?]*):[^\s@]*@", r"://\1:***@", text)
    text = re.sub(r"://([^/\s:@?]+)@", r"://***@", text)
    return re.sub(r"(?i)([?&](?:password|token|sslpassword)=)[^&\s'\"]*", r"\1***", text)
