"""Plots of the step record: a range of steps as a bounded number of buckets, at a cost that follows these.

Narrow buckets are made from the steps; wide ones from the roll-ups, down to the steps only at the edges and
where no roll-up is (not yet complete, or written before there were any). Nothing here writes.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from halfstep.service.errors import NewerRecord
from halfstep.service.store.record import rollups
from halfstep.service.store.record.reading import MetricPage, known_names, newest_step, parts
from halfstep.service.store.record.rollups import entry_steps, row_steps, series_of
from halfstep.service.store.tables import metric_rollups

# Entries of a level are used where a bucket is wider than so many of them: rounding its width up to a whole
# number of entries then costs at most a third of the points.
_FEWEST_ENTRIES = 3


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Entries of `width` steps each, one after another, beginning with step `first`."""

    first: int
    width: int
    count: int
    series: dict[str, Sequence[Any]]


def downsample(
    s: Session,
    job_id: str,
    *,
    from_step: int | None,
    to_step: int | None,
    max_points: int,
    fields: Sequence[str] | None,
) -> MetricPage:
    """At most `max_points` buckets of equally many steps over a range of steps; first and last may be short.

    Raises:
        NotFound: there is no such job.
        InvalidRequest: an unknown field.
        NewerRecord: steps of the range were stored by a later version.
    """
    names = known_names(fields)
    newest = newest_step(s, job_id)
    begin = max(1, from_step or 1)
    end = newest if to_step is None else min(to_step, newest)
    level, origin, width = _buckets(begin, end, max_points)
    columns: dict[str, list[Any]] = {"step": []}
    columns |= {each: [] for name in names if name != "step" for each in series_of(name)}
    if end >= begin:
        stretches = sorted(_stretches(s, job_id, level, begin, end, names), key=lambda stretch: stretch.first)
        columns["step"] = [min(edge, end) for edge in range(origin + width, end + width, width)]
        bounds = _bounds(stretches, columns["step"])
        for each in columns:
            if each != "step":
                joined = list(chain.from_iterable(stretch.series[each] for stretch in stretches))
                columns |= rollups.fold({each: joined}, bounds)
    steps = columns["step"]
    return MetricPage(columns, len(steps), newest, steps[-1] if steps else begin - 1, width)


def _buckets(begin: int, end: int, max_points: int) -> tuple[int, int, int]:
    """The level to make the buckets of, the step before the first bucket, and their width."""
    width = max(1, math.ceil((end - begin + 1) / max_points))
    level = 0
    while width > (_FEWEST_ENTRIES - 1) * entry_steps(level + 1):
        level += 1
    if not level:
        return level, begin - 1, width
    entry = entry_steps(level)
    origin = (begin - 1) // entry * entry
    return level, origin, math.ceil((end - origin) / max_points / entry) * entry


def _stretches(
    s: Session, job_id: str, level: int, begin: int, end: int, names: Sequence[str]
) -> Iterator[_Stretch]:
    """Entries that cover begin..end exactly, of `level` wherever there are some, in no order."""
    gaps = [(begin, end)]
    for each in range(level, 0, -1):
        left: list[tuple[int, int]] = []
        for gap in gaps:
            position = gap[0]
            for stretch in _rows(s, job_id, each, *gap, names):
                if stretch.first > position:
                    left.append((position, stretch.first - 1))
                position = stretch.first + stretch.width * stretch.count
                yield stretch
            if position <= gap[1]:
                left.append((position, gap[1]))
        gaps = left
    for gap in gaps:
        for part in parts(s, job_id, *gap, names):
            yield _Stretch(part["step"][0], 1, len(part["step"]), rollups.as_entries(part))


def _rows(
    s: Session, job_id: str, level: int, begin: int, end: int, names: Sequence[str]
) -> Iterator[_Stretch]:
    """The entries of one level that lie inside begin..end, in order."""
    width, span = entry_steps(level), row_steps(level)
    if end - begin + 1 < width:
        return
    rows = s.execute(
        select(metric_rollups.c.first_step, metric_rollups.c.payload)
        .where(
            metric_rollups.c.job_id == job_id,
            metric_rollups.c.level == level,
            metric_rollups.c.first_step > (begin - 1) // span * span,
            metric_rollups.c.first_step <= end,
        )
        .order_by(metric_rollups.c.first_step)
    )
    for first, payload in rows:
        low = max(0, math.ceil((begin - first) / width))
        high = min(rollups.ENTRIES, (end + 1 - first) // width)
        if low < high:
            try:
                series = rollups.decode(payload, names)
            except NewerRecord:  # the levels below, and the steps, may be readable
                continue
            yield _Stretch(
                first + low * width,
                width,
                high - low,
                {each: values[low:high] for each, values in series.items()},
            )


def _bounds(stretches: Sequence[_Stretch], last_steps: Sequence[int]) -> list[tuple[int, int]]:
    """Which of all the entries each bucket is made of; `last_steps` are where buckets, and entries, end."""
    firsts = [stretch.first for stretch in stretches]
    before = [0]
    for stretch in stretches:
        before.append(before[-1] + stretch.count)
    ends = []
    for step in last_steps:
        index = bisect_right(firsts, step) - 1
        ends.append(before[index] + (step + 1 - firsts[index]) // stretches[index].width)
    return list(zip([0, *ends[:-1]], ends, strict=True))
