"""The installation of 0.1, migrated, answers byte for byte as it did, but for intended differences."""

import base64
import functools
import json
import lzma
import sys
from itertools import zip_longest
from typing import Any

import pytest
from sqlalchemy import text

from halfstep.service.contract.states import JobState
from halfstep.service.store.outbox.sequencing import sequence
from halfstep.service.store.sql.database import Database
from tests.e2e.cluster import SOURCES
from tests.frozen.exchanges import Answer, Exchange, serving
from tests.frozen.installation import DATA, Installation
from tests.frozen.intended import INTENDED, Difference, recorded

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MOST_TOLD = 40  # differences in the message of a failure


@functools.cache
def differences_of(group: str) -> dict[int, list[Difference]]:
    """The entries of the table that are about an exchange, by its place."""
    return {
        place: [each for each in INTENDED if each.covers(exchange.ask, exchange.answer)]
        for place, exchange in enumerate(recorded()[group])
    }


def due(group: str, place: int) -> Answer:
    """The answer that an exchange ought to have today."""
    exchange = recorded()[group][place]
    answer = exchange.answer
    for each in differences_of(group)[place]:
        answer = each.applied(exchange.ask, answer)
    return answer


def told(exchange: Exchange, wanted: Answer, found: Answer) -> str:
    """Where two answers begin to differ."""
    lines = [str(exchange.ask)]
    if wanted.status != found.status:
        lines.append(f"  status {found.status} instead of {wanted.status}")
    lines += [
        f"  {name}: {found.headers.get(name)!r} instead of {wanted.headers.get(name)!r}"
        for name in sorted({*wanted.headers, *found.headers})
        if wanted.headers.get(name) != found.headers.get(name)
    ]
    if wanted.body != found.body:
        pairs = enumerate(zip_longest(wanted.body, found.body))
        place = next(place for place, (one, other) in pairs if one != other)
        around = slice(max(0, place - 60), place + 100)
        lines.append(f"  body at {place}: {found.body[around]!r}")
        lines.append(f"       instead of {wanted.body[around]!r}")
    return "\n".join(lines)


def assert_answers(group: str, installed: Installation, url: str) -> None:
    different = []
    with serving(
        sys.executable, "halfstep.service.api", installed.folder, url, installed.made_at, PYTHONPATH=SOURCES
    ) as server:
        for place, exchange in enumerate(recorded()[group]):
            wanted = due(group, place)
            found = server.answer(exchange.ask, expected=wanted)
            if found != wanted:
                different.append(told(exchange, wanted, found))
    more = f"\n… and {len(different) - MOST_TOLD} more" if len(different) > MOST_TOLD else ""
    assert not different, (
        f"{len(different)} answers differ from those recorded and from the table of intended differences "
        "(tests/frozen/intended.py):\n" + "\n".join(different[:MOST_TOLD]) + more
    )


@pytest.mark.parametrize("group", ["reads", "writes"])
def test_answers_are_those_of_the_frozen_version(
    group: str, installed: Installation, migrated_url: str
) -> None:
    assert_answers(group, installed, migrated_url)


def test_processes_of_the_frozen_version_work_on_beside_newer_ones(
    installed: Installation, migrated_url: str
) -> None:
    """A worker, a dispatcher and an API of 0.1 send what they sent; today's API tells the same of it."""
    database = Database(migrated_url)
    before = events_told(database)
    for transaction in json.loads(lzma.decompress((DATA / "statements.json.xz").read_bytes()))[
        database.dialect
    ]:
        with database.begin() as session:
            for statement, parameters in transaction:
                session.connection().exec_driver_sql(statement, bound(parameters))
    after = events_told(database)
    with database.begin() as session:
        while sequence(session):
            pass
        placed = session.execute(text("SELECT job_id, seq FROM outbox ORDER BY position")).all()
    written = {job_id: list(range(before.get(job_id, 0) + 1, last + 1)) for job_id, last in after.items()}
    in_order = {job_id: [seq for of, seq in placed if of == job_id] for job_id in after}
    assert in_order == written, "the order over all jobs lacks events that the older version wrote"
    assert placed
    database.dispose()
    assert_answers("beside", installed, migrated_url)


def events_told(database: Database) -> dict[str, int]:
    """How many events each job has."""
    with database.read() as session:
        rows = session.execute(text("SELECT job_id, last_event FROM job_stats")).all()
    return {str(job_id): int(last) for job_id, last in rows}


def bound(parameters: Any) -> Any:
    """Parameters as the driver takes them: of one row, or of many."""
    if isinstance(parameters, dict):
        return {name: value_of(value) for name, value in parameters.items()}
    if parameters and isinstance(parameters[0], dict | list) and "base64" not in parameters[0]:
        return [bound(each) for each in parameters]
    return tuple(value_of(value) for value in parameters)


def value_of(kept: Any) -> Any:
    return base64.b64decode(kept["base64"]) if isinstance(kept, dict) else kept


@pytest.mark.parametrize("entry", INTENDED, ids=lambda entry: str(entry.what))
def test_every_intended_difference_is_one(entry: Difference) -> None:
    """What the table says is compared above; here, that it says something of a request that was recorded."""
    covered = [
        exchange
        for exchanges in recorded().values()
        for exchange in exchanges
        if entry.covers(exchange.ask, exchange.answer)
    ]
    assert covered, f"no recorded request matches {entry.request!r}"
    assert any(entry.applied(one.ask, one.answer) != one.answer for one in covered), (
        f"'{entry.what}' changes no recorded answer of {len(covered)}: remove it, or correct it"
    )


def test_every_route_and_state_was_asked(installed: Installation) -> None:
    asked = {
        f"{one.ask.method} {one.ask.path.partition('?')[0]}" for group in recorded().values() for one in group
    }
    for name, job_id in installed.jobs.items():
        if name != "gone" and not name.startswith("beta"):
            for rest in ("", "/stats", "/events", "/metrics", "/checkpoints", "/stream"):
                assert f"GET /jobs/{job_id}{rest}" in asked, name
    for path in ("/jobs", "/components", "/workers", "/health/live", "/health/ready"):
        assert f"GET {path}" in asked
    states = {
        state
        for one in recorded()["reads"]
        for state in JobState
        if one.answer.status == 200
        and one.ask.path.startswith("/jobs/")
        and f'"state":"{state}","is_terminal"' in one.answer.body
    }
    assert states == set(JobState)
