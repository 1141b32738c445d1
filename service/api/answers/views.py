"""What is stored, as the fixed HTTP contract shows it: the fields of each answer and their order.

Values are spelled by `wire`; `schemas` describes the same fields for the OpenAPI document.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy.orm import Session

from halfstep.service.api.answers.wire import timestamp
from halfstep.service.store import jobs, record
from halfstep.service.store.events import Event
from halfstep.service.store.fleet.components import ComponentInfo
from halfstep.service.store.fleet.workers import Worker
from halfstep.service.store.jobs import Checkpoint, Job, Transition
from halfstep.service.store.outbox import Entry
from halfstep.service.store.record import Stats

_STATS_FIELDS = tuple(field.name for field in fields(Stats) if field.name != "version")


def job_view(session: Session, job: Job) -> dict[str, Any]:
    """The Job, with its transitions and its summary."""
    return job_document(job, jobs.transitions(session, job.id), record.summarise(session, job.id))


def job_views(session: Session, found: Sequence[Job]) -> list[dict[str, Any]]:
    """The same for many, in as many statements as for one. Leaves out what was deleted meanwhile."""
    ids = [job.id for job in found]
    transitions = jobs.transitions_of(session, ids)
    stats = record.summaries(session, ids)
    return [job_document(job, transitions.get(job.id, []), stats[job.id]) for job in found if job.id in stats]


def job_document(job: Job, transitions: Sequence[Transition], stats: Stats) -> dict[str, Any]:
    """The Job from its parts."""
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "is_terminal": job.state.is_terminal,
        "status_reason": job.status_reason,
        "spec": job.spec,
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "priority": job.priority,
        "tags": job.tags,
        "parent_id": job.parent_id,
        "from_checkpoint": job.from_checkpoint,
        "worker": job.worker,
        "created_at": timestamp(job.created_at),
        "started_at": timestamp(job.started_at),
        "finished_at": timestamp(job.finished_at),
        "transitions": [
            {"state": entered.state, "at": timestamp(entered.at), "reason": entered.reason}
            for entered in transitions
        ],
        "stats": stats_view(stats),
    }


def stats_view(stats: Stats) -> dict[str, Any]:
    """The summary: the stored fields, without the version that the etag carries."""
    return {
        **{name: getattr(stats, name) for name in _STATS_FIELDS},
        "last_step_at": timestamp(stats.last_step_at),
        "updated_at": timestamp(stats.updated_at),
    }


def checkpoint_view(checkpoint: Checkpoint) -> dict[str, Any]:
    """One checkpoint, without where it is kept."""
    return {
        "step": checkpoint.step,
        "bytes": checkpoint.bytes,
        "sha256": checkpoint.sha256,
        "created_at": timestamp(checkpoint.created_at),
        "metrics": checkpoint.metrics or {},
    }


def event_view(event: Event) -> dict[str, Any]:
    """One event."""
    return {
        "seq": event.seq,
        "at": timestamp(event.at),
        "type": event.type,
        "level": event.level,
        "message": event.message,
        "data": event.data,
    }


def tenant_event_view(entry: Entry) -> dict[str, Any]:
    """One event among those of all jobs, with its job and who did it."""
    return {
        "job_id": entry.job_id,
        "seq": entry.seq,
        "at": timestamp(entry.at),
        "type": entry.type,
        "level": entry.level,
        "message": entry.message,
        "data": entry.data,
        "actor": None if entry.actor is None else entry.actor.document(),
    }


def component_view(component: ComponentInfo) -> dict[str, Any]:
    """One component of the catalogue."""
    return {
        "kind": component.kind,
        "name": component.name,
        "help": component.help,
        "schema": component.schema,
        "extra": component.extra,
    }


def worker_view(worker: Worker) -> dict[str, Any]:
    """One live worker."""
    capability = worker.capability
    state = "draining" if worker.draining else "busy" if worker.busy >= worker.slots else "free"
    return {
        "id": worker.id,
        "name": worker.name,
        "pid": worker.pid,
        "state": state,
        "slots": worker.slots,
        "busy": worker.busy,
        "capability": {
            "device_type": capability.device_type,
            "device_name": capability.device_name,
            "device_count": capability.device_count,
            "bf16": capability.bf16,
            "fp16": capability.fp16,
            "memory_bytes": capability.memory_bytes,
            "speed": worker.speed,
        },
        "versions": worker.versions,
        "started_at": timestamp(worker.started_at),
        "last_seen": timestamp(worker.last_seen),
    }
