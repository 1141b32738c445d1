"""Many at once: claims, reapers, cancels, keys and zombies, on threads with connections of their own."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.errors import Conflict, StaleFence
from halfstep.service.store import events, jobs, record
from halfstep.service.store.job_rows import lock_fenced
from halfstep.service.store.record import writing
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import jobs as job_rows
from tests.store.making import CPU, LIVE, claimed, running, spec, state_of, steps, submitted

T = TypeVar("T")
PATIENCE = 60.0  # of a transaction's retries: many threads share two cores


def at_once(number: int, work: Callable[[int], T]) -> list[T]:
    """What `work(0)`, …, `work(number - 1)` return, all started at the same moment."""
    gate = threading.Barrier(number)

    def waiting(index: int) -> T:
        gate.wait(timeout=30)
        return work(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(waiting, range(number)))


def test_many_claimers_get_each_job_exactly_once(database: Database) -> None:
    made = [submitted(database) for _ in range(60)]

    def claim_all(index: int) -> list[tuple[str, int]]:
        mine: list[tuple[str, int]] = []
        misses = 0
        while misses < 3:  # a job locked by another is skipped, so a miss is no proof that none is left
            job = database.retry(
                lambda s: jobs.claim(s, worker_id=f"w{index}", capability=CPU, lease_seconds=60),
                seconds=PATIENCE,
            )
            if job is None:
                misses += 1
            else:
                mine.append((job.id, job.fence))
        return mine

    taken = [claim for claims in at_once(8, claim_all) for claim in claims]
    assert Counter(taken) == Counter((job.id, 1) for job in made)
    with database.read() as s:
        assert jobs.counts(s)[JobState.STARTING] == 60


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_claimer_does_not_wait_for_another_ones_commit(database: Database) -> None:
    made = [submitted(database) for _ in range(2)]
    with database.begin() as s:
        first = jobs.claim(s, worker_id="w1", capability=CPU, lease_seconds=60)
        second = claimed(database, worker="w2")  # on a connection of its own, while the first is open
        third = database.retry(lambda s: jobs.claim(s, worker_id="w3", capability=CPU, lease_seconds=60))
    assert first is not None
    assert [first.id, second.id] == [job.id for job in made]
    assert third is None


def test_several_reapers_take_each_lost_job_once(database: Database) -> None:
    for _ in range(20):
        submitted(database)
    held = [claimed(database) for _ in range(20)]
    with database.begin() as s:
        s.execute(update(job_rows).values(lease_until=1.0))

    reaped = [
        job for found in at_once(4, lambda _: database.retry(jobs.reap, seconds=PATIENCE)) for job in found
    ]
    assert Counter(job.id for job in reaped) == Counter(job.id for job in held)
    assert {(job.state, job.attempt, job.fence) for job in reaped} == {(JobState.QUEUED, 2, 1)}
    with database.read() as s:
        assert [len(jobs.transitions(s, job.id)) for job in held] == [3] * 20


def test_a_claim_between_a_zombies_check_and_its_write_cannot_happen(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence is checked under the row's lock: a new claim waits for the write that follows."""
    job = running(database)
    checked = threading.Event()
    go_on = threading.Event()

    def check_then_dawdle(s: Session, job_id: str, fence: int) -> None:
        lock_fenced(s, job_id, fence)
        checked.set()
        go_on.wait(timeout=30)

    def zombie() -> str:
        with database.begin() as s:
            record.append(s, job.id, job.fence, steps(1, 3), LIVE)
        return "written"

    def successor() -> int:
        database.retry(
            lambda s: jobs.release(s, job.id, job.fence, charge_attempt=True, why="lost"), seconds=PATIENCE
        )
        return claimed(database).fence

    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(writing, "lock_fenced", check_then_dawdle)
        first = pool.submit(zombie)
        assert checked.wait(timeout=30)
        second = pool.submit(successor)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.5)  # it waits between check and write
        go_on.set()
        assert first.result(timeout=30) == "written"
        assert second.result(timeout=30) == 2
    with pytest.raises(StaleFence), database.begin() as s:
        record.append(s, job.id, job.fence, steps(4, 5), LIVE)
    with database.read() as s:
        assert record.summarise(s, job.id).current_step == 3


def test_writers_under_a_moving_fence_never_mix(database: Database) -> None:
    """Attempts write while reapers and claimers move the job on: what is stored is one clean record."""
    job = running(database, max_attempts=100)
    fences = [job.fence]
    done = threading.Event()

    def append_two(s: Session, fence: int) -> None:
        number = record.summarise(s, job.id).current_step
        record.append(s, job.id, fence, steps(number + 1, number + 2, grad_norm=float(fence)), LIVE)

    def write(fence: int) -> None:
        number = 0
        while not done.is_set():
            try:
                with database.begin() as s:
                    number = record.summarise(s, job.id).current_step
                    record.append(
                        s, job.id, fence, steps(number + 1, number + 2, grad_norm=float(fence)), LIVE
                    )
            except Conflict:
                continue  # the successor appended between the look and the lock: PostgreSQL alone
            except StaleFence:
                return

    def until(attempt: Callable[[], T]) -> T:
        """A row that is locked just now is skipped by reapers and claimers; they come round again."""
        deadline = time.monotonic() + PATIENCE
        while not (found := attempt()):
            assert time.monotonic() < deadline
        return found

    def claim() -> jobs.Job | None:
        return database.retry(
            lambda s: jobs.claim(s, worker_id="w1", capability=CPU, lease_seconds=60), seconds=PATIENCE
        )

    def expire(s: Session) -> None:
        s.execute(update(job_rows).where(job_rows.c.id == job.id).values(lease_until=1.0))

    def move_on() -> None:
        try:
            for _ in range(5):
                database.retry(expire, seconds=PATIENCE)
                until(lambda: database.retry(jobs.reap, seconds=PATIENCE))
                successor = until(claim)
                assert successor is not None
                fences.append(successor.fence)
                pool.submit(write, successor.fence)
        finally:
            done.set()

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(write, job.fence)
        pool.submit(move_on).result(timeout=200)
        first.result(timeout=30)
    assert fences == [1, 2, 3, 4, 5, 6]
    with database.read() as s:
        page = record.read(s, job.id, limit=10_000, fields=["grad_norm"])
    assert page.columns["step"] == list(range(1, page.last_step + 1)) != []
    assert page.columns["grad_norm"] == sorted(page.columns["grad_norm"])  # no old fence after a newer one


def test_cancel_and_finish_at_once_end_in_one_of_both(database: Database) -> None:
    for _ in range(10):
        job = running(database)

        def work(index: int, job: jobs.Job = job) -> Any:
            try:
                if index == 0:
                    return database.retry(
                        lambda s: jobs.request_cancel(s, job.id, tenant=None), seconds=PATIENCE
                    ).state
                return database.retry(
                    lambda s: jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None), seconds=PATIENCE
                ).state
            except Conflict:
                return "too late"

        cancelled, finished = at_once(2, work)
        assert finished is JobState.SUCCEEDED
        assert cancelled in {JobState.CANCELLING, "too late"}
        assert state_of(database, job) is JobState.SUCCEEDED


def test_one_key_used_at_once_makes_one_job(database: Database) -> None:
    def submit(_: int) -> tuple[str, bool]:
        job, created = database.retry(
            lambda s: jobs.submit(s, tenant="acme", spec=spec(), idempotency_key="k"), seconds=PATIENCE
        )
        return job.id, created

    answers = at_once(8, submit)
    assert len({job_id for job_id, _ in answers}) == 1
    assert [created for _, created in answers].count(True) == 1
    with database.read() as s:
        assert sum(jobs.counts(s).values()) == 1


def test_events_written_at_once_are_numbered_without_gaps(database: Database) -> None:
    job = submitted(database)

    def tell(index: int) -> list[int]:
        return [
            database.retry(
                lambda s: events.append(s, job.id, type="alert", level="info", message=str(index)),
                seconds=PATIENCE,
            )
            for _ in range(10)
        ]

    numbers = [seq for seqs in at_once(6, tell) for seq in seqs]
    assert sorted(numbers) == list(range(2, 62))
    with database.read() as s:
        assert [event.seq for event in events.read(s, job.id, limit=100)] == list(range(1, 62))
