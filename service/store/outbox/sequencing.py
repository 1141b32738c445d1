"""Giving events their position: what is committed and has none yet, in one short transaction under a lock.

The numbers that a database draws for new rows say nothing of the order of commits: a reader by such a number
that has seen 8 would skip a 7 that commits later. So positions are drawn afterwards, by one process at a
time and until its commit: whoever sees a position sees every lower one. A job's events are committed in the
order of their numbers, since their writers hold the job's row, and the waiting list keeps that order.
"""

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.tables import job_events, jobs, outbox, outbox_waiting

_LOCK = 0x68616C666F757462  # "halfoutb"


def any_waiting(s: Session) -> bool:
    """Whether an event has no position yet; a read, which `sequence` is not."""
    return s.execute(select(outbox_waiting.c.id).limit(1)).first() is not None


def sequence(s: Session, *, limit: int = 1000) -> int:
    """Give at most `limit` waiting events their positions; returns how many were taken from the list.

    Returns 0 at once while another process does the same. Events of deleted jobs are dropped. Positions only
    rise; they may have gaps.
    """
    # On SQLite the write transaction is the lock. On PostgreSQL the lock is a statement of its own, so that
    # the next one sees what its last holder has committed.
    shared = s.get_bind().dialect.name == "postgresql"
    if shared and not s.scalar(select(func.pg_try_advisory_xact_lock(_LOCK))):
        return 0
    waiting = list(s.scalars(select(outbox_waiting.c.id).order_by(outbox_waiting.c.id).limit(limit)))
    if not waiting:
        return 0
    events = (
        select(jobs.c.tenant, outbox_waiting.c.job_id, outbox_waiting.c.seq, job_events.c.type, db_now())
        .join(jobs, jobs.c.id == outbox_waiting.c.job_id)
        .join(
            job_events,
            (job_events.c.job_id == outbox_waiting.c.job_id) & (job_events.c.seq == outbox_waiting.c.seq),
        )
        .where(outbox_waiting.c.id.in_(waiting))
        .order_by(outbox_waiting.c.id)
    )
    s.execute(insert(outbox).from_select(["tenant", "job_id", "seq", "type", "at"], events))
    # By id, and not up to one: a row with a lower id may have been committed since they were read.
    s.execute(delete(outbox_waiting).where(outbox_waiting.c.id.in_(waiting)))
    return len(waiting)
