"""Jobs submitted together are each what they would have been alone."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from halfstep.service.errors import InvalidRequest, NotFound
from halfstep.service.store import events, jobs, record
from halfstep.service.store.jobs import NewJob, Submitted
from halfstep.service.store.jobs.submissions import Beginning
from halfstep.service.store.sql.database import Database

from .making import spec, submitted


def new(**changes: Any) -> NewJob:
    options: dict[str, Any] = {
        name: changes.pop(name) for name in ("idempotency_key", "warnings", "tenant") if name in changes
    }
    options.setdefault("tenant", "acme")
    return NewJob(spec=spec(**changes), **options)


def together(s: Session, *wanted: NewJob) -> list[Submitted]:
    """What came of submissions of which none is refused."""
    found = jobs.submit_all(s, wanted)
    assert all(isinstance(one, Submitted) for one in found)
    return [one for one in found if isinstance(one, Submitted)]


def test_what_is_returned_is_what_is_stored(database: Database) -> None:
    wanted = [new(name=f"n{number}", tags={"n": str(number)}, priority=number) for number in range(3)]
    with database.begin() as s:
        outcomes = jobs.submit_all(s, wanted)
    with database.read() as s:
        stored = [jobs.get(s, one.job_id, tenant="acme") for one in wanted]
        tagged = jobs.list_jobs(s, tenant="acme", tags=[[("n", "1")]], limit=9)
        told = [Beginning(tuple(jobs.transitions(s, job.id)), record.summarise(s, job.id)) for job in stored]
    assert outcomes == [
        Submitted(job, created=True, beginning=one) for job, one in zip(stored, told, strict=True)
    ]
    assert tagged == [stored[1]]


def test_together_or_alone_is_the_same(database: Database) -> None:
    alone = submitted(database)
    with database.begin() as s:
        [one, other] = [found.job for found in together(s, new(), new())]
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
        version = record.versions(s, [wanted.job_id])[wanted.job_id]
    assert told == [
        (1, "state", "queued: submitted"),
        (2, "warning", "Slow."),
        (3, "warning", "Odd \ufffd."),
    ]
    with database.begin() as s:
        assert events.append(s, wanted.job_id, type="alert", level="info", message="Next.") == 4
    with database.read() as s:
        assert record.versions(s, [wanted.job_id])[wanted.job_id] > version


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
    assert isinstance(made, Submitted)
    assert same == replace(made, created=False)
    assert isinstance(theirs, Submitted)
    assert (theirs.job.id, theirs.created) == (elsewhere.job_id, True)
    with database.read() as s:
        assert jobs.list_jobs(s, tenant="acme", limit=9) == [made.job]
    with database.begin() as s:
        mine = new(idempotency_key="k")
        yours = new(idempotency_key="k", tenant="rival", name="theirs")
        assert jobs.submit_all(s, [mine, yours]) == [
            Submitted(made.job, created=False, beginning=None),
            Submitted(theirs.job, created=False, beginning=None),
        ]


def test_keys_that_are_there_and_keys_that_are_not_come_together(database: Database) -> None:
    with database.begin() as s:
        [held] = together(s, new(idempotency_key="m"))
    wanted = [new(idempotency_key=key, name=name) for key, name in (("z", "z"), ("m", "other"), ("a", "a"))]
    alike = [new(idempotency_key="m"), new(idempotency_key="a", name="a"), new()]
    with database.begin() as s:
        last, refused, first, same, again, without = jobs.submit_all(s, [*wanted, *alike])
    assert isinstance(refused, InvalidRequest)
    assert same == Submitted(held.job, created=False, beginning=None)
    created = {held.job.id}
    for found, asked in ((last, wanted[0]), (first, wanted[2]), (without, alike[2])):
        assert isinstance(found, Submitted)
        assert (found.job.id, found.created) == (asked.job_id, True)
        created.add(found.job.id)
    assert isinstance(first, Submitted)
    assert again == replace(first, created=False)
    with database.read() as s:
        assert {job.id for job in jobs.list_jobs(s, tenant="acme", limit=9)} == created


@pytest.mark.parametrize("key", [None, "k"])
def test_a_repeat_creates_nothing(database: Database, key: str | None) -> None:
    wanted = [new(idempotency_key=key, tags={"a": "b"}, warnings=("Slow.",)), new()]
    with database.begin() as s:
        [first] = together(s, wanted[0])
    with database.begin() as s:
        again, other = together(s, *wanted)
    assert again == replace(first, beginning=None)
    assert other.beginning is not None
    with database.read() as s:
        assert len(jobs.list_jobs(s, tenant="acme", limit=9)) == 2
        assert len(events.read(s, wanted[0].job_id)) == 2


def test_an_id_that_is_none_is_refused(database: Database) -> None:
    with pytest.raises(NotFound), database.begin() as s:
        jobs.submit(s, tenant="acme", spec=spec(), job_id="7")
