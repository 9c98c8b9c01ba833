"""Addresses of servers and databases as people give them, and the secrets in them.

What is plainly meant is put right once (a browser's `#/experiments/1`, `postgres://`, a raw `@` in
a password); the rest is refused in one line. Whatever kdexp shows or records goes through
`without_credentials`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote

from kdexp import KdexpError

__all__ = [
    "one_database",
    "remember_secrets",
    "sqlite_file",
    "sqlite_url",
    "storage_url",
    "tracking_url",
    "without_credentials",
]

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# as hosting companies write it; SQLAlchemy knows the second alone
OTHERS = {"postgres": "postgresql"}
PORTS = {"postgresql": "5432", "mysql": "3306", "mssql": "1433"}
# names in a URL's query, in any case
TELLING = r"[\w.\-]*(?:token|key|pass|pwd|secret|sig|auth|credential|session)[\w.\-]*"
# characters of a secret that is masked wherever it stands; shorter ones only inside of a URL
SHORTEST = 4
SURE = 12  # characters from which on a secret is masked also within a word
EMBEDDED = "without it kdexp uses the embedded store"
_secrets: dict[str, str] = {}
"""Those of the URLs and variables that this process was given, in every form in which a message may
show them, and masked.
"""


# --- what may be given ---


def tracking_url(text: str) -> str:
    """--tracking-uri as MLflow takes it. Raises KdexpError where it is neither a server nor a
    database.
    """
    given = text.strip()
    shown = without_credentials(given if "://" in given else f"http://{given}").removeprefix(
        "" if "://" in given else "http://"
    )
    if given.lower().partition(":")[0] in ("databricks", "databricks-uc", "uc"):
        raise KdexpError(
            f"--tracking-uri {shown}: kdexp records in an MLflow server (http://HOST:5000), a"
            " database (postgresql://…, sqlite:///FILE) or its embedded store, not in Databricks;"
            " leave it out for the embedded store."
        )
    scheme, separator, rest = given.partition("://")
    if not separator and re.fullmatch(r"(.*@)?[\w.\-]+:\d+(/.*)?", given):
        raise KdexpError(
            f"--tracking-uri {shown}: write it with http:// (or https://): --tracking-uri"
            f" http://{shown}"
        )
    if not separator or scheme.lower() == "file":
        raise KdexpError(
            f"--tracking-uri {shown}: is a path; MLflow keeps no runs in folders any more. Name a"
            " server (http://HOST:5000) or a database (sqlite:///FILE); a folder of embedded"
            " stores is --stores FOLDER."
        )
    if scheme.lower() in ("http", "https"):
        return _server(scheme.lower(), rest)
    return _database("--tracking-uri", given, "an MLflow server (http://HOST:5000), ", EMBEDDED)


def storage_url(text: str) -> str:
    """--storage as Optuna takes it. Raises KdexpError where it is no database."""
    given = text.strip()
    if "://" not in given:
        example = (
            f"sqlite:///{given}"
            if given.endswith((".db", ".sqlite", ".sqlite3"))
            else "sqlite:///FILE.db"
        )
        raise KdexpError(
            f"--storage {without_credentials(given)}: is a path; Optuna's storage is a database's"
            f" URL: --storage {example} or postgresql://HOST/DB; {EMBEDDED}."
        )
    return _database("--storage", given, "", EMBEDDED)


def _server(scheme: str, rest: str) -> str:
    """A server's root: without what a browser's address bar has behind it."""
    user, rest = _divided(rest)
    rest = rest.partition("#")[0].rstrip("/")
    if not re.match(r"[\w.\-]+|\[[0-9a-fA-F:.]+\]", rest):
        raise KdexpError(
            f"--tracking-uri {scheme}://{rest}: names no host; write it as http://HOST:5000;"
            f" {EMBEDDED}."
        )
    port = re.match(r"(?:[\w.\-]+|\[[0-9a-fA-F:.]+\]):([^/?]*)", rest)
    if port and not (port[1].isdigit() and 0 < int(port[1]) < 65536):
        raise KdexpError(
            f"--tracking-uri {scheme}://{rest}: the port '{port[1]}' is no number from 1 to 65535."
        )
    return f"{scheme}://{_quoted(user)}{rest}"


def _database(option: str, given: str, also: str, leave_out: str) -> str:
    scheme, _, rest = given.partition("://")
    backend, plus, driver = scheme.lower().partition("+")
    backend = OTHERS.get(backend, backend)
    if backend not in DATABASES:
        # no kind at all: a secret in the wrong place?
        kind = scheme if re.fullmatch(r"[A-Za-z0-9+]{1,12}", scheme) else "…"
        raise KdexpError(
            f"{option} {kind}://…: is not a kind of store that kdexp can use; allowed: {also}a"
            f" database ({', '.join(f'{name}://…' for name in DATABASES)}); {leave_out}."
        )
    if backend == "sqlite":
        file = sqlite_file(given)
        if file and not file.absolute().parent.is_dir():
            raise KdexpError(
                f"{option} {given}: the folder {file.parent} is not there; make it, or correct the"
                " path."
            )
        if file and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise KdexpError(
                f"{option} {given}: {file} cannot be written here; name another file, or change its"
                " permissions."
            )
        return given
    user, rest = _divided(rest)
    return f"{backend}{plus}{driver}://{_quoted(user)}{rest}"


def _divided(rest: str) -> tuple[str, str]:
    """User part (with its @) and what follows, of a URL behind its ://. A raw password may hold @,
    /, ? and #.
    """
    if re.match(r"(?:[\w.\-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?(?:/[^@]*?)?[?#][\w.\-/]+=", rest):
        return "", rest  # a host comes first: an @ behind it belongs to the query
    user, at, after = rest.rpartition("@")
    return user + at, after


def _quoted(user: str) -> str:
    """A user part whose name and password are percent-encoded, as every library reads them."""
    if not user:
        return ""
    name, colon, password = user[:-1].partition(":")
    return f"{_encoded(name)}{colon}{_encoded(password)}@"


def _encoded(text: str) -> str:
    # a lone % : it was not encoded
    plain = text if re.search(r"%(?![0-9a-fA-F]{2})", text) else unquote(text)
    return quote(plain, safe="")


# --- SQLite ---


def sqlite_url(file: Path) -> str:
    """The URL of an SQLite file, whatever its path holds. The timeout lets writers of several
    processes wait for each other.
    """
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for other databases, and in memory."""
    if not re.match(r"sqlite(\+\w+)?:///", url):
        return None
    path = unquote(url.partition(":///")[2].partition("?")[0])
    return Path(path.removeprefix("file:")) if path and path != ":memory:" else None


def one_database(one: str, other: str) -> bool:
    """Whether two URLs name the same database, however they spell it."""
    first, second = sqlite_file(one), sqlite_file(other)
    if first and second:
        same = first.exists() and second.exists() and first.samefile(second)
        return same or first.resolve() == second.resolve()
    return first is second is None and "://" in one and _named(one) == _named(other)


def _named(url: str) -> tuple[str, str, str, str]:
    """Kind, host, port and database of a server's URL."""
    scheme, _, rest = url.partition("://")
    backend = OTHERS.get(scheme.lower().partition("+")[0], scheme.lower().partition("+")[0])
    address, _, database = _divided(rest)[1].partition("?")[0].partition("/")
    host, _, port = address.partition(":")
    return (
        backend,
        "localhost" if host in ("127.0.0.1", "") else host.lower(),
        port or PORTS.get(backend, ""),
        unquote(database),
    )


# --- secrets ---


def remember_secrets(*urls: str) -> None:
    """Mask these URLs' secrets from now on wherever they stand, in parts and in every encoding."""
    for url in urls:
        scheme, separator, rest = url.partition("://")
        user = _divided(rest)[0][:-1] if separator else ""
        # else a database's user without a password
        secret_user = ":" in user or scheme.lower().startswith("http")
        found = {user, *user.split(":", 1)[1:]} if user and secret_user else set()
        found |= {
            match[1] for match in re.finditer(rf"(?i)[?&;]{TELLING}=(.*?)(?=&[\w.\-]+=|$)", rest)
        }
        whole = url
        for secret in found - {""}:
            _secrets.update(dict.fromkeys(_forms(secret), "***"))
            # what a parser may take for the host
            ends = [match.end() for match in re.finditer(r"[@:/?#]", secret)]
            _secrets.update({f"{secret[end:]}@": "***@" for end in ends if secret[end:]})
            whole = whole.replace(secret, "***")
        if found:
            _secrets[url] = _masked(whole)
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        _secrets.update(dict.fromkeys(_forms(os.environ.get(name, "")), "***"))


def _forms(secret: str) -> set[str]:
    plain = unquote(secret)
    forms = {secret, plain}
    for text in (secret, plain):
        forms |= {
            quote(text, safe=""),
            quote(text),
            quote_plus(text),
            quote(text, safe="!#$%&'()*+,/:;=?@[]~"),
        }
        forms |= {
            quote(text, safe="!$&'()*+,;=:~"),
            repr(text)[1:-1],
            json.dumps(text)[1:-1],
            text.replace("'", "'\"'\"'"),
        }
    return {form for form in forms if len(form) >= SHORTEST}


def without_credentials(text: str) -> str:
    """`text` with the secrets of every URL in it masked: postgresql://***@host/db, http://***@host,
    ?password=***.
    """
    for secret in sorted(_secrets, key=len, reverse=True):
        if secret in text:
            text = re.sub(_pattern(secret), _secrets[secret].replace("\\", r"\\"), text)
    return _masked(text)


def _pattern(secret: str) -> str:
    """A short one as a whole word: a password of `post` is not to be seen in `postgresql`."""
    short = len(secret) < SURE
    before = r"(?<!\w)" if short and secret[0].isalnum() else ""
    after = r"(?!\w)" if short and secret[-1].isalnum() else ""
    return f"{before}{re.escape(secret)}{after}"


def _masked(text: str) -> str:
    text = re.sub(r"(?<=://)(\S+)", lambda match: _without_user(match[1]), text)
    text = re.sub(r"(://[^\s/?#]*:[^@\n]*?)@(?=[\w.\-]+)", _spaced, text)
    return re.sub(rf"(?i)([?&;]{TELLING}=)[^\n]*?(?=&[\w.\-]+=|[\s'\")\]]|$)", r"\1***", text)


def _spaced(match: re.Match[str]) -> str:
    """A password with spaces in it, unless the first word behind :// is an address by itself."""
    first = match[1].removeprefix("://").split()[0]
    whole = re.fullmatch(
        r"(?:\*\*\*@)?(?:[\w.\-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?(?:[/?#]\S*)?[,;:.'\")]*", first
    )
    return match[0] if whole or " " not in match[1] else "://***@"


def _without_user(rest: str) -> str:
    user, after = _divided(rest)
    return f"***@{after}" if user else rest
