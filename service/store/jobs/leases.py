"""A worker's hold on a job: claim, renew, run, finish, give back. Every write here carries the fence.

A repeat of a write whose answer was lost changes nothing. What happens to leases that ran out is in `upkeep`.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, literal, select, update
from sqlalchemy.orm import Session

from halfstep.service.contract.states import LEASED, JobState, ReasonCode, RequestedAction
from halfstep.service.errors import StaleFence
from halfstep.service.store.fleet.workers import Capability, can_run
from halfstep.service.store.job_rows import (
    JOB_COLUMNS,
    Job,
    job_from,
    lock,
    move,
    record_states,
    stale,
    status,
)
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.tables import jobs, workers


def claim(
    s: Session, *, worker_id: str, capability: Capability, lease_seconds: float, hint: str | None = None
) -> Job | None:
    """Take the queued job of the highest priority, then the oldest, that this worker can run, or None.

    The job is then `starting`, under a fence one higher and a lease of `lease_seconds`. Claims at once get
    different jobs. `hint`, the id that a message carried, decides only between jobs of the same instant.
    """
    order: list[ColumnElement[Any]] = [jobs.c.precedence, jobs.c.created_at, jobs.c.id]
    if hint is not None:
        order.insert(2, (jobs.c.id == hint).desc())
    best = (
        select(jobs.c.id)
        .where(*_waits_for(capability))
        .order_by(*order)
        .limit(1)
        .with_for_update(skip_locked=True, key_share=True)
        .scalar_subquery()
    )
    name = select(workers.c.name).where(workers.c.id == worker_id).scalar_subquery()
    row = s.execute(
        update(jobs)
        .where(jobs.c.id == best, jobs.c.state == JobState.QUEUED)
        .values(
            state=JobState.STARTING,
            fence=jobs.c.fence + 1,
            lease_until=db_now() + lease_seconds,
            worker_id=worker_id,
            worker=func.coalesce(name, worker_id),
            requested=None,
        )
        .returning(*JOB_COLUMNS)
    ).one_or_none()
    if row is None:
        return None
    job = job_from(row)
    record_states(s, job, [(JobState.STARTING, f"claimed by {job.worker}, attempt {job.attempt}")])
    return job


def any_waiting(s: Session, *, capability: Capability) -> bool:
    """Whether a job is queued that this worker can run; a read, which a claim is not."""
    return s.execute(select(jobs.c.id).where(*_waits_for(capability)).limit(1)).first() is not None


def renew(
    s: Session, job_id: str, fence: int, *, lease_seconds: float, worker_id: str
) -> RequestedAction | None:
    """Extend the lease from now; returns what a client has asked for meanwhile.

    Raises:
        StaleFence: the job is held no longer under this fence by this worker.
    """
    row = s.execute(
        update(jobs)
        .where(*_mine(job_id, fence, worker_id))
        .values(lease_until=db_now() + lease_seconds)
        .returning(jobs.c.requested)
    ).one_or_none()
    if row is None:
        raise stale(job_id, fence)
    return None if row.requested is None else RequestedAction(row.requested)


def requested(s: Session, job_id: str, fence: int, *, worker_id: str) -> RequestedAction | None:
    """What a client has asked for, as `renew` returns it, without renewing: one read of one row.

    Raises:
        StaleFence: the job is held no longer under this fence by this worker.
    """
    row = s.execute(select(jobs.c.requested).where(*_mine(job_id, fence, worker_id))).one_or_none()
    if row is None:
        raise StaleFence(f"job {job_id} is no longer held under fence {fence}")
    return None if row.requested is None else RequestedAction(row.requested)


def mark_running(s: Session, job_id: str, fence: int) -> None:
    """The job's process trains now. A job that was asked to cancel meanwhile stays as it is.

    One that was asked to pause while it started is `pausing` as soon as it runs.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    job = _held(s, job_id, fence)
    if job.state is not JobState.STARTING:
        return
    job = move(s, job, JobState.RUNNING, why=None, started_at=func.coalesce(jobs.c.started_at, db_now()))
    if job.requested is RequestedAction.PAUSE:
        move(s, job, JobState.PAUSING, why="pause requested while it started")


def finish(s: Session, job_id: str, fence: int, state: JobState, reason: Mapping[str, Any] | None) -> Job:
    """End the job (or end its pausing) with what really came of it, a request to stop notwithstanding.

    Raises:
        StaleFence: the job is held no longer under this fence.
        Conflict: TRANSITIONS has no edge from the job's state to `state`.
        ValueError: `state` is neither terminal nor paused, or a failure without a reason.
    """
    if not state.is_terminal and state is not JobState.PAUSED:
        raise ValueError(f"a job does not finish as {state}")
    if state is JobState.FAILED and reason is None:
        raise ValueError("a failure needs a reason: code, message, detail")
    job = lock(s, job_id, tenant=None)
    if job.fence == fence and job.state is state:
        return job
    if job.fence != fence or not job.state.is_leased:
        raise stale(job_id, fence)
    if reason is None and state is JobState.CANCELLED:
        reason = _CANCELLED
    return move(s, job, state, why=None if reason is None else reason["message"], status_reason=reason)


def release(
    s: Session,
    job_id: str,
    fence: int,
    *,
    charge_attempt: bool,
    why: str,
    exhausted: ReasonCode = ReasonCode.WORKER_LOST,
    left: Mapping[str, Any] | None = None,
) -> Job:
    """Give the job back: to the queue, or where a client asked it to go.

    With `charge_attempt` (a crash, a lost worker, a stall) the next attempt counts, and past `max_attempts`
    the job fails for the reason `exhausted`; without (a drain) the attempt is not charged. `left` is what a
    process that died left to be told, such as its last words; None where it was the worker that was lost.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    job = lock(s, job_id, tenant=None)
    if job.fence == fence and job.state in {JobState.QUEUED, JobState.PAUSED}:
        return job
    if job.fence != fence or not job.state.is_leased:
        raise stale(job_id, fence)
    return give_back(s, job, charge_attempt=charge_attempt, why=why, exhausted=exhausted, left=left)


def give_back(
    s: Session,
    job: Job,
    *,
    charge_attempt: bool,
    why: str,
    exhausted: ReasonCode,
    left: Mapping[str, Any] | None = None,
) -> Job:
    """`release` for a job whose row the caller has locked."""
    if job.state is JobState.CANCELLING:
        return move(s, job, JobState.CANCELLED, why=f"cancelled; {why}", status_reason=_CANCELLED)
    if job.state is JobState.PAUSING:
        return move(s, job, JobState.PAUSED, why=why)
    if not charge_attempt or job.attempt < job.max_attempts:
        queued = move(s, job, JobState.QUEUED, why=why, attempt=job.attempt + int(charge_attempt))
        if job.requested is RequestedAction.PAUSE:
            return move(s, queued, JobState.PAUSED, why="paused as was requested while it started")
        return queued
    attempts = "its only attempt" if job.max_attempts == 1 else f"each of its {job.max_attempts} attempts"
    if exhausted is ReasonCode.WORKER_LOST and left is not None:
        what, remedy = _DIED
    else:
        what, remedy = _EXHAUSTED.get(exhausted, _EXHAUSTED[ReasonCode.WORKER_LOST])
    detail = {"last": why, **(left or {})}
    reason = status(exhausted, f"The job {what} in {attempts}. {remedy}", detail)
    return move(s, job, JobState.FAILED, why=why, status_reason=reason)


# What happened in every attempt, and the next thing to try.
_EXHAUSTED = {
    ReasonCode.WORKER_LOST: (
        "lost its worker",
        "Look at its events and the worker's memory, then retry; unsteady hosts need a higher max_attempts.",
    ),
    ReasonCode.STALLED: (
        "stopped making progress",
        "Look at its last events, then retry; if single steps take so long, raise HALFSTEP_STALL_SECONDS.",
    ),
}
_DIED = (
    "lost its process, at the last to its own code, a library or the host's memory,",
    "Correct what the last words in the detail name, then retry, from a checkpoint if there is one.",
)
_CANCELLED = status(
    ReasonCode.CANCELLED_BY_USER, "The job was cancelled on request. A retry can go on from its checkpoints."
)


def _waits_for(capability: Capability) -> tuple[ColumnElement[bool], ...]:
    return (
        jobs.c.state == JobState.QUEUED,
        can_run(
            jobs.c.device,
            jobs.c.needs_bf16,
            jobs.c.min_memory_bytes,
            device_type=literal(capability.device_type),
            bf16=literal(capability.bf16),
            memory_bytes=literal(capability.memory_bytes),
        ),
    )


def _mine(job_id: str, fence: int, worker_id: str) -> tuple[ColumnElement[bool], ...]:
    return (
        jobs.c.id == job_id,
        jobs.c.fence == fence,
        jobs.c.worker_id == worker_id,
        jobs.c.state.in_(sorted(LEASED)),
    )


def _held(s: Session, job_id: str, fence: int) -> Job:
    job = lock(s, job_id, tenant=None)
    if job.fence != fence or not job.state.is_leased:
        raise stale(job_id, fence)
    return job
