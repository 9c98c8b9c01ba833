"""Passwords and tokens, in URLs and in the environment, are found nowhere: not in stores,
artifacts, logs or messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from faults.conftest import SWEEP, Life, written
from faults.servers import MlflowServer, Postgresql, free_port

pytestmark = [pytest.mark.slow, pytest.mark.postgresql]

PLAIN, ODD, ELSEWHERE = "s3cr3t-database", "s3cr3t/odd@word:?#%&= 'q'\"é-t4il", "s3cr3t-environment"
TRACES = ("s3cr3t", "t4il")
"""The beginning and the end: what a parser makes of the characters in between shows one of them."""


@dataclass(frozen=True)
class Environment:
    """Secrets in the variables of the process."""

    def __call__(self) -> None:
        for name in (
            "AWS_SECRET_ACCESS_KEY",
            "MLFLOW_TRACKING_TOKEN_OF_SOMEBODY",
            "DATABASE_URL",
            "MY_TOKEN",
        ):
            os.environ[name] = ELSEWHERE


@pytest.fixture
def postgresql() -> Iterator[Postgresql]:
    server = Postgresql(PLAIN)
    server.start()
    yield server
    server.remove()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def holding(folder: Path) -> list[str]:
    """The files in which a secret is found, as it is or percent-encoded."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if any(trace.encode() in content for trace in TRACES):
                found.append(str(path.relative_to(folder)))
    return found


def test_secrets_are_found_nowhere(
    tmp_path: Path, postgresql: Postgresql, server: MlflowServer
) -> None:
    place = written(tmp_path / "place")
    tracking = server.url.replace("http://", f"http://me:{ODD}@")  # raw
    quoted = server.url.replace("http://", f"http://me:{quote(ODD, safe='')}@")
    sweep = [*SWEEP, "--storage", postgresql.url, "--tracking-uri", tracking]
    texts = []

    def run(arguments: list[str], code: int) -> str:
        end = Life(place, arguments, Environment()).end()
        assert end.code == code, end.err
        texts.extend([end.out, end.err])
        return end.out

    run_id = run(sweep, 0).split("Run ID:")[1].split()[0]
    run(["reproduce", run_id, "--tracking-uri", tracking], 0)
    run(["select", "tiny", "--bar", "1.0", "--tracking-uri", tracking], 1)
    run(["reproduce", "0" * 32, "--tracking-uri", quoted], 1)
    run(
        [
            *SWEEP,
            "--storage",
            postgresql.url.replace("/postgres", "/nowhere"),
            "--tracking-uri",
            tracking,
        ],
        1,
    )
    run([*SWEEP, "--storage", f"postgresql://me:{PLAIN}@127.0.0.1:{free_port()}/x"], 1)
    run([*SWEEP, "--storage", f"mysql://me:{PLAIN}@127.0.0.1:{free_port()}/x"], 1)
    run([*SWEEP, "--storage", f"{PLAIN}://me"], 1)
    run(
        [
            "train",
            "tiny.yaml",
            "--tracking-uri",
            f"http://me:{quote(ODD, safe='')}@127.0.0.1:{free_port()}",
        ],
        1,
    )
    run(["train", "tiny.yaml", "--tracking-uri", f"http://me:{ODD}@127.0.0.1:{free_port()}"], 1)
    run(
        ["train", "tiny.yaml", "--tracking-uri", f"http://127.0.0.1:{free_port()}/?token={PLAIN}"],
        1,
    )
    run(
        [
            "train",
            "tiny.yaml",
            "--tracking-uri",
            f"http://127.0.0.1:{free_port()}/?access_token={ODD}",
        ],
        1,
    )
    run([*SWEEP, "--storage", f"postgresql://me:{ODD}@127.0.0.1:{free_port()}/x"], 1)
    run([*SWEEP, "--storage", f"postgresql://127.0.0.1:{free_port()}/x?user=me&password={ODD}"], 1)
    print("\n=====\n".join(texts))
    assert not [
        text for text in texts if any(trace in text.replace(f"{PLAIN}://…", "") for trace in TRACES)
    ]
    assert not any(trace in postgresql.dump() for trace in TRACES)
    assert holding(tmp_path) == []
    (tmp_path / "place" / "planted").write_text(PLAIN)
    assert holding(tmp_path) == ["place/planted"], "this test must be able to fail"
