"""MLflow, through a client that is handed around: no global run, no global tracking URI.

One experiment per sweep name. In it: one parent run per study, one child run per trial and per
fresh seed of a confirmation, one run per teacher, and the runs of `train` and `reproduce`.
`kdexp.kind` tells them apart.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from filelock import FileLock

from kdexp import KdexpError, __version__
from kdexp.files import sha256_of, write_ahead, write_atomically
from kdexp.patience import PATIENCE, patiently, whole
from kdexp.reading import spellings, study_name
from kdexp.runs import served
from kdexp.runs.embedded import folder_for, is_local, readdressed, run_place, shown
from kdexp.runs.schema import Library, StoreError, fitting
from kdexp.settings import Settings, deaf, without_credentials
from kdexp.urls import sqlite_file, sqlite_url

# read when mlflow is imported: kdexp does not phone home
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with its password
# waiting is done here, and never in the middle of training
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
import mlflow.exceptions
import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient
from mlflow.utils.credentials import get_default_host_creds

__all__ = [
    "ARTIFACTS",
    "LONGEST",
    "MLFLOW",
    "NOTE",
    "EpochMetrics",
    "Kind",
    "RunRecord",
    "Tracking",
    "TrackingAway",
    "TrackingError",
    "TrackingGone",
    "as_param",
    "dataset",
    "too_long",
    "upgrade",
]

Kind = Literal["study", "trial", "confirmation", "train", "teacher", "reproduction"]
P = ParamSpec("P")
R = TypeVar("R")
RACES = 5
CONNECT_SECONDS = 10.0  # that a server may be busy at the start
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
OVERLOADED = ("database is locked", "QueuePool limit", "too many clients", "connection slots")
"""What a store says that is only busy, also where the server makes a 400 of it."""
PARAMS, METRICS = 100, 1000  # MLflow's limits in one request
DATASET = ("name", "digest", "source_type", "source", "profile")
EXPERIMENTS = 1000  # in one page, and in one search for runs
MLFLOW = Library(
    "MLflow",
    "mlflow",
    "--tracking-uri",
    version("mlflow"),
    Path(str(mlflow.__file__)).parent / "store" / "db_migrations" / "versions",
    "experiments",
)
LONGEST = 6000  # characters of a param
NOTE = "mlflow.note.content"
"""The tag that is a run's description."""
ARTIFACTS = "kdexp.artifacts"
"""The tag that holds the SHA-256 of a run's files, as JSON by their place."""
SERVED = "kdexp_served"  # what served.py is called beside a model
log = logging.getLogger("kdexp")
EXPERIMENT_TAGS = {
    # the UI then shows its pages for training, not for GenAI
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": (
        "Knowledge distillation: small *student* networks learn from a large *teacher*, in search"
        " of the smallest that still meets an accuracy bar. `study …` holds its trials as child"
        " runs; open it for the selected model. `teacher …` is the teacher's own training."
    ),
}


class TrackingError(KdexpError):
    """MLflow's store refuses or does not answer, or does not hold what was asked for."""


class TrackingAway(TrackingError):
    """MLflow's store does not answer now; it may in a while."""


class TrackingGone(TrackingError):
    """A run that MLflow has deleted, or does not hold."""

    def __init__(self, message: str, restore: str = "") -> None:
        super().__init__(message)
        self.restore = restore
        """The command that brings it back, where there is one."""


@dataclass(frozen=True)
class RunRecord:
    """A run as stored."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EpochMetrics:
    """Values of one epoch, and when they were measured: sent twice, they are stored once."""

    epoch: int
    time_ms: int
    values: Mapping[str, float]


class Tracking:
    """A handle to one MLflow store."""

    def __init__(self, settings: Settings, make: bool = True) -> None:
        """Open it. Where it is not there yet it is made, unless this is only for reading."""
        deaf()
        self.url, embedded = settings.tracking_url, settings.tracking_uri is None
        self.patience = CONNECT_SECONDS
        self.shown = "the embedded store" if embedded else without_credentials(self.url)
        self.address = settings.tracking_shown
        self.stores, self.embedded = settings.stores.resolve(), embedded
        self._places: dict[str, Path | None] = {}
        for name in ("mlflow", "alembic"):
            # what fails is raised too, and said once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.url.startswith("http"):
            self._knock()
            self.client = self._connect(self.url)
        else:
            self.client = self._open(settings, make)
        self.patience = PATIENCE

    def _open(self, settings: Settings, make: bool) -> MlflowClient:
        """A database of this machine's, or one that its clients write to by themselves."""
        file = sqlite_file(self.url)
        if file and not make and not file.exists():
            where = settings.stores / "mlflow.db" if self.embedded else file
            option = "--stores" if self.embedded else "--tracking-uri"
            raise TrackingError(
                f"{where} is not there, so no run is recorded here ({Path.cwd()}): run kdexp sweep"
                f" first, go to the folder where it was run, or name the store with {option}."
            )
        fitting(self.url, MLFLOW, self._last_version)
        try:
            if make:
                self.stores.mkdir(parents=True, exist_ok=True)
                # two processes must not migrate one new store
                with FileLock(settings.stores / ".mlflow.lock"):
                    if self.embedded:
                        self._make(settings.stores / "mlflow.db")
                    client = self._connect(self.url)
            else:
                client = self._connect(self.url)
            if self.embedded:
                write_ahead(settings.stores / "mlflow.db")
                readdressed(self.stores)
        except OSError as error:
            raise TrackingError(
                f"{settings.stores}: {error.strerror}; choose another folder with --stores"
            ) from None
        return client

    def _last_version(self) -> str | None:
        """The MLflow that the newest run's own record names."""
        records = (self.stores / "artifacts").glob("*/*/artifacts/environment.json")
        with suppress(OSError, ValueError):
            newest = max(records, key=lambda path: path.stat().st_mtime)
            return str(json.loads(newest.read_text("utf-8"))["mlflow"])
        return None

    # --- writing ---

    def experiment(self, name: str) -> str:
        """The id of the experiment of that name, made if it is new."""
        if found := self._experiment_named(name):
            return found
        place = (
            (self.stores / "artifacts" / folder_for(name)).as_uri()
            if not self.url.startswith("http")
            else None
        )
        try:
            return str(
                self._do(
                    self.client.create_experiment,
                    name,
                    artifact_location=place,
                    tags=EXPERIMENT_TAGS,
                )
            )
        except TrackingAway:
            raise
        except TrackingError:
            # another process made it just now, or this one did and never heard of it
            if found := self._experiment_named(name):
                return found
            raise

    def tag_experiment(self, experiment_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of an experiment."""
        for key, value in tags.items():
            self._do(self.client.set_experiment_tag, experiment_id, key, value)

    def experiment_tags(self, experiment_id: str) -> dict[str, str]:
        """The tags of an experiment."""
        return dict(self._do(self.client.get_experiment, experiment_id).tags)

    def _experiment_named(self, name: str) -> str | None:
        for spelling in spellings(name):
            found = self._do(self.client.get_experiment_by_name, spelling)
            if found is None:
                continue
            if found.lifecycle_stage != "active":
                raise TrackingGone(
                    f"MLflow experiment '{name}' is deleted in {self.shown}: restore it"
                    f" ({self._again('experiments', found)}), or give the sweep another name (--set"
                    f" name={name}-2)."
                )
            return str(found.experiment_id)
        return None

    def start(
        self,
        experiment_id: str,
        kind: Kind,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        """A new run with its params and tags; its id. Broken off in the middle, it is closed."""
        mark = uuid.uuid4().hex
        every = {
            "kdexp.kind": kind,
            "mlflow.source.name": f"kdexp {__version__}",
            **({"mlflow.parentRunId": parent} if parent else {}),
            **tags,
        }
        try:
            run_id = self._create(experiment_id, every, name, mark)
            flat = [Param(key, as_param(value)) for key, value in params.items()]
            for first in range(0, len(flat), PARAMS):
                self._do(self.client.log_batch, run_id, params=flat[first : first + PARAMS])
        except BaseException:
            with self.at_once(), suppress(Exception):
                for run in self._marked(experiment_id, mark):
                    self.finish(run.info.run_id, "KILLED")
            raise
        return run_id

    def log_metrics(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        time_ms: int | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """These values and tags, in one request. Sent again with the same time stamp, they are
        stored once.
        """
        now = time_ms or time.time_ns() // 1_000_000
        points = [Metric(k, float(v), now, 0) for k, v in metrics.items()]
        self._do(
            self.client.log_batch,
            run_id,
            metrics=points,
            tags=[RunTag(k, v) for k, v in (tags or {}).items()],
        )

    def log_epochs(self, run_id: str, epochs: Sequence[EpochMetrics]) -> None:
        """Many epochs' values in as few requests as MLflow takes: one costs some 15 ms, whatever it
        holds.
        """
        points = [
            Metric(name, float(v), each.time_ms, each.epoch)
            for each in epochs
            for name, v in each.values.items()
        ]
        for first in range(0, len(points), METRICS):
            self._do(self.client.log_batch, run_id, metrics=points[first : first + METRICS])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._do(
            self.client.log_batch, run_id, tags=[RunTag(key, value) for key, value in tags.items()]
        )

    def log_files(self, run_id: str, folder: Path, under: str | None = None) -> dict[str, str]:
        """Every file of a folder as an artifact, `under` a folder of that name if given; SHA-256 of
        each by its place.
        """
        own, sums = self._artifacts(run_id), {}
        # each tried again by itself
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            artifact = Path(under or "") / file.relative_to(folder)
            place, sums[artifact.as_posix()] = artifact.parent.as_posix(), sha256_of(file)
            where = None if place == "." else place
            if own:
                own.log_artifact(str(file), where)
            else:
                self._do(self.client.log_artifact, run_id, str(file), where)
        return sums

    def log_model(
        self, run_id: str, module: Any, example: Any, channels: int, classes: Sequence[str]
    ) -> dict[str, str]:
        """A torch module as an MLflow model in the artifact folder `model`: an exported program, no
        pickle.

        `example` holds images as they are stored, uint8; `channels` is how many the module takes.
        The names of its classes, by logit, are the model's metadata `classes`. SHA-256 of each file
        by its place.
        """
        import mlflow.pytorch
        import numpy as np

        with tempfile.TemporaryDirectory() as temporary, _writing(run_id):
            folder = Path(temporary) / "model"
            mlflow.pytorch.save_model(
                module,
                folder,
                serialization_format="pt2",
                input_example=np.repeat(
                    example.astype(np.float32), channels // example.shape[1], axis=1
                ),
                signature=_answers(example),
                pip_requirements=[f"torch=={version('torch')}"],
                metadata={"classes": list(classes)},
            )
            _let_answer(folder, "data/model.pt2", example, channels, classes)
            return self.log_files(run_id, folder, "model")

    def log_onnx(
        self, run_id: str, model: Any, example: Any, folder: str, classes: Sequence[str]
    ) -> dict[str, str]:
        """An ONNX model as an MLflow model in an artifact folder: the file `model.onnx` and what
        MLflow keeps with it. Otherwise as log_model.
        """
        import mlflow.onnx

        with tempfile.TemporaryDirectory() as temporary, _writing(run_id):
            place = Path(temporary) / "model"
            mlflow.onnx.save_model(
                model,
                place,
                signature=_answers(example),
                pip_requirements=[f"{name}=={version(name)}" for name in ("onnx", "onnxruntime")],
                onnx_execution_providers=["CPUExecutionProvider"],
                save_as_external_data=False,
                metadata={"classes": list(classes)},
            )
            _let_answer(place, "model.onnx", example, example.shape[1], classes)
            return self.log_files(run_id, place, folder)

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """A text as an artifact."""
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / name).write_text(text, "utf-8")
            self.log_files(run_id, Path(temporary))

    def log_dataset(
        self, run_id: str, name: str, role: str, fingerprint: str, profile: Mapping[str, Any]
    ) -> None:
        """A dataset input of the run; `role` is training, validation or test."""
        described = Dataset(**dataset(name, role, fingerprint, profile))
        inputs = [DatasetInput(described, [InputTag("mlflow.data.context", role)])]
        for attempt in range(RACES):
            try:
                return self._do(self.client.log_inputs, run_id, inputs)
            except TrackingError as error:
                # MLflow looks a dataset up, then inserts it: two processes that log it together
                # collide once.
                if "IntegrityError" not in str(error) or attempt == RACES - 1:
                    raise
                time.sleep(0.2 * (attempt + 1))

    def finish(
        self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]
    ) -> None:
        """Close a run (or open it again: RUNNING)."""
        if status == "RUNNING":
            self._do(self.client.update_run, run_id, status="RUNNING")
        else:
            self._do(self.client.set_terminated, run_id, status=status)

    def register(
        self, run_id: str, name: str, alias: str, description: str, folder: str = "model"
    ) -> str:
        """An artifact folder of the run as a new version of a registered model, under an alias; its
        version.
        """
        try:
            self._do(self.client.create_registered_model, name)
        except TrackingError as error:
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        place = self._place(run_id)
        address = (
            place.as_uri() if place else self._do(self.client.get_run, run_id).info.artifact_uri
        )
        source = f"{address}/{folder}"
        registered = self._do(
            self.client.create_model_version, name, source, run_id=run_id, description=description
        )
        self.alias(name, alias, str(registered.version))
        return str(registered.version)

    def registered(self, run_id: str, name: str, version: str) -> bool:
        """Whether that version of a registered model is there, and this run's: it may have been
        deleted, or made anew.
        """
        try:
            return str(self._do(self.client.get_model_version, name, version).run_id) == run_id
        except TrackingError as error:
            if _code(error) in MISSING:
                return False
            raise

    def model_version(self, address: str) -> tuple[str, str]:
        """What a registered model's address, models:/name@alias or models:/name/version, stands
        for: the run and its artifact folder. Raises TrackingError.
        """
        by_alias = re.fullmatch(r"models:/([^/]+)@([^@/]+)", address)
        by_version = re.fullmatch(r"models:/([^/]+)/(\d+)", address)
        if not (by_alias or by_version):
            raise TrackingError(
                f"{address}: no address of a registered model; write models:/NAME@ALIAS, as kdexp"
                " select prints it, or models:/NAME/VERSION"
            )
        try:
            if by_alias:
                found = self._do(self.client.get_model_version_by_alias, *by_alias.groups())
            else:
                assert by_version
                found = self._do(self.client.get_model_version, *by_version.groups())
        except TrackingError as error:
            if _code(error) not in MISSING:
                raise
            raise TrackingError(
                f"{address}: not in {self.shown}; kdexp select registers a study's model, kdexp ui"
                " shows what there is"
            ) from None
        return str(found.run_id), str(found.source).partition(f"/{found.run_id}/artifacts/")[2]

    def has_model(self, name: str) -> bool:
        """Whether a model is registered under that name."""
        try:
            self._do(self.client.get_registered_model, name)
        except TrackingError as error:
            if _code(error) in MISSING:
                return False
            raise
        return True

    def describe(self, name: str, version: str, description: str) -> None:
        """Describe a version of a registered model anew."""
        self._do(self.client.update_model_version, name, version, description)

    def tag_version(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version of a registered model."""
        for key, value in tags.items():
            self._do(self.client.set_model_version_tag, name, version, key, value)

    def describe_model(self, name: str, description: str) -> None:
        """Describe a registered model, whatever its versions."""
        self._do(self.client.update_registered_model, name, description)

    def alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point to a version."""
        self._do(self.client.set_registered_model_alias, name, alias, version)

    # --- reading ---

    def read(self, run_id: str) -> RunRecord:
        """The run of that id. Raises TrackingGone where there is none, or it is deleted."""
        try:
            run = self._do(self.client.get_run, run_id)
        except TrackingError as error:
            if _code(error) in MISSING:
                raise TrackingGone(
                    f"No run '{run_id}' in {self.shown}. Copy the run ID from `kdexp select` or the"
                    " MLflow UI (kdexp ui); --tracking-uri or --stores names another store."
                ) from None
            raise
        if run.info.lifecycle_stage != "active":
            restore = self._again("runs", run)
            raise TrackingGone(
                f"Run {run_id} is deleted in {self.shown}: restore it ({restore}).", restore
            )
        return _record(run)

    def there(self, run_id: str) -> bool:
        """Whether a run of that id can be written to."""
        try:
            self.read(run_id)
        except TrackingGone:
            return False
        return True

    def find(
        self, kind: Kind, tags: Mapping[str, str], experiment_id: str | None = None
    ) -> list[RunRecord]:
        """The runs of a kind with these tags, oldest first: those of this experiment, else of every
        one.
        """
        if experiment_id and (runs := self._search(kind, tags, [experiment_id])):
            return [_record(run) for run in runs]
        return [_record(run) for run in self._everywhere(kind, tags)]

    def study(self, name: str) -> RunRecord:
        """The parent run of a study. Raises TrackingError naming the studies there are."""
        runs = self.studies(name)
        if runs:
            return runs[-1]
        if deleted := self._named(name, ViewType.ALL):
            raise TrackingGone(
                f"Study '{name}' is deleted in {self.shown} (run {deleted[-1].info.run_id}):"
                f" restore it ({self._again('runs', deleted[-1])}) and its trials (in kdexp ui all"
                " at once, State: Deleted), or run the sweep under another name (--set"
                f" name={name}-2)."
            )
        known = sorted({run.tags["kdexp.study"] for run in self.find("study", {})})
        there = (
            f"Studies there: {', '.join(known)}."
            if known
            else "There is no study yet; run kdexp sweep first."
        )
        raise TrackingError(f"No study '{name}' in {self.shown}. {there}")

    def studies(self, name: str) -> list[RunRecord]:
        """The parent runs of the studies of that name, oldest first, however its letters were
        stored.
        """
        return [_record(run) for run in self._named(name)]

    def _named(self, name: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        asked = [spelling for spelling in spellings(name) if not set(spelling) & set("'\"`\\")]
        found = [
            run
            for spelling in asked
            for run in self._everywhere("study", {"kdexp.study": spelling}, view)
        ]
        if not found:  # as an earlier version took it, blanks and all
            found = self._everywhere("study", {}, view)
        same = [
            run
            for run in found
            if study_name(run.data.tags.get("kdexp.study", "")) == study_name(name)
        ]
        return sorted(same, key=lambda run: run.info.start_time)

    def _everywhere(
        self, kind: Kind, tags: Mapping[str, str], view: int = ViewType.ACTIVE_ONLY
    ) -> list[Run]:
        """Runs of every experiment, page by page."""
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._do(
                self.client.search_experiments,
                view_type=view,
                max_results=EXPERIMENTS,
                page_token=token,
            )
            if page:
                runs += self._search(kind, tags, [str(found.experiment_id) for found in page], view)
            token = page.token
            if not token:
                break
        return sorted(runs, key=lambda run: run.info.start_time)

    def _search(
        self,
        kind: Kind,
        tags: Mapping[str, str],
        experiments: list[str],
        view: int = ViewType.ACTIVE_ONLY,
    ) -> list[Run]:
        quoted = [
            f"tags.`{key}` = '{value}'" for key, value in {"kdexp.kind": kind, **tags}.items()
        ]
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._do(
                self.client.search_runs,
                experiments,
                filter_string=" and ".join(quoted),
                run_view_type=view,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Every (step, value) of a metric, by step."""
        points = self._do(self.client.get_metric_history, run_id, metric)
        return sorted((int(point.step), float(point.value)) for point in points)

    def places(self, run_id: str, folder: str | None = None) -> list[str]:
        """Where in a run's artifacts its files are, all of them."""
        if own := self._place(run_id):
            return sorted(
                file.relative_to(own).as_posix()
                for file in (own / (folder or "")).rglob("*")
                if file.is_file()
            )
        found = self._do(self.client.list_artifacts, run_id, folder)
        each = (self.places(run_id, one.path) if one.is_dir else [one.path] for one in found)
        return [place for places in each for place in places]

    def inputs(self, run_id: str) -> dict[str, dict[str, str]]:
        """The dataset inputs of a run by role, as `dataset` describes them."""
        inputs = self._do(self.client.get_run, run_id).inputs
        found = inputs.dataset_inputs if inputs else []
        described = [{key: getattr(each.dataset, key) or "" for key in DATASET} for each in found]
        return {
            tag.value: own for own, each in zip(described, found, strict=True) for tag in each.tags
        }

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """An artifact as a local file. Raises TrackingError where the run has none of that name."""
        if place := self._place(run_id):
            return _copied(run_id, place, artifact, folder)
        for attempt in range(RACES):
            try:
                return Path(self._do(self.client.download_artifacts, run_id, artifact, str(folder)))
            except TrackingAway:
                raise
            except (TrackingError, OSError) as error:
                # MLflow does not tell "there is none" from "not now"
                listed = {found.path for found in self._do(self.client.list_artifacts, run_id)}
                if attempt == RACES - 1 or artifact not in listed:
                    raise TrackingError(
                        f"Run {run_id} holds no artifact '{artifact}' (or its store is out of"
                        f" reach): {without_credentials(str(error))}"
                    ) from None
                time.sleep(0.2 * (attempt + 1))
        raise AssertionError("unreachable")

    def read_text(self, run_id: str, artifact: str) -> str:
        """What a text artifact says. Raises TrackingError where the run has none of that name."""
        with tempfile.TemporaryDirectory() as temporary:
            return self.download(run_id, artifact, Path(temporary)).read_text("utf-8")

    def shown_by_ui(self) -> AbstractContextManager[None]:
        """Around a UI on this store."""
        return shown(self.stores) if self.embedded else nullcontext()

    # --- talking ---

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a server that is away is not waited for: TrackingAway comes at once."""
        before, self.patience = self.patience, 0.0
        try:
            yield
        finally:
            self.patience = before

    def aside(self) -> Tracking:
        """A handle to the same store for another thread, which waits for nobody."""
        other = copy(self)
        other.patience = 0.0
        return other

    def _place(self, run_id: str) -> Path | None:
        """The folder of a run's artifacts in the embedded store; None: MLflow knows where they
        are.
        """
        if not self.embedded:
            return None
        if run_id not in self._places:
            info = self._do(self.client.get_run, run_id).info
            address = info.artifact_uri or ""
            local = is_local(address)
            self._places[run_id] = (
                run_place(self.stores, address, str(info.experiment_id), run_id) if local else None
            )
        return self._places[run_id]

    def _artifacts(self, run_id: str) -> LocalArtifactRepository | None:
        place = self._place(run_id)
        return LocalArtifactRepository(place.as_uri()) if place else None

    def _again(self, what: Literal["runs", "experiments"], found: Any) -> str:
        """The command that restores a deleted run, or the experiment that was deleted with it."""
        if what == "runs":
            home = self._do(self.client.get_experiment, found.info.experiment_id)
            if home.lifecycle_stage == "active":
                return (
                    f"MLFLOW_TRACKING_URI={shlex.quote(self.address)} mlflow runs restore --run-id"
                    f" {found.info.run_id}"
                )
            found = home
        return (
            f"MLFLOW_TRACKING_URI={shlex.quote(self.address)} mlflow experiments restore -x"
            f" {found.experiment_id}"
        )

    def _create(self, experiment_id: str, tags: Mapping[str, str], name: str, mark: str) -> str:
        """A new run, once, also where the server went away before it could say so."""

        def create() -> str:
            if attempts and (found := self._marked(experiment_id, mark)):
                return str(found[0].info.run_id)
            attempts.append(1)
            every = {**tags, "kdexp.mark": mark}
            return str(self.client.create_run(experiment_id, tags=every, run_name=name).info.run_id)

        attempts: list[int] = []
        return self._do(create)

    def _marked(self, experiment_id: str, mark: str) -> Sequence[Run]:
        """The run that carries a mark, if it was made."""
        found: Sequence[Run] = self.client.search_runs(
            [experiment_id], f"tags.`kdexp.mark` = '{mark}'"
        )
        return found

    def _make(self, database: Path) -> None:
        """A new embedded store, whole or not at all: MLflow does not recover one whose tables are
        made in part.
        """
        if not database.exists():
            write_atomically(database, lambda path: self._connect(sqlite_url(path.resolve())))

    def _connect(self, url: str) -> MlflowClient:
        client = MlflowClient(url, registry_uri=url)
        try:
            self._do(client.search_experiments, max_results=1)
        except TrackingError:
            raise
        except Exception as error:  # SQLAlchemy, requests and MLflow each raise their own
            raise TrackingError(self._message(error)) from error
        return client

    def _knock(self) -> None:
        """Fail in seconds where no MLflow server listens; MLflow itself would retry for minutes."""
        try:
            health = self._get("/health")
            if health.status_code == 200 and health.text.strip() == "OK":
                return
            if health.status_code in (401, 403, 429) or (
                health.status_code >= 500 and health.status_code != 501
            ):
                return  # a server that refuses us or is busy: the first real request will tell
            answer = self._get("/api/2.0/mlflow/experiments/search?max_results=1")
            if answer.headers.get("content-type", "").startswith("application/json"):
                return  # behind a proxy that keeps /health to itself
        except requests.exceptions.SSLError as error:
            raise TrackingError(f"MLflow, {self.shown}: {_tls(error)}") from None
        except requests.RequestException as error:
            raise TrackingError(
                f"No MLflow server answers at {self.shown} ({type(error).__name__}). Start it, or"
                " correct --tracking-uri; without it kdexp uses the embedded store."
            ) from None
        raise TrackingError(
            f"What answers at {self.shown} is no MLflow server ({health.status_code} for /health,"
            f" {answer.status_code} for its API). Correct --tracking-uri (an MLflow server's root,"
            " such as http://HOST:5000); without it kdexp uses the embedded store."
        )

    def _get(self, path: str) -> requests.Response:
        """One request with the user's credentials and certificates, not repeated."""
        creds = get_default_host_creds(self.url)
        login = (creds.username, creds.password) if creds.username else None
        verify = False if creds.ignore_tls_verification else creds.server_cert_path or True
        headers = {"Authorization": f"Bearer {creds.token}"} if creds.token and not login else {}
        return requests.get(
            self.url + path,
            timeout=10,
            auth=login,
            verify=verify,
            cert=creds.client_cert_path,
            headers=headers,
        )

    def _do(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        def asked() -> R:
            with whole() if self.embedded else nullcontext():  # a request holds no lock in here
                return method(*args, **kwargs)

        try:
            return patiently(asked, _may_pass, self.patience, f"MLflow, {self.shown},")
        except (mlflow.exceptions.MlflowException, requests.RequestException) as error:
            if _may_pass(error):
                raise TrackingAway(
                    f"No answer from MLflow, {self.shown}: {self._message(error)}"
                ) from error
            raise TrackingError(self._message(error)) from error

    def _message(self, error: Exception) -> str:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return (
            f"MLflow, {self.shown}:"
            f" {without_credentials(lines[0] if lines else type(error).__name__)}"
        )


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, no answer in time, an overloaded
    or failing server.
    """
    if not isinstance(error, mlflow.exceptions.MlflowException | requests.RequestException):
        return False
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    text = str(error)
    if any(reason in text for reason in OVERLOADED):
        return True
    refused = "error code 4" in text and "error code 429" not in text
    passing = "API request to" in text and "failed with" in text and not refused
    return isinstance(error, requests.ConnectionError | requests.Timeout) or passing


@contextmanager
def _writing(run_id: str) -> Iterator[None]:
    """A model that cannot be written (a full disk, …) is one line: torch, ONNX and MLflow each
    raise their own.
    """
    try:
        yield
    except (KdexpError, OSError):
        raise
    except Exception as error:
        first = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise TrackingError(
            f"The model of run {run_id} could not be written: {without_credentials(first)}. Is"
            f" there room in {tempfile.gettempdir()} and in the store? The same command tries"
            " again."
        ) from error


def _tls(error: Exception) -> str:
    """Why no secure connection comes about, and what to do."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return (
            "its certificate is not trusted here; name the authority's file in"
            " MLFLOW_TRACKING_SERVER_CERT_PATH, or set MLFLOW_TRACKING_INSECURE_TLS=true"
        )
    return (
        "what answers there does not speak TLS; write http:// in place of https://, or correct"
        " --tracking-uri"
    )


def _copied(run_id: str, place: Path, artifact: str, folder: Path) -> Path:
    """An artifact of the embedded store, copied into a folder."""
    source, target = place / artifact, folder / artifact
    if not source.exists():
        raise TrackingError(
            f"Run {run_id} holds no artifact '{artifact}': {source} is not there. It was deleted,"
            f" or the store was copied without it: put {place.parent.parent.parent} back as it was,"
            " or begin a study anew (--set name=…)."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
    return target


def upgrade(url: str) -> None:
    """Take a database of an older MLflow along to the installed one's tables, by MLflow's own
    scripts.
    """
    import sqlalchemy
    from mlflow.store.db.utils import _upgrade_db

    try:
        _upgrade_db(sqlalchemy.create_engine(url))
    except Exception as error:  # SQLAlchemy, Alembic and MLflow each raise their own
        raise StoreError(f"MLflow's own upgrade failed: {str(error).splitlines()[0]}") from error


def _code(error: TrackingError) -> str:
    """MLflow's own name for what went wrong."""
    return str(getattr(error.__cause__, "error_code", ""))


def _record(run: Run) -> RunRecord:
    return RunRecord(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name or "",
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )


def dataset(name: str, role: str, fingerprint: str, profile: Mapping[str, Any]) -> dict[str, str]:
    """A dataset input as MLflow stores it."""
    return {
        "name": f"{name}-{role}",
        "digest": fingerprint[:16],
        "source_type": "kdexp",
        "source": json.dumps({"dataset": name, "split": role, "sha256": fingerprint}),
        "profile": json.dumps(profile),
    }


def as_param(value: Any) -> str:
    """A value as it is stored with a run."""
    text = _text(value)
    if len(text) <= LONGEST:
        return text
    # MLflow would cut the rest off without a word, or refuse all (MLFLOW_TRUNCATE_LONG_VALUES).
    said = f" … shortened: {len(text):,} characters, the run's artifacts hold all"
    return text[: LONGEST - len(said)] + said


def _answers(example: Any) -> Any:
    """The signature of what served.py makes of a model: images like these in, a row for each
    out.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    images = Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))])
    row = Schema([ColSpec("string", "label"), ColSpec("double", "probability")])
    return ModelSignature(images, row)


def _let_answer(
    folder: Path, file: str, example: Any, channels: int, classes: Sequence[str]
) -> None:
    """Put served.py beside a saved model, as what MLflow serves of it: the library's own flavor
    stays.
    """
    from mlflow.models import Model

    told = {"file": file, "channels": channels, "classes": list(classes)}
    (folder / served.ANSWERS).write_text(json.dumps(told, ensure_ascii=False), "utf-8")
    (folder / "code").mkdir()
    shutil.copy(served.__file__, folder / "code" / f"{SERVED}.py")
    model = Model.load(str(folder))
    kept = {key: model.flavors["python_function"][key] for key in ("env", "python_version")}
    model.flavors["python_function"] = kept | {
        "loader_module": SERVED,
        "code": "code",
        "data": ".",
    }
    model.saved_input_example_info = {
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
        "type": "ndarray",
    }
    images = example[:1].tolist()
    (folder / "input_example.json").write_text(json.dumps(images))
    (folder / "serving_input_example.json").write_text(json.dumps({"inputs": images}))
    model.save(str(folder / "MLmodel"))


def too_long(params: Mapping[str, Any]) -> list[str]:
    """Which params are longer than MLflow takes."""
    return [name for name, value in params.items() if len(_text(value)) > LONGEST]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
