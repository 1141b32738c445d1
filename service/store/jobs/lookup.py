"""Looking jobs up: lists, their transitions, how long they have trained, how many there are of each state."""

from collections.abc import Iterable, Sequence

from sqlalchemy import and_, func, or_, select, tuple_
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.store.job_rows import JOB_COLUMNS, Job, Transition, absent, job_from
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.tenancy import of_tenant
from halfstep.service.store.tables import job_tags, job_transitions, jobs


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
    tags: Iterable[Sequence[tuple[str, str]]] = (),
    limit: int,
    before: tuple[float, str] | None = None,
) -> list[Job]:
    """The newest jobs first, at most `limit`.

    `before` is `(created_at, id)` of the last job of the page before; each of `tags` must match,
    by one of its pairs of key and value.
    """
    query = select(*JOB_COLUMNS).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
    query = of_tenant(query, jobs.c.tenant, tenant)
    if states:
        query = query.where(jobs.c.state.in_(sorted(states)))
    if name is not None:
        query = query.where(jobs.c.name == name)
    for pairs in tags:
        named = or_(*(and_(job_tags.c.key == key, job_tags.c.value == value) for key, value in pairs))
        query = query.where(select(job_tags.c.job_id).where(job_tags.c.job_id == jobs.c.id, named).exists())
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
