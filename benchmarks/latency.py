"""From POST to the first optimizer step on a warm worker, beside a cold script, and the broker's share.

Jobs go one after another, each when the worker's next process is warm: the claim is about a warm worker, and
how long it takes to be warm again is told. Times are read from the job's own record (`transitions` and
`last_step_at`, by the database's clock) and from this process's clock just before the POST is sent; both are
the same machine's. A job has one step, so `last_step_at` is when its first step's row was written: the
step itself had ended a little before.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.support import report
from benchmarks.support.installation import Installation, postgres_database
from halfstep.service.cli.up import broker
from halfstep.service.queue import QUEUE, make_celery

REDIS = "redis://127.0.0.1:6379/0"
POSTGRES = "postgresql://postgres@127.0.0.1:5432/postgres"
SPEC: dict[str, Any] = {
    "model": {"name": "mlp", "params": {"hidden": [512]}},
    "dataset": {"name": "digits"},
    "training": {"max_steps": 1, "evaluate_every_steps": 1_000_000},
}
PARTS = ("POST answered", "claimed", "running", "first step stored")
UNCOUNTED = 2
"""The first jobs fill caches of the API and of the file system."""

STARTED = """
import sys, time
from halfstep.service.queue import QUEUE, make_celery
app = make_celery(sys.argv[1])

@app.task(name="started")
def started(sent):
    print(time.time() - sent, flush=True)

app.Worker(pool="threads", concurrency=1, queues=[QUEUE], loglevel="ERROR", without_gossip=True,
           without_mingle=True, without_heartbeat=True, quiet=True).start()
"""


def main() -> None:
    options = report.options("latency", __doc__)
    options.add_argument("--jobs", type=int, default=30, help="of each kind")
    options.add_argument("--messages", type=int, default=200, help="through each broker")
    options.add_argument("--threads", type=int, default=1, help="torch threads of a job")
    options.add_argument("--redis", default=REDIS, help="a database number that is empty")
    options.add_argument("--postgres", default=POSTGRES, help="a server on which a database may be made")
    options.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="which installations"
    )
    given = options.parse_args()
    told = report.Report(
        "latency", {"jobs": given.jobs, "messages": given.messages, "threads": given.threads, "spec": SPEC}
    )
    for kind in given.kinds:
        with _folder() as folder, KINDS[kind](folder, given) as installation:
            _first_steps(told, kind, installation, given.jobs)
    cold = [_cold() for _ in range(max(3, given.jobs // 6))]
    told.add("cold script/first step", cold, unit="ms", better="neither")
    with _folder() as folder, _embedded_broker(folder) as url:
        _dispatch(told, "embedded", url, given.messages)
    _dispatch(told, "redis", given.redis, given.messages)
    told.write(given.out)


@contextlib.contextmanager
def _embedded(folder: Path, given: argparse.Namespace) -> Iterator[Installation]:
    with Installation(folder, worker_threads=given.threads) as made:
        yield made


@contextlib.contextmanager
def _servers(folder: Path, given: argparse.Namespace) -> Iterator[Installation]:
    with (
        postgres_database(given.postgres) as database,
        Installation(
            folder, database_url=database, broker_url=given.redis, worker_threads=given.threads
        ) as made,
    ):
        yield made


KINDS = {"embedded, SQLite": _embedded, "Redis, PostgreSQL": _servers}


def _first_steps(told: report.Report, kind: str, installation: Installation, jobs: int) -> None:
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    again: list[float] = []
    installation.warm()
    for number in range(UNCOUNTED + jobs):
        time.sleep(0.2)  # what a person or a script does in between; the machine settles
        sent = time.time()
        job_id = installation.submit(SPEC)
        answered = time.time()
        ended = installation.ended(job_id)
        stored = _seconds(ended["stats"]["last_step_at"])
        warm = installation.warm()
        if number < UNCOUNTED:
            continue
        at = {entry["state"]: _seconds(entry["at"]) for entry in ended["transitions"]}
        moments = (answered, at["starting"], at["running"], stored)
        for name, moment in zip(PARTS, moments, strict=True):
            parts[name].append((moment - sent) * 1e3)
        again.append(float(warm["seconds"]))
    for name, values in parts.items():
        told.add(f"{kind}/{name}", values, unit="ms", better="lower")
    steps = sorted(parts["first step stored"])
    for share in (0.5, 0.95):
        worst = steps[min(len(steps) - 1, round(share * len(steps)))]
        told.add(f"{kind}/first step stored/p{share * 100:g}", [worst], unit="ms", better="lower")
    told.add(f"{kind}/warm again", again, unit="s", better="lower")


def _cold() -> float:
    began = time.time()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peers") / "cold_train.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    return (float(done.stdout) - began) * 1e3


def _dispatch(told: report.Report, name: str, url: str, messages: int) -> None:
    """How long a message takes from being sent to its task's first line, with nothing else to do."""
    app = make_celery(url, publisher=True)
    process = subprocess.Popen([sys.executable, "-c", STARTED, url], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        seconds = []
        for number in range(20 + messages):
            app.send_task("started", args=[time.time()], queue=QUEUE, retry=False, ignore_result=True)
            taken = float(process.stdout.readline())
            if number >= 20:
                seconds.append(taken * 1e3)
            time.sleep(0.01)
        told.add(f"dispatch/{name}", seconds, unit="ms", better="lower")
        ordered = sorted(seconds)
        told.add(f"dispatch/{name}/p99", [ordered[int(0.99 * len(ordered))]], unit="ms", better="lower")
    finally:
        process.terminate()
        process.wait(timeout=30)
        app.close()


@contextlib.contextmanager
def _embedded_broker(folder: Path) -> Iterator[str]:
    socket = folder / "broker.sock"
    process = subprocess.Popen(broker.command(socket), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.01)
        yield f"redis+socket://{socket}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="halfstep-") as name:
        yield Path(name)


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


if __name__ == "__main__":
    main()
