"""The product as its users run it, for benchmarks: API, dispatcher, worker and broker as own processes.

Everything listens on loopback or on a socket in a temporary folder, and is gone when the benchmark is. What
is measured, and how, is each benchmark's.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
from psycopg import sql

from halfstep.service.cli.up import broker
from halfstep.service.store.sql.schema import migrate

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 45.0
T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], seconds: float = 120.0) -> T:
    """The first true value of `look`, asked for every few milliseconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.005)
    raise TimeoutError(f"{what}: not within {seconds:g} s")


class Installation:
    """One data directory, one database, one broker, and the processes between them.

    Args:
        folder: a new one; its path is short enough for a socket.
        database_url: empty: SQLite in the folder.
        broker_url: empty: the embedded Valkey.
        settings: HALFSTEP_… by lower-case name.
    """

    def __init__(
        self, folder: Path, *, database_url: str = "", broker_url: str = "", **settings: Any
    ) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()
        self.database_url = database_url or f"sqlite:///{self.data / 'halfstep.db'}"
        port = _free_port()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HALFSTEP_")},
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            "HALFSTEP_DATA_DIR": str(self.data),
            "HALFSTEP_DATABASE_URL": self.database_url,
            "HALFSTEP_BROKER_URL": broker_url,
            "HALFSTEP_PORT": str(port),
            "HALFSTEP_LOG_FORMAT": "json",
            "HALFSTEP_LOG_LEVEL": "debug",
            **{f"HALFSTEP_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0)
        self._embedded = not broker_url
        self._read = 0

    def __enter__(self) -> Self:
        try:
            migrate(self.database_url)
            if self._embedded:
                self.start("broker", broker.command(self.data / "broker.sock"))
                wait_for("the broker's socket", (self.data / "broker.sock").exists)
            self.start("api", (sys.executable, "-m", "halfstep.service.api"))
            self.start("dispatch", (sys.executable, "-m", "halfstep.service.dispatch"))
            wait_for("the API answers", self._ready)
            self.start("worker", (sys.executable, "-m", "halfstep.worker.app"))
            wait_for("a worker is registered", lambda: self.get("/workers")["items"])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, name: str, command: tuple[str, ...]) -> None:
        """Start a process whose output goes to a file of its name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def close(self) -> None:
        """End everything, the broker last."""
        self.client.close()
        for name in ("worker", "dispatch", "api", "broker"):
            process = self.processes.pop(name, None)
            if process is None:
                continue
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def get(self, path: str, **parameters: Any) -> Any:
        """The document at `path`."""
        answer = self.client.get(path, params=parameters)
        answer.raise_for_status()
        return answer.json()

    def submit(self, spec: dict[str, Any]) -> str:
        """Submit a job; returns its id."""
        answer = self.client.post("/jobs", json=spec)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def ended(self, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
        """The job, once it has succeeded.

        Raises:
            RuntimeError: it ended otherwise.
        """

        def look() -> dict[str, Any] | None:
            job: dict[str, Any] = self.get(f"/jobs/{job_id}")
            return job if job["is_terminal"] else None

        job = wait_for(f"job {job_id} ends", look, seconds)
        if job["state"] != "succeeded":
            raise RuntimeError(f"job {job_id} is {job['state']}: {job['status_reason']}")
        return job

    def warm(self, seconds: float = 120.0) -> dict[str, Any]:
        """Wait until the worker says that a process is warm that was not reported before; its log entry."""

        def look() -> dict[str, Any] | None:
            with (self.folder / "worker.log").open("rb") as log:
                log.seek(self._read)
                for line in log:
                    if not line.endswith(b"\n"):
                        return None
                    self._read += len(line)
                    with contextlib.suppress(ValueError):
                        entry: dict[str, Any] = json.loads(line)
                        if entry.get("event") == "a process is warm":
                            return entry
            return None

        return wait_for("a process is warm", look, seconds)

    def _ready(self) -> bool:
        try:
            return self.client.get("/health/live").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def postgres_database(server: str) -> Iterator[str]:
    """The URL of a new database on `server`, dropped afterwards."""
    name = f"halfstep_bench_{os.getpid()}_{time.monotonic_ns() % 10**9}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
