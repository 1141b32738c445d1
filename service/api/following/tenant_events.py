"""The events of all jobs of a tenant: pages of them, waiting for more, and what a listener is sent.

Events that have no position yet are given one on the way, so that a reader need not wait for the dispatcher.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from halfstep.service.api.answers.views import tenant_event_view
from halfstep.service.api.following.event_stream import Messages
from halfstep.service.api.following.feed import EVENTS_A_PAGE, message
from halfstep.service.errors import StoreUnavailable
from halfstep.service.store import outbox, record
from halfstep.service.store.outbox import Page
from halfstep.service.store.sql.database import Database

_SUBJECT = "events of "  # no job's id begins so


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events are asked for: those of a tenant, of these types alone where some are named."""

    tenant: str
    types: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """What a watcher knows the tenant's events by."""
        return _SUBJECT + self.tenant


@dataclass(frozen=True, slots=True)
class Extent:
    """From where to where there are events now: those up to `removed` have been removed by age."""

    removed: int
    newest: int


def extent(database: Database) -> Extent:
    """From where to where there are events, after those that wait have been put in order."""
    _put_in_order(database)
    with database.read() as session:
        removed = outbox.removed_up_to(session)
        return Extent(removed, max(removed, outbox.newest_position(session)))


def page(database: Database, wanted: Selection, *, after: int, limit: int) -> Page:
    """The next events beyond position `after`."""
    _put_in_order(database)
    with database.read() as session:
        return outbox.read(session, after=after, limit=limit, tenant=wanted.tenant, types=wanted.types)


def versions(database: Database, subjects: Sequence[str]) -> Mapping[str, int]:
    """The versions of jobs by their ids, and the newest positions of tenants' events by their subjects."""
    tenants = [each.removeprefix(_SUBJECT) for each in subjects if each.startswith(_SUBJECT)]
    if tenants:
        _put_in_order(database)
    with database.read() as session:
        found = record.versions(session, [each for each in subjects if not each.startswith(_SUBJECT)])
        newest = outbox.newest_of(session, tenants)
    return {**found, **{_SUBJECT + tenant: position for tenant, position in newest.items()}}


class TenantEvents:
    """What one listener to a tenant's events is told, from position `after` on.

    Args:
        database: Where the events are.
        wanted: Which ones.
        after: What the listener has.
        cursor: Makes the id of the message of the event at a position.
    """

    def __init__(
        self, database: Database, wanted: Selection, after: int, cursor: Callable[[int], str]
    ) -> None:
        self._database, self._wanted, self._after, self._cursor = database, wanted, after, cursor
        self.subject = wanted.subject

    async def following(self, version: int) -> Messages:  # noqa: ARG002  # each read sees what there is now
        """The next events; see `event_stream.Source`."""
        found = await run_in_threadpool(
            lambda: page(self._database, self._wanted, after=self._after, limit=EVENTS_A_PAGE)
        )
        self._after = found.position
        body = b"".join(
            message("event", self._cursor(entry.position), tenant_event_view(entry))
            for entry in found.entries
        )
        return Messages(body, found.position, found.complete, ended=False)

    def farewell(self) -> bytes:
        """Nothing: a tenant's events do not end."""
        return b""

    def forget(self) -> None:
        """Do nothing: nothing is kept."""


def _put_in_order(database: Database) -> None:
    with database.read() as session:
        if not outbox.any_waiting(session):
            return
    # Where the database is busy, what has a position already is told, and the rest in the next round.
    with contextlib.suppress(StoreUnavailable), database.begin() as session:
        outbox.sequence(session)
