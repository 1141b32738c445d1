"""The lease keeper: renewals, what they bring back, and when it must not be believed any longer."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.contract.states import RequestedAction
from service.errors import StaleFence, StoreUnavailable
from worker.lease import LeaseKeeper

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
