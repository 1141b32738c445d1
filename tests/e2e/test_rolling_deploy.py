"""A new version takes over under load, with a migration in between: no job fails, no step is taken twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from tests.databases import KINDS, empty_database
from tests.e2e.cluster import ROOT, SOURCES, Cluster, wait_for
from tests.faults import audit
from tests.faults.checker import check
from tests.faults.client import Client

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.slow]

STEPS = 300
QUEUED = 2  # jobs wait at any moment: whoever gives one back or is new finds work
MIGRATION = '''
"""What a later version might add."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("note", sa.Text(), nullable=True))
    op.add_column("checkpoints", sa.Column("copies", sa.Integer(), nullable=False, server_default="1"))
    op.create_table("notes", sa.Column("job_id", sa.Text(), primary_key=True), sa.Column("text", sa.Text()))
    op.create_index("jobs_note", "jobs", ["note"])
'''


def paced_job(name: str, **training: Any) -> dict[str, Any]:
    """Ten milliseconds a step, however fast the machine is; needs `tests.faults.components`."""
    return {
        "name": name,
        "model": {"name": "paced"},
        "dataset": {"name": "synthetic", "params": {"samples": 320, "held_out_samples": 32}},
        "precision": {"precision_level": "fp32"},
        "training": {"batch_size": 16, "seed": 7, **training},
        "tags": {"variant": "paced"},
    }


def job(number: int) -> dict[str, Any]:
    """Some seconds long; its checkpoints are so rare that a stop without one shows."""
    return paced_job(f"job-{number}", max_steps=STEPS, checkpoint_every_steps=200)


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with empty_database(request.param, tmp_path) as url:
        migrate(url)
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    audit.install(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def client(cluster: Cluster, tmp_path: Path) -> Iterator[Client]:
    made = Client(cluster.url, tmp_path / "history.jsonl")
    yield made
    made.close()


@pytest.fixture
def cluster(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Cluster]:
    modules = json.dumps(["tests.faults.components"])
    # Nothing here is killed: a lease that ends would be this machine's slowness, and charge an attempt.
    made = Cluster(
        tmp_path,
        database_url,
        redis_url,
        component_modules=modules,
        worker_device="cpu",
        lease_seconds=30.0,
    )
    made.start_api()
    made.start("dispatch", "halfstep.service.dispatch")
    for name in ("one", "two"):
        made.start(name, "halfstep.worker.app", worker_name=name)
    try:
        yield made
    finally:
        made.stop()


def revision_of(database: Database) -> str:
    with database.read() as s:
        return str(s.execute(text("SELECT version_num FROM alembic_version")).scalar_one())


def later_version(folder: Path, head: str) -> tuple[str, Path]:
    """This version and one more migration; its revision, and what comes first in its PYTHONPATH."""
    number = int(head.partition("_")[0])
    revision = f"{number + 1:04}_since_{number:04}"
    later = folder / "later"
    shutil.copytree(
        ROOT / "src" / "halfstep", later / "halfstep", ignore=shutil.ignore_patterns("__pycache__")
    )
    content = MIGRATION.format(revision=revision, head=head)
    versions = later / "halfstep" / "migrations" / "versions"
    (versions / f"{revision}.py").write_text(content, encoding="utf-8")
    return revision, later


def run(cluster: Cluster, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=cluster.environment,
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def end(cluster: Cluster, name: str) -> float:
    """Stop a part as an operator does; returns the seconds that it took."""
    process = cluster.processes.pop(name)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{name} did not stop; {cluster.tails()}") from None
    assert status == 0, f"{name} ended with {status}; {cluster.tails()}"
    return time.monotonic() - asked


def registered(cluster: Cluster, name: str) -> bool:
    return name in [worker["name"] for worker in cluster.get("/workers")["items"]]


def gone(cluster: Cluster, name: str) -> bool:
    return not registered(cluster, name)


def in_the_middle_of_a_job(cluster: Cluster, worker: str) -> bool:
    found = cluster.get("/jobs", state="running", limit=100)["items"]
    return any(
        each["worker"] == worker and 20 < cluster.job(each["id"])["stats"]["current_step"] < STEPS // 2
        for each in found
    )


@contextmanager
def submissions_going_on(client: Client) -> Iterator[None]:
    """A client that reads and submits until the deploy is over; its requests are in `client.history`."""
    over = threading.Event()
    failures: list[BaseException] = []

    def go_on() -> None:
        number = 0
        try:
            while not over.wait(0.25):
                status, answer = client.ask("GET", "/jobs?state=queued")
                if status == 200 and len(answer["items"]) < QUEUED:
                    client.submit(job(number), key=f"job-{number}", variant="paced")
                    number += 1
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=go_on, name="client", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures


def test_workers_are_replaced_under_load_with_a_migration_in_between(
    tmp_path: Path, cluster: Cluster, client: Client, database: Database
) -> None:
    for name in ("one", "two"):
        wait_for(f"{name} is registered", partial(registered, cluster, name), 90)
    head = revision_of(database)
    revision, later = later_version(tmp_path, head)
    drains = {}
    earlier = dict(cluster.environment)
    with submissions_going_on(client):
        wait_for("both train", lambda: len(cluster.get("/jobs", state="running")["items"]) == 2, 60)
        cluster.environment["PYTHONPATH"] = os.pathsep.join((str(later), SOURCES))
        too_early = run(cluster, "halfstep.service.dispatch")
        assert f"this version needs {revision}" in too_early.stderr + too_early.stdout
        migrated = run(cluster, "halfstep.service.cli", "migrate")
        assert migrated.returncode == 0, migrated.stderr
        assert revision_of(database) == revision

        # Between the two the earlier version is whole: it is ready, and what ends of it comes back.
        assert cluster.client.get("/health/ready").status_code == 200
        later_environment, cluster.environment = cluster.environment, earlier
        end(cluster, "dispatch")
        cluster.start("dispatch", "halfstep.service.dispatch")
        log = tmp_path / "dispatch.log"
        wait_for("the earlier dispatcher is back", lambda: log.read_text().count("dispatcher ready") == 2, 60)
        cluster.environment = later_environment

        end(cluster, "api")
        cluster.start_api()
        end(cluster, "dispatch")
        cluster.start("dispatch", "halfstep.service.dispatch")
        for name in ("one", "two"):
            wait_for(f"{name} trains", partial(in_the_middle_of_a_job, cluster, name), 60)
            drains[name] = end(cluster, name)
            wait_for(f"{name} is gone", partial(gone, cluster, name), 30)
            cluster.start(name, "halfstep.worker.app", worker_name=f"new-{name}")
            wait_for(f"new-{name} is registered", partial(registered, cluster, f"new-{name}"), 90)
    told = ", ".join(f"{name} in {seconds:.2f} s" for name, seconds in drains.items())
    print(f"drained: {told}")

    everything = {request.job_id for request in client.history if request.status == 202 and request.job_id}
    for job_id in everything:
        cluster.wait(job_id)
    with database.read() as s:
        jobs = {job_id: audit.seen(s, job_id, tmp_path / "data") for job_id in everything}
    undisturbed = next(each for each in jobs.values() if each.fence == 1)
    evidence = audit.gather(
        database,
        tmp_path / "data",
        history=client.history,
        references={"paced": audit.reference(undisturbed)},
    )
    assert evidence.jobs.keys() == everything
    assert check(evidence) == [], told
    assert {(each.state, each.attempt) for each in evidence.jobs.values()} == {("succeeded", 1)}
    given_back = [
        reason for each in jobs.values() for _, _, reason in each.states if reason == "the worker was drained"
    ]
    assert len(given_back) == 2, f"both workers were drained in the middle of a job; {told}"
    # As the database saw it: what was cut off would have been taken again.
    assert [change for change in evidence.changes if change.kind == "cut"] == []
    taken = sum(change.new - change.old for change in evidence.changes if change.kind == "steps")
    assert taken == STEPS * len(everything)
    resumed = [
        event["data"]["steps_repeated"]
        for job_id in everything
        for event in cluster.get(f"/jobs/{job_id}/events")["items"]
        if "steps_repeated" in (event["data"] or {})
    ]
    assert resumed == [0, 0], told
