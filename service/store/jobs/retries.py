"""A retry: a new job with the specification of one that has ended, from the start or from its checkpoint.

From a checkpoint the new job takes over a reference to its files and the record up to its step, all in the
transaction that makes it: no file is copied, so there is no instant at which a crash could leave half a job,
and the files stay for as long as one of the two refers to them.
"""

import hashlib
import json

from pydantic import ValidationError
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import TERMINAL
from halfstep.service.errors import Conflict, FieldProblem, InvalidRequest
from halfstep.service.store import record
from halfstep.service.store.job_rows import JOB_COLUMNS, Job, job_from, lock
from halfstep.service.store.jobs import submit
from halfstep.service.store.jobs.checkpoints import Checkpoint, adopt_checkpoint, checkpoints
from halfstep.service.store.tables import jobs

_MOST_NAMED = 12


def retry(
    s: Session,
    job_id: str,
    *,
    tenant: str | None,
    new_id: str,
    from_checkpoint: int | None = None,
    idempotency_key: str | None = None,
) -> tuple[Job, bool]:
    """Queue a new job like one that has ended; returns it and whether this call created it.

    Asked again while its answer has not ended, it returns that job; an `idempotency_key` decides instead
    where there is one. `new_id`, drawn once, makes a repeat after an unknown commit create nothing.

    Raises:
        NotFound: there is no such job of this tenant's.
        Conflict: it has not ended, or its specification is none that this version runs.
        InvalidRequest: it has no checkpoint of that step, or the key was used with another body.
    """
    parent = lock(s, job_id, tenant=tenant)
    if not parent.state.is_terminal:
        raise Conflict(
            f"the job is {parent.state}; a retry is made of a job that has ended, so cancel it first or wait"
        )
    again = _there(s, jobs.c.id == new_id) or (
        None
        if idempotency_key
        else _there(
            s,
            jobs.c.parent_id == parent.id,
            jobs.c.from_checkpoint.is_not_distinct_from(from_checkpoint),
            jobs.c.state.not_in(sorted(TERMINAL)),
        )
    )
    if again is not None:
        return again, False
    kept = None if from_checkpoint is None else _checkpoint(s, parent, from_checkpoint)
    origin = f"retry of {parent.id}"
    child, created = submit(
        s,
        tenant=parent.tenant,
        spec=_spec(parent),
        idempotency_key=idempotency_key,
        body_hash=hashlib.sha256(json.dumps(["retry", parent.id, from_checkpoint]).encode()).hexdigest(),
        parent_id=parent.id,
        from_checkpoint=from_checkpoint,
        # Fences only rise, those of the files that a job refers to included.
        fence=0 if kept is None else kept.fence,
        why=origin if kept is None else f"{origin} from its checkpoint of step {kept.step}",
        job_id=new_id,
    )
    if created and kept is not None:
        adopt_checkpoint(s, child.id, kept)
        record.inherit(s, child.id, source_id=parent.id, step=kept.step)
    return child, created


def _there(s: Session, *conditions: ColumnElement[bool]) -> Job | None:
    query = select(*JOB_COLUMNS).where(*conditions).order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
    row = s.execute(query.limit(1)).one_or_none()
    return None if row is None else job_from(row)


def _checkpoint(s: Session, parent: Job, step: int) -> Checkpoint:
    kept = checkpoints(s, parent.id)
    for one in kept:
        if one.step == step:
            return one
    steps = ", ".join(str(one.step) for one in kept[:_MOST_NAMED])
    known = f"it has those of the steps {steps}" if kept else "it has none; leave the field out to start anew"
    raise InvalidRequest(
        "There is no such checkpoint.",
        [FieldProblem("/from_checkpoint", f"names no checkpoint of this job; {known}")],
        code="no_such_checkpoint",
    )


def _spec(parent: Job) -> JobSpec:
    try:
        return JobSpec.stored(parent.spec)
    except ValidationError as error:
        raise Conflict(
            "the job's specification is none that this version of the service runs; submit a new one"
        ) from error
