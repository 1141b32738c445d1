"""Submissions that come at the same time: stored together, each judged for itself."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy.orm import Session

from halfstep.service import queue
from halfstep.service.api.requests.body import JsonBody, parse
from halfstep.service.api.submitting.intake import Intake, Order, Taken
from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.errors import InvalidRequest, StoreUnavailable
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.fleet import components
from halfstep.service.store.fleet.components import ComponentInfo
from halfstep.service.store.sql.database import Database

from .catalogue import INFOS
from .conftest import SPEC


def order(key: str | None = None, *, dry_run: bool = False, **changes: Any) -> Order:
    raw = json.dumps({**SPEC, **changes}).encode()
    body = JsonBody(document=parse(raw), digest=str(hash(raw)), earlier_digest="")
    return Order("acme", Actor(ActorKind.LOCAL), body, dry_run=dry_run, idempotency_key=key)


def take(intake: Intake, *orders: Order) -> list[Taken | BaseException]:
    """The outcomes of orders that come together, and after one that is alone."""

    async def run() -> list[Taken | BaseException]:
        return await asyncio.gather(*map(intake.take, orders), return_exceptions=True)

    return asyncio.run(run())


def stored(database: Database) -> list[jobs.Job]:
    with database.read() as session:
        return jobs.list_jobs(session, tenant=None, limit=100)[::-1]


@pytest.fixture
def transactions(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each call of the store was given."""
    counts: list[int] = []
    submit_all = jobs.submit_all

    def counted(session: Session, wanted: Sequence[jobs.NewJob]) -> Any:
        counts.append(len(wanted))
        return submit_all(session, wanted)

    monkeypatch.setattr(jobs, "submit_all", counted)
    return counts


def test_what_comes_together_is_committed_together(
    settings: Settings, database: Database, sent: list[str], transactions: list[int]
) -> None:
    outcomes = take(Intake(settings, database), *(order(name=f"n{number}") for number in range(5)))
    ids = [outcome.job_id for outcome in outcomes if isinstance(outcome, Taken)]
    assert transactions == [5]
    assert ids == [job.id for job in stored(database)]
    assert [job.name for job in stored(database)] == [f"n{number}" for number in range(5)]
    assert sent == ids


def test_one_that_is_refused_refuses_no_other(
    settings: Settings, database: Database, sent: list[str]
) -> None:
    with database.begin() as session:
        components.publish(session, INFOS)
    outcomes = take(
        Intake(settings, database),
        order("k"),
        order(model={"name": "absent"}),
        order("k", name="another"),
        order("k"),
        order(dry_run=True),
        order(name="last"),
    )
    first, absent, reused, again, checked, last = outcomes
    assert isinstance(absent, InvalidRequest)
    assert isinstance(reused, InvalidRequest)
    assert reused.code == "idempotency_key_reused"
    assert isinstance(first, Taken)
    assert isinstance(last, Taken)
    assert again == first
    assert isinstance(checked, Taken)
    assert checked.job_id is None
    assert sorted(job.id for job in stored(database)) == sorted(map(str, [first.job_id, last.job_id]))
    assert sent == [first.job_id, last.job_id]


def test_one_that_cannot_be_stored_fails_alone(
    settings: Settings, database: Database, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_all = jobs.submit_all

    def poisoned(session: Session, wanted: Sequence[jobs.NewJob]) -> Any:
        found = submit_all(session, wanted)
        if any(new.spec.name == "poison" for new in wanted):
            raise RuntimeError("boom")
        return found

    monkeypatch.setattr(jobs, "submit_all", poisoned)
    outcomes = take(Intake(settings, database), order(name="a"), order(name="poison"), order(name="b"))
    assert [type(outcome) for outcome in outcomes] == [Taken, RuntimeError, Taken]
    assert [job.name for job in stored(database)] == ["a", "b"]
    assert len(sent) == 2


def test_a_defect_that_one_body_meets_is_not_the_others(
    settings: Settings, database: Database, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfstep.service.api.submitting import intake
    from halfstep.service.api.submitting.document import read_spec

    def defective(body: JsonBody) -> Any:
        if body.document.get("name") == "poison":
            raise RecursionError
        return read_spec(body)

    monkeypatch.setattr(intake, "read_spec", defective)
    outcomes = take(Intake(settings, database), order(name="a"), order(name="poison"))
    assert [type(outcome) for outcome in outcomes] == [Taken, RecursionError]
    assert [job.id for job in stored(database)] == sent


def test_nothing_is_published_of_what_was_not_committed(
    settings: Settings, database: Database, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(database, "retry", away, raising=False)
    outcomes = take(Intake(settings, database), order(), order())
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable, StoreUnavailable]
    assert (stored(database), sent) == ([], [])


def test_all_are_committed_before_the_queue_hears_of_one(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def enqueue(_settings: Settings, *job_ids: str) -> bool:
        seen.append((list(job_ids), [job.id for job in stored(database)]))
        return True

    monkeypatch.setattr(queue, "enqueue", enqueue)
    take(Intake(settings, database), order(), order(), order())
    [(woken, there)] = seen
    assert len(woken) == 3
    assert woken == there


def test_what_is_published_counts_at_once(settings: Settings, database: Database, sent: list[str]) -> None:
    with database.begin() as session:
        components.publish(session, INFOS)
    intake = Intake(settings, database)
    named = order(model={"name": "newcomer", "params": {"width": 3}})
    assert isinstance(take(intake, named)[0], InvalidRequest)
    for width, accepted in ((2, False), (3, True), (4, False)):
        schema = {"type": "object", "properties": {"width": {"const": width}}}
        with database.begin() as session:
            components.publish(session, [ComponentInfo("model", "newcomer", "Came later.", schema)])
        assert isinstance(take(intake, named)[0], Taken) is accepted
    assert len(sent) == 1
