"""What a job is to the rest of the system, and the one way its state changes.

`lock` takes the job's row, `move` takes it along an edge of TRANSITIONS; both are used by every file
here that writes about a job. Which edge to take when is decided by the callers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import structlog
from sqlalchemy import Row, Select, bindparam, insert, select, update
from sqlalchemy.orm import Session

from halfstep.service.contract.events import Actor
from halfstep.service.contract.states import LEASED, TRANSITIONS, JobState, ReasonCode, RequestedAction
from halfstep.service.errors import Conflict, NotFound, StaleFence
from halfstep.service.store.event_rows import NewEvent, storable, write_events
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.tenancy import of_tenant
from halfstep.service.store.tables import job_stats, job_transitions, jobs

log = structlog.get_logger(__name__)

AnyRow: TypeAlias = Row[*tuple[Any, ...]]

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Job:
    """One job as stored. Times are seconds since the epoch by the database's clock."""

    id: str
    tenant: str
    name: str
    state: JobState
    status_reason: dict[str, Any] | None  # {code, message, detail}
    spec: dict[str, Any]
    attempt: int  # from 1
    max_attempts: int
    priority: int
    tags: dict[str, str]
    parent_id: str | None
    from_checkpoint: int | None  # the step of the parent's that it went on from
    worker: str | None  # the name of the worker that holds or last held it
    fence: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    requested: RequestedAction | None


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of state."""

    state: JobState
    at: float
    reason: str | None


JOB_COLUMNS = (
    jobs.c.id,
    jobs.c.tenant,
    jobs.c.name,
    jobs.c.state,
    jobs.c.status_reason,
    jobs.c.spec,
    jobs.c.attempt,
    jobs.c.max_attempts,
    jobs.c.precedence,
    jobs.c.tags,
    jobs.c.parent_id,
    jobs.c.from_checkpoint,
    jobs.c.worker,
    jobs.c.fence,
    jobs.c.created_at,
    jobs.c.started_at,
    jobs.c.finished_at,
    jobs.c.requested,
)


def job_from(row: AnyRow) -> Job:
    """The frozen object of a row of JOB_COLUMNS."""
    return Job(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        state=JobState(row.state),
        status_reason=row.status_reason,
        spec=row.spec,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        priority=-row.precedence,
        tags=row.tags,
        parent_id=row.parent_id,
        from_checkpoint=row.from_checkpoint,
        worker=row.worker,
        fence=row.fence,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        requested=None if row.requested is None else RequestedAction(row.requested),
    )


def get(s: Session, job_id: str, *, tenant: str | None) -> Job:
    """The job; `tenant` None sees every tenant's.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    query = select(*JOB_COLUMNS).where(jobs.c.id == known_shape(job_id))
    query = of_tenant(query, jobs.c.tenant, tenant)
    row = s.execute(query).one_or_none()
    if row is None:
        raise absent(job_id)
    return job_from(row)


def lock(s: Session, job_id: str, *, tenant: str | None) -> Job:
    """The job, its row locked until the transaction ends.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    query = select(*JOB_COLUMNS).where(jobs.c.id == known_shape(job_id))
    query = of_tenant(query, jobs.c.tenant, tenant)
    row = s.execute(query.with_for_update(key_share=True)).one_or_none()
    if row is None:
        raise absent(job_id)
    return job_from(row)


def lock_fenced(s: Session, job_id: str, fence: int, *, states: frozenset[JobState] = LEASED) -> AnyRow:
    """Lock the job's row for a write under `fence`; returns `id, state, fence`.

    The lock makes the check hold until the commit: a claim that raises the fence waits, and after a
    claim this finds no row. On SQLite the write transaction itself is that lock.

    Raises:
        StaleFence: the fence has moved on, or the job is in none of `states`.
    """
    row = s.execute(_fenced(states), {"of_job": job_id, "under": fence}).one_or_none()
    if row is None:
        raise stale(job_id, fence)
    return row


@cache
def _fenced(states: frozenset[JobState]) -> Select[Any]:
    # Kept: every batch of steps runs it, and composing a statement costs more than running it on SQLite.
    return (
        select(jobs.c.id, jobs.c.state, jobs.c.fence)
        .where(
            jobs.c.id == bindparam("of_job"),
            jobs.c.fence == bindparam("under"),
            jobs.c.state.in_(sorted(states)),
        )
        .with_for_update(key_share=True)
    )


def move(
    s: Session,
    job: Job,
    to: JobState,
    *,
    why: str | None,
    status_reason: Mapping[str, Any] | None = None,
    **values: Any,
) -> Job:
    """Take a job along one edge, with its transition and its event; the lease follows the state.

    `job` is what the caller saw: the change happens only if state and fence are still those.

    Raises:
        Conflict: TRANSITIONS has no such edge.
        StaleFence: the job has changed since it was read.
    """
    if to not in TRANSITIONS[job.state]:
        raise Conflict(f"a job that is {job.state} cannot become {to}")
    if to not in LEASED:
        values |= {"lease_until": None, "worker_id": None, "requested": None}
    if to.is_terminal:
        values["finished_at"] = db_now()
    if status_reason is not None:
        values["status_reason"] = dict(status_reason)
    if to is JobState.QUEUED:
        values |= {"queued_at": db_now(), "publish_due": db_now(), "publishes": 0}
    row = s.execute(
        update(jobs)
        .where(jobs.c.id == job.id, jobs.c.state == job.state, jobs.c.fence == job.fence)
        .values(state=to, **values)
        .returning(*JOB_COLUMNS)
    ).one_or_none()
    if row is None:
        raise stale(job.id, job.fence)
    moved = job_from(row)
    record_states(s, moved, [(to, why)])
    return moved


def record_states(s: Session, job: Job, entered: Sequence[tuple[JobState, str | None]]) -> None:
    """Write the transitions and state events of states just entered."""
    at, transition, event = s.execute(
        update(job_stats)
        .where(job_stats.c.job_id == job.id)
        .values(
            version=job_stats.c.version + 1,
            last_transition=job_stats.c.last_transition + len(entered),
            last_event=job_stats.c.last_event + len(entered),
            updated_at=db_now(),
        )
        .returning(job_stats.c.updated_at, job_stats.c.last_transition, job_stats.c.last_event)
    ).one()
    ordered = list(enumerate(entered, start=1 - len(entered)))
    s.execute(
        insert(job_transitions),
        [transition_row(job.id, transition + offset, at, state, why) for offset, (state, why) in ordered],
    )
    write_events(s, [state_event(job, event + offset, at, state, why) for offset, (state, why) in ordered])


def transition_row(job_id: str, seq: int, at: float, state: JobState, why: str | None) -> dict[str, Any]:
    """The row of job_transitions that tells of a state just entered."""
    return {"job_id": job_id, "seq": seq, "state": state, "at": at, "reason": why and storable(why)}


def state_event(
    job: Job, seq: int, at: float, state: JobState, why: str | None, *, actor: Actor | None = None
) -> NewEvent:
    """The event that tells of it; `actor` None: whoever the session acts for."""
    return NewEvent(
        job_id=job.id,
        seq=seq,
        at=at,
        type="state",
        level="error" if state is JobState.FAILED else "info",
        message=f"{state}: {why}" if why else str(state),
        data={"state": state, "attempt": job.attempt, "worker": job.worker},
        actor=actor,
    )


def status(code: ReasonCode, message: str, detail: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A status_reason document."""
    return {"code": str(code), "message": message, "detail": None if detail is None else dict(detail)}


def known_shape(job_id: str) -> str:
    """The id itself.

    Raises:
        NotFound: it cannot be the id of anything, so no database is asked.
    """
    if _UUID.fullmatch(job_id) is None:
        raise absent(job_id)
    return job_id


def absent(job_id: str) -> NotFound:
    """The error for a job that is not there."""
    return NotFound(f"there is no job {storable(job_id[:64])}")


def stale(job_id: str, fence: int) -> StaleFence:
    """The error for a write under an old fence; told in the log too, so that operators can count zombies."""
    log.warning("stale fence", job_id=job_id, fence=fence)
    return StaleFence(f"job {job_id} is no longer held under fence {fence}; nothing was written")
