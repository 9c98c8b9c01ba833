"""MLflow, through a client that is handed around: no global run, no global tracking URI.

One experiment per sweep name. In it: one parent run per study, one child run per trial and per fresh seed of a
confirmation, one run per teacher, and the runs of `train` and `reproduce`. `kdexp.kind` tells them apart.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from filelock import FileLock

from kdexp import KdexpError, __version__
from kdexp.files import write_ahead, write_atomically
from kdexp.settings import Settings, without_credentials

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported: kdexp does not phone home
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with its password
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # waiting is done here, and never in the middle of training
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
import mlflow.exceptions
import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

__all__ = ["EpochMetrics", "Kind", "RunRecord", "Tracking", "TrackingAway", "TrackingError"]

Kind = Literal["study", "trial", "confirmation", "train", "teacher", "reproduction"]
P = ParamSpec("P")
R = TypeVar("R")
RACES = 5
CONNECT_SECONDS = 10.0  # that a server may be busy at the start
PATIENCE = 300.0  # seconds that it may be away later
PARAMS, METRICS = 100, 1000  # MLflow's limits in one request
log = logging.getLogger("kdexp")
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # the UI then shows its pages for training, not for GenAI
    "mlflow.note.content": (
        "Knowledge distillation: small *student* networks learn from a large *teacher*, in search of the smallest that "
        "still meets an accuracy bar. `study …` holds its trials as child runs; open it for the selected model. "
        "`teacher …` is the teacher's own training."
    ),
}


class TrackingError(KdexpError):
    """MLflow's store refuses or does not answer, or does not hold what was asked for."""


class TrackingAway(TrackingError):
    """MLflow's store does not answer now; it may in a while."""


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

    def __init__(self, settings: Settings) -> None:
        self.url = settings.tracking_url
        self.patience = CONNECT_SECONDS
        self.shown = "the embedded store" if settings.tracking_uri is None else without_credentials(self.url)
        self.artifacts = None if self.url.startswith("http") else settings.stores.resolve() / "artifacts"
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised too, and said once
        if self.url.startswith("http"):
            self._knock()
        if self.artifacts is None:
            self.client = self._connect(self.url)
        else:
            try:
                self.artifacts.mkdir(parents=True, exist_ok=True)
                with FileLock(settings.stores / ".mlflow.lock"):  # two processes must not migrate one new store
                    if settings.tracking_uri is None:
                        self._make(settings.stores / "mlflow.db")
                    self.client = self._connect(self.url)
                    if settings.tracking_uri is None:
                        write_ahead(settings.stores / "mlflow.db")
            except OSError as error:
                raise TrackingError(f"{settings.stores}: {error.strerror}; choose another folder with --stores") from None
        self.patience = PATIENCE

    # --- writing ---

    def experiment(self, name: str) -> str:
        """The id of the experiment of that name, made if it is new."""
        found = self._do(self.client.get_experiment_by_name, name)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise TrackingError(f"MLflow experiment '{name}' is deleted; restore it, or rename the sweep (name: …)")
            return str(found.experiment_id)
        place = (self.artifacts / name).as_uri() if self.artifacts else None
        try:
            return str(self._do(self.client.create_experiment, name, artifact_location=place, tags=EXPERIMENT_TAGS))
        except TrackingAway:
            raise
        except TrackingError:  # another process made it just now, or this one did and never heard of it
            found = self._do(self.client.get_experiment_by_name, name)
            if found is None:
                raise
            return str(found.experiment_id)

    def start(
        self,
        experiment_id: str,
        kind: Kind,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        """A new run with its params and tags; its id."""
        every = {
            "kdexp.kind": kind,
            "mlflow.source.name": f"kdexp {__version__}",
            **({"mlflow.parentRunId": parent} if parent else {}),
            **tags,
        }
        run_id = self._create(experiment_id, every, name)
        flat = [Param(key, _text(value)) for key, value in params.items()]
        for first in range(0, len(flat), PARAMS):
            self._do(self.client.log_batch, run_id, params=flat[first : first + PARAMS])
        return run_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], time_ms: int | None = None) -> None:
        """These values, in one request. Sent again with the same time stamp, they are stored once."""
        now = time_ms or time.time_ns() // 1_000_000
        self._do(self.client.log_batch, run_id, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items()])

    def log_epochs(self, run_id: str, epochs: Sequence[EpochMetrics]) -> None:
        """Many epochs' values in as few requests as MLflow takes: one costs some 15 ms, whatever it holds."""
        points = [Metric(name, float(v), each.time_ms, each.epoch) for each in epochs for name, v in each.values.items()]
        for first in range(0, len(points), METRICS):
            self._do(self.client.log_batch, run_id, metrics=points[first : first + METRICS])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._do(self.client.log_batch, run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_files(self, run_id: str, folder: Path, under: str | None = None) -> None:
        """Every file of a folder as an artifact, `under` a folder of that name if given."""
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):  # each tried again by itself
            place = (Path(under or "") / file.relative_to(folder)).parent.as_posix()
            self._do(self.client.log_artifact, run_id, str(file), None if place == "." else place)

    def log_model(self, run_id: str, module: Any, example: Any, classes: Sequence[str]) -> None:
        """A torch module as an MLflow model in the artifact folder `model`: an exported program, no pickle.

        The names of its classes, by logit, are the model's metadata `classes`.
        """
        import mlflow.pytorch
        from mlflow.models import infer_signature

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            mlflow.pytorch.save_model(
                module,
                folder,
                serialization_format="pt2",
                input_example=example.numpy(),
                signature=infer_signature(example.numpy(), module(example).detach().numpy()),
                pip_requirements=[f"torch=={version('torch')}"],
                metadata={"classes": list(classes)},
            )
            self.log_files(run_id, folder, "model")

    def log_onnx(self, run_id: str, model: Any, example: Any, gives: Any, folder: str, classes: Sequence[str]) -> None:
        """An ONNX model as an MLflow model in an artifact folder: the file `model.onnx` and what MLflow keeps with it."""
        import mlflow.onnx
        from mlflow.models import infer_signature

        with tempfile.TemporaryDirectory() as temporary:
            mlflow.onnx.save_model(
                model,
                Path(temporary) / "model",
                signature=infer_signature(example, gives),
                pip_requirements=[f"{name}=={version(name)}" for name in ("onnx", "onnxruntime")],
                onnx_execution_providers=["CPUExecutionProvider"],
                save_as_external_data=False,
                metadata={"classes": list(classes)},
            )
            self.log_files(run_id, Path(temporary) / "model", folder)

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """A text as an artifact."""
        self._do(self.client.log_text, run_id, text, name)

    def log_dataset(self, run_id: str, name: str, role: str, fingerprint: str, profile: Mapping[str, Any]) -> None:
        """A dataset input of the run; `role` is training, validation or test."""
        dataset = Dataset(
            name=f"{name}-{role}",
            digest=fingerprint[:16],
            source_type="kdexp",
            source=json.dumps({"dataset": name, "split": role, "sha256": fingerprint}),
            profile=json.dumps(profile),
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", role)])]
        for attempt in range(RACES):
            try:
                return self._do(self.client.log_inputs, run_id, inputs)
            except TrackingError as error:
                # MLflow looks a dataset up, then inserts it: two processes that log it together collide once.
                if "IntegrityError" not in str(error) or attempt == RACES - 1:
                    raise
                time.sleep(0.2 * (attempt + 1))

    def finish(self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]) -> None:
        """Close a run (or open it again: RUNNING)."""
        if status == "RUNNING":
            self._do(self.client.update_run, run_id, status="RUNNING")
        else:
            self._do(self.client.set_terminated, run_id, status=status)

    def register(self, run_id: str, name: str, alias: str, description: str, folder: str = "model") -> str:
        """An artifact folder of the run as a new version of a registered model, under an alias; its version."""
        try:
            self._do(self.client.create_registered_model, name)
        except TrackingError as error:
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        source = self._do(self.client.get_run, run_id).info.artifact_uri + f"/{folder}"
        registered = self._do(self.client.create_model_version, name, source, run_id=run_id, description=description)
        self.alias(name, alias, str(registered.version))
        return str(registered.version)

    def describe(self, name: str, version: str, description: str) -> None:
        """Describe a version of a registered model anew."""
        self._do(self.client.update_model_version, name, version, description)

    def alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point to a version."""
        self._do(self.client.set_registered_model_alias, name, alias, version)

    # --- reading ---

    def read(self, run_id: str) -> RunRecord:
        """The run of that id. Raises TrackingError where there is none."""
        try:
            return _record(self._do(self.client.get_run, run_id))
        except TrackingError as error:
            if _code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise TrackingError(
                    f"No run '{run_id}' in {self.shown}. Copy the run ID from `kdexp select` or the MLflow UI "
                    f"(kdexp ui); --tracking-uri or --stores names another store."
                ) from None
            raise

    def find(self, kind: Kind, tags: Mapping[str, str]) -> list[RunRecord]:
        """The runs of a kind with these tags, oldest first, of every experiment."""
        experiments = [str(found.experiment_id) for found in self._do(self.client.search_experiments)]
        quoted = [f"tags.`{key}` = '{value}'" for key, value in {"kdexp.kind": kind, **tags}.items()]
        runs: list[Run] = []
        token: str | None = None
        while experiments:
            page = self._do(
                self.client.search_runs,
                experiments,
                filter_string=" and ".join(quoted),
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                break
        return [_record(run) for run in runs]

    def study(self, name: str) -> RunRecord:
        """The parent run of a study. Raises TrackingError naming the studies there are."""
        runs = self.find("study", {"kdexp.study": name}) if "'" not in name else []
        if not runs:
            known = sorted({run.tags["kdexp.study"] for run in self.find("study", {})})
            there = f"Studies there: {', '.join(known)}." if known else "There is no study yet; run kdexp sweep first."
            raise TrackingError(f"No study '{name}' in {self.shown}. {there}")
        return runs[-1]

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Every (step, value) of a metric, by step."""
        points = self._do(self.client.get_metric_history, run_id, metric)
        return sorted((int(point.step), float(point.value)) for point in points)

    def download(self, run_id: str, artifact: str, folder: Path) -> Path:
        """An artifact as a local file. Raises TrackingError where the run has none of that name."""
        for attempt in range(RACES):
            try:
                return Path(self._do(self.client.download_artifacts, run_id, artifact, str(folder)))
            except TrackingAway:
                raise
            except (TrackingError, OSError) as error:  # MLflow does not tell "there is none" from "not now"
                listed = {found.path for found in self._do(self.client.list_artifacts, run_id)}
                if attempt == RACES - 1 or artifact not in listed:
                    raise TrackingError(
                        f"Run {run_id} holds no artifact '{artifact}' (or its store is out of reach): "
                        f"{without_credentials(str(error))}"
                    ) from None
                time.sleep(0.2 * (attempt + 1))
        raise AssertionError("unreachable")

    def read_text(self, run_id: str, artifact: str) -> str:
        """What a text artifact says. Raises TrackingError where the run has none of that name."""
        with tempfile.TemporaryDirectory() as temporary:
            return self.download(run_id, artifact, Path(temporary)).read_text()

    # --- talking ---

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a server that is away is not waited for: TrackingAway comes at once."""
        before, self.patience = self.patience, 0.0
        try:
            yield
        finally:
            self.patience = before

    def _create(self, experiment_id: str, tags: Mapping[str, str], name: str) -> str:
        """A new run, once, also where the server went away before it could say so."""
        mark = {"kdexp.mark": uuid.uuid4().hex}

        def create() -> str:
            if attempts:
                found = self.client.search_runs([experiment_id], f"tags.`kdexp.mark` = '{mark['kdexp.mark']}'")
                if found:
                    return str(found[0].info.run_id)
            attempts.append(1)
            return str(self.client.create_run(experiment_id, tags={**tags, **mark}, run_name=name).info.run_id)

        attempts: list[int] = []
        return self._do(create)

    def _make(self, database: Path) -> None:
        """A new embedded store, whole or not at all: MLflow does not recover one whose tables are made in part."""
        if not database.exists():
            write_atomically(database, lambda path: self._connect(f"sqlite:///{path.resolve()}"))

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
        """Fail in seconds where no server listens; MLflow itself would retry for minutes."""
        try:
            requests.get(self.url.rstrip("/") + "/health", timeout=10)
        except requests.RequestException as error:
            raise TrackingError(
                f"No MLflow server answers at {self.shown} ({type(error).__name__}). Start it, or correct "
                f"--tracking-uri; without it kdexp uses the embedded store."
            ) from None

    def _do(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return method(*args, **kwargs)
            except (mlflow.exceptions.MlflowException, requests.RequestException) as error:
                if not _may_pass(error):
                    raise TrackingError(self._message(error)) from error
                if time.monotonic() >= deadline:
                    raise TrackingAway(f"No answer from MLflow, {self.shown}: {self._message(error)}") from error
            if pause == 1.0:  # not for a single request
                log.warning("MLflow, %s, does not answer; waiting for it (up to %.0f s)", self.shown, self.patience)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _message(self, error: Exception) -> str:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"MLflow, {self.shown}: {without_credentials(lines[0] if lines else type(error).__name__)}"


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, no answer in time, an overloaded or failing server."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    text = str(error)
    refused = "error code 4" in text and "error code 429" not in text
    passing = "API request to" in text and "failed with" in text and not refused
    return isinstance(error, requests.ConnectionError | requests.Timeout) or passing or "database is locked" in text


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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
