"""How a job goes, from one row: stored totals and newest values, and what follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.store.job_rows import AnyRow, Job, absent, known_shape
from halfstep.service.store.sql.tenancy import of_tenant
from halfstep.service.store.tables import job_stats, jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The summary of a job. None: not known yet, or not measured. Times are seconds since the epoch.

    `version` rises with every change of the job's state, steps or events.
    """

    job_id: str
    version: int
    state: JobState
    is_terminal: bool
    attempt: int
    current_step: int
    total_steps: int | None
    epoch: int | None
    progress: float | None  # 0..1
    eta_seconds: float | None
    loss: float | None
    average_loss: float | None  # over the epoch's finite losses
    current_scale: float | None  # the scale that the next step will use
    average_scale: float | None  # over all steps
    overflow_count: int
    underflow_count: int
    nan_count: int
    skipped_steps: int
    overflow_rate: float | None  # None before 1 / overflow_threshold steps
    overflow_budget_exceeded: bool
    underflow_estimate: float | None
    grad_norm: float | None
    learning_rate: float | None
    memory_usage: float | None  # share of the device, 0..1
    memory_allocated_bytes: int | None
    memory_reserved_bytes: int | None
    memory_peak_bytes: int | None
    precision: dict[str, str | None]  # {mode, precision_level, compute_dtype}
    evaluation: dict[str, Any] | None  # {step, split, loss, metrics, seconds}
    last_overflow: dict[str, Any] | None  # {step, layer, kind}
    performance_metrics: dict[str, Any]
    last_step_at: float | None
    updated_at: float


_QUERY = select(job_stats, jobs.c.state, jobs.c.attempt).join(jobs, jobs.c.id == job_stats.c.job_id)


def summarise(s: Session, job_id: str, *, tenant: str | None = None) -> Stats:
    """The summary of a job, at the same cost however long it is; `tenant` None sees every tenant's.

    Raises:
        NotFound: there is no such job, or it is another tenant's.
    """
    query = _QUERY.where(job_stats.c.job_id == known_shape(job_id))
    query = of_tenant(query, jobs.c.tenant, tenant)
    row = s.execute(query).one_or_none()
    if row is None:
        raise absent(job_id)
    return _stats(row)


def summaries(s: Session, job_ids: Sequence[str]) -> dict[str, Stats]:
    """The summary of each of these jobs that exists, in one statement."""
    if not job_ids:
        return {}
    rows = s.execute(_QUERY.where(job_stats.c.job_id.in_(job_ids)))
    return {row.job_id: _stats(row) for row in rows}


def versions(s: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """`Stats.version` of each of these jobs that exists: what a poller compares."""
    if not job_ids:
        return {}
    found = s.execute(select(job_stats.c.job_id, job_stats.c.version).where(job_stats.c.job_id.in_(job_ids)))
    return {row.job_id: row.version for row in found}


def stats_of(job: Job, values: Mapping[str, Any]) -> Stats:
    """The summary of a job by the values that its row in job_stats is made of; the others are NULL."""
    return _stats(SimpleNamespace(**{**_NULLS, **values}, state=job.state, attempt=job.attempt))


_NULLS = dict.fromkeys(column.name for column in job_stats.columns)


def _stats(row: AnyRow | SimpleNamespace) -> Stats:
    state = JobState(row.state)
    steps = row.current_step
    return Stats(
        job_id=row.job_id,
        version=row.version,
        state=state,
        is_terminal=state.is_terminal,
        attempt=row.attempt,
        current_step=steps,
        total_steps=row.total_steps,
        epoch=row.epoch or None,
        progress=None if not row.total_steps else min(1.0, steps / row.total_steps),
        eta_seconds=_eta(row, state),
        loss=row.loss,
        average_loss=row.epoch_loss_sum / row.epoch_losses if row.epoch_losses else None,
        current_scale=row.current_scale,
        average_scale=row.scale_sum / steps if steps else None,
        overflow_count=row.overflow_count,
        underflow_count=row.underflow_count,
        nan_count=row.nan_count,
        skipped_steps=row.skipped_steps,
        overflow_rate=row.overflow_count / steps if steps * row.overflow_threshold >= 1 else None,
        overflow_budget_exceeded=row.overflow_budget_exceeded,
        underflow_estimate=row.underflow_estimate,
        grad_norm=row.grad_norm,
        learning_rate=row.learning_rate,
        memory_usage=row.memory_usage,
        memory_allocated_bytes=row.memory_allocated_bytes,
        memory_reserved_bytes=row.memory_reserved_bytes,
        memory_peak_bytes=row.memory_peak_bytes,
        precision={
            "mode": row.mode,
            "precision_level": row.precision_level,
            "compute_dtype": row.compute_dtype,
        },
        evaluation=row.evaluation,
        last_overflow=row.last_overflow,
        performance_metrics={
            "steps_per_second": row.steps_per_second,
            "samples_per_second": row.samples_per_second,
            "step_time_ms": {
                "p50": row.step_time_ms_p50,
                "p95": row.step_time_ms_p95,
                "max": row.step_time_ms_max,
            },
            "host_syncs_per_step": row.host_syncs_per_step,
        },
        last_step_at=row.last_step_at,
        updated_at=row.updated_at,
    )


def _eta(row: AnyRow | SimpleNamespace, state: JobState) -> float | None:
    """Seconds of training left at the present rate; None where it is not known or nothing trains."""
    if state is JobState.SUCCEEDED:
        return 0.0
    if state.is_terminal or not row.total_steps or not row.steps_per_second or row.steps_per_second < 0:
        return None
    return float((row.total_steps - row.current_step) / row.steps_per_second)
