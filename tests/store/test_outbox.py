"""The outbox: every committed event gets one place among all, none is skipped, and cursors are fenced."""

from contextlib import ExitStack

import pytest
from sqlalchemy import event, text, update

from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.errors import StaleFence
from halfstep.service.store import events, jobs, outbox
from halfstep.service.store.jobs import NewJob
from halfstep.service.store.outbox import Entry
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import outbox as outbox_rows
from halfstep.service.store.tables import outbox_cursors
from tests.store.making import running, spec, submitted

DAY = 86_400.0


def tell(db: Database, job_id: str, message: str) -> None:
    with db.begin() as s:
        events.append(s, job_id, type="alert", level="info", message=message)


def sequence(db: Database, *, limit: int = 1000) -> int:
    with db.begin() as s:
        return outbox.sequence(s, limit=limit)


def entries(
    db: Database, after: int = 0, *, tenant: str | None = None, types: tuple[str, ...] = ()
) -> list[Entry]:
    with db.read() as s:
        return list(outbox.read(s, after=after, limit=1000, tenant=tenant, types=types).entries)


def age(db: Database, days: float, *, up_to: int) -> None:
    with db.begin() as s:
        s.execute(
            update(outbox_rows)
            .where(outbox_rows.c.position <= up_to)
            .values(at=outbox_rows.c.at - days * DAY)
        )


def test_every_way_to_write_an_event_ends_in_the_outbox_in_order(database: Database) -> None:
    job = running(database)  # submitted, claimed, running
    tell(database, job.id, "look")
    assert entries(database) == []  # nothing has a place yet
    with database.read() as s:
        assert outbox.any_waiting(s)
    assert sequence(database) == 4
    found = entries(database)
    assert [(each.job_id, each.tenant, each.seq) for each in found] == [
        (job.id, "acme", seq) for seq in (1, 2, 3, 4)
    ]
    assert [each.position for each in found] == sorted(each.position for each in found)
    with database.read() as s:
        told = events.read(s, job.id)
        assert not outbox.any_waiting(s)
    assert [(each.at, each.type, each.level, each.message, each.data) for each in found] == [
        (each.at, each.type, each.level, each.message, each.data) for each in told
    ]
    assert sequence(database) == 0


def test_an_event_that_an_older_version_writes_is_in_the_outbox(database: Database) -> None:
    job = submitted(database)
    statement = (
        "INSERT INTO job_events (job_id, seq, at, type, level, message) "
        "VALUES (:job, :seq, 1.0, 'alert', 'info', 'x')"
    )
    with database.begin() as s:
        s.execute(text(statement), [{"job": job.id, "seq": 2}, {"job": job.id, "seq": 3}])
    sequence(database)
    assert [(each.seq, each.actor) for each in entries(database)] == [(1, None), (2, None), (3, None)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_event_that_commits_late_is_not_skipped(database: Database) -> None:
    first, second = submitted(database), submitted(database)
    sequence(database)
    seen = entries(database)[-1].position
    with database.begin() as late:
        events.append(late, first.id, type="alert", level="info", message="drawn first, committed last")
        tell(database, second.id, "drawn last, committed first")
        sequence(database)
        [early] = entries(database, seen)
        assert early.job_id == second.id
    sequence(database)
    assert [each.job_id for each in entries(database, early.position)] == [first.id]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_event_that_commits_while_positions_are_given_waits_for_the_next_time(database: Database) -> None:
    first, second = submitted(database), submitted(database)
    sequence(database)
    seen = entries(database)[-1].position
    with ExitStack() as writer, database.begin() as s:
        late = writer.enter_context(database.begin())
        events.append(late, first.id, type="alert", level="info", message="drawn first, committed last")
        tell(database, second.id, "drawn last, committed first")

        @event.listens_for(s.connection(), "before_cursor_execute")
        def commit_late(_c: object, _cursor: object, statement: str, *_: object) -> None:
            if statement.startswith("INSERT INTO outbox"):
                writer.close()

        assert outbox.sequence(s) == 1
    assert sequence(database) == 1
    assert [each.job_id for each in entries(database, seen)] == [second.id, first.id]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_one_process_at_a_time_gives_positions_and_the_others_do_not_wait(database: Database) -> None:
    submitted(database)
    with database.begin() as s:
        assert outbox.sequence(s) == 1
        submitted(database)
        assert sequence(database) == 0
    assert sequence(database) == 1


def test_positions_are_given_in_small_transactions(database: Database) -> None:
    job = submitted(database)
    for number in range(5):
        tell(database, job.id, str(number))
    assert [sequence(database, limit=4), sequence(database, limit=4), sequence(database, limit=4)] == [
        4,
        2,
        0,
    ]
    assert [each.seq for each in entries(database)] == [1, 2, 3, 4, 5, 6]


def test_what_is_rolled_back_never_happened(database: Database) -> None:
    job = submitted(database)
    with database.begin() as s:
        events.append(s, job.id, type="alert", level="info", message="x")
        s.rollback()
    sequence(database)
    assert [each.seq for each in entries(database)] == [1]


def test_a_reader_gets_its_tenants_events_of_the_types_that_it_names(database: Database) -> None:
    mine, theirs = submitted(database), submitted(database, tenant="other")
    tell(database, mine.id, "mine")
    tell(database, theirs.id, "theirs")
    sequence(database)
    assert {each.job_id for each in entries(database)} == {mine.id, theirs.id}
    assert [each.job_id for each in entries(database, tenant="acme")] == [mine.id, mine.id]
    assert [each.message for each in entries(database, tenant="other", types=("alert",))] == ["theirs"]
    newest = entries(database)[-1].position
    with database.read() as s:
        page = outbox.read(s, after=0, limit=5, tenant="acme", types=("nan",))
        assert outbox.newest_of(s, ["acme", "nobody"]) == {"acme": newest - 1, "nobody": 0}
    assert (page.entries, page.position, page.complete) == ([], newest, True)


def test_pages_lead_from_one_to_the_next(database: Database) -> None:
    job = submitted(database)
    for number in range(6):
        tell(database, job.id, str(number))
    sequence(database)
    seen: list[int] = []
    after, complete = 0, False
    while not complete:
        with database.read() as s:
            page = outbox.read(s, after=after, limit=3)
        seen += [each.seq for each in page.entries]
        after, complete = page.position, page.complete
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_events_of_a_deleted_job_go_with_it(database: Database) -> None:
    gone, kept = submitted(database), submitted(database)
    with database.begin() as s:
        jobs.request_cancel(s, gone.id, tenant=None)
    sequence(database)
    tell(database, gone.id, "has no position when the job goes")
    with database.begin() as s:
        jobs.delete(s, gone.id, tenant=None)
    with database.begin() as s:
        jobs.sweep(s, gone.id)
    sequence(database)
    assert [each.job_id for each in entries(database)] == [kept.id]
    with database.read() as s:
        assert not outbox.any_waiting(s)


def test_who_acts_is_kept_with_the_job_and_its_events(database: Database) -> None:
    key = Actor(ActorKind.KEY, id="k1", name="ci", tenant="acme")
    worker = Actor(ActorKind.WORKER, name="gpu-1")
    job = submitted(database.acting(key))
    tell(database.acting(worker), job.id, "from the worker")
    tell(database, job.id, "from nobody in particular")
    other = NewJob(tenant="acme", spec=spec(), actor=worker)
    with database.acting(key).begin() as s:
        jobs.submit_all(s, [other])
    sequence(database)
    assert [each.actor for each in entries(database)] == [key, worker, None, worker]
    with database.read() as s:
        stored = s.execute(text("SELECT submitted_by FROM jobs WHERE id = :id"), {"id": job.id}).scalar_one()
    assert stored == '{"kind":"key","id":"k1","name":"ci","tenant":"acme"}'


def test_a_cursor_is_held_by_one_and_its_fence_rises_with_each_new_holder(database: Database) -> None:
    def hold(holder: str, seconds: float = 60.0) -> outbox.Held | None:
        with database.begin() as s:
            return outbox.hold(s, "hooks", holder=holder, seconds=seconds)

    first = hold("a")
    assert first is not None
    assert (first.position, first.fence) == (0, 1)
    assert hold("b") is None
    assert hold("a") == first  # renewed, under its fence
    with database.begin() as s:
        assert outbox.advance(s, first, 7).position == 7
    assert hold("a", -1.0) is not None
    second = hold("b")
    assert second is not None
    assert (second.position, second.fence) == (7, 2)
    with pytest.raises(StaleFence, match="hooks"), database.begin() as s:
        outbox.advance(s, first, 9)
    with database.begin() as s:
        outbox.let_go(s, first)  # nothing of its own is left
    assert hold("a") is None
    with database.begin() as s:
        outbox.let_go(s, second)
    assert hold("a") is not None


def test_a_cursor_never_goes_back(database: Database) -> None:
    with database.begin() as s:
        held = outbox.hold(s, "hooks", holder="a", seconds=60)
        assert held is not None
        outbox.advance(s, held, 7)
    with pytest.raises(StaleFence), database.begin() as s:
        outbox.advance(s, held, 6)


def test_old_entries_are_removed_and_a_consumer_holds_them_back_up_to_a_limit(database: Database) -> None:
    job = submitted(database)
    for number in range(5):
        tell(database, job.id, str(number))
    sequence(database)
    positions = [each.position for each in entries(database)]

    def remove(limit: int = 100) -> int:
        with database.begin() as s:
            return outbox.remove_old(s, days=7, most_days=30, limit=limit)

    assert remove() == 0
    age(database, 8, up_to=positions[3])
    with database.begin() as s:
        held = outbox.hold(s, "hooks", holder="a", seconds=60)
        assert held is not None
        outbox.advance(s, held, positions[1])
    assert [remove(limit=1), remove(limit=1), remove(limit=1)] == [1, 1, 0]  # the consumer is not further
    with database.read() as s:
        assert outbox.removed_up_to(s) == positions[1]
    age(database, 23, up_to=positions[2])
    assert remove() == 1  # it has waited for long enough
    assert [each.position for each in entries(database)] == positions[3:]
    with database.begin() as s:
        s.execute(outbox_cursors.delete().where(outbox_cursors.c.name == "hooks"))
    assert remove() == 1
    with database.read() as s:
        assert outbox.removed_up_to(s) == positions[3]
