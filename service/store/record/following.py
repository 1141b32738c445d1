"""Following a job: what is new since a position, read so that a follower ends up with the whole record.

A position names the newest step and the newest event that a follower has. A resumed attempt takes steps
again: the event that tells of it sets the position back, so that the steps which take the old ones' place
follow. Nothing here writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.store import events
from halfstep.service.store.events import Event
from halfstep.service.store.job_rows import absent, known_shape
from halfstep.service.store.record import reading
from halfstep.service.store.record.reading import MetricPage
from halfstep.service.store.sql.tenancy import of_tenant
from halfstep.service.store.tables import job_stats, jobs


@dataclass(frozen=True, slots=True)
class Standing:
    """How a job stands now. `version` rises with every change of its state, steps or events."""

    version: int
    state: JobState
    status_reason: dict[str, Any] | None
    attempt: int
    current_step: int
    last_event: int


@dataclass(frozen=True, slots=True)
class Position:
    """What a follower has: steps 1..`step` and events 1..`event`, or from where it began.

    Its steps are those of the record as it was at event `settled`: an event up to there sets nothing back.
    """

    step: int
    event: int
    settled: int


@dataclass(frozen=True, slots=True)
class News:
    """What a follower does not have yet, or a first part of it.

    Attributes:
        standing: how the job stood before the rest was read; `version` is at most that of the rest.
        events: each new event with the position that a follower has once it got it.
        steps: new steps, at least one; None: there are none, or more events come first.
        position: the position after all this.
        complete: nothing was left behind when it was read. For a terminal job this is the end.
    """

    standing: Standing
    events: Sequence[tuple[Event, Position]]
    steps: MetricPage | None
    position: Position
    complete: bool


def standing(s: Session, job_id: str, *, tenant: str | None = None) -> Standing:
    """How the job stands; `tenant` None sees every tenant's.

    Raises:
        NotFound: there is no such job, or it is another tenant's.
    """
    query = _STANDING.where(jobs.c.id == known_shape(job_id))
    query = of_tenant(query, jobs.c.tenant, tenant)
    row = s.execute(query).one_or_none()
    if row is None:
        raise absent(job_id)
    return Standing(
        row.version, JobState(row.state), row.status_reason, row.attempt, row.current_step, row.last_event
    )


def news(
    s: Session, job_id: str, at: Position, *, fields: Sequence[str] | None, most_steps: int, most_events: int
) -> News:
    """What is new of the job beyond `at`: events first, then steps once every event is told.

    Raises:
        NotFound: there is no such job.
    """
    # In this order, each statement sees at least what the one before saw: steps of a cut record can be read
    # too early, but then the event that tells of the cut is still to come and sets the position back.
    now = standing(s, job_id)
    found = events.read(s, job_id, after=at.event, limit=most_events) if now.last_event > at.event else []
    told: list[tuple[Event, Position]] = []
    here = replace(at, step=min(at.step, now.current_step))
    for event in found:
        kept = steps_kept(event)
        step = here.step if kept is None or event.seq <= at.settled else min(here.step, kept)
        here = Position(step, event.seq, max(here.settled, event.seq))
        told.append((event, here))
    if here.event < now.last_event:
        return News(now, told, None, here, complete=False)
    if here.step >= now.current_step:
        return News(now, told, None, here, complete=True)
    page = reading.read(s, job_id, after_step=here.step, limit=most_steps, fields=fields)
    here = replace(here, step=max(here.step, page.next_after_step))
    return News(
        now, told, page if page.count else None, here, complete=page.next_after_step >= page.last_step
    )


def steps_kept(event: Event) -> int | None:
    """The step up to which the record was kept, if `event` tells that steps beyond it are taken again."""
    if event.type != "worker" or not event.data or not event.data.get("steps_repeated"):
        return None
    return int(event.data["step"])


_STANDING = select(
    job_stats.c.version,
    jobs.c.state,
    jobs.c.status_reason,
    jobs.c.attempt,
    job_stats.c.current_step,
    job_stats.c.last_event,
).join(jobs, jobs.c.id == job_stats.c.job_id)
