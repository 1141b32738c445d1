"""What is stored, made into the answers of the contract.

Which fields an answer has, in which order, and how they are spelled is in `contract.answers`.
"""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from halfstep.service.contract import answers
from halfstep.service.store import jobs, record
from halfstep.service.store.events import Event
from halfstep.service.store.fleet.components import ComponentInfo
from halfstep.service.store.fleet.workers import Worker
from halfstep.service.store.jobs import Checkpoint, Job, Transition
from halfstep.service.store.outbox import Entry
from halfstep.service.store.record import Stats


def job_view(session: Session, job: Job) -> answers.Job:
    """The Job, with its transitions and its summary."""
    return job_document(job, jobs.transitions(session, job.id), record.summarise(session, job.id))


def job_views(session: Session, found: Sequence[Job]) -> list[answers.Job]:
    """The same for many, in as many statements as for one. Leaves out what was deleted meanwhile."""
    ids = [job.id for job in found]
    transitions = jobs.transitions_of(session, ids)
    stats = record.summaries(session, ids)
    return [job_document(job, transitions.get(job.id, []), stats[job.id]) for job in found if job.id in stats]


def job_document(job: Job, transitions: Sequence[Transition], stats: Stats) -> answers.Job:
    """The Job from its parts."""
    return answers.Job.model_validate(
        {
            **{name: getattr(job, name) for name in _JOB_FIELDS},
            "is_terminal": job.state.is_terminal,
            "transitions": transitions,
            "stats": stats,
        },
        from_attributes=True,
    )


# What the stored job is asked for; the rest stands in other tables.
_JOB_FIELDS = tuple(
    name for name in answers.Job.model_fields if name not in {"is_terminal", "transitions", "stats"}
)


def stats_view(stats: Stats) -> answers.Stats:
    """The summary, without the version that the etag carries."""
    return answers.Stats.model_validate(stats, from_attributes=True)


def checkpoint_view(checkpoint: Checkpoint) -> answers.Checkpoint:
    """One checkpoint, without where it is kept."""
    return answers.Checkpoint(
        step=checkpoint.step,
        bytes=checkpoint.bytes,
        sha256=checkpoint.sha256,
        created_at=checkpoint.created_at,
        metrics=checkpoint.metrics or {},
    )


def event_view(event: Event) -> answers.Event:
    """One event."""
    return answers.Event.model_validate(event, from_attributes=True)


def tenant_event_view(entry: Entry) -> answers.TenantEvent:
    """One event among those of all jobs, with its job and who did it."""
    return answers.TenantEvent.model_validate(entry, from_attributes=True)


def component_view(component: ComponentInfo) -> answers.Component:
    """One component of the catalogue."""
    return answers.Component.model_validate(component, from_attributes=True)


def worker_view(worker: Worker) -> answers.Worker:
    """One live worker."""
    able = worker.capability
    return answers.Worker(
        id=worker.id,
        name=worker.name,
        pid=worker.pid,
        state="draining" if worker.draining else "busy" if worker.busy >= worker.slots else "free",
        slots=worker.slots,
        busy=worker.busy,
        capability=answers.Capability(
            device_type=able.device_type,
            device_name=able.device_name,
            device_count=able.device_count,
            bf16=able.bf16,
            fp16=able.fp16,
            memory_bytes=able.memory_bytes,
            speed=worker.speed,
        ),
        versions=worker.versions,
        started_at=worker.started_at,
        last_seen=worker.last_seen,
    )
