"""The step record: how fast it is written, what a step costs in bytes, and how fast it is read back.

The whole path is a worker's: rows handed to the reporter until the last is committed. Then the store's own
calls, and reads through a real API process. Beside them, in the same run: a row per step in the same
databases, and MLflow's server. `--quick` is a smoke test.
"""

import http.client
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sqlalchemy import make_url, text

from benchmarks.peers import mlflow
from benchmarks.peers.rows import PostgresRows, Rows, SqliteRows
from benchmarks.support.databases import LOCAL_SERVER, new_database
from benchmarks.support.report import Report, options
from benchmarks.support.steps import LIVE, batches
from halfstep.service.contract.spec import JobSpec
from halfstep.service.store import jobs, record
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.jobs import Job
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from halfstep.service.store.tables import metadata
from halfstep.worker.job.reporting import Reporter

BATCHES = (256, 1024, 8192)  # what the reporter sends: from a slow job's flush to its limit under pressure
FILL_BATCH = 8192
REPORTED = 100_000  # steps of one repetition of the whole path
REPORT_BATCH = 250  # what the loop hands on at once, of 500 steps a second
SEGMENT = 500_000  # steps of one repetition while a job is filled
CPU = Capability("cpu", bf16=True, fp16=True, memory_bytes=2**33, device_name="cpu", device_count=1)
SPEC = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}}


def main() -> None:
    parser = options("record", __doc__)
    parser.add_argument(
        "--databases", nargs="*", default=["sqlite", "postgresql"], help="none: a part with MLflow alone"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[1_000_000, 10_000_000])
    parser.add_argument("--postgres", default=LOCAL_SERVER)
    parser.add_argument("--directory", type=Path, help="where the SQLite files go; default: a temporary one")
    parser.add_argument("--mlflow-python", type=Path, help="an interpreter that has MLflow")
    parser.add_argument("--without", nargs="*", default=[], choices=["rows", "batches", "path"])
    parser.add_argument("--quick", action="store_true", help="few steps and repetitions: proves that it runs")
    parser.add_argument("--add", action="store_true", help="a part of a run: keep the file's other figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = [20_000]
    settings = {name: getattr(arguments, name) for name in ("databases", "steps", "without", "quick")}
    report = Report("record", settings)
    repetitions = 3 if arguments.quick else 7
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for kind in arguments.databases:
            place = (kind, Path(directory), arguments.postgres)
            if "batches" not in arguments.without:
                with new_database(*place) as url:
                    _batches(report, kind, url, repetitions)
            if "path" not in arguments.without:
                with new_database(*place) as url:
                    _whole_path(report, kind, url, 10_000 if arguments.quick else REPORTED, repetitions)
            with new_database(*place) as url:
                _record(report, kind, url, sorted(arguments.steps), repetitions)
            if "rows" not in arguments.without:
                with new_database(*place) as url:
                    _rows(report, kind, url, min(arguments.steps))
    if arguments.mlflow_python is None:
        print("MLflow: absent; name an interpreter that has it with --mlflow-python")
    else:
        _mlflow(report, arguments.mlflow_python, quick=arguments.quick)
    report.write(arguments.out, add=arguments.add)


def _batches(report: Report, kind: str, url: str, repetitions: int) -> None:
    migrate(url)
    database = Database(url)
    try:
        for size in BATCHES:
            rates = [_append(database, _running(database), 1, 8 * size, size) for _ in range(repetitions)]
            report.add(f"{kind}/written, batches of {size}", rates, unit="steps/s", better="higher")
    finally:
        database.dispose()


def _whole_path(report: Report, kind: str, url: str, steps: int, repetitions: int) -> None:
    """From the training loop's call until the last row is committed: queue, thread, packing, transactions.

    The rows are there before, and the loop calls as fast as it can: what a step costs it, and the thread, in
    CPU time, stands beside.
    """
    migrate(url)
    database = Database(url)
    rates, loop_costs, thread_costs = [], [], []
    try:
        for _ in range(repetitions):
            job, made = _running(database), list(batches(1, steps, REPORT_BATCH))
            reporter = Reporter(database, job.id, job.fence, on_progress=lambda *_: None)
            began, loop_began, both_began = time.perf_counter(), time.thread_time(), time.process_time()
            for rows in made:
                reporter.steps(rows, LIVE)
            loop = time.thread_time() - loop_began
            reporter.close()
            rates.append(steps / (time.perf_counter() - began))
            loop_costs.append(loop / steps * 1e6)
            thread_costs.append((time.process_time() - both_began - loop) / steps * 1e6)
            with database.read() as s:
                if record.summarise(s, job.id).current_step != steps:
                    raise RuntimeError("the reporter has ended, and steps are missing")
    finally:
        database.dispose()
    report.add(f"{kind}/whole path, written", rates, unit="steps/s", better="higher")
    report.add(f"{kind}/whole path, CPU of the loop's thread", loop_costs, unit="us/step", better="lower")
    report.add(
        f"{kind}/whole path, CPU of the reporter's thread", thread_costs, unit="us/step", better="lower"
    )


def _record(report: Report, kind: str, url: str, lengths: list[int], repetitions: int) -> None:
    migrate(url)
    database = Database(url)
    try:
        job = _running(database)
        empty, filled = _bytes(database), 0
        for steps in lengths:
            rates = []
            while filled < steps:
                last = min(filled + SEGMENT, steps)
                rates.append(_append(database, job, filled + 1, last, FILL_BATCH))
                filled = last
            at = f"{kind}/{_count(steps)} steps"
            report.add(f"{at}/written", rates, unit="steps/s", better="higher")
            taken = (_bytes(database) - empty) / steps
            report.add(f"{at}/bytes", [taken], unit="bytes/step", better="lower")
            _reads_in_process(report, at, database, job, steps, repetitions)
            _reads_over_http(report, at, url, job, steps, repetitions)
    finally:
        database.dispose()


def _append(database: Database, job: Job, first: int, last: int, size: int) -> float:
    """Steps a second of the store's own calls; making the rows is not counted."""
    seconds = 0.0
    for rows in batches(first, last, size):
        began = time.perf_counter()
        database.retry(partial(record.append, job_id=job.id, fence=job.fence, rows=rows, live=LIVE))
        seconds += time.perf_counter() - began
    return (last - first + 1) / seconds


def _reads_in_process(
    report: Report, at: str, database: Database, job: Job, steps: int, repetitions: int
) -> None:
    draw = random.Random(0)

    def page() -> object:
        with database.read() as s:
            return record.read(s, job.id, after_step=draw.randrange(steps - 1000), limit=1000, fields=None)

    def plot() -> object:
        with database.read() as s:
            return record.downsample(s, job.id, from_step=None, to_step=None, max_points=500, fields=None)

    def summary() -> object:
        with database.read() as s:
            return record.summarise(s, job.id)

    for name, call in (("page of 1 000", page), ("plot of 500 points", plot), ("summary", summary)):
        times = _times(call, repetitions)
        report.add(f"{at}/store, {name}", times, unit="ms", better="lower")


def _reads_over_http(report: Report, at: str, url: str, job: Job, steps: int, rounds: int) -> None:
    draw = random.Random(1)
    with _api(url) as client:

        def page() -> object:
            return client.get(f"/jobs/{job.id}/metrics?limit=1000&after_step={draw.randrange(steps - 1000)}")

        def plot() -> object:
            return client.get(f"/jobs/{job.id}/metrics?max_points=500")

        def one_field() -> object:
            return client.get(f"/jobs/{job.id}/metrics?max_points=500&fields=loss")

        def summary() -> object:
            return client.get(f"/jobs/{job.id}/stats")

        wanted = (
            ("page of 1 000", page, 200),
            ("plot of 500 points", plot, 30),
            ("plot of 500 points, one field", one_field, 30),
            ("summary", summary, 200),
        )
        for name, call, number in wanted:
            taken = [_times(call, number) for _ in range(rounds)]
            medians = [statistics.median(times) for times in taken]
            report.add(f"{at}/http, {name}, p50", medians, unit="ms", better="lower")
            if number >= 100:
                worst = [statistics.quantiles(times, n=100)[-1] for times in taken]
                report.add(f"{at}/http, {name}, p99", worst, unit="ms", better="lower")


def _rows(report: Report, kind: str, url: str, steps: int) -> None:
    store: Rows = (
        SqliteRows(Path(str(make_url(url).database)))
        if kind == "sqlite"
        else PostgresRows(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False))
    )
    at = f"{kind}/{_count(steps)} steps"
    try:
        rates, filled = [], 0
        while filled < steps:
            last, seconds = min(filled + SEGMENT // 5, steps), 0.0
            for rows in batches(filled + 1, last, FILL_BATCH):
                began = time.perf_counter()
                store.append(rows)
                seconds += time.perf_counter() - began
            rates.append((last - filled) / seconds)
            filled = last
        report.add(f"{at}/rows, written", rates, unit="steps/s", better="neither")
        report.add(f"{at}/rows, bytes", [store.bytes() / steps], unit="bytes/step", better="neither")
        draw = random.Random(2)
        page = _times(lambda: store.page(draw.randrange(steps - 1000)), 30)
        report.add(f"{at}/rows, page of 1 000", page, unit="ms", better="neither")
        report.add(
            f"{at}/rows, plot of 500 points",
            _times(lambda: store.plot(steps), 3),
            unit="ms",
            better="neither",
        )
    finally:
        store.close()


def _mlflow(report: Report, python: Path, *, quick: bool) -> None:
    names: tuple[str, ...] = (
        "loss",
        "scale",
        "underflow_estimate",
        "grad_norm",
        "learning_rate",
        "memory_usage",
    )
    names += ("memory_allocated_bytes", "memory_reserved_bytes", "step_time_ms", "epoch")
    steps = 1_000 if quick else 10_000
    with mlflow.server(python) as server:
        run = server.new_run()
        rates = []
        for rows in batches(1, steps, 100):
            figures = [(name, float(getattr(row, name)), row.step) for row in rows for name in names]
            finite = [figure for figure in figures if figure[1] - figure[1] == 0]
            began = time.perf_counter()
            server.log_batch(run, finite)
            rates.append(len(rows) / (time.perf_counter() - began))
        report.add("mlflow/written, 10 metrics a step", rates, unit="steps/s", better="neither")
        whole = _times(lambda: server.history(run, "epoch"), 5)
        report.add(f"mlflow/{_count(steps)} points of one metric", whole, unit="ms", better="neither")
        sampled = _times(lambda: server.sampled(run, "epoch", 2500), 5)
        report.add(f"mlflow/2 500 sampled of {_count(steps)}", sampled, unit="ms", better="neither")


def _times(call: Callable[[], object], number: int) -> list[float]:
    """Milliseconds of each call, after two that are not counted."""
    times = []
    for index in range(number + 2):
        began = time.perf_counter()
        call()
        if index >= 2:
            times.append((time.perf_counter() - began) * 1e3)
    return times


def _running(database: Database) -> Job:
    with database.begin() as s:
        jobs.submit(s, tenant="default", spec=JobSpec.model_validate(SPEC))
        job = jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=86_400)
        if job is None:
            raise RuntimeError("the job just submitted could not be claimed")
        jobs.mark_running(s, job.id, job.fence)
    return job


def _bytes(database: Database) -> int:
    """What the database takes: the file after a checkpoint, or every table with its indexes and TOAST."""
    if database.dialect == "sqlite":
        path = Path(str(database.url.database))
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        return path.stat().st_size
    tables = (
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relname = ANY(:names)"
    )
    with database.read() as s:
        return int(s.scalar(text(tables), {"names": sorted(metadata.tables)}) or 0)


class _Client:
    """One connection to the API that stays open; requests leave in one write, so no delayed answer counts."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, path: str) -> bytes:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {body[:300]!r}")
        return body


@contextmanager
def _api(url: str) -> Iterator[_Client]:
    """The product's API in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data:
        process = subprocess.Popen(
            [sys.executable, "-m", "halfstep.service.api"],
            env=os.environ
            | {
                "HALFSTEP_DATABASE_URL": url,
                "HALFSTEP_DATA_DIR": data,
                "HALFSTEP_PORT": str(port),
                "HALFSTEP_LOG_LEVEL": "error",
            },
        )
        try:
            yield _answering(process, port)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _answering(process: "subprocess.Popen[bytes]", port: int) -> _Client:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client = _Client(port)
            client.get("/health/live")
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
        else:
            return client
    raise RuntimeError("the API did not start")


def _count(steps: int) -> str:
    return f"{steps // 1_000_000} M" if steps % 1_000_000 == 0 else f"{steps // 1000} k"


if __name__ == "__main__":
    main()
