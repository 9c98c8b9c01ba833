"""Where to run: defaults, and secrets that never reach a message."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from kdexp import urls
from kdexp.settings import Settings, deaf, without_credentials


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
        "http://me:p@s3cret@host",
        "http://me:s3 cret@host/db",
        "http://me:pa?s3cret@host",
        "http://me:pa#s3cret@host",
        "http://host/?access_token=s3cret",
        "http://host/?x=1&X-Amz-Signature=s3cret&y=2",
        "https://host/x?api_key=s3cret#frag",
        "https://me:s3cr%40et-s3cret@host: refused (Caused by http://me:s3cret@host)",
    ],
)
def test_secrets_in_urls_are_masked_and_the_host_stays(text: str) -> None:
    shown = without_credentials(text)
    assert "s3cret" not in shown
    assert "host" in shown
    assert "***" in shown


RAW = "s3cret@:/?#%&= 'x'\"é\\t4il"


@pytest.mark.parametrize(
    "form",
    ["http://me:{}@host:80/x", "postgresql://{}@host/db", "http://host/?access_token={}&x=1"],
)
def test_a_secret_that_is_known_is_masked_in_parts_and_in_every_encoding(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "_secrets", {})
    url = form.format(RAW)
    urls.remember_secrets(url)
    said = [
        url, repr(url), json.dumps(url), quote(RAW), quote(RAW, safe=""), quote_plus(RAW), f"could not resolve {RAW}",
        shlex.join(["kdexp", "sweep", "--tracking-uri", url]), f"host='{RAW.rpartition('/')[2]}@host'", str({"url": url}),
    ]  # fmt: skip
    for text in said:
        shown = without_credentials(f"before {text} after")
        assert "s3cret" not in shown, text
        assert "t4il" not in shown, text
        assert shown.startswith("before "), shown
        assert shown.endswith(" after"), shown


def test_a_common_word_as_a_password_does_not_mask_what_contains_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(urls, "_secrets", {})
    urls.remember_secrets("postgresql://postgres@host/db", "postgresql://kdexp:post@host/db")
    assert (
        without_credentials("postgresql://host/db is away: post")
        == "postgresql://host/db is away: ***"
    )
    assert without_credentials("connection of postgres refused") == "connection of postgres refused"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://127.0.0.1:5000/#/experiments/1?workflowType=x", "http://127.0.0.1:5000"),
        (" http://host/mlflow/ ", "http://host/mlflow"),
        ("HTTP://me:p@ss/w?o#r%d@host:80", "http://me:p%40ss%2Fw%3Fo%23r%25d@host:80"),
        ("http://me:p%40ss@host", "http://me:p%40ss@host"),
        ("http://[::1]:5000/#/", "http://[::1]:5000"),
        ("postgres://me:p@ss@host/db", "postgresql://me:p%40ss@host/db"),
        ("postgresql+psycopg://host/db?mail=a@b", "postgresql+psycopg://host/db?mail=a@b"),
    ],
)
def test_a_url_is_taken_as_it_is_plainly_meant(given: str, taken: str) -> None:
    assert urls.tracking_url(given) == taken


def test_variables_for_another_use_of_mlflow_are_ignored_by_a_rule() -> None:
    kept = dict.fromkeys(
        ("MLFLOW_TRACKING_TOKEN", "MLFLOW_S3_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "PATH"), "1"
    )
    shell = kept | {
        "MLFLOW_RUN_ID": "x",
        "_MLFLOW_NEXT_YEAR": "x",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "x",
        "no_proxy": "a.b, c",
    }
    deaf(shell)
    assert shell.keys() - {"NO_PROXY", "no_proxy"} == kept.keys()
    assert shell["no_proxy"] == shell["NO_PROXY"] == "a.b,c,127.0.0.1,localhost,::1"
    everything = {"NO_PROXY": "*"}
    deaf(everything)
    assert everything == {"NO_PROXY": "*"}


def test_a_url_without_secrets_stays_as_it_is() -> None:
    for text in (
        "http://127.0.0.1:5000/#/experiments/1",
        "sqlite:////tmp/x.db?timeout=60",
        "No student reaches 0.93: see a@b",
    ):
        assert without_credentials(text) == text
