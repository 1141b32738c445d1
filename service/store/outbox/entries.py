"""Reading the outbox: the events beyond a position, of one tenant or of all, in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from halfstep.service.contract.events import Actor
from halfstep.service.store.job_rows import AnyRow
from halfstep.service.store.sql.tenancy import of_tenant
from halfstep.service.store.tables import job_events, outbox


@dataclass(frozen=True, slots=True)
class Entry:
    """One event with its place among those of all jobs; `seq` is its number within its job."""

    position: int
    tenant: str
    job_id: str
    seq: int
    at: float
    type: str
    level: str
    message: str
    data: dict[str, Any] | None
    actor: Actor | None


@dataclass(frozen=True, slots=True)
class Page:
    """Entries in order, and the position up to which there was nothing else that was asked for."""

    entries: Sequence[Entry]
    position: int
    complete: bool  # nothing more was there


def read(
    s: Session,
    *,
    after: int,
    limit: int,
    tenant: str | None = None,
    types: Sequence[str] = (),
) -> Page:
    """The events beyond position `after`, at most `limit`; `tenant` None: of all, no `types`: of every type.

    Events of jobs that have been deleted are no longer there.
    """
    # Read first: everything up to it is committed, so that an entry that is not found now never will be.
    newest = newest_position(s)
    if newest <= after:
        return Page((), after, complete=True)
    query = (
        select(
            outbox.c.position,
            outbox.c.tenant,
            outbox.c.job_id,
            outbox.c.seq,
            job_events.c.at,
            job_events.c.type,
            job_events.c.level,
            job_events.c.message,
            job_events.c.data,
            job_events.c.actor,
        )
        .join(job_events, (job_events.c.job_id == outbox.c.job_id) & (job_events.c.seq == outbox.c.seq))
        .where(outbox.c.position > after, outbox.c.position <= newest)
        .order_by(outbox.c.position)
        .limit(limit)
    )
    query = of_tenant(query, outbox.c.tenant, tenant)
    if types:
        query = query.where(outbox.c.type.in_(sorted(types)))
    entries = [_entry(row) for row in s.execute(query)]
    complete = len(entries) < limit
    return Page(entries, newest if complete else entries[-1].position, complete)


def _entry(row: AnyRow) -> Entry:
    return Entry(
        position=row.position,
        tenant=row.tenant,
        job_id=row.job_id,
        seq=row.seq,
        at=row.at,
        type=row.type,
        level=row.level,
        message=row.message,
        data=row.data,
        actor=None if row.actor is None else Actor.of(row.actor),
    )


def newest_position(s: Session) -> int:
    """The highest position there is; 0 where the outbox is empty."""
    return int(s.scalar(select(func.coalesce(func.max(outbox.c.position), 0))) or 0)


def newest_of(s: Session, tenants: Sequence[str]) -> dict[str, int]:
    """The highest position of each tenant's events; 0 where it has none."""
    newest = dict.fromkeys(tenants, 0)
    for tenant in newest:
        # One look at the end of an index each; a GROUP BY would walk through all entries.
        found = s.scalar(
            select(outbox.c.position)
            .where(outbox.c.tenant == tenant)
            .order_by(outbox.c.position.desc())
            .limit(1)
        )
        newest[tenant] = found or 0
    return newest
