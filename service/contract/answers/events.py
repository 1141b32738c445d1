"""What happened to a job: its events as a list, and the messages of its stream."""

from typing import Any, Literal

from pydantic import Field

from halfstep.service.contract.answers.examples import (
    EVENTS,
    STREAM_END,
    STREAM_METRICS,
    STREAM_STATE,
    TENANT_EVENTS,
)
from halfstep.service.contract.answers.jobs import Reason
from halfstep.service.contract.answers.values import Answer, Cell, JobId, Open, Timestamp, with_example
from halfstep.service.contract.events import ActorKind, EventType
from halfstep.service.contract.states import JobState


class Event(Answer):
    """Something that happened to a job."""

    seq: int = Field(ge=1, description="From 1, without gaps.")
    at: Timestamp
    type: Open[EventType]
    level: str
    message: str
    data: Any = None


class EventPage(Answer):
    """Events, oldest first."""

    model_config = with_example(EVENTS)

    items: list[Event]
    next_after: int = Field(description="For the next `after=`.")


class Actor(Answer):
    """Who did it."""

    kind: Open[ActorKind]
    id: str | None = Field(default=None, description="Of the API key; null for everything else.")
    name: str | None = Field(default=None, description="The key's or the worker's name.")
    tenant: str | None = Field(
        default=None, description="The key's; null for what belongs to the installation."
    )


class TenantEvent(Answer):
    """Something that happened to one of a tenant's jobs."""

    job_id: JobId
    seq: int = Field(ge=1, description="Its number within its job, from 1 without gaps.")
    at: Timestamp
    type: Open[EventType]
    level: str
    message: str
    data: Any = None
    actor: Actor | None = Field(default=None, description="Null: written by a version that did not keep it.")


class TenantEventPage(Answer):
    """Events of all jobs of a tenant, in one order."""

    model_config = with_example(TENANT_EVENTS)

    items: list[TenantEvent]
    next_after: str = Field(description="For the next `after=`; given where there is no event, too.")


class StreamState(Answer):
    """`state` of a stream: the job entered a state."""

    model_config = with_example(STREAM_STATE)

    seq: int = Field(ge=1, description="Its place among the job's events.")
    at: Timestamp
    state: Open[JobState]
    is_terminal: bool
    attempt: int = Field(ge=1)
    worker: str | None = None
    message: str


class StreamMetrics(Answer):
    """`metrics` of a stream: the next steps of the record, column by column."""

    model_config = with_example(STREAM_METRICS)

    attempt: int = Field(ge=1)
    count: int = Field(ge=1, description="Rows in each column.")
    columns: dict[str, list[Cell]] = Field(description="As in MetricsPage.")
    next_after_step: int = Field(description="The last step of these.")
    last_step: int = Field(ge=0, description="The newest step of the record.")


class StreamEnd(Answer):
    """`end` of a stream: its last message. A job that was deleted meanwhile has neither state nor attempt."""

    model_config = with_example(STREAM_END)

    job_id: JobId
    state: Open[JobState] | None = None
    is_terminal: Literal[True]
    status_reason: Reason | None = None
    attempt: int | None = None
    last_step: int | None = None
    deleted: bool
