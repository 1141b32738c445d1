"""What the dispatcher does on a timer: leases that ran out, wake-ups to send again, jobs nobody can run.

Every statement is compare-and-set, so several dispatchers may run at once.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, case, select, update
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState, ReasonCode
from halfstep.service.store.fleet.workers import can_run
from halfstep.service.store.job_rows import JOB_COLUMNS, Job, job_from, move, status
from halfstep.service.store.jobs.leases import give_back
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.tables import jobs, workers

# At most so many jobs in one transaction: their rows stay locked until its end.
_BATCH = 100
_MOST_SECONDS_BETWEEN_WAKE_UPS = 60.0
_DOUBLINGS = 6  # of the interval, from one second, before it is at its most


def reap(s: Session) -> list[Job]:
    """Give back every job whose lease has run out, as a lost worker's; returns what became of them.

    At most 100 at a time: a full list says that there may be more.
    """
    return _give_back(
        s,
        _held().where(jobs.c.lease_until < db_now()).with_for_update(skip_locked=True, key_share=True),
        charge_attempt=True,
        why="the lease of {0.worker} ran out in attempt {0.attempt}",
    )


def give_back_held(s: Session) -> list[Job]:
    """Give back every job that somebody holds, uncharged; returns what became of them, at most 100 at a time.

    For a restored copy, whose holders are gone and did nothing wrong. One that lives after all stops at its
    next write.
    """
    return _give_back(
        s,
        _held().with_for_update(key_share=True),
        charge_attempt=False,
        why="restored from a copy, in which {0.worker} held it",
    )


def _held() -> Select[Any]:
    held = select(*JOB_COLUMNS).where(jobs.c.lease_until.is_not(None))
    return held.order_by(jobs.c.lease_until, jobs.c.id).limit(_BATCH)


def _give_back(s: Session, held: Select[Any], *, charge_attempt: bool, why: str) -> list[Job]:
    return [
        give_back(
            s, job, charge_attempt=charge_attempt, why=why.format(job), exhausted=ReasonCode.WORKER_LOST
        )
        for job in map(job_from, s.execute(held).all())
    ]


def unclaimed(s: Session, *, older_than: float, limit: int) -> list[str]:
    """Ids of jobs queued for `older_than` seconds whose next wake-up is due, in the order of claims."""
    return list(
        s.scalars(
            select(jobs.c.id)
            .where(
                jobs.c.state == JobState.QUEUED,
                jobs.c.queued_at <= db_now() - older_than,
                jobs.c.publish_due <= db_now(),
            )
            .order_by(jobs.c.precedence, jobs.c.created_at, jobs.c.id)
            .limit(limit)
        )
    )


def mark_published(s: Session, ids: Sequence[str]) -> None:
    """A wake-up was sent for these jobs; the next is due after 1, 2, 4, … at most 60 seconds."""
    if not ids:
        return
    interval = case(
        *((jobs.c.publishes == n, float(2**n)) for n in range(_DOUBLINGS)),
        else_=_MOST_SECONDS_BETWEEN_WAKE_UPS,
    )
    s.execute(
        update(jobs)
        .where(jobs.c.id.in_(ids), jobs.c.state == JobState.QUEUED)
        .values(publishes=jobs.c.publishes + 1, publish_due=db_now() + interval)
    )


def fail_without_worker(s: Session, *, seconds: float, live_seconds: float = 30.0) -> list[Job]:
    """Fail the jobs that have been queued for `seconds` while no live worker could run them.

    A worker is live while it was seen within `live_seconds`; one that could run the job and was seen within
    `seconds` still counts, stopped or not, so a restart of the fleet fails nothing.
    """
    horizon = max(seconds, live_seconds)
    capable = (
        select(workers.c.id)
        .where(
            workers.c.last_seen >= db_now() - horizon,
            can_run(
                jobs.c.device,
                jobs.c.needs_bf16,
                jobs.c.min_memory_bytes,
                device_type=workers.c.device_type,
                bf16=workers.c.bf16,
                memory_bytes=workers.c.memory_bytes,
            ),
        )
        .exists()
    )
    rows = s.execute(
        select(*JOB_COLUMNS, jobs.c.device, jobs.c.needs_bf16, jobs.c.min_memory_bytes)
        .where(jobs.c.state == JobState.QUEUED, jobs.c.queued_at <= db_now() - seconds, ~capable)
        .order_by(jobs.c.created_at)
        .limit(_BATCH)
        .with_for_update(of=jobs, skip_locked=True, key_share=True)
    ).all()
    failed = []
    for row in rows:
        wanted = [] if row.device == "auto" else [f"device {row.device}"]
        wanted += ["native bfloat16"] if row.needs_bf16 else []
        wanted += [f"{row.min_memory_bytes} bytes of device memory"] if row.min_memory_bytes else []
        what = f"that offers {', '.join(wanted)}" if wanted else "of any kind"
        reason = status(
            ReasonCode.NO_CAPABLE_WORKER,
            f"For {seconds:g} seconds there was no worker {what}. Start one (GET /workers shows those there "
            "are) or submit the job with other resources or precision.",
        )
        failed.append(move(s, job_from(row), JobState.FAILED, why="no capable worker", status_reason=reason))
    return failed
