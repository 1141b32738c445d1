"""Consumers: duties that act on every event, at least once and in order for each job, and keep a cursor.

A consumer handles a batch and stores its cursor afterwards: a death between the two repeats the batch, and
skips nothing. One dispatcher at a time goes on for a consumer; the fence of its cursor refuses one that was
frozen meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy.orm import Session

from halfstep.service.errors import StaleFence
from halfstep.service.store import outbox
from halfstep.service.store.outbox import Entry, Held, Page
from halfstep.service.store.sql.database import Database

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """Something that must be done for every event.

    Attributes:
        name: Of its cursor; a new name begins with the oldest event there is.
        handle: Does it for events in order. It is given the same ones again after a death or an exception, so
            it must recognise them, by `position` or by job and `seq`. It should return within `held_seconds`:
            else another process may begin with the same ones meanwhile.
        types: Events of these types alone; empty: all.
        batch: Events that it is given at most.
        held_seconds: How long a process that died keeps others from going on.
    """

    name: str
    handle: Callable[[Sequence[Entry]], None]
    types: tuple[str, ...] = ()
    batch: int = 100
    held_seconds: float = 30.0


def consume(database: Database, consumer: Consumer, *, holder: str) -> bool:
    """Handle the next events, then store the cursor; returns whether there may be more for this process.

    Args:
        database: Where the events are.
        consumer: What to do.
        holder: An id that no other process has.

    Raises:
        StoreUnavailable: The database is away; what was handled may come again.
        Exception: Whatever `handle` raises; the cursor stays, and the same events come again.
    """

    def take(session: Session) -> tuple[Held, Page, int] | None:
        held = outbox.hold(session, consumer.name, holder=holder, seconds=consumer.held_seconds)
        if held is None:
            return None
        removed = outbox.removed_up_to(session)
        after = max(held.position, removed)
        page = outbox.read(session, after=after, limit=consumer.batch, types=consumer.types)
        return held, page, removed

    with database.read() as session:
        if outbox.newest_position(session) <= outbox.position_of(session, consumer.name):
            return False
    taken = database.retry(take)
    if taken is None:
        return False
    held, page, removed = taken
    if removed > held.position:
        log.error("events were removed before they were handled", consumer=consumer.name, up_to=removed)
    if page.entries:
        consumer.handle(page.entries)
    try:
        database.retry(lambda s: outbox.advance(s, held, page.position))
    except StaleFence as error:
        log.warning("another process goes on for this consumer", consumer=consumer.name, error=str(error))
        return False
    return not page.complete
