"""A database that takes no writes while steps arrive: what is kept, and what is told and when."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import Session

from halfstep.service.contract.metrics import Evaluation
from halfstep.service.errors import StaleFence, StoreUnavailable
from halfstep.service.store import events, jobs, record
from halfstep.service.store.sql.database import Database
from halfstep.worker.job.reporting import Reporter
from tests.e2e.cluster import wait_for
from tests.store.making import LIVE, claimed, step, submitted

SOON = 20.0


class Failing(Database):
    """A database that refuses while `refuses` says so; each refusal is told in `refusals`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.refuses: Callable[[], bool] = lambda: False
        self.refusals = threading.Semaphore(0)

    def retry(self, fn: Callable[[Session], Any], *, seconds: float = 5.0) -> Any:
        if self.refuses():
            self.refusals.release()
            raise StoreUnavailable("nobody answers")
        return super().retry(fn, seconds=min(seconds, 0.05))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.worker.job.reporting.RETRY_SECONDS", 0.01)


@pytest.fixture
def database(database_url: str) -> Iterator[Failing]:
    made = Failing(database_url)
    yield made
    made.dispose()


@pytest.fixture
def job(database: Failing) -> jobs.Job:
    submitted(database)
    return claimed(database)


class Told:
    """A reporter with its producer on a thread of its own, as the training loop is."""

    def __init__(self, database: Database, job: jobs.Job, **options: int) -> None:
        self.progress: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self.reporter = Reporter(
            database,
            job.id,
            job.fence,
            on_progress=lambda step, seconds: self.progress.put((step, seconds)),
            **options,
        )
        self.produced = 0
        self.reporter.opened(total_steps=None)

    def produce(self, last: int) -> None:
        for number in range(self.produced + 1, last + 1):
            self.reporter.steps([step(number)], LIVE)
            self.produced = number

    def in_background(self, last: int) -> threading.Thread:
        thread = threading.Thread(target=self.produce, args=(last,), daemon=True)
        thread.start()
        return thread


def stored_steps(database: Database, job: jobs.Job) -> list[int]:
    with database.read() as session:
        return record.read(session, job.id, after_step=0, limit=10_000, fields=["step"]).columns["step"]


def outages(database: Database, job: jobs.Job) -> list[events.Event]:
    with database.read() as session:
        found = events.read(session, job.id, type="alert")
    return [each for each in found if (each.data or {}).get("code") == "database_away"]


def entry(logs: list[Any], words: str) -> Any:
    (found,) = [each for each in logs if words in each["event"]]
    return found


def refuse(database: Failing) -> None:
    """From now on, and until the reporter has met it."""
    database.refuses = lambda: True


@contextmanager
def full(database: Database) -> Iterator[Callable[[], None]]:
    """A disk without room for one more page of the database; yields what makes room."""
    pages = ["1"]  # SQLite takes the present size for anything below it

    def limit(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")

    sqlalchemy_event.listen(database._engine, "checkout", limit)
    yield lambda: pages.__setitem__(0, "1000000")
    sqlalchemy_event.remove(database._engine, "checkout", limit)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_disk_costs_no_step_and_is_told_once_there_is_room(database: Failing, job: jobs.Job) -> None:
    told = Told(database, job)
    told.reporter._drain()
    with full(database) as make_room, structlog.testing.capture_logs() as logs:
        # Enough that no free page holds it.
        told.produce(3000)
        wait_for("it is met", lambda: any("takes no writes" in each["event"] for each in logs), SOON)
        told.produce(3500)
        assert stored_steps(database, job)[-1:] != [3500]
        make_room()
        told.reporter.close()
    assert stored_steps(database, job) == list(range(1, 3501))
    (event,) = outages(database, job)
    assert "database or disk is full" in event.message
    assert event.data is not None
    assert event.data["seconds"] >= 0


def test_at_its_bound_training_waits_and_both_are_told(database: Failing, job: jobs.Job) -> None:
    told = Told(database, job, max_rows=10)
    told.produce(5)
    told.reporter._drain()
    refuse(database)
    with structlog.testing.capture_logs() as logs:
        producer = told.in_background(100)
        for _ in range(30):
            assert database.refusals.acquire(timeout=SOON)
        said = entry(logs, "training waits for the database")
        assert producer.is_alive()
    assert told.produced == 15
    assert said["rows"] == 10
    assert said["since"].startswith("20")
    database.refuses = lambda: False
    producer.join(SOON)
    told.reporter.close()
    assert stored_steps(database, job) == list(range(1, 101))
    (event,) = outages(database, job)
    assert event.data is not None
    # Each refusal took the reporter 10 ms at least, and the loop waited from the first few on.
    assert event.data["seconds"] >= event.data["waited_seconds"] > 0
    assert event.data["rows_buffered"] == 10
    assert f"waited for {event.data['waited_seconds']} s" in event.message


def test_within_the_bound_training_does_not_wait(database: Failing, job: jobs.Job) -> None:
    told = Told(database, job, max_rows=100)
    refuse(database)
    told.produce(100)
    for _ in range(5):
        assert database.refusals.acquire(timeout=SOON)
    assert told.progress.qsize() == 101
    database.refuses = lambda: False
    told.reporter.close()
    assert stored_steps(database, job) == list(range(1, 101))


def test_waiting_for_the_database_is_no_stall(database: Failing, job: jobs.Job) -> None:
    told = Told(database, job, max_rows=10)
    refuse(database)
    producer = told.in_background(11)
    for _ in range(12):
        told.progress.get(timeout=SOON)
    assert told.progress.get(timeout=SOON) == (10, LIVE.step_time_ms_p50 / 1e3)
    database.refuses = lambda: False
    producer.join(SOON)
    told.reporter.close()


def test_a_second_outage_does_not_lose_the_event_of_the_first(database: Failing, job: jobs.Job) -> None:
    told = Told(database, job)
    answers = iter([True, True, False, True, True, False])
    told.reporter._drain()
    database.refuses = lambda: next(answers, False)
    told.produce(1)
    told.reporter.close()
    assert stored_steps(database, job) == [1]
    assert len(outages(database, job)) == 2


def test_who_was_away_for_longer_than_the_lease_writes_nothing_afterwards(
    database: Failing, job: jobs.Job
) -> None:
    told = Told(database, job, max_rows=10)
    told.produce(5)
    told.reporter._drain()
    refuse(database)
    told.produce(15)
    assert database.refusals.acquire(timeout=SOON)
    with database.begin() as session:  # the lease ran out, and another attempt has it
        jobs.release(session, job.id, job.fence, charge_attempt=True, why="its lease ran out")
    successor = claimed(database)
    database.refuses = lambda: False
    with pytest.raises(StaleFence):
        told.reporter.close()
    assert stored_steps(database, job) == [1, 2, 3, 4, 5]
    assert successor.fence > job.fence
    assert outages(database, job) == []


class Counting(Failing):
    """Counts its commits."""

    commits = 0

    def retry(self, fn: Callable[[Session], Any], *, seconds: float = 5.0) -> Any:
        done = super().retry(fn, seconds=seconds)
        self.commits += 1
        return done


class Forgetful(Failing):
    """Commits, loses the answer, and is asked again."""

    loses = False

    def retry(self, fn: Callable[[Session], Any], *, seconds: float = 5.0) -> Any:
        if self.loses:
            super().retry(fn, seconds=seconds)
        return super().retry(fn, seconds=seconds)


def evaluation(step: int) -> Evaluation:
    return Evaluation(step=step, split="held_out", loss=1.0 / step, metrics={}, seconds=0.1)


def messages(database: Database, job: jobs.Job) -> list[str]:
    with database.read() as session:
        return [each.message for each in events.read(session, job.id, limit=1000)]


def test_what_waits_together_is_committed_together(database_url: str) -> None:
    database = Counting(database_url)
    submitted(database)
    job = claimed(database)
    told = Told(database, job)
    told.reporter._drain()
    refuse(database)
    told.reporter.event("alert", "info", "the first")
    assert database.refusals.acquire(timeout=SOON)
    for last in range(10, 110, 10):
        told.produce(last)
        told.reporter.evaluated(evaluation(last))
        told.reporter.event("alert", "info", f"at {last}")
    before = database.commits
    database.refuses = lambda: False
    told.reporter.close()
    # The first event, the event of the outage with all that waited behind it.
    assert database.commits == before + 2
    assert stored_steps(database, job) == list(range(1, 101))
    told_of = [each for each in messages(database, job) if each.startswith(("at ", "step "))]
    assert [each.split()[1].strip(":") for each in told_of] == [
        str(last) for last in range(10, 110, 10) for _ in range(2)
    ]
    database.dispose()


def test_a_commit_whose_answer_was_lost_is_not_made_twice(database_url: str) -> None:
    database = Forgetful(database_url)
    submitted(database)
    job = claimed(database)
    told = Told(database, job)
    told.reporter._drain()
    refuse(database)
    told.produce(1)
    assert database.refusals.acquire(timeout=SOON)
    for last in (2, 3):
        told.produce(last)
        told.reporter.evaluated(evaluation(last))
        told.reporter.event("alert", "info", f"at {last}")
    database.loses = True
    database.refuses = lambda: False
    told.reporter.close()
    assert stored_steps(database, job) == [1, 2, 3]
    assert [each for each in messages(database, job) if each.startswith(("at ", "step "))] == [
        "step 2: held_out loss 0.5",
        "at 2",
        "step 3: held_out loss 0.3333",
        "at 3",
    ]
    database.dispose()
