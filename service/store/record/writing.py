"""Writing the step record and its summary: append steps, cut back, hand on to a retry.

The steps themselves are in `rows`, and are always exactly 1..current_step. Every write is fenced and
updates steps and summary in one transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Update, bindparam, select, update
from sqlalchemy.orm import Session

from halfstep.service.contract import columns as table
from halfstep.service.contract.metrics import Evaluation, LiveStats, StepMetrics
from halfstep.service.errors import Conflict
from halfstep.service.store import events, series
from halfstep.service.store.job_rows import AnyRow, lock_fenced, stale
from halfstep.service.store.record import rows as record_rows
from halfstep.service.store.record.totals import Totals
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.tables import job_stats

# Of the summary, what no job inherits: its identity, and how far its own events and batches are.
_OWN = frozenset(
    {
        "job_id",
        "version",
        "last_event",
        "last_transition",
        "batch_fence",
        "batch_first_step",
        "updated_at",
    }
)


def append(s: Session, job_id: str, fence: int, rows: Sequence[StepMetrics], live: LiveStats) -> bool:
    """Add the next steps of a job and bring its summary up to date; the work grows with `rows` alone.

    A repeat of the newest batch (same fence, same first and last step) changes nothing, so a batch may be
    sent again when the answer to its commit was lost. Returns whether it was new.

    Raises:
        StaleFence: the job is held no longer under this fence.
        Conflict: the steps do not follow on without a gap.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("append needs at least one step")
    given = dict(zip(rows[0]._fields, zip(*rows, strict=True), strict=True))
    lacking = (None,) * len(rows)
    columns = {name: given.get(name, lacking) for name in table.RECORD.names}
    first, last = rows[0].step, rows[-1].step
    if columns["step"] != tuple(range(first, first + len(rows))):
        raise Conflict(f"the batch {first}..{last} has a gap or is out of order", code="steps_not_contiguous")
    lock_fenced(s, job_id, fence)
    stored = s.execute(_STORED, {"of_job": job_id}).one()
    if (stored.batch_fence, stored.batch_first_step, stored.current_step) == (fence, first, last):
        return False
    if first != stored.current_step + 1:
        raise Conflict(
            f"the record ends at step {stored.current_step}, so a batch cannot begin at step {first}",
            code="steps_not_contiguous",
        )
    totals = record_rows.add(s, job_id, columns, _totals(stored))
    values = {
        **_summary(totals, columns),
        "current_step": last,
        "batch_fence": fence,
        "batch_first_step": first,
        "current_scale": live.current_scale,
        "memory_peak_bytes": live.memory_peak_bytes,
        "steps_per_second": live.steps_per_second,
        "samples_per_second": live.samples_per_second,
        "step_time_ms_p50": live.step_time_ms_p50,
        "step_time_ms_p95": live.step_time_ms_p95,
        "step_time_ms_max": live.step_time_ms_max,
        "host_syncs_per_step": live.host_syncs_per_step,
        "overflow_budget_exceeded": live.overflow_budget_exceeded,
    }
    if live.last_overflow is not None:
        values["last_overflow"] = dict(live.last_overflow)
    elif totals.last_overflow_step >= first:
        values["last_overflow"] = _unattributed(totals.last_overflow_step)
    _update(s, _APPENDED, job_id, fence, stored.current_step, values)
    return True


def opened(s: Session, job_id: str, fence: int, *, total_steps: int | None) -> None:
    """The dataset is open: how many steps the job will have, None where nobody can know.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    lock_fenced(s, job_id, fence)
    s.execute(
        update(job_stats)
        .where(job_stats.c.job_id == job_id)
        .values(total_steps=total_steps, version=job_stats.c.version + 1, updated_at=db_now())
    )


def evaluated(s: Session, job_id: str, fence: int, evaluation: Evaluation) -> None:
    """Store an evaluation as the newest one, with its event. A repeat changes nothing.

    Raises:
        StaleFence: the job is held no longer under this fence.
    """
    document = asdict(evaluation) | {"metrics": dict(evaluation.metrics)}
    lock_fenced(s, job_id, fence)
    is_new = s.scalar(
        update(job_stats)
        .where(job_stats.c.job_id == job_id, job_stats.c.evaluation.is_distinct_from(document))
        .values(evaluation=document)
        .returning(job_stats.c.job_id)
    )
    if is_new is None:
        return
    series.add(s, job_id, series.of_evaluation(evaluation))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
    message = (
        f"step {evaluation.step}: {evaluation.split} loss {evaluation.loss:.4g}{figures and ', ' + figures}"
    )
    events.append(s, job_id, type="evaluation", level="info", message=message, data=document)


def truncate_after(s: Session, job_id: str, fence: int, step: int) -> int:
    """Remove the steps beyond `step`, which a resumed job will take again; returns how many there were.

    Raises:
        StaleFence: the job is held no longer under this fence.
        ValueError: `step` is negative.
    """
    if step < 0:
        raise ValueError(f"a record cannot be cut at step {step}")
    lock_fenced(s, job_id, fence)
    seen, values = _cut_back(s, job_id, step)
    series.cut_back(s, job_id, step)
    if values:
        _update(s, _CHANGED, job_id, fence, seen, values)
    return max(0, seen - step)


def inherit(s: Session, job_id: str, *, source_id: str, step: int) -> None:
    """Give a job that has no record yet that of another up to `step`, with its summary as it was there.

    Nobody may hold either of the two meanwhile: the caller has one locked, and has just made the other.
    """
    record_rows.copy(s, source_id, job_id, step)
    series.copy(s, source_id, job_id, step)
    series.cut_back(s, job_id, step)
    summary = s.execute(
        select(*(column for column in job_stats.columns if column.name not in _OWN)).where(
            job_stats.c.job_id == source_id
        )
    )
    s.execute(update(job_stats).where(job_stats.c.job_id == job_id).values(**summary.mappings().one()))
    _, values = _cut_back(s, job_id, step)
    if values:
        s.execute(update(job_stats).where(job_stats.c.job_id == job_id).values(**values))


def _cut_back(s: Session, job_id: str, step: int) -> tuple[int, dict[str, Any]]:
    """Remove the chunks beyond `step`; returns the last step there was, and the summary's new values."""
    stored = s.execute(
        select(job_stats.c.current_step, job_stats.c.last_overflow, job_stats.c.evaluation).where(
            job_stats.c.job_id == job_id
        )
    ).one()
    seen = int(stored.current_step)
    if seen <= step:
        return seen, {}
    values: dict[str, Any] = dict.fromkeys(
        (*_newest(), "current_scale", "steps_per_second", "samples_per_second", "last_step_at")
    )
    totals, columns = record_rows.cut_back(s, job_id, step)
    if columns is not None:
        values |= _summary(totals, columns) | {"current_scale": columns["scale"][-1]}
        del values["last_step_at"]
    values |= totals._asdict() | {"current_step": step, "batch_fence": None, "batch_first_step": None}
    if stored.last_overflow is not None and stored.last_overflow.get("step") != totals.last_overflow_step:
        values["last_overflow"] = (
            _unattributed(totals.last_overflow_step) if totals.last_overflow_step else None
        )
    if stored.evaluation is not None and stored.evaluation["step"] > step:
        values["evaluation"] = None
    return seen, values


# The statements of every batch are composed once: that costs more than running them on SQLite does.
_STORED = select(
    job_stats.c.current_step,
    job_stats.c.batch_fence,
    job_stats.c.batch_first_step,
    *(job_stats.c[name] for name in Totals._fields),
).where(job_stats.c.job_id == bindparam("of_job"))
_CHANGED = (
    update(job_stats)
    .where(job_stats.c.job_id == bindparam("of_job"), job_stats.c.current_step == bindparam("seen_step"))
    .values(version=job_stats.c.version + 1, updated_at=db_now())
    .returning(job_stats.c.job_id)
)
_APPENDED = _CHANGED.values(last_step_at=db_now())


def _totals(row: AnyRow) -> Totals:
    return Totals(*(getattr(row, name) or 0 for name in Totals._fields))


def _summary(totals: Totals, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return totals._asdict() | {name: columns[name][-1] for name in _newest()}


def _newest() -> list[str]:
    return [column.name for column in table.RECORD.columns if column.in_summary]


def _update(
    s: Session, statement: Update, job_id: str, fence: int, seen_step: int, values: Mapping[str, Any]
) -> None:
    row = s.execute(statement, {**values, "of_job": job_id, "seen_step": seen_step}).one_or_none()
    if row is None:
        raise stale(job_id, fence)


def _unattributed(step: int) -> dict[str, Any]:
    return {"step": step, "layer": None, "kind": "unknown"}
