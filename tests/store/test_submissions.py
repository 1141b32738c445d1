"""Jobs submitted together are each what they would have been alone."""

import pytest
from sqlalchemy import text

from service.errors import InvalidRequest, NotFound
from service.store import events, jobs, metrics
from service.store.database import Database
from service.store.jobs import NewJob

from .making import spec, submitted


def new(**changes: object) -> NewJob:
    options = {
        name: changes.pop(name) for name in ("idempotency_key", "warnings", "tenant") if name in changes
    }
    return NewJob(**{"tenant": "acme", "spec": spec(**changes), **options})  # type: ignore[arg-type]


def test_what_is_returned_is_what_is_stored(database: Database) -> None:
    wanted = [new(name=f"n{number}", tags={"n": str(number)}, priority=number) for number in range(3)]
    with database.begin() as s:
        outcomes = jobs.submit_all(s, wanted)
    with database.read() as s:
        stored = [jobs.get(s, one.job_id, tenant="acme") for one in wanted]
        tagged = jobs.list_jobs(s, tenant="acme", tags=[("n", "1")], limit=9)
    assert outcomes == [(job, True) for job in stored]
    assert tagged == [stored[1]]


def test_together_or_alone_is_the_same(database: Database) -> None:
    alone = submitted(database)
    with database.begin() as s:
        [one, other] = [job for job, _ in jobs.submit_all(s, [new(), new()])]  # type: ignore[misc]
    rows = "SELECT * FROM {} WHERE {} = :id"
    own = {"id", "job_id", "created_at", "queued_at", "publish_due", "updated_at", "at"}
    with database.read() as s:
        for table, key in (
            ("jobs", "id"),
            ("job_stats", "job_id"),
            ("job_transitions", "job_id"),
            ("job_events", "job_id"),
        ):
            found = [
                [
                    {name: value for name, value in row.items() if name not in own}
                    for row in s.execute(text(rows.format(table, key)), {"id": job.id}).mappings()
                ]
                for job in (alone, one, other)
            ]
            assert len(found[0]) == 1
            assert found[0] == found[1] == found[2]


def test_warnings_are_events_and_the_next_one_follows(database: Database) -> None:
    wanted = new(warnings=("Slow.", "Odd \x00."))
    with database.begin() as s:
        jobs.submit_all(s, [new(), wanted])
    with database.read() as s:
        told = [(event.seq, event.type, event.message) for event in events.read(s, wanted.job_id)]
        version = metrics.versions(s, [wanted.job_id])[wanted.job_id]
    assert told == [
        (1, "state", "queued: submitted"),
        (2, "warning", "Slow."),
        (3, "warning", "Odd \ufffd."),
    ]
    with database.begin() as s:
        assert events.append(s, wanted.job_id, type="alert", level="info", message="Next.") == 4
    with database.read() as s:
        assert metrics.versions(s, [wanted.job_id])[wanted.job_id] > version


def test_a_key_used_with_another_body_refuses_that_one_alone(database: Database) -> None:
    first, other, again = (
        new(idempotency_key="k"),
        new(idempotency_key="k", name="other"),
        new(idempotency_key="k"),
    )
    elsewhere = new(idempotency_key="k", tenant="rival", name="theirs")
    with database.begin() as s:
        made, refused, same, theirs = jobs.submit_all(s, [first, other, again, elsewhere])
    assert isinstance(refused, InvalidRequest)
    assert not isinstance(made, InvalidRequest)
    assert same == (made[0], False)
    assert not isinstance(theirs, InvalidRequest)
    assert (theirs[0].id, theirs[1]) == (elsewhere.job_id, True)
    with database.read() as s:
        assert jobs.list_jobs(s, tenant="acme", limit=9) == [made[0]]
    with database.begin() as s:
        mine = new(idempotency_key="k")
        yours = new(idempotency_key="k", tenant="rival", name="theirs")
        assert jobs.submit_all(s, [mine, yours]) == [(made[0], False), (theirs[0], False)]


@pytest.mark.parametrize("key", [None, "k"])
def test_a_repeat_creates_nothing(database: Database, key: str | None) -> None:
    wanted = [new(idempotency_key=key, tags={"a": "b"}, warnings=("Slow.",)), new()]
    with database.begin() as s:
        first = jobs.submit_all(s, wanted[:1])
    with database.begin() as s:
        again = jobs.submit_all(s, wanted)
    assert again[:1] == first
    with database.read() as s:
        assert len(jobs.list_jobs(s, tenant="acme", limit=9)) == 2
        assert len(events.read(s, wanted[0].job_id)) == 2


def test_an_id_that_is_none_is_refused(database: Database) -> None:
    with pytest.raises(NotFound), database.begin() as s:
        jobs.submit(s, tenant="acme", spec=spec(), job_id="7")
