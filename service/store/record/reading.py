"""Reading the step record: pages of whole steps. Plots are in `plots`; nothing here writes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from halfstep.service.contract import columns as table
from halfstep.service.errors import FieldProblem, InvalidRequest, NewerRecord
from halfstep.service.store.job_rows import absent, known_shape
from halfstep.service.store.record import chunks
from halfstep.service.store.tables import job_stats, metric_chunks


@dataclass(frozen=True, slots=True)
class MetricPage:
    """Columns of equal length, `step` first.

    `last_step` is the newest step stored of the job; `next_after_step` goes on from here. In buckets, of
    `bucket_steps` each, a column holds the value at the bucket's last step, `<column>_first`, `_min` and
    `_max` stand beside it (NaN left out of min and max unless there is nothing else), and a flag's column
    counts it.
    """

    columns: dict[str, list[Any]]
    count: int
    last_step: int
    next_after_step: int
    bucket_steps: int | None = None


def read(
    s: Session,
    job_id: str,
    *,
    after_step: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    limit: int,
    fields: Sequence[str] | None,
) -> MetricPage:
    """The steps in `after_step` < step, `from_step` ≤ step ≤ `to_step`, in order, at most `limit`.

    A page ends before steps that were stored by a later version.

    Raises:
        NotFound: there is no such job.
        InvalidRequest: an unknown field.
        NewerRecord: the page would begin with such steps.
    """
    names = known_names(fields)
    newest = newest_step(s, job_id)
    begin = max(1, (after_step or 0) + 1, from_step or 1)
    end = min(begin + limit - 1, newest if to_step is None else min(to_step, newest))
    columns: dict[str, list[Any]] = {name: [] for name in names}
    try:
        for part in parts(s, job_id, begin, end, names):
            for name in names:
                columns[name] += part[name]
    except NewerRecord:
        if not columns["step"]:
            raise
    steps = columns["step"]
    return MetricPage(columns, len(steps), newest, steps[-1] if steps else begin - 1)


def known_names(fields: Sequence[str] | None) -> tuple[str, ...]:
    """The columns to answer with, in their order, `step` always.

    Raises:
        InvalidRequest: an unknown field.
    """
    if fields is None:
        return table.RECORD.names
    unknown = [name for name in fields if name not in table.RECORD.by_name]
    if unknown:
        detail = f"there is no metric {unknown[0]!r}; choose from {', '.join(table.RECORD.names)}"
        raise InvalidRequest(detail, [FieldProblem("/fields", detail)])
    return tuple(name for name in table.RECORD.names if name == "step" or name in fields)


def newest_step(s: Session, job_id: str) -> int:
    """The last step stored.

    Raises:
        NotFound: there is no such job.
    """
    newest = s.scalar(select(job_stats.c.current_step).where(job_stats.c.job_id == known_shape(job_id)))
    if newest is None:
        raise absent(job_id)
    return int(newest)


def parts(
    s: Session, job_id: str, begin: int, end: int, names: Sequence[str]
) -> Iterator[dict[str, list[Any]]]:
    """The columns of begin..end, chunk by chunk.

    Raises:
        NewerRecord: what comes next was stored by a later version; says which steps.
    """
    if end < begin:
        return
    # Only the primary key is searched: the chunk that holds `begin` is the last that begins at or before it.
    holder = (
        select(func.max(metric_chunks.c.first_step))
        .where(metric_chunks.c.job_id == job_id, metric_chunks.c.first_step <= begin)
        .scalar_subquery()
    )
    found = s.execute(
        select(metric_chunks.c.first_step, metric_chunks.c.last_step, metric_chunks.c.payload)
        .where(
            metric_chunks.c.job_id == job_id,
            metric_chunks.c.first_step >= func.coalesce(holder, begin),
            metric_chunks.c.first_step <= end,
        )
        .order_by(metric_chunks.c.first_step)
        .execution_options(yield_per=64)
    )
    with found as rows:  # closed where a row cannot be read, and the rest is not asked for
        for row in rows:
            try:
                part = chunks.decode(row.payload, row.first_step, names)
            except NewerRecord as error:
                raise NewerRecord(
                    f"steps {row.first_step} to {row.last_step} of the record cannot be read here: {error}. "
                    f"Nothing is lost, and what follows is read with from_step={row.last_step + 1}"
                ) from error
            low = max(0, begin - row.first_step)
            high = min(row.last_step, end) - row.first_step + 1
            yield {name: part[name][low:high] for name in names}
