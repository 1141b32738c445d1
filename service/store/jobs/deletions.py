"""Jobs that go: deleted on request or when they are old enough, and what they leave, removed in small steps.

A deletion is one short transaction, after which nobody sees the job. What grows with a job's length is swept
afterwards, a bounded number of rows a transaction, so that no writer waits longer than for one of these. A
deletion stays on record until the last row is gone: whoever sweeps may die at any moment.
"""

from dataclasses import asdict, dataclass

from sqlalchemy import delete as sql_delete
from sqlalchemy import insert, select, tuple_
from sqlalchemy.orm import Session

from halfstep.service.contract.states import TERMINAL
from halfstep.service.errors import Conflict
from halfstep.service.store.job_rows import absent, lock
from halfstep.service.store.jobs.checkpoints import drop_checkpoints
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.tables import (
    deletions,
    job_events,
    jobs,
    metric_chunks,
    metric_rollups,
    series_chunks,
)

# Rows of one transaction: of chunks about a megabyte.
SWEEP_ROWS = 64
_SWEPT = (
    (metric_chunks, (metric_chunks.c.first_step,)),
    (metric_rollups, (metric_rollups.c.level, metric_rollups.c.first_step)),
    (series_chunks, (series_chunks.c.name, series_chunks.c.first_step)),
    (job_events, (job_events.c.seq,)),
)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Checkpoints of a deleted job, as paths of its record: those that may go, those that other jobs name."""

    removable: list[str]
    shared: list[str]


def delete(s: Session, job_id: str, *, tenant: str | None) -> Leftovers:
    """Delete a job that has ended; returns what is left of it on disk. Its record is left to `sweep`.

    Raises:
        NotFound: there is no such job of this tenant's.
        Conflict: the job has not ended.
    """
    job = lock(s, job_id, tenant=tenant)
    if not job.state.is_terminal:
        raise Conflict(f"the job is {job.state}; cancel it and wait for its end, then delete it")
    left = Leftovers(*drop_checkpoints(s, job_id))
    if s.execute(sql_delete(jobs).where(jobs.c.id == job_id).returning(jobs.c.id)).one_or_none() is None:
        raise absent(job_id)
    s.execute(insert(deletions).values(job_id=job_id, deleted_at=db_now(), files=asdict(left)))
    return left


def expired(s: Session, *, days: float, limit: int) -> list[str]:
    """Ids of jobs that ended more than `days` ago, the oldest first."""
    return list(
        s.scalars(
            select(jobs.c.id)
            .where(jobs.c.finished_at < db_now() - days * 86_400, jobs.c.state.in_(sorted(TERMINAL)))
            .order_by(jobs.c.finished_at)
            .limit(limit)
        )
    )


def unswept(s: Session, *, limit: int) -> list[tuple[str, Leftovers]]:
    """Deleted jobs of which something may be left, the longest gone first."""
    rows = s.execute(
        select(deletions.c.job_id, deletions.c.files).order_by(deletions.c.deleted_at).limit(limit)
    )
    return [(row.job_id, Leftovers(**row.files)) for row in rows]


def sweep(s: Session, job_id: str) -> bool:
    """Remove at most SWEEP_ROWS rows of a deleted job; returns whether this was all.

    Also where nobody deleted such a job, or somebody else sweeps it at this moment.
    """
    taken = s.scalar(
        select(deletions.c.job_id).where(deletions.c.job_id == job_id).with_for_update(skip_locked=True)
    )
    if taken is None:
        return True
    for table, key in _SWEPT:
        found = s.execute(select(*key).where(table.c.job_id == job_id).order_by(*key).limit(SWEEP_ROWS)).all()
        if found:
            s.execute(sql_delete(table).where(table.c.job_id == job_id, tuple_(*key) <= tuple(found[-1])))
            return False
    s.execute(sql_delete(deletions).where(deletions.c.job_id == job_id))
    return True
