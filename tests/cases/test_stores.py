"""Stores that move, lose a part, meet other versions, or are named in ways that cannot be meant."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faults.servers import free_port
from system.conftest import command, environment

from cases.conftest import TINY, Case, one_line
from kdexp.config import load
from kdexp.runs import tracking
from kdexp.runs.embedded import shown
from kdexp.runs.tracking import Tracking
from kdexp.settings import Settings, checked


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder in which the tiny sweep was run: three trials, one selected and registered."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "mlruns").mkdir()
    shutil.copy(empty_store, folder / "mlruns" / "mlflow.db")
    (folder / "tiny.yaml").write_text(TINY)
    done = subprocess.run(
        command("sweep", "tiny.yaml"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def project(case: Case, swept: Path) -> Case:
    """A copy of it that is this test's own; the original must stay as it is."""
    before = contents(swept)
    shutil.rmtree(case.folder / "mlruns")
    shutil.copytree(swept / "mlruns", case.folder / "mlruns")
    yield case
    assert contents(swept) == before, "what was done in the copy was written into the original"


def contents(folder: Path) -> dict[str, str]:
    """Every file by its SHA-256 (but the logs that SQLite keeps beside an open database)."""
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-wal", "-shm", ".lock"))
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def sql(database: Path, statement: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def mlflow_db(case: Case) -> Path:
    return case.folder / "mlruns" / "mlflow.db"


def addresses(case: Case) -> list[str]:
    found = sql(
        mlflow_db(case),
        "select artifact_uri from runs union select artifact_location from experiments",
    )
    found += sql(
        mlflow_db(case),
        "select storage_location from model_versions union select source from model_versions",
    )
    return [address for (address,) in found if address]


def selected(case: Case) -> str:
    done = case.kd("select", "tiny")
    assert done.returncode == 0, done.stderr
    return re.findall(r"Run ID: +([0-9a-f]{32})", done.stdout)[0]


def client(case: Case):
    from mlflow.tracking import MlflowClient

    url = f"sqlite:///{mlflow_db(case)}"
    return MlflowClient(url, registry_uri=url)


# --- moved and copied ---


def test_a_copy_works_and_never_touches_the_original(project: Case, swept: Path) -> None:
    run = selected(project)
    assert "identical" in project.kd("reproduce", run).stdout
    assert (
        project.kd("sweep", "tiny.yaml", "--trials", "4", "--set", "study.seed=8787").returncode
        == 0
    )
    inside = (project.folder / "mlruns").as_uri()
    assert all(address.startswith(inside) for address in addresses(project))


def test_a_moved_store_works_from_any_folder_when_the_original_is_gone(
    project: Case, tmp_path: Path
) -> None:
    run = selected(project)
    for name in ("a b#c", "why? 50%25 'Ä'"):
        elsewhere = tmp_path / name
        shutil.move(project.folder / "mlruns", elsewhere / "mlruns")
        done = project.kd("select", "tiny", "--stores", str(elsewhere / "mlruns"))
        assert done.returncode == 0, done.stderr
        shutil.move(elsewhere / "mlruns", project.folder / "mlruns")  # and back again
        assert selected(project) == run
    shutil.move(project.folder / "mlruns", elsewhere / "mlruns")
    done = project.kd("select", "tiny", "--stores", str(elsewhere / "mlruns"))
    (call,) = re.findall(r"(mlflow.set_tracking_uri\(.*\))   in Python", done.stdout)
    code = f"import mlflow\n{call}\nprint('loaded')"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.stdout.endswith("loaded\n"), loaded.stderr
    assert not list(tmp_path.glob("*.db"))


def test_while_a_ui_shows_the_store_its_addresses_stay_and_kdexp_needs_none_of_them(
    project: Case,
) -> None:
    before = addresses(project)
    with shown(project.folder / "mlruns"):
        run = selected(project)
        assert "identical" in project.kd("reproduce", run).stdout
    assert set(before) <= set(addresses(project))
    inside = (project.folder / "mlruns").as_uri()
    selected(project)
    assert all(address.startswith(inside) for address in addresses(project))


def test_an_older_layout_of_the_experiment_default_is_found_below_the_store(case: Case) -> None:
    sql(
        mlflow_db(case),
        "update experiments set artifact_location = '/gone/mlruns/0' where experiment_id = 0",
    )
    done = case.kd(
        "train", "tiny.yaml", "--set", "name=Default", "--stores", str(case.folder / "mlruns")
    )
    assert done.returncode == 0, done.stderr
    run = re.findall(r"Run ID: +([0-9a-f]{32})", done.stdout)[0]
    assert (
        case.folder / "mlruns" / "artifacts" / "0" / run / "artifacts" / "config.json"
    ).is_file()
    shutil.move(case.folder / "mlruns" / "artifacts" / "0", case.folder / "mlruns" / "0")
    sql(
        mlflow_db(case),
        f"update runs set artifact_uri = '/gone/mlruns/0/{run}/artifacts' where run_uuid = '{run}'",
    )
    assert "identical" in case.kd("reproduce", run).stdout


def test_with_stores_elsewhere_nothing_is_made_where_the_command_runs(
    case: Case, tmp_path: Path
) -> None:
    here = case.folder / "here"
    here.mkdir()
    shutil.copy(case.folder / "tiny.yaml", here)
    os.chdir(here)
    for name in ("Default", "tiny"):
        done = case.kd(
            "train", "tiny.yaml", "--set", f"name={name}", "--stores", str(case.folder / "mlruns")
        )
        assert done.returncode == 0, done.stderr
    assert [path.name for path in here.iterdir()] == ["tiny.yaml"]


# --- a part is missing ---


def test_a_deleted_study_run_is_named_and_how_to_restore_it(project: Case) -> None:
    of = client(project)
    experiment = of.get_experiment_by_name("tiny").experiment_id
    runs = [
        run.info.run_id
        for run in of.search_runs([experiment])
        if run.data.tags["kdexp.kind"] in ("study", "trial")
    ]
    for run in runs:
        of.delete_run(run)
    for arguments in (
        ["select", "tiny"],
        ["sweep", "tiny.yaml"],
        ["sweep", "tiny.yaml", "--trials", "5"],
        ["confirm", "tiny"],
    ):
        line = one_line(
            project.kd(*arguments), "deleted", "mlflow runs restore --run-id", "--set name=tiny-2"
        )
        assert line.count("MLFLOW_TRACKING_URI=sqlite:////") == 1
    for run in runs:
        of.restore_run(run)
    assert selected(project)
    for run in runs:
        of.delete_run(run)
    subprocess.run(
        [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", f"sqlite:///{mlflow_db(project)}"],
        env=environment() | {"MLFLOW_TRACKING_URI": f"sqlite:///{mlflow_db(project)}"}, capture_output=True, check=False,
    )  # fmt: skip
    one_line(project.kd("sweep", "tiny.yaml"), "3 trials", "does not hold", "--set name=tiny-2")
    assert project.kd("sweep", "tiny.yaml", "--set", "name=tiny-2", "--trials", "2").returncode == 0


def test_a_deleted_experiment_is_named_and_how_to_restore_it(project: Case) -> None:
    of = client(project)
    of.delete_experiment(of.get_experiment_by_name("tiny").experiment_id)
    for arguments in (["select", "tiny"], ["sweep", "tiny.yaml"], ["train", "tiny.yaml"]):
        one_line(project.kd(*arguments), "deleted", "mlflow experiments restore -x")


def test_a_renamed_experiment_keeps_its_study_together(project: Case) -> None:
    of = client(project)
    experiment = of.get_experiment_by_name("tiny").experiment_id
    of.rename_experiment(experiment, "our digits")
    assert project.kd("sweep", "tiny.yaml", "--trials", "5").returncode == 0
    assert of.get_experiment_by_name("tiny") is None
    assert {run.info.experiment_id for run in of.search_runs([experiment])} == {experiment}
    assert selected(project)


def test_a_trial_whose_run_is_deleted_while_it_is_under_way_begins_again(project: Case) -> None:
    storage = project.folder / "mlruns" / "optuna.db"
    found = sql(
        storage, "select trial_id, value_json from trial_user_attributes where key = 'run_id'"
    )
    trial, run = found[0]
    client(project).delete_run(run.strip('"'))
    sql(storage, "update trials set state = 'RUNNING' where trial_id = ?", trial)
    done = project.kd("sweep", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "(again)" in done.stdout


def test_a_study_without_an_ended_trial_goes_on_where_its_run_is_gone(case: Case) -> None:
    assert case.kd("sweep", "tiny.yaml", "--trials", "2").returncode == 0
    sql(case.folder / "mlruns" / "optuna.db", "update trials set state = 'RUNNING'")
    for table in ("tags", "runs"):
        sql(mlflow_db(case), f"delete from {table}")
    done = case.kd("sweep", "tiny.yaml", "--trials", "2")
    assert done.returncode == 0, done.stderr
    assert "Selected: trial" in done.stdout


def test_a_tracking_store_that_does_not_hold_the_study_is_named(
    project: Case, tmp_path: Path
) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    shutil.copy(mlflow_db(project), tmp_path / "aside.db")
    sql(tmp_path / "aside.db", "delete from tags")
    sql(tmp_path / "aside.db", "delete from runs")
    shutil.copy(tmp_path / "aside.db", tmp_path / "other.db")
    one_line(
        project.kd("sweep", "tiny.yaml", "--tracking-uri", other),
        "3 trials",
        "other.db",
        "--set name=tiny-2",
    )
    mlflow_db(project).unlink()
    one_line(project.kd("select", "tiny"), "mlruns/mlflow.db is not there", "--stores")


def test_a_lost_optuna_database_is_named_before_anything_is_trained(project: Case) -> None:
    (project.folder / "mlruns" / "optuna.db").unlink()
    for _ in range(2):
        one_line(
            project.kd("sweep", "tiny.yaml"),
            "3 trials",
            "optuna.db",
            "--storage",
            "--set name=tiny-2",
        )
    assert selected(project)


def test_lost_artifacts_are_named(project: Case) -> None:
    shutil.rmtree(project.folder / "mlruns" / "artifacts")
    for arguments in (["select", "tiny"], ["sweep", "tiny.yaml"]):
        one_line(
            project.kd(*arguments),
            "holds no artifact",
            str(project.folder / "mlruns"),
            "--set name=",
        )


def test_a_deleted_model_or_version_is_made_anew(project: Case) -> None:
    of = client(project)
    of.delete_registered_model("tiny")
    assert selected(project) == of.get_model_version_by_alias("tiny", "smallest").run_id
    of.delete_model_version("tiny", of.get_model_version_by_alias("tiny", "smallest").version)
    assert selected(project) == of.get_model_version_by_alias("tiny", "smallest").run_id
    version = of.get_model_version_by_alias("tiny", "smallest").version
    # made anew by somebody, of another run
    sql(mlflow_db(project), "update model_versions set run_id = ?", "0" * 32)
    assert selected(project)
    assert of.get_model_version_by_alias("tiny", "smallest").version != version


def test_reading_commands_make_nothing(case: Case) -> None:
    shutil.rmtree(case.folder / "mlruns")
    run = "0" * 32
    for arguments in (
        ["select", "x"],
        ["confirm", "x"],
        ["reproduce", run],
        ["export", run],
        ["ui"],
    ):
        one_line(case.kd(*arguments), "mlruns/mlflow.db is not there", str(case.folder), "--stores")
        one_line(
            case.kd(*arguments, "--tracking-uri", "sqlite:///x.db"),
            "x.db is not there",
            "--tracking-uri",
        )
    assert [path.name for path in case.folder.iterdir()] == ["tiny.yaml"]


def test_a_full_disk_while_registering_is_not_called_torch_exports(
    project: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import mlflow.pytorch

    client(project).delete_registered_model("tiny")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.pt2")

    def torn(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    for failing, says in ((full, "No space left"), (torn, "could not be written")):
        monkeypatch.setattr(mlflow.pytorch, "save_model", failing)
        line = one_line(project.kd("select", "tiny"), says)
        assert "torch.export" not in line
    monkeypatch.undo()


# --- other versions ---


@pytest.mark.parametrize("revision", ["acf3f17fdcc7", "ffffffffffff"])
def test_a_database_of_another_mlflow_says_of_which_and_what_to_do(
    project: Case, revision: str
) -> None:
    before = sql(mlflow_db(project), "select name from sqlite_master")
    sql(mlflow_db(project), "update alembic_version set version_num = ?", revision)
    older = revision != "ffffffffffff"
    says = (
        ["older MLflow", "October 2023", "kdexp doctor --upgrade"]
        if older
        else ["newer MLflow", "install", "pip install"]
    )
    for arguments in (["select", "tiny"], ["sweep", "tiny.yaml"], ["train", "tiny.yaml"], ["ui"]):
        one_line(project.kd(*arguments), revision, *says)
    done = project.kd("doctor")
    assert done.returncode == 1
    assert says[0] in done.stdout
    assert sql(mlflow_db(project), "select name from sqlite_master") == before, (
        "nothing was changed"
    )
    if older:  # its tables are the new ones, so MLflow's own scripts fail: all is as it was
        failed = project.kd("doctor", "--upgrade")
        assert failed.returncode == 1
        assert "as it was" in failed.stdout
        sql(mlflow_db(project), "update alembic_version set version_num = 'dc11669786a5'")
        assert selected(project)


def test_the_newest_run_says_which_version_a_newer_database_needs(project: Case) -> None:
    record = next((project.folder / "mlruns" / "artifacts").glob("*/*/artifacts/environment.json"))
    record.write_text('{"mlflow": "9.1.0"}')
    os.utime(record, (2**32, 2**32))
    sql(mlflow_db(project), "update alembic_version set version_num = 'ffffffffffff'")
    one_line(project.kd("select", "tiny"), "install mlflow==9.1.0")


@pytest.mark.parametrize("revision", ["v2.4.0.a", "v9.0.0.a"])
def test_a_database_of_another_optuna_says_of_which_and_what_to_do(
    project: Case, revision: str
) -> None:
    storage = project.folder / "mlruns" / "optuna.db"
    sql(storage, "update alembic_version set version_num = ?", revision)
    says = (
        ["older Optuna", "2.4.0", "kdexp doctor --upgrade"]
        if "v2" in revision
        else ["newer Optuna", "install"]
    )
    one_line(project.kd("sweep", "tiny.yaml", "--trials", "4"), revision, *says)
    assert says[0] in project.kd("doctor").stdout


def test_doctor_takes_a_database_of_an_older_mlflow_along_and_keeps_a_copy(case: Case) -> None:
    from alembic import command as alembic
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    mlflow_db(case).unlink()
    engine = create_engine(f"sqlite:///{mlflow_db(case)}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{mlflow_db(case)}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.upgrade(config, "acf3f17fdcc7")
    engine.dispose()
    one_line(case.kd("train", "tiny.yaml"), "older MLflow", "kdexp doctor --upgrade")
    done = case.kd("doctor", "--upgrade")
    assert done.returncode == 0, done.stdout
    assert sql(
        case.folder / "mlruns" / "mlflow.db.before-acf3f17fdcc7",
        "select version_num from alembic_version",
    ) == [("acf3f17fdcc7",)]
    assert case.kd("doctor").returncode == 0
    assert case.kd("train", "tiny.yaml").returncode == 0


def test_doctor_changes_nothing_and_says_what_is_installed(case: Case) -> None:
    shutil.rmtree(case.folder / "mlruns")
    done = case.kd("doctor")
    assert done.returncode == 0
    for word in ("kdexp ", "torch ", "mlflow ", "optuna ", "is not there yet"):
        assert word in done.stdout
    assert not (case.folder / "mlruns").exists()


# --- many ---


def test_a_study_is_found_among_a_thousand_newer_experiments(project: Case) -> None:
    with closing(sqlite3.connect(mlflow_db(project))) as database, database:
        columns = [row[1] for row in database.execute("pragma table_info(experiments)")]
        (row,) = database.execute("select * from experiments where name = 'tiny'").fetchall()
        for number in range(2500):
            new = dict(zip(columns, row, strict=True)) | {
                "experiment_id": 10**6 + number,
                "name": f"customer {number}",
            }
            new["last_update_time"] = new["creation_time"] = (
                row[columns.index("creation_time")] + 1000 + number
            )
            database.execute(
                f"insert into experiments values ({','.join('?' * len(new))})", list(new.values())
            )
    run = selected(project)
    done = project.kd("sweep", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "trial 0" not in done.stdout.split("trial  parameters")[0], (
        "finished trials are not trained again"
    )
    assert "identical" in project.kd("reproduce", run).stdout
    runs = sql(
        mlflow_db(project),
        "select count(*) from tags where key = 'kdexp.kind' and value = 'teacher'",
    )
    assert runs == [(1,)]


# --- URLs ---

LIVE = "http://127.0.0.1:{port}"


@pytest.fixture
def web() -> Iterator[int]:
    """python -m http.server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (LIVE, ["no MLflow server", "--tracking-uri"]),
        (f"{LIVE}/#/experiments/1", ["no MLflow server"]),
        ("127.0.0.1:{port}", ["http://127.0.0.1:{port}"]),
        ("localhost:{port}", ["http://localhost:{port}"]),
        ("https://127.0.0.1:{port}", ["http:// in place of https://"]),
        ("file:{folder}/runs", ["is a path", "--stores"]),
        ("./runs", ["is a path", "sqlite:///"]),
        ("databricks", ["Databricks"]),
        ("databricks://profile", ["Databricks"]),
        ("http://", ["no host"]),
        ("http://127.0.0.1:99999", ["port"]),
        ("s3://bucket/runs", ["s3://", "postgresql://"]),
        ("postgres://me:s3cr3t@127.0.0.1:{closed}/x", ["postgresql://", "127.0.0.1"]),
        ("postgresql://me:p@ss@127.0.0.1:{closed}/x", ["127.0.0.1"]),
        ("mysql://me:hunter2@127.0.0.1:{closed}/x", ["mysql+pymysql://"]),
        ("sqlite:///nowhere/mlflow.db", ["nowhere is not there"]),
        ("http://me:p@ss@127.0.0.1:{closed}", ["No MLflow server answers"]),
        (
            "http://127.0.0.1:{closed}/?access_token=s3cr3t&key=hunter2",
            ["No MLflow server answers"],
        ),
    ],
)
def test_a_tracking_uri_that_cannot_be_meant_is_one_line(
    case: Case, web: int, uri: str, says: list[str]
) -> None:
    fill = {"port": web, "closed": free_port(), "folder": case.folder}
    done = case.kd("train", "tiny.yaml", "--tracking-uri", uri.format(**fill))
    one_line(done, *(word.format(**fill) for word in says))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgres://me:s3cr3t@127.0.0.1:{closed}/x", ["postgresql://", "correct --storage"]),
        ("optuna.db", ["sqlite:///optuna.db"]),
        ("./optuna.db", ["sqlite:///./optuna.db"]),
        ("journal.log", ["is a path", "sqlite:///"]),
        ("sqlite:///nowhere/optuna.db", ["nowhere is not there"]),
        ("mysql://me:s3cr3t@127.0.0.1/x", ["mysql+pymysql://"]),
        ("redis://:hunter2@127.0.0.1", ["redis://", "postgresql://"]),
        ("sqlite:///mlruns/mlflow.db", ["one database"]),
        ("sqlite:///mlruns/../mlruns//mlflow.db?timeout=3", ["one database"]),
    ],
)
def test_a_storage_that_cannot_be_meant_is_one_line(case: Case, url: str, says: list[str]) -> None:
    before = contents(case.folder)
    one_line(case.kd("sweep", "tiny.yaml", "--storage", url.format(closed=free_port())), *says)
    assert not (case.folder / "mlruns" / "optuna.db").exists()
    assert contents(case.folder).keys() - {"mlruns/place"} == before.keys() or "127.0.0.1" in url


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("sqlite:///{folder}/all.db", "sqlite:///{folder}/all.db"),
        ("sqlite:///all.db", "sqlite:///{folder}/./all.db?timeout=5"),
        ("sqlite:///link/all.db", "sqlite:///{folder}/all.db"),
        (
            "postgres://me:s3cr3t@127.0.0.1/x",
            "postgresql+psycopg://you:hunter2@localhost:5432/x?sslmode=disable",
        ),
    ],
)
def test_one_database_for_both_is_refused_before_anything_is_written(
    case: Case, storage: str, tracking: str
) -> None:
    (case.folder / "link").symlink_to(case.folder)
    before = contents(case.folder)
    uris = [
        "--storage",
        storage.format(folder=case.folder),
        "--tracking-uri",
        tracking.format(folder=case.folder),
    ]
    one_line(case.kd("sweep", "tiny.yaml", *uris), "one database", "of its own")
    assert contents(case.folder) == before


def test_a_foreign_database_is_named(case: Case, swept: Path) -> None:
    shutil.copy(swept / "mlruns" / "optuna.db", case.folder / "search.db")
    one_line(
        case.kd("train", "tiny.yaml", "--tracking-uri", "sqlite:///search.db"),
        "is not MLflow's database",
    )
    shutil.copy(swept / "mlruns" / "mlflow.db", case.folder / "runs.db")
    one_line(
        case.kd("sweep", "tiny.yaml", "--storage", "sqlite:///runs.db"), "is not Optuna's database"
    )
    case.write("text.db", "no database at all, but long enough to have a header of its own")
    one_line(case.kd("train", "tiny.yaml", "--tracking-uri", "sqlite:///text.db"), "not a database")


def test_the_embedded_store_by_its_address_is_the_embedded_store(tmp_path: Path) -> None:
    settings = Settings(stores=tmp_path, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db?timeout=9")
    assert checked(settings).tracking_uri is None


class Mlflow(BaseHTTPRequestHandler):
    """What a server sees of who we are."""

    seen: list[str | None] = []

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("login", "variables", "header"),
    [
        ("me:p@s/s?x#%&=' \"é@", {}, "Basic bWU6cEBzL3M/eCMlJj0nICLp"),
        (
            "",
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "pass"},
            "Basic bWU6cGFzcw==",
        ),
        ("", {"MLFLOW_TRACKING_TOKEN": "abcdef"}, "Bearer abcdef"),
    ],
)
def test_who_we_are_reaches_the_server_that_was_named(
    tmp_path: Path, monkeypatch, login, variables, header
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mlflow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (
        variables | {"HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
    ).items():
        monkeypatch.setenv(name, value)
    Mlflow.seen.clear()
    monkeypatch.setattr(tracking, "CONNECT_SECONDS", 0.0)
    url = f"http://{login}127.0.0.1:{server.server_address[1]}/#/experiments/1"
    with pytest.raises(Exception, match="MLflow"):  # it answers nothing else
        Tracking(checked(Settings(stores=tmp_path, tracking_uri=url)))
    server.shutdown()
    assert Mlflow.seen[0] == header


# --- names ---


@pytest.mark.parametrize("name", ["#1 (a) – Kopie~.v2 [bold]x 100% a@b+c", "知識蒸留" * 25])
def test_a_name_that_the_stores_allow_works_from_file_to_model(case: Case, name: str) -> None:
    if len(name) < 100:
        case.write(f"{name}.yaml", re.sub("^name:.*\n", "", TINY))
        done = case.kd("sweep", f"{name}.yaml", "--trials", "2")
    else:
        done = case.kd("sweep", "tiny.yaml", "--trials", "2", "--set", f"name={name}")
    assert done.returncode == 0, done.stderr
    again = case.kd("select", name)
    assert again.returncode == 0, again.stderr
    (model,) = re.findall(r'load_model\("(models:/.*)"\)', again.stdout)
    assert model == f"models:/{name}@smallest"
    assert client(case).get_model_version_by_alias(name, "smallest").run_id


@pytest.mark.parametrize(
    "name",
    [
        "tiny (1)",
        "tiny copy",
        "tiny~",
        "(x)",
        "tiny.v2",
        "#1",
        "_x",
        "a&b=c",
        "Ärger",
        "№ 1",
        "🍐1",
    ],
)
def test_a_file_name_that_is_a_good_name_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.yaml").write_text(re.sub("^name:.*\n", "", TINY))
    assert load(tmp_path / f"{name}.yaml").name == name


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "a:b",
        "it's",
        'say "x"',
        "why?",
        ".yaml",
        "-x",
        "...",
        "a`b",
        "a\\\\b",
        "x" * 101,
        "a\tb",
    ],
)
def test_a_name_that_the_stores_do_not_allow_is_refused_in_words(case: Case, name: str) -> None:
    case.write("tiny.yaml", TINY.replace("name: tiny", f"name: {json.dumps(name)}"))
    done = case.kd("train", "tiny.yaml")
    if name == "a\tb":
        assert done.returncode == 0, "blanks are one space"
        return
    assert "pattern" not in one_line(done, "a name is of 1 to 100 letters", "--set name=")


def test_a_name_is_the_same_however_its_letters_are_composed(case: Case) -> None:
    case.write("cafe\u0301.yaml", re.sub("^name:.*\n", "", TINY))
    assert case.kd("sweep", "cafe\u0301.yaml", "--trials", "2").returncode == 0
    for typed in ("caf\u00e9", "cafe\u0301", " caf\u00e9. "):
        assert case.kd("select", typed).returncode == 0
    # as an earlier version recorded it
    sql(mlflow_db(case), "update tags set value = ? where key = 'kdexp.study'", "cafe\u0301")
    sql(
        mlflow_db(case), "update experiments set name = ? where name = ?", "cafe\u0301", "caf\u00e9"
    )
    sql(case.folder / "mlruns" / "optuna.db", "update studies set study_name = ?", "cafe\u0301")
    assert case.kd("select", "caf\u00e9").returncode == 0
    done = case.kd("sweep", "cafe\u0301.yaml", "--trials", "3")
    assert done.returncode == 0, done.stderr
    assert sql(case.folder / "mlruns" / "optuna.db", "select count(*) from studies") == [(1,)]
    assert sql(
        mlflow_db(case), "select count(*) from tags where key = 'kdexp.kind' and value = 'study'"
    ) == [(1,)]


# --- a shell set up for something else ---

FOREIGN = {
    "MLFLOW_TRACKING_URI": "databricks",
    "MLFLOW_REGISTRY_URI": "databricks-uc",
    "MLFLOW_RUN_ID": "0123456789abcdef0123456789abcdef",
    "MLFLOW_EXPERIMENT_NAME": "elsewhere",
    "MLFLOW_EXPERIMENT_ID": "77",
    "MLFLOW_ACTIVE_MODEL_ID": "m-0123456789abcdef",
    "_MLFLOW_ACTIVE_MODEL_ID": "m-0123456789abcdef",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://nowhere",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DFS_TMP": "/nowhere",
    "MLFLOW_WHAT_COMES_NEXT_YEAR": "x",
    "MLFLOW_TRACKING_INSECURE_TLS": "true",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": "s3cr3t",
}


def test_variables_that_are_meant_for_another_use_of_mlflow_are_ignored_and_named_once(
    case: Case,
) -> None:
    done = case.alone("sweep", "tiny.yaml", "--workers", "2", env=FOREIGN)
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "MLFLOW_" in line]
    named = set(re.findall(r"_?MLFLOW_\w+", said))
    assert named == {
        name
        for name in FOREIGN
        if not name.startswith(("MLFLOW_TRACKING_USER", "MLFLOW_TRACKING_P", "MLFLOW_TRACKING_I"))
    }
    assert sql(mlflow_db(case), "select count(*) from runs where status = 'FINISHED'") == [(5,)]


@pytest.mark.slow
def test_the_ui_answers_on_the_address_that_it_prints_whatever_the_shell_says(
    case: Case, tmp_path: Path
) -> None:
    import urllib.request

    assert case.kd("train", "tiny.yaml").returncode == 0
    port = free_port()
    foreign = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": "ml.example.com",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "UVICORN_PORT": "1",
    }
    ui = subprocess.Popen(
        command("ui", "--port", str(port)), cwd=case.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment() | foreign | {"http_proxy": "http://127.0.0.1:1", "NO_PROXY": "example.com"},
    )  # fmt: skip
    try:
        assert ui.stdout is not None
        for line in ui.stdout:
            if "Ctrl-C" in line:
                break
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert page.status == 200
    finally:
        ui.terminate()
        ui.wait(60)
