"""Servers that can be killed and started again: MLflow's, PostgreSQL's, and one in between that
answers badly.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import needs

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class MlflowServer:
    """A real MLflow server on loopback, on a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url, self.database = f"http://127.0.0.1:{self.port}", folder / "server.db"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}",
             "--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port),
             "--workers", "1"],
            cwd=self.folder, start_new_session=True, **QUIET,
        )  # fmt: skip
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the MLflow server never answered")

    def kill(self) -> None:
        """kill -9, of all its processes."""
        if self.process:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


class Postgresql:
    """A PostgreSQL server of its own, as its own user (it refuses to run as root)."""

    def __init__(self, password: str = "") -> None:
        bins = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        needs(bool(bins), "PostgreSQL's server programs")
        self.bin, self.port = bins[-1].parent, free_port()
        self.folder = Path(f"/tmp/kdexp-faults-{os.getpid()}-{self.port}")
        self.as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._run("initdb", "-D", self.folder, "-A", "trust", "-U", "kdexp")
        secret = f":{password}" if password else ""
        self.url = f"postgresql://kdexp{secret}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._run(
            "pg_ctl",
            "-D",
            self.folder,
            "-w",
            "-o",
            f"-p {self.port} -h 127.0.0.1 -k {self.folder}",
            "start",
            **QUIET,
        )

    def kill(self) -> None:
        self._run("pg_ctl", "-D", self.folder, "-m", "immediate", "stop", **QUIET)

    def dump(self) -> str:
        """All it holds, as text."""
        return self._run(
            "pg_dump",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "kdexp",
            "postgres",
            capture_output=True,
        )

    def remove(self) -> None:
        subprocess.run(
            [*self.as_user, self.bin / "pg_ctl", "-D", self.folder, "-m", "immediate", "stop"],
            check=False,
            **QUIET,
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str | Path, **how: object) -> str:
        how = how or {"capture_output": True}
        done = subprocess.run(
            [*self.as_user, self.bin / program, *arguments], check=True, cwd="/tmp", **how
        )
        return (done.stdout or b"").decode()


class BadProxy:
    """Between kdexp and a real server: every fifth request is answered badly."""

    def __init__(self, server: str, how: str) -> None:
        self.port, self.count = free_port(), 0
        self.url = f"http://127.0.0.1:{self.port}"
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                with lock:
                    proxy.count += 1
                    bad = proxy.count % 5 == 0 and self.path != "/health"
                if bad and how in ("500", "429"):
                    self.send_response(int(how))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if bad and how == "slow":
                    time.sleep(1)
                status, headers, content = self.forward(body)
                if bad and how == "answer lost":  # the server has done it, and nobody hears of it
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in (
                        "transfer-encoding",
                        "content-length",
                        "connection",
                        "date",
                        "server",
                    ):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def forward(self, body: bytes | None) -> tuple[int, list[tuple[str, str]], bytes]:
                headers = {
                    k: v
                    for k, v in self.headers.items()
                    if k.lower() not in ("host", "connection", "accept-encoding")
                }
                request = urllib.request.Request(
                    server + self.path, body, headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        return answer.status, answer.getheaders(), answer.read()
                except urllib.error.HTTPError as error:
                    return error.code, list(error.headers.items()), error.read()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
