"""What answers look like, for the OpenAPI document alone: no answer is validated against these at run time.

Bytes are built in `views`; a test holds both together.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from halfstep.service.contract import columns
from halfstep.service.contract.actors import ActorKind
from halfstep.service.contract.examples import (
    CHECKPOINT,
    COMPONENT,
    EVENTS,
    JOB,
    METRICS,
    PROBLEM,
    RESOLVED,
    STATS,
    STREAM_END,
    STREAM_METRICS,
    STREAM_STATE,
    TENANT_EVENTS,
    WORKER,
)
from halfstep.service.contract.precision import MixedPrecisionMode, PrecisionLevel
from halfstep.service.contract.speed import DtypeSpeed
from halfstep.service.contract.states import JobState, ReasonCode

NonFinite = Literal["NaN", "Infinity", "-Infinity"]
Number = Annotated[float | NonFinite, Field(description="A number; what is not finite is spelled out.")]
JobId = Annotated[str, Field(json_schema_extra={"format": "uuid"}, description="UUIDv7.")]
EventType = Literal[
    "state", "precision", "overflow", "nan", "alert", "evaluation", "checkpoint", "worker", "warning"
]
ComputeDtype = Literal["float32", "float16", "bfloat16"]
Share = Annotated[float, Field(ge=0, le=1)]


class _Answer(BaseModel):
    # Required even where it may be null: every answer has every field.
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


def _with(example: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


def _by_column(schema: dict[str, Any]) -> None:
    """Say of each column of the record what it is, whatever the table has at the time."""
    schema["properties"] = {column.name: column.schema for column in columns.RECORD.columns}


class WrongPlace(_Answer):
    """One wrong place of a request: in the body by `pointer`, elsewhere by `in` and `parameter`."""

    pointer: str | None = Field(default=None, description="JSON pointer (RFC 6901) into the body.")
    where: Literal["query", "path", "header"] | None = Field(default=None, alias="in")
    parameter: str | None = None
    detail: str = Field(description="What is wrong and what to do.")

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)


class Problem(BaseModel):
    """Why a request failed (RFC 9457). The rejected input is never repeated."""

    model_config = _with(PROBLEM)

    type: str = Field(description="`about:blank`: `code` tells the kind.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's path.")
    code: str = Field(description="Stable and made for programs.")
    errors: list[WrongPlace] = Field(default=[], description="Each wrong place, where places are known.")


class Reason(_Answer):
    """Why a job ended other than by finishing."""

    code: ReasonCode
    message: str = Field(description="Whose fault it is, in a sentence, with the next thing to try.")
    detail: Any = Field(default=None, description="Figures and names behind the message.")


class Transition(_Answer):
    """A state that a job entered."""

    state: JobState
    at: datetime
    reason: str | None


class StatsPrecision(_Answer):
    """What was asked for, and what the newest step computed in."""

    mode: MixedPrecisionMode
    precision_level: PrecisionLevel
    compute_dtype: ComputeDtype | None


class StatsEvaluation(_Answer):
    """The newest pass over the held-out split."""

    step: int
    split: str
    loss: Number
    metrics: dict[str, Number]
    seconds: float


class LastOverflow(_Answer):
    """Where the newest overflow entered."""

    step: int
    layer: str | None
    kind: str | None


class StepTime(_Answer):
    """Over the newest steps."""

    p50: Number | None
    p95: Number | None
    max: Number | None


class PerformanceMetrics(_Answer):
    """Speed over the newest steps; null before the first."""

    steps_per_second: Number | None
    samples_per_second: Number | None
    step_time_ms: StepTime
    host_syncs_per_step: Number | None


class Stats(BaseModel):
    """A job's summary. Null: not measured yet."""

    model_config = _with(STATS)

    job_id: JobId
    state: JobState
    is_terminal: bool
    attempt: int = Field(ge=1)
    current_step: int = Field(ge=0, description="Optimizer steps attempted, skipped ones included.")
    total_steps: int | None
    epoch: int | None
    progress: Share | None
    eta_seconds: float | None
    loss: Number | None = Field(description="Of the newest step, unscaled.")
    average_loss: Number | None = Field(description="Over the newest epoch.")
    current_scale: Number | None = Field(description="The scale that the next step will use.")
    average_scale: Number | None
    overflow_count: int
    underflow_count: int
    nan_count: int
    skipped_steps: int
    overflow_rate: float | None
    overflow_budget_exceeded: bool
    underflow_estimate: Number | None
    grad_norm: Number | None
    learning_rate: Number | None
    memory_usage: Number | None = Field(description="Share of the device's memory.")
    memory_allocated_bytes: int | None
    memory_reserved_bytes: int | None
    memory_peak_bytes: int | None
    precision: StatsPrecision
    evaluation: StatsEvaluation | None
    last_overflow: LastOverflow | None
    performance_metrics: PerformanceMetrics
    last_step_at: datetime | None
    updated_at: datetime


class Job(BaseModel):
    """A training job."""

    model_config = _with(JOB)

    id: JobId
    name: str
    state: JobState
    is_terminal: bool
    status_reason: Reason | None
    spec: dict[str, Any] = Field(description="The JobSpec with its defaults filled in.")
    attempt: int = Field(ge=1)
    max_attempts: int
    priority: int
    tags: dict[str, str]
    parent_id: JobId | None = Field(description="The job that this one is a retry of.")
    from_checkpoint: int | None = Field(description="The step of the parent's that the retry went on from.")
    worker: str | None = Field(description="The name of the worker that holds it, or held it last.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    transitions: list[Transition]
    stats: Stats


class JobPage(_Answer):
    """Jobs, newest first."""

    items: list[Job]
    next_cursor: str | None = Field(description="For `cursor=`; null at the end.")


class DryRun(BaseModel):
    """What would be submitted."""

    model_config = _with(RESOLVED)

    valid: Literal[True]
    warnings: list[str]
    resolved: dict[str, Any] = Field(description="The JobSpec with its defaults filled in.")
    capable_workers: int = Field(ge=0, description="Live workers that could run it.")


class MetricsPage(BaseModel):
    """Steps of the record, column by column."""

    model_config = _with(METRICS)

    job_id: JobId
    state: JobState
    is_terminal: bool
    attempt: int = Field(ge=1)
    count: int = Field(ge=0, description="Rows in each column.")
    columns: dict[str, list[float | bool | str | None]] = Field(
        description="Of equal length. Non-finite numbers are spelled out; null: not measured, or stored by a "
        "version that had no such column.",
        json_schema_extra=_by_column,
    )
    next_after_step: int = Field(description="For the next `after_step=`.")
    last_step: int = Field(ge=0, description="The newest step of the record; 0 when there is none.")
    downsampled: bool
    bucket_steps: int | None = Field(description="Steps of one bucket, when downsampled.")


class Event(_Answer):
    """Something that happened to a job."""

    seq: int = Field(ge=1, description="From 1, without gaps.")
    at: datetime
    type: EventType
    level: str
    message: str
    data: Any


class EventPage(BaseModel):
    """Events, oldest first."""

    model_config = _with(EVENTS)

    items: list[Event]
    next_after: int = Field(description="For the next `after=`.")


class Actor(_Answer):
    """Who did it."""

    kind: ActorKind
    id: str | None = Field(description="Of the API key; null for everything else.")
    name: str | None = Field(description="The key's or the worker's name.")
    tenant: str | None = Field(description="The key's; null for what belongs to the installation.")


class TenantEvent(_Answer):
    """Something that happened to one of a tenant's jobs."""

    job_id: JobId
    seq: int = Field(ge=1, description="Its number within its job, from 1 without gaps.")
    at: datetime
    type: EventType
    level: str
    message: str
    data: Any
    actor: Actor | None = Field(description="Null: written by a version that did not keep it.")


class TenantEventPage(BaseModel):
    """Events of all jobs of a tenant, in one order."""

    model_config = _with(TENANT_EVENTS)

    items: list[TenantEvent]
    next_after: str = Field(description="For the next `after=`; given where there is no event, too.")


class Checkpoint(BaseModel):
    """A saved state of a job."""

    model_config = _with(CHECKPOINT)

    step: int = Field(ge=1, description="Optimizer steps taken before it.")
    bytes: int = Field(description="Of all its files.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the weights that `/model` serves.")
    created_at: datetime
    metrics: dict[str, Number] = Field(description="Figures of that moment.")


class CheckpointList(_Answer):
    """What can be downloaded or retried from, newest first."""

    items: list[Checkpoint]


class StreamState(BaseModel):
    """`state` of a stream: the job entered a state."""

    model_config = _with(STREAM_STATE)

    seq: int = Field(ge=1, description="Its place among the job's events.")
    at: datetime
    state: JobState
    is_terminal: bool
    attempt: int = Field(ge=1)
    worker: str | None
    message: str


class StreamMetrics(BaseModel):
    """`metrics` of a stream: the next steps of the record, column by column."""

    model_config = _with(STREAM_METRICS)

    attempt: int = Field(ge=1)
    count: int = Field(ge=1, description="Rows in each column.")
    columns: dict[str, list[float | bool | str | None]] = Field(description="As in MetricsPage.")
    next_after_step: int = Field(description="The last step of these.")
    last_step: int = Field(ge=0, description="The newest step of the record.")


class StreamEnd(BaseModel):
    """`end` of a stream: its last message. A job that was deleted meanwhile has neither state nor attempt."""

    model_config = _with(STREAM_END)

    job_id: JobId
    state: JobState | None
    is_terminal: Literal[True]
    status_reason: Reason | None
    attempt: int | None
    last_step: int | None
    deleted: bool


class Component(BaseModel):
    """Something that a spec can name."""

    model_config = _with(COMPONENT)

    kind: Literal["model", "dataset", "loss", "optimizer", "scheduler"]
    name: str
    help: str
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema (Draft 2020-12) of its params.")
    extra: dict[str, Any]


class ComponentList(_Answer):
    """What the workers have published."""

    items: list[Component]


class Capability(_Answer):
    """What a worker's device can do."""

    device_type: Literal["cpu", "cuda"]
    device_name: str
    device_count: int
    bf16: bool
    fp16: bool
    memory_bytes: int
    speed: dict[str, DtypeSpeed] | None = Field(
        default=None,
        description="By data type, as the worker measured it when it started; null: not measured.",
    )


class Worker(BaseModel):
    """A process that trains jobs."""

    model_config = _with(WORKER)

    id: str
    name: str
    pid: int
    capability: Capability
    versions: dict[str, Any]
    slots: int
    busy: int = Field(description="Jobs that it runs now.")
    state: Literal["free", "busy", "draining"]
    started_at: datetime
    last_seen: datetime


class WorkerList(_Answer):
    """Workers that were seen lately."""

    items: list[Worker]


class Alive(_Answer):
    """The process answers."""

    status: Literal["ok"]


class Part(_Answer):
    """One part that requests depend on."""

    ok: bool
    detail: str | None


class Readiness(_Answer):
    """Whether requests can be served. Without a broker jobs are still taken in: `degraded`."""

    status: Literal["ready", "degraded"]
    parts: dict[Literal["database", "schema", "broker"], Part]
