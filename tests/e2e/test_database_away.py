"""A database that stays away while a job trains: the lease ends its process, a later attempt goes on."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfstep.service.store.sql.schema import migrate
from tests.e2e.cluster import Cluster, alive, children_of, wait_for
from tests.e2e.test_installation import long_job

pytestmark = [pytest.mark.e2e, pytest.mark.redis]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "halfstep.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def serving(tmp_path: Path, file: Path, redis_url: str) -> Iterator[Cluster]:
    made = Cluster(tmp_path, f"sqlite:///{file}", redis_url)
    try:
        made.start_api()
        made.start("dispatch", "halfstep.service.dispatch")
        made.start_worker("one")
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def writable_by_nobody(file: Path) -> Iterator[None]:
    """Another holds the write lock and never lets go; whoever reads can."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=30)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_the_lease_ends_a_job_whose_database_stays_away_and_it_goes_on_from_its_checkpoint(
    serving: Cluster, file: Path
) -> None:
    spec = long_job(3_000, checkpoint_every_steps=100)
    job_id = serving.submit(spec)
    wait_for("it is past a checkpoint", lambda: serving.get(f"/jobs/{job_id}/checkpoints")["items"], 90)
    worker = serving.processes["one"].pid
    running = children_of(worker)
    with writable_by_nobody(file):
        reached = serving.job(job_id)["stats"]["current_step"]
        log = serving.folder / "one.log"
        wait_for("the lease runs out", lambda: "lease could not be renewed in time" in log.read_text(), 30)
        # The warm process beside the job's stays.
        wait_for("its process is gone", lambda: sum(map(alive, running)) < len(running), 10)
        assert serving.job(job_id)["stats"]["current_step"] == reached < 3_000
    ended = serving.wait(job_id)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    assert serving.columns(job_id, "step")["step"] == list(range(1, 3_001))
    events = serving.get(f"/jobs/{job_id}/events")["items"]
    [resumed] = [each for each in events if each["message"].startswith("resumed after step")]
    assert 0 < resumed["data"]["step"] <= reached
