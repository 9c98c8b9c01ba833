"""Where to run it: stores, servers, data folder, device, threads, workers. Never part of a
recipe.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from kdexp import KdexpError
from kdexp.surroundings import out_of_memory
from kdexp.urls import (
    one_database,
    remember_secrets,
    sqlite_file,
    sqlite_url,
    storage_url,
    tracking_url,
    without_credentials,
)

__all__ = ["Settings", "checked", "deaf", "first_line", "in_one_line", "without_credentials"]

KEPT = re.compile(
    # who we are
    r"MLFLOW_(TRACKING_(USERNAME|PASSWORD|TOKEN|INSECURE_TLS|SERVER_CERT_PATH|CLIENT_CERT_PATH|AUTH|AWS_SIGV4)"
    # how a server is reached
    r"|(S3|GCS|BOTO|KERBEROS|HTTP|SQLALCHEMYSTORE|MYSQL)_\w+|ENABLE_MULTIPART_UPLOAD|WORKSPACE"
    # what kdexp sets itself
    r"|DISABLE_TELEMETRY|ENABLE_ARTIFACTS_PROGRESS_BAR|SUPPRESS_PRINTING_URL_TO_STDOUT)"
)
"""MLflow's variables that say how the server is reached that kdexp was told to use. Every other one
is for something else.
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("kdexp")


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
    """Trials that a process trains as one batch; None: as many as measure best on the device (on a
    CPU, one).
    """

    @property
    def storage_url(self) -> str:
        """Optuna's storage. The timeout lets writers of several processes wait for each other."""
        return self.storage or f"{sqlite_url(self.stores.resolve() / 'optuna.db')}?timeout=60"

    @property
    def tracking_url(self) -> str:
        """MLflow's tracking store."""
        return self.tracking_uri or f"{sqlite_url(self.stores.resolve() / 'mlflow.db')}?timeout=60"

    @property
    def tracking_shown(self) -> str:
        """The same as people paste it, from any folder, without secrets."""
        return without_credentials(
            self.tracking_uri or sqlite_url(self.stores.resolve() / "mlflow.db")
        )

    @property
    def teachers(self) -> Path:
        """Trained teachers and their cached logits, by content."""
        return self.stores / "teachers"


def checked(settings: Settings) -> Settings:
    """The same with URLs as the libraries take them. Raises KdexpError where they cannot be
    meant.
    """
    tracking, storage = settings.tracking_uri or None, settings.storage or None
    remember_secrets(*filter(None, (tracking, storage)))
    tracking, storage = tracking and tracking_url(tracking), storage and storage_url(storage)
    remember_secrets(*filter(None, (tracking, storage)))
    file = sqlite_file(tracking) if tracking else None
    if file and file.resolve() == settings.stores.resolve() / "mlflow.db":
        tracking = None  # the embedded store by its address
    settings = replace(settings, tracking_uri=tracking, storage=storage)
    if one_database(settings.tracking_url, settings.storage_url):
        raise KdexpError(
            "--storage and --tracking-uri name one database"
            f" ({without_credentials(settings.storage_url)}): Optuna and MLflow each keep their"
            " tables' version in a table of the same name. Give each a database of its own."
        )
    return settings


def deaf(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take MLflow's variables that are meant for something else out of this process's environment,
    and say so once.

    A rule, not a list: what MLflow will read next year is ignored as well. Nor does loopback go
    through a proxy.
    """
    ignored = sorted(
        name for name in environment if re.match("_?MLFLOW_", name) and not KEPT.fullmatch(name)
    )
    for name in ignored:
        del environment[name]
    if ignored:
        log.warning("Ignored, as set for another use of MLflow: %s", ", ".join(ignored))
    hosts = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if hosts.strip() != "*":
        wanted = ",".join(
            dict.fromkeys([*filter(None, map(str.strip, hosts.split(","))), *LOOPBACK])
        )
        environment["no_proxy"] = environment["NO_PROXY"] = wanted


def in_one_line(error: Exception) -> str:
    """Any failure as one line, without secrets: our own as it is, the system's with its file,
    others by their kind.
    """
    if isinstance(error, KdexpError):
        line = str(error)
    elif out_of_memory(error):
        line = (
            f"No memory is left ({first_line(error)}): give fewer --workers, a smaller --pack or"
            " batch_size, or raise the limit (ulimit -v)"
        )
    elif isinstance(error, OSError):
        line = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
    else:
        line = (
            f"Unexpected {type(error).__name__}: {first_line(error)} (--debug shows where; please"
            " report it)"
        )
    return without_credentials(line)


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of what it explains."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
