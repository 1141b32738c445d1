"""An installation to be mistreated: real processes behind proxies, started again when they die."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import text
from sqlalchemy.orm import Session

from halfstep.service.errors import StoreUnavailable
from halfstep.service.faultpoints import HITS, VARIABLE
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from tests.e2e.cluster import Cluster, children_of
from tests.faults import audit
from tests.faults.proxy import Proxy
from tests.faults.servers import OwnPostgres, OwnRedis

T = TypeVar("T")
LEASE_SECONDS = 1.0
STALL_SECONDS = 30.0


class Installation:
    """API, dispatcher, `workers` workers, Redis and a database, each at the mercy of its methods."""

    def __init__(self, folder: Path, kind: str, workers: int, **settings: object) -> None:
        self.kind, self.folder = kind, folder
        self.points = folder / "points"
        self.points.mkdir()
        self.redis = OwnRedis(folder)
        self.redis_proxy = Proxy(self.redis.port)
        self.postgres: OwnPostgres | None = None
        self.postgres_proxy: Proxy | None = None
        if kind == "postgresql":
            self.postgres = OwnPostgres()
            self.postgres_proxy = Proxy(self.postgres.port)
            direct = self.postgres.url
            through = direct.replace(f":{self.postgres.port}/", f":{self.postgres_proxy.port}/")
        else:
            direct = through = f"sqlite:///{folder / 'halfstep.db'}"
        migrate(direct)
        self.database = Database(direct)
        audit.install(self.database)
        self.cluster = Cluster(
            folder,
            through,
            f"redis://127.0.0.1:{self.redis_proxy.port}/0",
            **{
                "lease_seconds": LEASE_SECONDS,
                "heartbeat_seconds": LEASE_SECONDS / 4,
                "dispatch_seconds": 0.25,
                "stall_seconds": STALL_SECONDS,
                "drain_seconds": 10.0,
                "worker_device": "cpu",
                "component_modules": json.dumps(["tests.faults.components", "tests.faults.powerloss"]),
                **settings,
            },
        )
        self.cluster.environment[VARIABLE] = str(self.points)
        self.data_dir = folder / "data"
        self.workers = [f"w{number}" for number in range(1, workers + 1)]
        self.restarts = 0
        self._starting = threading.Lock()
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def start(self, *, dispatcher: bool = True) -> None:
        self.cluster.start_api()
        if dispatcher:
            self.cluster.start("dispatch", "halfstep.service.dispatch")
        for name in self.workers:
            self.cluster.start(name, "halfstep.worker.app", worker_name=name)
        for name in self.workers:
            self.cluster_wait_registered(name)
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    def cluster_wait_registered(self, name: str) -> None:
        deadline = time.monotonic() + 120
        while name not in [worker["name"] for worker in self.cluster.get("/workers")["items"]]:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} did not register; {self.cluster.tails()}")
            time.sleep(0.1)

    def pid(self, name: str) -> int:
        return self.cluster.processes[name].pid

    def child(self, worker: str) -> int | None:
        """The process that runs the worker's job: the oldest of its children."""
        found = children_of(self.pid(worker))
        return min(found, key=_started) if found else None

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a part; the keeper starts it again once it is gone."""
        self.cluster.processes[name].send_signal(number)

    def restart_under(self, worker: str, environment: dict[str, str]) -> None:
        """End a worker at once and start it again with more in its environment, this once."""
        with self._starting:
            process = self.cluster.processes[worker]
            process.kill()
            process.wait()
            before = dict(self.cluster.environment)
            self.cluster.environment.update(environment)
            try:
                self.cluster.start(worker, "halfstep.worker.app", worker_name=worker)
            finally:
                self.cluster.environment = before

    def look(self, read: Callable[[Session], T], seconds: float = 30.0) -> T:
        """Read the database directly, again where it is away for a fault's sake."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with self.database.read() as s:
                    return read(s)
            except StoreUnavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def holders(self) -> dict[str, tuple[str, str, int]]:
        """Worker → job, state and fence, for every job that is held now."""
        held = text("SELECT worker, id, state, fence FROM jobs WHERE lease_until IS NOT NULL")
        rows = self.look(lambda s: s.execute(held).all())
        return {row.worker: (row.id, row.state, row.fence) for row in rows}

    def arm(self, point: str, action: str = "kill", *, skip: int = 0, times: int = 1) -> None:
        """Let `action` happen when a process next reaches `point`."""
        document = {"action": action, "skip": skip, "times": times}
        fresh = self.points / f".{point}"
        fresh.write_text(json.dumps(document), encoding="ascii")
        fresh.replace(self.points / point)

    def disarm(self) -> list[str]:
        """Forget what is armed; returns the names that nobody came by."""
        left = self.armed()
        for name in left:
            (self.points / name).unlink(missing_ok=True)
        return left

    def armed(self) -> list[str]:
        """The points at which something waits for a process to come by."""
        return [
            path.name for path in self.points.iterdir() if not path.name.startswith(".") and path.name != HITS
        ]

    def hits(self) -> list[dict[str, Any]]:
        try:
            lines = (self.points / HITS).read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def refused_writes(self) -> int:
        """How many writes under an old fence were tried and refused, by the logs."""
        return sum(log.read_text(errors="replace").count("stale fence") for log in self.folder.glob("w*.log"))

    def stop(self) -> None:
        self._over.set()
        if self._keeper is not None:
            self._keeper.join()
        self.disarm()
        self.redis_proxy.mode = "pass"
        if self.postgres_proxy is not None:
            self.postgres_proxy.mode = "pass"
        for process in self.cluster.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                for child in children_of(process.pid):
                    os.kill(child, signal.SIGCONT)
        try:
            self.cluster.stop()
        finally:
            self.database.dispose()
            self.redis.kill()
            self.redis_proxy.close()
            if self.postgres is not None and self.postgres_proxy is not None:
                self.postgres_proxy.close()
                self.postgres.remove()

    def _keep(self) -> None:
        modules = {"api": "halfstep.service.api", "dispatch": "halfstep.service.dispatch"}
        while not self._over.wait(0.1):
            with self._starting:
                for name, process in list(self.cluster.processes.items()):
                    if process.poll() is not None and not self._over.is_set():
                        self.restarts += 1
                        settings = {"worker_name": name} if name in self.workers else {}
                        self.cluster.start(name, modules.get(name, "halfstep.worker.app"), **settings)


def _started(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 2**63
