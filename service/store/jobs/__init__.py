"""A job's life in SQL: how it comes, is looked up, claimed, controlled, taken back and deleted.

How jobs come is in `submissions`, what a client asks of one in `control` and `retries`, what a worker does
under its lease in `leases`, what the dispatcher does in `upkeep`, how jobs go in `deletions`, checkpoints in
`checkpoints`, reading in `lookup`; their functions are offered here, so that callers need one name.
"""

from halfstep.service.store.fleet.workers import Capability, Requirements
from halfstep.service.store.job_rows import Job, Transition, get
from halfstep.service.store.jobs.checkpoints import (
    Checkpoint,
    checkpoints,
    drop_checkpoint,
    record_checkpoint,
)
from halfstep.service.store.jobs.control import request_cancel, request_pause, request_resume
from halfstep.service.store.jobs.deletions import Leftovers, delete, expired, sweep, unswept
from halfstep.service.store.jobs.leases import (
    any_waiting,
    claim,
    finish,
    mark_running,
    release,
    renew,
    requested,
)
from halfstep.service.store.jobs.lookup import active_seconds, counts, list_jobs, transitions, transitions_of
from halfstep.service.store.jobs.submissions import (
    NewJob,
    Submitted,
    requirements,
    submit,
    submit_all,
)
from halfstep.service.store.jobs.upkeep import (
    fail_without_worker,
    give_back_held,
    mark_published,
    reap,
    unclaimed,
)

__all__ = [
    "Capability",
    "Checkpoint",
    "Job",
    "Leftovers",
    "NewJob",
    "Requirements",
    "Submitted",
    "Transition",
    "active_seconds",
    "any_waiting",
    "checkpoints",
    "claim",
    "counts",
    "delete",
    "drop_checkpoint",
    "expired",
    "fail_without_worker",
    "finish",
    "get",
    "give_back_held",
    "list_jobs",
    "mark_published",
    "mark_running",
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
    "submit_all",
    "sweep",
    "transitions",
    "transitions_of",
    "unclaimed",
    "unswept",
]
