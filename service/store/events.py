"""A job's events: what happened to it, in order, for people and for streams.

States have their events written where they change (`records`); metrics are another record.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Text, and_, select, type_coerce, update
from sqlalchemy.orm import Session

from halfstep.service.store.event_rows import NewEvent, storable, write_events
from halfstep.service.store.job_rows import absent, known_shape, lock_fenced
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.tables import job_events, job_stats


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `seq` counts from 1 within the job, without gaps."""

    seq: int
    at: float
    type: str
    level: str
    message: str
    data: dict[str, Any] | None


def append(
    s: Session,
    job_id: str,
    *,
    type: str,  # noqa: A002  # the field's name on the wire
    level: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    fence: int | None = None,
) -> int:
    """Add an event; returns its seq. With `fence`, only while the job is held under it.

    Raises:
        NotFound: there is no such job.
        StaleFence: the fence has moved on.
    """
    if fence is not None:
        lock_fenced(s, job_id, fence)
    row = s.execute(
        update(job_stats)
        .where(job_stats.c.job_id == known_shape(job_id))
        .values(version=job_stats.c.version + 1, last_event=job_stats.c.last_event + 1, updated_at=db_now())
        .returning(job_stats.c.last_event, job_stats.c.updated_at)
    ).one_or_none()
    if row is None:
        raise absent(job_id)
    event = NewEvent(
        job_id=job_id,
        seq=row.last_event,
        at=row.updated_at,
        type=type,
        level=level,
        message=message,
        data=data,
    )
    write_events(s, [event])
    return int(row.last_event)


def is_told(
    s: Session,
    job_id: str,
    *,
    type: str,  # noqa: A002  # as above
    same: str | Mapping[str, Any],
) -> bool:
    """Whether the job has an event of this type that tells the same, however many events it has.

    Args:
        s: the transaction.
        job_id: the job's.
        type: the event's.
        same: the sentence that makes it the same, or the members of its data.
    """
    if isinstance(same, str):
        alike = job_events.c.message == storable(same)
    else:
        # A member's text is in the column's; what merely begins alike is sorted out below.
        text = type_coerce(job_events.c.data, Text)
        members = (json.dumps({name: value}, separators=(",", ":"))[1:-1] for name, value in same.items())
        alike = and_(*(text.contains(member, autoescape=True) for member in members))
    found = s.scalars(
        select(job_events.c.data).where(job_events.c.job_id == job_id, job_events.c.type == type, alike)
    )
    return any(isinstance(same, str) or data | same == data for data in found)


def read(
    s: Session,
    job_id: str,
    *,
    after: int = 0,
    limit: int = 100,
    type: str | None = None,  # noqa: A002  # as above
) -> list[Event]:
    """The events with a seq above `after`, in order, at most `limit`; of one type alone where it is given."""
    query = (
        select(
            job_events.c.seq,
            job_events.c.at,
            job_events.c.type,
            job_events.c.level,
            job_events.c.message,
            job_events.c.data,
        )
        .where(job_events.c.job_id == job_id, job_events.c.seq > after)
        .order_by(job_events.c.seq)
        .limit(limit)
    )
    if type is not None:
        query = query.where(job_events.c.type == type)
    return [Event(*row) for row in s.execute(query)]
