"""A whole installation as real processes on loopback: API, dispatcher, workers, each killable by itself."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).parents[2]
# First the product of this very tree: a copy of the tree runs the copy, whatever is installed.
SOURCES = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
T = TypeVar("T")
TERMINAL = {"succeeded", "failed", "cancelled"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, look: Callable[[], T | None], seconds: float) -> T:
    """The first true value of `look`; fails the test with `what` when none comes in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds:g} s")


def children_of(pid: int) -> list[int]:
    """Living processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Cluster:
    """Processes that share one database, one broker and one data directory."""

    def __init__(self, folder: Path, database_url: str, broker_url: str, **settings: object) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HALFSTEP_")},
            "PYTHONPATH": SOURCES,
            "HALFSTEP_DATA_DIR": str(folder / "data"),
            "HALFSTEP_DATABASE_URL": database_url,
            "HALFSTEP_BROKER_URL": broker_url,
            "HALFSTEP_PORT": str(self.port),
            "HALFSTEP_LEASE_SECONDS": "3",
            "HALFSTEP_HEARTBEAT_SECONDS": "0.5",
            "HALFSTEP_DISPATCH_SECONDS": "0.3",
            # On a small machine several jobs whose threads spin for each other would starve it.
            "HALFSTEP_WORKER_THREADS": "1",
            **{f"HALFSTEP_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.client = httpx.Client(base_url=self.url, timeout=30.0)

    def start(self, name: str, module: str, *arguments: str, **settings: object) -> "subprocess.Popen[bytes]":
        own = {f"HALFSTEP_{key.upper()}": str(value) for key, value in settings.items()}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**self.environment, **own},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        return process

    def start_api(self) -> None:
        self.start("api", "halfstep.service.api")
        wait_for("the API answers", self._ready, 30)

    def start_worker(self, name: str, **settings: object) -> "subprocess.Popen[bytes]":
        process = self.start(name, "halfstep.worker.app", worker_name=name, **settings)
        wait_for(
            f"{name} is registered", lambda: name in [w["name"] for w in self.get("/workers")["items"]], 60
        )
        return process

    def _ready(self) -> bool:
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, spec: dict[str, Any]) -> str:
        answer = self.client.post("/jobs", json=spec)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/jobs/{job_id}")
        return found

    def wait(
        self, job_id: str, states: Sequence[str] = tuple(TERMINAL), seconds: float = 120
    ) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = self.job(job_id)
            assert found["state"] in states or found["state"] not in TERMINAL, found
            return found if found["state"] in states else None

        return wait_for(f"{job_id} is {' or '.join(states)}; {self.tails()}", look, seconds)

    def columns(self, job_id: str, fields: str | None = None) -> dict[str, list[Any]]:
        """The whole record, page by page."""
        merged: dict[str, list[Any]] = {}
        after = 0
        while True:
            page = self.get(
                f"/jobs/{job_id}/metrics",
                after_step=after,
                limit=10_000,
                **({"fields": fields} if fields else {}),
            )
            for name, values in page["columns"].items():
                merged.setdefault(name, []).extend(values)
            if not page["count"]:
                return merged
            after = page["next_after_step"]

    def tails(self) -> str:
        texts = [
            f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.folder.glob("*.log")
        ]
        return "\n".join(texts)

    def stop(self) -> None:
        """End every process of this installation, politely first; children must be gone too."""
        family = [
            pid for process in self.processes.values() for pid in [process.pid, *children_of(process.pid)]
        ]
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"a process ignored SIGTERM for 40 s; {self.tails()}") from None
        self.client.close()
        wait_for("no process is left", lambda: not any(alive(pid) for pid in family), 10)
