"""The HTTP API: requests a second and their times, by one API process over a record of a million steps.

POST /jobs, GET /stats and its 304, on SQLite and PostgreSQL, with 16 connections and with one; then the same
while a worker trains two jobs on the same cores. Beside it, in the same rounds: MLflow's server. A route that
asks nothing shows what the framework leaves to be had. `--quick` is a smoke test.

A whole run takes ten minutes; `--databases sqlite --add`, then `--databases postgresql --add`, is the same in
two parts.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.peers import mlflow
from benchmarks.support.databases import LOCAL_SERVER, new_database
from benchmarks.support.load import Load, Served, measure, request
from benchmarks.support.report import Report, options
from benchmarks.support.steps import LIVE, batches
from halfstep.service.cli.up import broker
from halfstep.service.contract.spec import JobSpec
from halfstep.service.store import jobs, record
from halfstep.service.store.fleet import workers
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.jobs import Job
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate

CONNECTIONS = (16, 1)
CPU = Capability("cpu", bf16=True, fp16=True, memory_bytes=2**33, device_name="cpu", device_count=1)
SUBMITTED = {
    "name": "digits-amp",
    "model": {"name": "mlp", "params": {"hidden": [512]}},
    "dataset": {"name": "digits"},
    "optimizer": {"name": "adamw", "params": {"lr": 0.001}},
    "scheduler": {"name": "step_lr", "params": {"step_size": 5, "gamma": 0.1}},
    "precision": {"mode": "automatic", "precision_level": "mixed", "initial_scale": 65536.0},
    "training": {"epochs": 10, "batch_size": 32},
    "tags": {"team": "vision"},
}
# Without an end, and ahead of whatever else is queued.
TRAINED = {
    "model": {"name": "mlp", "params": {"hidden": [512]}},
    "dataset": {"name": "digits"},
    "training": {"max_steps": 10_000_000},
    "priority": 10,
}


class Asked(NamedTuple):
    """A request to whoever listens on `port`, and the status of its answer."""

    port: int
    request: str
    status: int


def main() -> None:
    parser = options("api", __doc__)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one load")
    parser.add_argument("--postgres", default=LOCAL_SERVER)
    parser.add_argument("--directory", type=Path, help="where the files go; default: a temporary one")
    parser.add_argument("--mlflow-python", type=Path, help="an interpreter that has MLflow")
    parser.add_argument("--without", nargs="*", default=[], choices=["idle", "training"])
    parser.add_argument("--add", action="store_true", help="a part of a run: keep the file's other figures")
    parser.add_argument("--quick", action="store_true", help="few steps, short loads: proves that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds, arguments.seconds = 20_000, 1, 2.0
    settings = {
        name: getattr(arguments, name)
        for name in ("databases", "steps", "rounds", "seconds", "without", "quick")
    }
    if arguments.mlflow_python is None:
        print("MLflow: absent; name an interpreter that has it with --mlflow-python")
    report = Report("api", settings)
    for kind in arguments.databases:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory)))
            url = stack.enter_context(new_database(kind, directory, arguments.postgres))
            job = _filled(url, arguments.steps)
            installation = stack.enter_context(_Installation(directory, url))
            loads = installation.loads(job)
            rounds = (arguments.rounds, arguments.seconds)
            if "idle" not in arguments.without:
                with ExitStack() as beside:
                    if arguments.mlflow_python is not None:
                        server = beside.enter_context(mlflow.server(arguments.mlflow_python))
                        peers = _mlflow(server)
                    else:
                        peers = {}
                    _report(report, f"{kind}/idle", loads | peers, *rounds)
            if "training" not in arguments.without:
                with installation.training():
                    _report(report, f"{kind}/two jobs training", loads, *rounds)
    report.write(arguments.out, add=arguments.add)


def _filled(url: str, steps: int) -> Job:
    """A running job with so many steps, held by a worker that is nobody."""
    migrate(url)
    database = Database(url)
    try:
        with database.begin() as s:
            workers.register(s, worker_id="w", name="w", pid=1, capability=CPU, versions={}, slots=1)
            jobs.submit(s, tenant="default", spec=JobSpec.model_validate(SUBMITTED))
            job = jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=86_400)
            if job is None:
                raise RuntimeError("the job just submitted could not be claimed")
            jobs.mark_running(s, job.id, job.fence)
        for rows in batches(1, steps, 8192):
            database.retry(partial(record.append, job_id=job.id, fence=job.fence, rows=rows, live=LIVE))
    finally:
        database.dispose()
    return job


class _Installation:
    """One API process and an embedded broker over a database; a worker for a while."""

    def __init__(self, directory: Path, url: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._directory, self._stack = directory, ExitStack()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HALFSTEP_")},
            "HALFSTEP_DATABASE_URL": url,
            "HALFSTEP_DATA_DIR": str(directory),
            "HALFSTEP_PORT": str(self.port),
            # Whoever was seen before the first load is live to the last one.
            "HALFSTEP_HEARTBEAT_SECONDS": "600",
            "HALFSTEP_LEASE_SECONDS": "86400",
            "HALFSTEP_WORKER_SLOTS": "2",
            "HALFSTEP_WORKER_THREADS": "1",
        }

    def __enter__(self) -> Self:
        self._start(*broker.command(self._directory / "broker.sock"))
        self._start(sys.executable, "-m", "halfstep.service.api")
        _until(self._answers, "the API answers")
        with self.worker():  # it publishes the catalogue, which stays
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def loads(self, job: Job) -> dict[str, Asked]:
        """Each request that is measured."""
        path = f"/jobs/{job.id}/stats"
        _, etag = self.call("GET", path)
        return {
            "a route that asks nothing": Asked(self.port, request("GET", "/health/live"), 200),
            "GET stats": Asked(self.port, request("GET", path), 200),
            "GET stats, 304": Asked(self.port, request("GET", path, if_none_match=str(etag)), 304),
            "POST jobs": Asked(self.port, request("POST", "/jobs", SUBMITTED), 202),
        }

    @contextmanager
    def worker(self) -> Iterator[None]:
        """A worker with two slots, registered."""
        process = self._start(sys.executable, "-m", "halfstep.worker.app")
        try:
            _until(lambda: len(self.call("GET", "/workers")[0]["items"]) == 2, "the worker is registered")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Two jobs train."""
        trained = [self.call("POST", "/jobs", TRAINED)[0]["id"] for _ in range(2)]
        with self.worker():
            for job_id in trained:
                _until(partial(self._is_beyond, job_id, 100), "both jobs train")
            before = [self._step(job_id) for job_id in trained]
            yield
            if not all(self._step(job_id) > step for job_id, step in zip(trained, before, strict=True)):
                raise RuntimeError("a job stopped training while the API was measured")

    def _is_beyond(self, job_id: str, step: int) -> bool:
        return self._step(job_id) > step

    def _step(self, job_id: str) -> int:
        return int(self.call("GET", f"/jobs/{job_id}/stats")[0]["current_step"])

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[Any, str | None]:
        """The answer's JSON and etag."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {data[:500]!r}")
            return json.loads(data), answer.headers["etag"]
        finally:
            connection.close()

    def _answers(self) -> bool:
        try:
            self.call("GET", "/health/ready")
        except (OSError, http.client.HTTPException, RuntimeError):
            return False
        return True

    def _start(self, *command: str) -> "subprocess.Popen[bytes]":
        log = self._stack.enter_context((self._directory / "log").open("ab"))
        process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        self._stack.callback(process.wait, 60)
        self._stack.callback(process.terminate)
        return process


def _report(report: Report, at: str, loads: Mapping[str, Asked], rounds: int, seconds: float) -> None:
    """Each load in turn, again and again, so that the machine's moods fall on all of them alike."""
    found: dict[tuple[str, int], list[Served]] = defaultdict(list)
    for _ in range(rounds):
        for name, asked in loads.items():
            for connections in CONNECTIONS:
                one = measure(Load(asked.port, asked.request, asked.status, connections, seconds))
                found[name, connections].append(one)
    for (name, connections), served in found.items():
        of = f"{at}/{name}, {connections} connection{'s' * (connections > 1)}"
        report.add(of, [one.per_second for one in served], unit="requests/s", better="higher")
        report.add(f"{of}, p50", [one.p50 for one in served], unit="ms", better="lower")
        report.add(f"{of}, p99", [one.p99 for one in served], unit="ms", better="lower")


def _mlflow(server: mlflow.Mlflow) -> dict[str, Asked]:
    """What MLflow is asked: to make a run, and to tell of one."""
    run = server.new_run()
    created = {"experiment_id": "0", "start_time": int(time.time() * 1000), "tags": []}
    told = f"/api/2.0/mlflow/runs/get?run_id={run}"
    return {
        "MLflow runs/create": Asked(
            server.port, request("POST", "/api/2.0/mlflow/runs/create", created), 200
        ),
        "MLflow runs/get": Asked(server.port, request("GET", told), 200),
    }


def _until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within two minutes: {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
