"""The lease keeper: renewals, what they bring back, and when it must not be believed any longer."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from halfstep.service.contract.states import RequestedAction
from halfstep.service.errors import StaleFence, StoreUnavailable
from halfstep.service.store import jobs
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import jobs as job_rows
from halfstep.worker.host.lease import LeaseKeeper
from tests.e2e.cluster import wait_for
from tests.store.making import running

SOON = 10.0


class Renewals:
    """A database whose renewals are answered by the test, one by one."""

    def __init__(self) -> None:
        self.answers: queue.Queue[object] = queue.Queue()
        self.asked = threading.Semaphore(0)

    def retry(self, fn: object, *, seconds: float) -> Any:
        self.asked.release()
        answer = self.answers.get(timeout=SOON)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Kept:
    def __init__(self, lease: float = 1.0) -> None:
        self.database = Renewals()
        self.requests: queue.Queue[RequestedAction] = queue.Queue()
        self.lost: queue.Queue[str] = queue.Queue()
        self.keeper = LeaseKeeper(
            self.database,  # type: ignore[arg-type]
            job_id="0195-0000",
            fence=1,
            worker_id="w",
            lease_seconds=lease,
            heartbeat_seconds=0.02,
            on_request=self.requests.put,
            on_lost=self.lost.put,
            look_seconds=3600.0,
        )


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.keeper._over.set()
    made.database.answers.put(None)


def test_a_renewal_moves_the_deadline_and_brings_requests_back(kept: Kept) -> None:
    before = kept.keeper.deadline
    kept.database.answers.put(None)
    kept.database.answers.put(RequestedAction.CANCEL)
    assert kept.requests.get(timeout=SOON) is RequestedAction.CANCEL
    assert kept.keeper.deadline > before
    assert kept.lost.empty()


def test_a_stale_fence_is_told_once(kept: Kept) -> None:
    kept.database.answers.put(StaleFence("another owns it"))
    assert kept.lost.get(timeout=SOON)
    kept.keeper._thread.join(SOON)
    assert not kept.keeper._thread.is_alive()


def test_an_absent_database_leaves_the_deadline_where_it_was(kept: Kept) -> None:
    kept.database.answers.put(None)
    assert kept.database.asked.acquire(timeout=SOON)
    assert kept.database.asked.acquire(timeout=SOON)
    before = kept.keeper.deadline
    for _ in range(3):
        kept.database.answers.put(StoreUnavailable("away"))
        assert kept.database.asked.acquire(timeout=SOON)
    assert kept.keeper.deadline == before
    assert kept.lost.empty()


def test_the_deadline_is_before_the_leases_end_and_counts_from_before_the_renewal() -> None:
    began = time.monotonic()
    made = Kept(lease=10.0)
    assert began + 10.0 > made.keeper.deadline >= began + 5.0
    assert made.database.asked.acquire(timeout=SOON)
    sent_by = time.monotonic()
    time.sleep(0.2)  # an answer that takes its time must not lengthen the lease
    made.database.answers.put(None)
    assert made.database.asked.acquire(timeout=SOON)
    assert made.keeper.deadline <= sent_by + 8.0
    made.keeper._over.set()
    made.database.answers.put(None)


def looking(database: Any, job: jobs.Job, **changes: Any) -> Kept:
    """A keeper whose heartbeats are far apart, over a real store."""
    made = Kept.__new__(Kept)
    made.requests, made.lost = queue.Queue(), queue.Queue()
    options = {"lease_seconds": 3600.0, "heartbeat_seconds": 1200.0, "look_seconds": 0.02} | changes
    made.keeper = LeaseKeeper(
        database,
        job_id=job.id,
        fence=job.fence,
        worker_id="w1",
        on_request=made.requests.put,
        on_lost=made.lost.put,
        **options,
    )
    return made


def lease_until(database: Database, job: jobs.Job) -> float:
    with database.read() as s:
        found: float = s.execute(select(job_rows.c.lease_until).where(job_rows.c.id == job.id)).scalar_one()
        return found


class Watched:
    """A database whose looks are counted; the first `refusals` of them find it away."""

    def __init__(self, database: Database, refusals: int = 0) -> None:
        self.database, self.refusals = database, refusals
        self.looked = threading.Semaphore(0)

    @contextmanager
    def read(self) -> Iterator[Session]:
        self.looked.release()
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("away")
        with self.database.read() as s:
            yield s


def test_a_request_is_seen_between_two_heartbeats_and_renews_nothing(database: Database) -> None:
    job = running(database)
    before = lease_until(database, job)
    watched = Watched(database)
    kept = looking(watched, job)
    deadline = kept.keeper.deadline
    database.retry(lambda s: jobs.request_pause(s, job.id, tenant=None))
    assert kept.requests.get(timeout=SOON) is RequestedAction.PAUSE
    while watched.looked.acquire(blocking=False):
        pass
    for _ in range(3):
        assert watched.looked.acquire(timeout=SOON)
    assert kept.requests.empty(), "it is told once"
    database.retry(lambda s: jobs.request_cancel(s, job.id, tenant=None))
    assert kept.requests.get(timeout=SOON) is RequestedAction.CANCEL
    assert lease_until(database, job) == before
    assert kept.keeper.deadline == deadline
    kept.keeper.release()
    assert kept.requests.empty()
    assert kept.lost.empty()


def test_a_look_finds_that_the_job_is_anothers(database: Database) -> None:
    job = running(database)
    kept = looking(database, job)
    database.retry(lambda s: jobs.release(s, job.id, job.fence, charge_attempt=True, why="it was reaped"))
    assert kept.lost.get(timeout=SOON)
    kept.keeper._thread.join(SOON)
    assert not kept.keeper._thread.is_alive()


def test_looking_often_does_not_keep_a_heartbeat_from_coming(database: Database) -> None:
    job = running(database)
    before = lease_until(database, job)
    kept = looking(database, job, heartbeat_seconds=0.1)
    wait_for("a renewal", lambda: lease_until(database, job) > before + 3000, SOON)
    kept.keeper.release()


def test_a_database_that_is_away_while_looking_is_waited_for(database: Database) -> None:
    job = running(database)
    watched = Watched(database, refusals=3)
    kept = looking(watched, job)
    database.retry(lambda s: jobs.request_cancel(s, job.id, tenant=None))
    assert kept.requests.get(timeout=SOON) is RequestedAction.CANCEL
    assert watched.refusals == 0
    assert kept.lost.empty()
    kept.keeper.release()
