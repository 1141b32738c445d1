"""The one way in which an event is written: a row of `job_events`, in the caller's transaction.

A trigger puts it into the outbox as part of the same statement. Its number within the job is the caller's to
draw, from `job_stats.last_event` under that row's lock; so a job's events become visible in their order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.orm import Session

from halfstep.service.contract.events import Actor
from halfstep.service.store.sql.database import actor_of
from halfstep.service.store.sql.upsert import insert_rows
from halfstep.service.store.tables import job_events

# Text that a database cannot hold: NUL, and halves of surrogate pairs.
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event to be written.

    Attributes:
        job_id: Of the job that it happened to.
        seq: Its number within the job, from 1 without gaps.
        at: Seconds since the epoch by the database's clock.
        type: What kind of event it is, as `GET /jobs/{id}/events` tells it.
        level: debug, info, warning or error.
        message: A sentence; what no database can hold is replaced.
        data: Figures and names behind it.
        actor: Who did it; None: whoever the session acts for.
    """

    job_id: str
    seq: int
    at: float
    type: str
    level: str
    message: str
    data: Mapping[str, Any] | None = None
    actor: Actor | None = None


def write_events(s: Session, new: Sequence[NewEvent]) -> None:
    """Write events, those of one job in the order of their numbers. Nothing else writes that table."""
    for table, rows in event_kin(s, new).items():
        insert_rows(s, table, rows)


def event_kin(s: Session, new: Sequence[NewEvent]) -> dict[Table, list[dict[str, Any]]]:
    """What `write_events` would write, for the statement that inserts new jobs with all that is theirs."""
    acting = actor_of(s)
    return {job_events: [_row(event, event.actor or acting) for event in new]}


def _row(event: NewEvent, actor: Actor | None) -> dict[str, Any]:
    return {
        "job_id": event.job_id,
        "seq": event.seq,
        "at": event.at,
        "type": event.type,
        "level": event.level,
        "message": storable(event.message),
        "data": None if event.data is None else dict(event.data),
        "actor": None if actor is None else actor.document(),
    }


def storable(text: str) -> str:
    """The text with U+FFFD where no database could hold the character."""
    return _UNSTORABLE.sub("\ufffd", text)
