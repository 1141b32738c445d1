"""Consumers and the duties of the outbox: at least once, in order, by one process at a time."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import update

from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.dispatch import one_round
from halfstep.service.dispatch.consuming import Consumer, consume
from halfstep.service.settings import Settings
from halfstep.service.store import events, jobs, outbox
from halfstep.service.store.outbox import Entry
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import outbox as outbox_rows
from tests.store.making import claimed, submitted


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, no_worker_seconds=1000)


class Recorder:
    """What a consumer was given; it fails as often as it is told to."""

    def __init__(self, *, failures: int = 0) -> None:
        self.given: list[tuple[str, int]] = []
        self.failures = failures

    def __call__(self, entries: Sequence[Entry]) -> None:
        self.given += [(each.job_id, each.seq) for each in entries]
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the receiver is away")


def told(db: Database, number: int) -> list[tuple[str, int]]:
    """A job with so many sequenced events; each as a recorder notes it."""
    job = submitted(db)
    for _ in range(number - 1):
        with db.begin() as s:
            events.append(s, job.id, type="alert", level="info", message="look")
    with db.begin() as s:
        outbox.sequence(s)
    return [(job.id, seq) for seq in range(1, number + 1)]


def drain(db: Database, consumer: Consumer, holder: str = "one") -> None:
    while consume(db, consumer, holder=holder):
        pass


def test_a_consumer_is_given_every_event_once_where_nothing_fails(database: Database) -> None:
    handle = Recorder()
    consumer = Consumer(name="hooks", handle=handle, batch=2)
    wanted = told(database, 5)
    drain(database, consumer)
    assert handle.given == wanted
    drain(database, consumer)
    wanted += told(database, 1)
    drain(database, consumer)
    assert handle.given == wanted


def test_what_was_not_handled_is_given_again_and_nothing_is_passed_over(database: Database) -> None:
    handle = Recorder(failures=1)
    consumer = Consumer(name="hooks", handle=handle, batch=2)
    wanted = told(database, 3)
    with pytest.raises(ConnectionError):
        consume(database, consumer, holder="one")
    drain(database, consumer)
    assert handle.given == wanted[:2] + wanted


def test_a_consumer_of_one_type_is_given_no_other_and_still_goes_on(database: Database) -> None:
    handle = Recorder()
    consumer = Consumer(name="hooks", handle=handle, types=("state",))
    [first, *_] = told(database, 3)
    drain(database, consumer)
    assert handle.given == [first]
    with database.read() as s:
        assert outbox.position_of(s, "hooks") == outbox.newest_position(s)


def test_while_one_process_holds_a_consumer_another_leaves_it_alone(database: Database) -> None:
    given: list[str] = []

    def slow(entries: Sequence[Entry]) -> None:
        given.append("slow")
        assert not consume(database, Consumer(name="hooks", handle=fast), holder="two")

    def fast(entries: Sequence[Entry]) -> None:
        given.append("fast")

    told(database, 1)
    consume(database, Consumer(name="hooks", handle=slow), holder="one")
    assert given == ["slow"]


def test_a_process_that_was_frozen_stores_no_cursor_over_its_successors(database: Database) -> None:
    later = Recorder()

    def frozen(entries: Sequence[Entry]) -> None:
        told(database, 2)
        drain(database, Consumer(name="hooks", handle=later), holder="two")

    wanted = told(database, 2)
    assert not consume(database, Consumer(name="hooks", handle=frozen, held_seconds=-1.0), holder="one")
    assert later.given[:2] == wanted
    assert len(later.given) == 4
    with database.read() as s:
        assert outbox.position_of(s, "hooks") == outbox.newest_position(s)


def test_a_consumer_that_was_away_for_too_long_goes_on_after_the_gap(database: Database) -> None:
    handle = Recorder()
    told(database, 2)
    with database.begin() as s:
        s.execute(update(outbox_rows).values(at=0.0))
    with database.begin() as s:
        assert outbox.remove_old(s, days=7, most_days=30, limit=100) == 2
    wanted = told(database, 1)
    drain(database, Consumer(name="hooks", handle=handle))
    assert handle.given == wanted


def test_what_the_dispatcher_does_to_a_job_says_so(database: Database, settings: Settings) -> None:
    submitted(database)
    job = claimed(database, lease_seconds=-1.0)
    one_round(settings, database)
    with database.read() as s:
        last = list(outbox.read(s, after=0, limit=10).entries)[-1]
    assert (last.job_id, last.message) == (job.id, "queued: the lease of w1 ran out in attempt 1")
    assert last.actor == Actor(ActorKind.DISPATCHER)


def test_a_round_gives_positions_and_removes_entries_by_age(database: Database, settings: Settings) -> None:
    job = submitted(database)
    one_round(settings, database)
    with database.read() as s:
        [entry] = outbox.read(s, after=0, limit=10).entries
    assert (entry.job_id, entry.seq) == (job.id, 1)
    with database.begin() as s:
        s.execute(update(outbox_rows).values(at=outbox_rows.c.at - 8 * 86_400))
    one_round(settings.model_copy(update={"events_days": 9.0}), database)
    with database.read() as s:
        assert outbox.removed_up_to(s) == 0
    one_round(settings, database)
    with database.read() as s:
        assert not outbox.read(s, after=0, limit=10).entries
        assert outbox.removed_up_to(s) == entry.position
        assert len(events.read(s, job.id)) == 1  # the event itself stays with its job
        assert jobs.get(s, job.id, tenant=None).id == job.id
