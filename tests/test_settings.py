"""Where to run: defaults, and secrets that never reach a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdexp.settings import Settings, without_credentials


def test_the_default_stores_are_embedded(tmp_path: Path) -> None:
    settings = Settings(stores=tmp_path)
    assert settings.tracking_url == f"sqlite:///{tmp_path}/mlflow.db?timeout=60"
    assert settings.storage_url == f"sqlite:///{tmp_path}/optuna.db?timeout=60"
    assert Settings(storage="a://b", tracking_uri="http://c").storage_url == "a://b"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:s3cret@host/db",
        "postgresql+psycopg://me:s3cret@host:5432/db?x=1",
        "postgresql://me:pa/s3cret/ss@host/db",
        "http://s3cret@host/path",
        "http://:s3cret@host",
        "postgresql://host/db?user=me&password=s3cret",
        "https://me:s3cr%40et-s3cret@host: refused (Caused by http://me:s3cret@host)",
    ],
)
def test_secrets_in_urls_are_masked_and_the_host_stays(text: str) -> None:
    shown = without_credentials(text)
    assert "s3cret" not in shown
    assert "host" in shown
    assert "***" in shown


def test_a_url_without_secrets_stays_as_it_is() -> None:
    for text in ("http://127.0.0.1:5000/#/experiments/1", "sqlite:////tmp/x.db?timeout=60", "No student reaches 0.93: see a@b"):
        assert without_credentials(text) == text
