"""Series of a job: figures with a step and a name that are not there every step, in chunks of points.

They belong to the record: written under the same fence, cut back with it, copied to a retry, swept with a
deleted job. A series shows no step that the record does not have. The job's evaluations are series, too;
those that were told before there were series are read from the job's events.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, insert, literal, select, update
from sqlalchemy.orm import Session

from halfstep.service.contract.metrics import Evaluation
from halfstep.service.errors import NotFound
from halfstep.service.store.packing import pack_named, unpack
from halfstep.service.store.tables import job_events, job_stats, series_chunks

CHUNK_POINTS = 512
MAX_NAME = 200
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*(/[A-Za-z0-9_][A-Za-z0-9_.:@-]*)*")
"""A name is one or more words with slashes between them; at most MAX_NAME characters in all."""

HELD_OUT = "held_out"
"""The first word of the series that evaluations give."""

Points = dict[int, float]


@dataclass(frozen=True, slots=True)
class Series:
    """What there is of a series."""

    name: str
    count: int
    first_step: int
    last_step: int
    last_value: float


@dataclass(frozen=True, slots=True)
class SeriesPage:
    """Points of a series in order, or buckets of `bucket_points` points each.

    `columns` are `step` and `value`; in buckets `value` is the last one, and `value_first`, `_min` and `_max`
    stand beside it (NaN left out of min and max unless there is nothing else). `next_from_step` goes on from
    here; None: that was all.
    """

    columns: dict[str, list[Any]]
    count: int
    next_from_step: int | None
    bucket_points: int | None = None


def of_evaluation(evaluation: Evaluation) -> dict[str, Points]:
    """The points that an evaluation gives."""
    return _held_out(evaluation.step, evaluation.loss, evaluation.metrics)


def add(s: Session, job_id: str, points: Mapping[str, Points]) -> None:
    """Add points; one of a step that is there takes its place. Whoever calls holds the job's lock.

    Raises:
        ValueError: a name that no series can have.
    """
    for name, new in points.items():
        if len(name) > MAX_NAME or not NAME.fullmatch(name):
            raise ValueError(
                f"no series can be named {name[:MAX_NAME]!r}; at most {MAX_NAME} characters of {NAME.pattern}"
            )
        if not new:
            continue
        kept = _chunks(s, job_id, name, from_step=min(new))
        tail = kept or _newest_chunk(s, job_id, name)
        merged = {step: value for row in tail for step, value in _decoded(row.payload).items()} | new
        for row in tail:
            s.execute(
                delete(series_chunks).where(
                    series_chunks.c.job_id == job_id,
                    series_chunks.c.name == name,
                    series_chunks.c.first_step == row.first_step,
                )
            )
        ordered = sorted(merged)
        s.execute(
            insert(series_chunks),
            [
                {
                    "job_id": job_id,
                    "name": name,
                    "first_step": part[0],
                    "last_step": part[-1],
                    "payload": _encoded({step: merged[step] for step in part}),
                }
                for part in (
                    ordered[begin : begin + CHUNK_POINTS] for begin in range(0, len(ordered), CHUNK_POINTS)
                )
            ],
        )


def cut_back(s: Session, job_id: str, step: int) -> None:
    """Remove the points beyond `step`."""
    s.execute(
        delete(series_chunks).where(series_chunks.c.job_id == job_id, series_chunks.c.first_step > step)
    )
    over = s.execute(
        select(series_chunks).where(series_chunks.c.job_id == job_id, series_chunks.c.last_step > step)
    ).all()
    for row in over:
        points = {at: value for at, value in _decoded(row.payload).items() if at <= step}
        s.execute(
            _REPLACED,
            {
                "of_job": job_id,
                "of_name": row.name,
                "begin": row.first_step,
                "last_step": max(points),
                "payload": _encoded(points),
            },
        )


def copy(s: Session, source_id: str, job_id: str, step: int) -> None:
    """Copy the chunks that begin at `step` or before to a job without any."""
    others = [column for column in series_chunks.columns if column.name != "job_id"]
    found = select(literal(job_id, series_chunks.c.job_id.type), *others).where(
        series_chunks.c.job_id == source_id, series_chunks.c.first_step <= step
    )
    s.execute(insert(series_chunks).from_select(["job_id", *(column.name for column in others)], found))


def listing(s: Session, job_id: str) -> list[Series]:
    """The series of a job, by name."""
    newest = _newest_step(s, job_id)
    found: dict[str, Points] = {}
    for told in _told(s, job_id):
        _merge(found, told)
    rows = s.execute(
        select(series_chunks.c.name, series_chunks.c.payload)
        .where(series_chunks.c.job_id == job_id, series_chunks.c.first_step <= newest)
        .order_by(series_chunks.c.name, series_chunks.c.first_step)
    )
    for name, payload in rows:
        _merge(found, {name: _decoded(payload)})
    listed = []
    for name in sorted(found):
        steps = sorted(step for step in found[name] if step <= newest)
        if steps:
            listed.append(Series(name, len(steps), steps[0], steps[-1], found[name][steps[-1]]))
    return listed


def read(
    s: Session,
    job_id: str,
    name: str,
    *,
    from_step: int | None = None,
    to_step: int | None = None,
    limit: int,
    max_points: int | None = None,
) -> SeriesPage:
    """The points of a series from `from_step` to `to_step`: at most `limit`, or all in `max_points` buckets.

    Raises:
        NotFound: the job has no such series.
    """
    newest = _newest_step(s, job_id)
    first, last = from_step or 0, newest if to_step is None else min(to_step, newest)
    points: Points = {}
    is_there = False
    if name.split("/", maxsplit=1)[0] == HELD_OUT:
        for told in _told(s, job_id):
            is_there = is_there or name in told
            points |= told.get(name, {})
    for row in _chunks(s, job_id, name, from_step=first):
        points |= _decoded(row.payload)
    if not points and not is_there and not _newest_chunk(s, job_id, name):
        raise NotFound("the job has no such series; GET /jobs/{id}/series lists those it has")
    steps = sorted(step for step in points if first <= step <= last)
    values = [points[step] for step in steps]
    if max_points is not None:
        return _in_buckets(steps, values, max_points)
    more = len(steps) > limit
    columns: dict[str, list[Any]] = {"step": steps[:limit], "value": values[:limit]}
    return SeriesPage(columns, len(columns["step"]), steps[limit] if more else None)


def _in_buckets(steps: Sequence[int], values: Sequence[float], max_points: int) -> SeriesPage:
    width = max(1, -(-len(steps) // max_points))
    cuts = [(begin, min(begin + width, len(steps))) for begin in range(0, len(steps), width)]
    parts = [values[begin:end] for begin, end in cuts]
    numbers = [[each for each in part if not math.isnan(each)] or part for part in parts]
    columns: dict[str, list[Any]] = {
        "step": [steps[j - 1] for _, j in cuts],
        "value": [values[j - 1] for _, j in cuts],
        "value_first": [values[i] for i, _ in cuts],
        "value_min": [min(part) for part in numbers],
        "value_max": [max(part) for part in numbers],
    }
    return SeriesPage(columns, len(cuts), None, width)


def _told(s: Session, job_id: str) -> Iterable[dict[str, Points]]:
    """The evaluations of the job's events; of a step that was taken again, the newest comes last."""
    rows = s.scalars(
        select(job_events.c.data)
        .where(job_events.c.job_id == job_id, job_events.c.type == "evaluation")
        .order_by(job_events.c.seq)
    )
    for data in rows:
        yield _held_out(data["step"], data["loss"], data["metrics"])


def _held_out(step: int, loss: float, metrics: Mapping[str, float]) -> dict[str, Points]:
    figures = {"loss": loss, **metrics}
    return {f"{HELD_OUT}/{name}": {step: float(value)} for name, value in figures.items()}


def _merge(found: dict[str, Points], more: Mapping[str, Points]) -> None:
    for name, points in more.items():
        found.setdefault(name, {}).update(points)


def _newest_step(s: Session, job_id: str) -> int:
    return s.scalar(select(job_stats.c.current_step).where(job_stats.c.job_id == job_id)) or 0


def _chunks(s: Session, job_id: str, name: str, *, from_step: int) -> Sequence[Any]:
    return s.execute(
        select(series_chunks.c.first_step, series_chunks.c.payload)
        .where(
            series_chunks.c.job_id == job_id,
            series_chunks.c.name == name,
            series_chunks.c.last_step >= from_step,
        )
        .order_by(series_chunks.c.first_step)
    ).all()


def _newest_chunk(s: Session, job_id: str, name: str) -> Sequence[Any]:
    return s.execute(
        select(series_chunks.c.first_step, series_chunks.c.payload)
        .where(series_chunks.c.job_id == job_id, series_chunks.c.name == name)
        .order_by(series_chunks.c.first_step.desc())
        .limit(1)
    ).all()


def _encoded(points: Points) -> bytes:
    return pack_named(
        len(points), {"step": ("integer", list(points)), "value": ("float", list(points.values()))}
    )


def _decoded(payload: bytes) -> Points:
    _, columns = unpack(payload, ())
    return dict(zip(columns["step"], columns["value"], strict=True))


_REPLACED = update(series_chunks).where(
    series_chunks.c.job_id == bindparam("of_job"),
    series_chunks.c.name == bindparam("of_name"),
    series_chunks.c.first_step == bindparam("begin"),
)
