"""Jobs as clients see them: submit, look up, list; and the door to the rest of a job's life.

What a client asks of one is in `control` and `retries`, what a worker does under its lease in `leases`, what
the dispatcher does in `upkeep`, how jobs go in `deletions`, checkpoints in `checkpoints`; their functions are
offered here too, so that callers need one name.
"""

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import func, insert, select, tuple_
from sqlalchemy.orm import Session

from service.contract.precision import PrecisionLevel
from service.contract.spec import JobSpec
from service.contract.states import JobState
from service.errors import InvalidRequest
from service.store.checkpoints import (
    Checkpoint,
    checkpoints,
    drop_checkpoint,
    record_checkpoint,
)
from service.store.clock import db_now
from service.store.control import request_cancel, request_pause, request_resume
from service.store.deletions import Leftovers, delete, expired, sweep, unswept
from service.store.leases import claim, finish, mark_running, release, renew, requested
from service.store.records import (
    JOB_COLUMNS,
    Job,
    Transition,
    absent,
    get,
    job_from,
    known_shape,
    record_states,
)
from service.store.tables import (
    idempotency_keys,
    job_stats,
    job_tags,
    job_transitions,
    jobs,
)
from service.store.upkeep import fail_without_worker, mark_published, reap, unclaimed
from service.store.upsert import insert_new
from service.store.workers import Capability, Requirements

__all__ = [
    "Capability",
    "Checkpoint",
    "Job",
    "Leftovers",
    "Requirements",
    "Transition",
    "active_seconds",
    "checkpoints",
    "claim",
    "counts",
    "delete",
    "drop_checkpoint",
    "expired",
    "fail_without_worker",
    "finish",
    "get",
    "list_jobs",
    "mark_published",
    "mark_running",
    "new_job_id",
    "reap",
    "record_checkpoint",
    "release",
    "renew",
    "request_cancel",
    "request_pause",
    "request_resume",
    "requested",
    "requirements",
    "submit",
    "sweep",
    "transitions",
    "transitions_of",
    "unclaimed",
    "unswept",
]

_id_lock = threading.Lock()
_last_id = 0


def new_job_id() -> str:
    """A UUIDv7 (RFC 9562): by time, and rising within this process even inside one millisecond."""
    global _last_id  # noqa: PLW0603  # the order of ids within a process is process-wide state
    fresh = (time.time_ns() // 1_000_000) << 74 | int.from_bytes(os.urandom(10)) >> 6
    with _id_lock:
        # 48 bits of milliseconds over 74 random ones; inside a millisecond the sequence counts on.
        _last_id = max(fresh, _last_id + 1)
        value = _last_id
    high, low = value >> 62, value & ((1 << 62) - 1)
    milliseconds, random_12 = high >> 12, high & 0xFFF
    return str(uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | random_12 << 64 | 0b10 << 62 | low))


def requirements(spec: JobSpec) -> Requirements:
    """What a worker must offer to run this spec."""
    precision = spec.precision
    return Requirements(
        device=spec.resources.device,
        needs_bf16=precision.enabled
        and precision.precision_level is PrecisionLevel.BF16
        and not precision.allow_emulated_bf16,
        min_memory_bytes=spec.resources.min_memory_bytes or 0,
    )


def submit(
    s: Session,
    *,
    tenant: str,
    spec: JobSpec,
    idempotency_key: str | None = None,
    body_hash: str | None = None,
    parent_id: str | None = None,
    from_checkpoint: int | None = None,
    fence: int = 0,
    why: str = "submitted",
    job_id: str | None = None,
) -> tuple[Job, bool]:
    """Store a queued job; returns it and whether this call created it.

    The same `idempotency_key` with the same `body_hash` (default: the spec's own) returns the job that is
    there. With a `job_id` of the caller's, drawn once, a repeat after an unknown commit creates nothing.
    The fields of a retry are set by `retries`; its fences go on after `fence`.

    Raises:
        InvalidRequest: `idempotency_key_reused`, the key was used with another body.
    """
    document = spec.model_dump(mode="json")
    if idempotency_key is not None:
        body_hash = body_hash or hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    job_id = known_shape(job_id) if job_id is not None else new_job_id()
    if idempotency_key is not None and body_hash is not None:
        existing = _take_key(s, tenant, idempotency_key, body_hash, job_id)
        if existing is not None:
            return existing, False
    needs = requirements(spec)
    row = s.execute(
        insert_new(
            s,
            jobs,
            id=job_id,
            tenant=tenant,
            name=spec.name,
            state=JobState.QUEUED,
            spec=document,
            tags=spec.tags,
            parent_id=parent_id,
            from_checkpoint=from_checkpoint,
            precedence=-spec.priority,
            attempt=1,
            max_attempts=spec.max_attempts,
            device=needs.device,
            needs_bf16=needs.needs_bf16,
            min_memory_bytes=needs.min_memory_bytes,
            fence=fence,
            created_at=db_now(),
            queued_at=db_now(),
            publishes=0,
            publish_due=db_now(),
        ).returning(*JOB_COLUMNS)
    ).one_or_none()
    if row is None:
        return get(s, job_id, tenant=tenant), True
    job = job_from(row)
    if spec.tags:
        s.execute(
            insert(job_tags), [{"job_id": job_id, "key": key, "value": spec.tags[key]} for key in spec.tags]
        )
    s.execute(
        insert(job_stats).values(
            job_id=job_id,
            version=0,
            last_event=0,
            last_transition=0,
            mode=spec.precision.mode,
            precision_level=spec.precision.precision_level,
            overflow_threshold=spec.precision.overflow_threshold,
            current_step=0,
            overflow_count=0,
            underflow_count=0,
            nan_count=0,
            skipped_steps=0,
            scale_sum=0.0,
            epoch_loss_sum=0.0,
            epoch_losses=0,
            overflow_budget_exceeded=False,
            updated_at=db_now(),
        )
    )
    record_states(s, job, [(JobState.QUEUED, why)])
    return job, True


def _take_key(s: Session, tenant: str, key: str, body_hash: str, job_id: str) -> Job | None:
    """Reserve the key for `job_id`; returns the job that has it already, if one has."""
    taken = s.execute(
        insert_new(
            s,
            idempotency_keys,
            tenant=tenant,
            key=key,
            body_hash=body_hash,
            job_id=job_id,
            created_at=db_now(),
        ).returning(idempotency_keys.c.job_id)
    ).one_or_none()
    if taken is not None:
        return None
    held = s.execute(
        select(idempotency_keys.c.body_hash, idempotency_keys.c.job_id).where(
            idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key
        )
    ).one()
    if held.body_hash != body_hash:
        raise InvalidRequest(
            "this Idempotency-Key was used with another body; use a new key for a new job",
            code="idempotency_key_reused",
        )
    return get(s, held.job_id, tenant=tenant)


def transitions(s: Session, job_id: str) -> list[Transition]:
    """Every state the job has entered, in order."""
    return transitions_of(s, [job_id])[job_id]


def transitions_of(s: Session, job_ids: Sequence[str]) -> dict[str, list[Transition]]:
    """`transitions` of several jobs, in one statement."""
    entered: dict[str, list[Transition]] = {job_id: [] for job_id in job_ids}
    if not entered:
        return entered
    rows = s.execute(
        select(
            job_transitions.c.job_id, job_transitions.c.state, job_transitions.c.at, job_transitions.c.reason
        )
        .where(job_transitions.c.job_id.in_(list(entered)))
        .order_by(job_transitions.c.job_id, job_transitions.c.seq)
    )
    for row in rows:
        entered[row.job_id].append(Transition(JobState(row.state), row.at, row.reason))
    return entered


def active_seconds(s: Session, job_id: str) -> float:
    """How long the job has trained over all its attempts, by the database's clock; counts on while it does.

    Raises:
        NotFound: there is no such job.
    """
    entered = transitions(s, job_id)
    if not entered:
        raise absent(job_id)
    now: float = s.execute(select(db_now())).scalar_one()
    ends = [*(step.at for step in entered[1:]), now]
    stays = zip(entered, ends, strict=True)
    return sum((max(0.0, end - step.at) for step, end in stays if step.state in _TRAINING), start=0.0)


_TRAINING = frozenset({JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING})


def list_jobs(
    s: Session,
    *,
    tenant: str | None,
    states: Sequence[JobState] = (),
    name: str | None = None,
    tags: Iterable[tuple[str, str]] = (),
    limit: int,
    before: tuple[float, str] | None = None,
) -> list[Job]:
    """The newest jobs first, at most `limit`.

    `before` is `(created_at, id)` of the last job of the page before; `tags` must all match.
    """
    query = select(*JOB_COLUMNS).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    if states:
        query = query.where(jobs.c.state.in_(sorted(states)))
    if name is not None:
        query = query.where(jobs.c.name == name)
    for key, value in tags:
        query = query.where(
            select(job_tags.c.job_id)
            .where(job_tags.c.job_id == jobs.c.id, job_tags.c.key == key, job_tags.c.value == value)
            .exists()
        )
    if before is not None:
        query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < before)
    return [job_from(row) for row in s.execute(query)]


def counts(s: Session) -> dict[JobState, int]:
    """How many jobs are in each state; every state has a figure."""
    found = {
        JobState(row[0]): int(row[1])
        for row in s.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
    }
    return {state: found.get(state, 0) for state in JobState}
