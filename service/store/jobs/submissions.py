"""How jobs come: any number of them in as many statements as one, in one transaction.

What is submitted at the same time shares the cost of a commit, which is most of a small one's.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from sqlalchemy import Table, select, tuple_
from sqlalchemy.orm import Session

from halfstep.service.contract.events import Actor
from halfstep.service.contract.precision import PrecisionLevel
from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import JobState
from halfstep.service.errors import InvalidRequest
from halfstep.service.store.event_rows import NewEvent, event_kin
from halfstep.service.store.fleet.workers import Requirements
from halfstep.service.store.job_rows import (
    Job,
    Transition,
    get,
    known_shape,
    state_event,
    transition_row,
)
from halfstep.service.store.record.summary import Stats, stats_of
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.database import actor_of
from halfstep.service.store.sql.ids import new_job_id
from halfstep.service.store.sql.upsert import insert_families, insert_new_rows
from halfstep.service.store.tables import (
    idempotency_keys,
    job_stats,
    job_tags,
    job_transitions,
    jobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be queued.

    Attributes:
        tenant: whose it is.
        spec: with its defaults filled in.
        job_id: drawn once, so that a repeat after an unknown commit creates nothing.
        idempotency_key: with the same `body_hash` it gives the job that is there.
        body_hash: of what the client sent; default: the spec's own.
        earlier_body_hash: the one that an earlier version may have stored for the same body.
        parent_id: the job that it retries; with `from_checkpoint` from that step.
        fence: its fences go on after this one.
        why: the reason of its first transition.
        warnings: become events of it, after the one of its state.
        actor: who submits it; None: whoever the session acts for.
    """

    tenant: str
    spec: JobSpec
    job_id: str = field(default_factory=new_job_id)
    idempotency_key: str | None = None
    body_hash: str | None = None
    earlier_body_hash: str | None = None
    parent_id: str | None = None
    from_checkpoint: int | None = None
    fence: int = 0
    why: str = "submitted"
    warnings: tuple[str, ...] = ()
    actor: Actor | None = None


@dataclass(frozen=True, slots=True)
class Beginning:
    """What there is of a job that was inserted just now, besides itself."""

    transitions: tuple[Transition, ...]
    stats: Stats


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is stored.

    Attributes:
        job: as it is now.
        created: it was made for this submission; else it is the one that has its key.
        beginning: None of a job that was there before.
    """

    job: Job
    created: bool
    beginning: Beginning | None


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
    """Store a queued job; returns it and whether it was created for this `job_id`. See `NewJob`.

    Raises:
        InvalidRequest: `idempotency_key_reused`, the key was used with another body.
    """
    wanted = NewJob(
        tenant=tenant,
        spec=spec,
        job_id=new_job_id() if job_id is None else job_id,
        idempotency_key=idempotency_key,
        body_hash=body_hash,
        parent_id=parent_id,
        from_checkpoint=from_checkpoint,
        fence=fence,
        why=why,
    )
    [found] = submit_all(s, [wanted])
    if isinstance(found, InvalidRequest):
        raise found
    return found.job, found.created


def submit_all(s: Session, wanted: Sequence[NewJob]) -> list[Submitted | InvalidRequest]:
    """`submit` of each, in as many statements as of one; an error in the place of one refuses that one alone.

    Raises:
        NotFound: an id is none.
    """
    now: float = s.execute(select(db_now())).scalar_one()
    held = _take_keys(s, [new for new in wanted if new.idempotency_key is not None], now)
    inserted = _insert(s, [new for new in wanted if new.job_id not in held], now)
    answers: list[Submitted | InvalidRequest] = []
    for new in wanted:
        holder = held.get(new.job_id, new.job_id)
        if isinstance(holder, InvalidRequest):
            answers.append(holder)
            continue
        job, beginning = inserted.get(holder) or (get(s, holder, tenant=new.tenant), None)
        # Held for this very id: its commit took place, and the answer to it was lost.
        answers.append(Submitted(job, holder == new.job_id, beginning))
    return answers


def _take_keys(s: Session, wanted: Sequence[NewJob], now: float) -> dict[str, str | InvalidRequest]:
    """Reserve the keys of new jobs; by the id of each that did not get its own, who has it or the refusal."""
    firsts: dict[tuple[str, str], NewJob] = {}
    for new in wanted:
        firsts.setdefault(_key(new), new)
    if not firsts:
        return {}
    rows = [
        {
            "tenant": tenant,
            "key": key,
            "body_hash": _body_hash(new),
            "job_id": known_shape(new.job_id),
            "created_at": now,
        }
        # In one order everywhere, so that two processes that take the same keys at once do not deadlock.
        for (tenant, key), new in sorted(firsts.items(), key=itemgetter(0))
    ]
    taken = insert_new_rows(s, idempotency_keys, rows)
    holders = {key: (firsts[key].job_id, _body_hash(firsts[key])) for key in taken}
    if lost := firsts.keys() - taken:
        of = idempotency_keys.c
        query = select(of.tenant, of.key, of.job_id, of.body_hash)
        for row in s.execute(query.where(tuple_(of.tenant, of.key).in_(list(lost)))):
            holders[row.tenant, row.key] = row.job_id, row.body_hash
    without: dict[str, str | InvalidRequest] = {}
    for new in wanted:
        key = _key(new)
        if key in taken and new is firsts[key]:
            continue
        job_id, body_hash = holders[key]
        same = body_hash in (_body_hash(new), new.earlier_body_hash)
        without[new.job_id] = job_id if same else _other_body()
    return without


def _key(new: NewJob) -> tuple[str, str]:
    return new.tenant, str(new.idempotency_key)


def _body_hash(new: NewJob) -> str:
    if new.body_hash is not None:
        return new.body_hash
    return hashlib.sha256(json.dumps(new.spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _other_body() -> InvalidRequest:
    return InvalidRequest(
        "this Idempotency-Key was used with another body; use a new key for a new job",
        code="idempotency_key_reused",
    )


def _insert(s: Session, wanted: Sequence[NewJob], now: float) -> dict[str, tuple[Job, Beginning]]:
    """The jobs that were not there yet, by id."""
    if not wanted:
        return {}
    new_ones: dict[str, tuple[Job, Beginning]] = {}
    rows: dict[Table, list[dict[str, Any]]] = {table: [] for table in (job_tags, job_stats, job_transitions)}
    job_rows = []
    events: list[NewEvent] = []
    acting = actor_of(s)
    for new in wanted:
        document = new.spec.model_dump(mode="json")
        job, summary = _job(new, document, now), _stats_row(new, now)
        actor = new.actor or acting
        job_rows.append(_job_row(new, document, now, actor))
        rows[job_tags] += [
            {"job_id": job.id, "key": key, "value": value} for key, value in new.spec.tags.items()
        ]
        rows[job_stats].append(summary)
        entered = transition_row(job.id, 1, now, job.state, new.why)
        rows[job_transitions].append(entered)
        events.append(state_event(job, 1, now, job.state, new.why, actor=actor))
        events += _warnings(new, now, actor)
        transitions = (Transition(job.state, now, entered["reason"]),)
        new_ones[job.id] = job, Beginning(transitions, stats_of(job, summary))
    inserted = insert_families(s, jobs, job_rows, rows | event_kin(s, events), of="job_id")
    return {job_id: new_one for job_id, new_one in new_ones.items() if job_id in inserted}


def _job_row(new: NewJob, document: dict[str, Any], now: float, actor: Actor | None) -> dict[str, Any]:
    needs = requirements(new.spec)
    return {
        "id": known_shape(new.job_id),
        "tenant": new.tenant,
        "name": new.spec.name,
        "state": JobState.QUEUED,
        "spec": document,
        "tags": new.spec.tags,
        "parent_id": new.parent_id,
        "from_checkpoint": new.from_checkpoint,
        "precedence": -new.spec.priority,
        "attempt": 1,
        "max_attempts": new.spec.max_attempts,
        "device": needs.device,
        "needs_bf16": needs.needs_bf16,
        "min_memory_bytes": needs.min_memory_bytes,
        "fence": new.fence,
        "created_at": now,
        "queued_at": now,
        "publishes": 0,
        "publish_due": now,
        "submitted_by": None if actor is None else actor.document(),
    }


def _job(new: NewJob, document: dict[str, Any], now: float) -> Job:
    return Job(
        id=new.job_id,
        tenant=new.tenant,
        name=new.spec.name,
        state=JobState.QUEUED,
        status_reason=None,
        spec=document,
        attempt=1,
        max_attempts=new.spec.max_attempts,
        priority=new.spec.priority,
        tags=dict(new.spec.tags),
        parent_id=new.parent_id,
        from_checkpoint=new.from_checkpoint,
        worker=None,
        fence=new.fence,
        created_at=now,
        started_at=None,
        finished_at=None,
        requested=None,
    )


def _stats_row(new: NewJob, now: float) -> dict[str, Any]:
    entries = 1 + len(new.warnings)
    return {
        "job_id": new.job_id,
        "version": entries,
        "last_event": entries,
        "last_transition": 1,
        "mode": new.spec.precision.mode,
        "precision_level": new.spec.precision.precision_level,
        "overflow_threshold": new.spec.precision.overflow_threshold,
        "current_step": 0,
        "overflow_count": 0,
        "underflow_count": 0,
        "nan_count": 0,
        "skipped_steps": 0,
        "scale_sum": 0.0,
        "epoch_loss_sum": 0.0,
        "epoch_losses": 0,
        "overflow_budget_exceeded": False,
        "updated_at": now,
    }


def _warnings(new: NewJob, now: float, actor: Actor | None) -> list[NewEvent]:
    return [
        NewEvent(
            job_id=new.job_id,
            seq=seq,
            at=now,
            type="warning",
            level="warning",
            message=warning,
            actor=actor,
        )
        for seq, warning in enumerate(new.warnings, start=2)
    ]
