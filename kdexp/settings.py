"""Where to run it: stores, servers, data folder, device, threads, workers. Never part of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kdexp import KdexpError
from kdexp.surroundings import out_of_memory

__all__ = ["Settings", "first_line", "in_one_line", "without_credentials"]


@dataclass(frozen=True)
class Settings:
    """One resolved place to run. URLs default to embedded SQLite stores under `stores`."""

    stores: Path = Path("mlruns")
    storage: str | None = None
    tracking_uri: str | None = None
    data_dir: Path | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int | None = 1
    """Processes that train side by side; None: as many as this machine has cores and memory for."""
    pack: int | None = None
    """Trials that a process trains as one batch; None: as many as measure best on the device (on a CPU, one)."""

    @property
    def storage_url(self) -> str:
        """Optuna's storage. The timeout lets writers of several processes wait for each other."""
        return self.storage or f"sqlite:///{self.stores.resolve() / 'optuna.db'}?timeout=60"

    @property
    def tracking_url(self) -> str:
        """MLflow's tracking store."""
        return self.tracking_uri or f"sqlite:///{self.stores.resolve() / 'mlflow.db'}?timeout=60"

    @property
    def tracking_shown(self) -> str:
        """The same for messages: relative where --stores is, without secrets."""
        return without_credentials(self.tracking_uri or f"sqlite:///{self.stores / 'mlflow.db'}")

    @property
    def teachers(self) -> Path:
        """Trained teachers and their cached logits, by content."""
        return self.stores / "teachers"


def in_one_line(error: Exception) -> str:
    """Any failure as one line, without secrets: our own as it is, the system's with its file, others by their kind."""
    if isinstance(error, KdexpError):
        line = str(error)
    elif out_of_memory(error):
        line = (
            f"No memory is left ({first_line(error)}): give fewer --workers, a smaller --pack or batch_size, or raise the "
            f"limit (ulimit -v)"
        )
    elif isinstance(error, OSError):
        line = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
    else:
        line = f"Unexpected {type(error).__name__}: {first_line(error)} (--debug shows where; please report it)"
    return without_credentials(line)


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of what it explains."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def without_credentials(text: str) -> str:
    """`text` with the secrets of every URL in it masked: postgresql://me:***@host/db, http://***@host, ?password=***."""
    text = re.sub(r"://([^/\s:@?]*):[^\s@]*@", r"://\1:***@", text)
    text = re.sub(r"://([^/\s:@?]+)@", r"://***@", text)
    return re.sub(r"(?i)([?&](?:password|token|sslpassword)=)[^&\s'\"]*", r"\1***", text)
