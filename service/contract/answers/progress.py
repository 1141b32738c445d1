"""How a job goes: its summary, and the pages of its step record."""

from typing import Any

from pydantic import Field

from halfstep.service.contract import columns
from halfstep.service.contract.answers.examples import METRICS, STATS
from halfstep.service.contract.answers.values import (
    Answer,
    Cell,
    ComputeDtype,
    JobId,
    Number,
    Open,
    Share,
    Timestamp,
    with_example,
)
from halfstep.service.contract.precision import MixedPrecisionMode, PrecisionLevel
from halfstep.service.contract.states import JobState


class StatsPrecision(Answer):
    """What was asked for, and what the newest step computed in."""

    mode: Open[MixedPrecisionMode]
    precision_level: Open[PrecisionLevel]
    compute_dtype: ComputeDtype | None = None


class StatsEvaluation(Answer):
    """The newest pass over the held-out split."""

    step: int
    split: str
    loss: Number
    metrics: dict[str, Number]
    seconds: float


class LastOverflow(Answer):
    """Where the newest overflow entered."""

    step: int
    layer: str | None = None
    kind: str | None = None


class StepTime(Answer):
    """Over the newest steps."""

    p50: Number | None = None
    p95: Number | None = None
    max: Number | None = None


class PerformanceMetrics(Answer):
    """Speed over the newest steps; null before the first."""

    steps_per_second: Number | None = None
    samples_per_second: Number | None = None
    step_time_ms: StepTime
    host_syncs_per_step: Number | None = None


class Stats(Answer):
    """A job's summary. Null: not measured yet."""

    model_config = with_example(STATS)

    job_id: JobId
    state: Open[JobState]
    is_terminal: bool
    attempt: int = Field(ge=1)
    current_step: int = Field(ge=0, description="Optimizer steps attempted, skipped ones included.")
    total_steps: int | None = None
    epoch: int | None = None
    progress: Share | None = None
    eta_seconds: float | None = None
    loss: Number | None = Field(default=None, description="Of the newest step, unscaled.")
    average_loss: Number | None = Field(default=None, description="Over the newest epoch.")
    current_scale: Number | None = Field(default=None, description="The scale that the next step will use.")
    average_scale: Number | None = None
    overflow_count: int
    underflow_count: int
    nan_count: int
    skipped_steps: int
    overflow_rate: float | None = None
    overflow_budget_exceeded: bool
    underflow_estimate: Number | None = None
    grad_norm: Number | None = None
    learning_rate: Number | None = None
    memory_usage: Number | None = Field(default=None, description="Share of the device's memory.")
    memory_allocated_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_peak_bytes: int | None = None
    precision: StatsPrecision
    evaluation: StatsEvaluation | None = None
    last_overflow: LastOverflow | None = None
    performance_metrics: PerformanceMetrics
    last_step_at: Timestamp | None = None
    updated_at: Timestamp


def _by_column(schema: dict[str, Any]) -> None:
    """Say of each column of the record what it is, whatever the table has at the time."""
    schema["properties"] = {column.name: column.schema for column in columns.RECORD.columns}


class MetricsPage(Answer):
    """Steps of the record, column by column."""

    model_config = with_example(METRICS)

    job_id: JobId
    state: Open[JobState]
    is_terminal: bool
    attempt: int = Field(ge=1)
    count: int = Field(ge=0, description="Rows in each column.")
    columns: dict[str, list[Cell]] = Field(
        description="Of equal length. Non-finite numbers are spelled out; null: not measured, or stored by a "
        "version that had no such column.",
        json_schema_extra=_by_column,
    )
    next_after_step: int = Field(description="For the next `after_step=`.")
    last_step: int = Field(ge=0, description="The newest step of the record; 0 when there is none.")
    downsampled: bool
    bucket_steps: int | None = Field(default=None, description="Steps of one bucket, when downsampled.")
