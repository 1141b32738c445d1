"""The rows that hold steps: columnar chunks, and roll-ups of them for plots; added, cut back and copied.

The chunks together are exactly the steps 1..current_step. Whoever calls has the job's row locked; fences and
the summary are in `writing`.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from sqlalchemy import bindparam, delete, insert, literal, select, update
from sqlalchemy.orm import Session

from halfstep.service.contract import columns as columns_table
from halfstep.service.errors import NewerRecord
from halfstep.service.store.job_rows import AnyRow
from halfstep.service.store.record import chunks, rollups
from halfstep.service.store.record.chunks import CHUNK_STEPS
from halfstep.service.store.record.reading import parts
from halfstep.service.store.record.totals import NEEDED, Totals
from halfstep.service.store.tables import metric_chunks, metric_rollups

Columns: TypeAlias = Mapping[str, Sequence[Any]]


def add(s: Session, job_id: str, columns: Columns, totals: Totals) -> Totals:
    """Add steps that follow on those stored, `totals` being theirs; returns the totals after them."""
    totals = _add_chunks(s, job_id, columns, totals)
    _roll_up(s, job_id, columns)
    return totals


def cut_back(s: Session, job_id: str, step: int) -> tuple[Totals, dict[str, list[Any]] | None]:
    """Remove the steps beyond `step`; returns the totals there, and the columns of the chunk that ends there.

    No columns where nothing is left. Reads two chunks, however long the record.
    """
    for table, bound in ((metric_chunks, "first_step"), (metric_rollups, "last_step")):
        s.execute(delete(table).where(table.c.job_id == job_id, table.c[bound] > step))
    newest = _newest_chunk(s, job_id)
    if newest is None:
        return Totals(), None
    return _cut(s, job_id, newest, step)


def copy(s: Session, source_id: str, job_id: str, step: int) -> None:
    """Copy the chunks that begin, and the roll-ups that end, at `step` or before to a job without any."""
    for table, bound in ((metric_chunks, "first_step"), (metric_rollups, "last_step")):
        others = [column for column in table.columns if column.name != "job_id"]
        found = select(literal(job_id, table.c.job_id.type), *others).where(
            table.c.job_id == source_id, table.c[bound] <= step
        )
        s.execute(insert(table).from_select(["job_id", *(column.name for column in others)], found))


def _add_chunks(s: Session, job_id: str, columns: Columns, totals: Totals) -> Totals:
    """Add the steps in chunks that end on the grid, and return the totals after them.

    The first piece joins the chunk that it goes on from: a slow job, which is flushed step by step, must not
    end up with as many chunks as steps.
    """
    first, last = columns["step"][0], columns["step"][-1]
    added = []
    for begin in _cuts(first, last, CHUNK_STEPS):
        end = min(last, (begin - 1) // CHUNK_STEPS * CHUNK_STEPS + CHUNK_STEPS)
        part = {name: column[begin - first : end - first + 1] for name, column in columns.items()}
        totals = totals.after(part)
        tail = _newest_chunk(s, job_id) if (begin - 1) % CHUNK_STEPS else None
        if tail is not None and (tail.first_step - 1) // CHUNK_STEPS == (begin - 1) // CHUNK_STEPS:
            try:
                before = chunks.decode_all(tail.payload, tail.first_step)
            except NewerRecord:  # it stays as it is, and a chunk of its own goes on from it
                pass
            else:
                _replace(s, job_id, chunks.joined(before, part), totals)
                continue
        payload = chunks.encode(part)
        added.append(
            {
                "job_id": job_id,
                "first_step": begin,
                "last_step": end,
                "totals": totals.pack(),
                "payload": payload,
            }
        )
    if added:
        s.execute(_ADDED, added)
    return totals


def _cuts(first: int, last: int, grid: int) -> list[int]:
    """Where the pieces of first..last begin that end on multiples of `grid`."""
    return [first, *range((first - 1) // grid * grid + grid + 1, last + 1, grid)]


def _roll_up(s: Session, job_id: str, columns: Columns) -> None:
    """Add the roll-ups of every row of entries that these steps, stored already, complete."""
    first, last = columns["step"][0], columns["step"][-1]
    names = tuple(columns)
    span = rollups.row_steps(1)
    made: dict[tuple[int, int], rollups.Series] = {}
    for end in range((first - 1) // span * span + span, last + 1, span):
        begin = end - span + 1
        steps: Columns = {
            name: column[max(0, begin - first) : end - first + 1] for name, column in columns.items()
        }
        if begin < first:
            try:
                stored = list(parts(s, job_id, begin, first - 1, names))
            except NewerRecord:  # left out: plots are made of the steps there
                continue
            steps = {
                name: [*chain.from_iterable(part[name] for part in stored), *column]
                for name, column in steps.items()
            }
        groups = rollups.every(span, rollups.entry_steps(1))
        made[1, begin] = rollups.fold(rollups.as_entries(steps), groups)
        level = 1
        while end % rollups.row_steps(level + 1) == 0:
            below = _row_of_entries(s, job_id, level, end, made)
            if below is None:
                break
            level += 1
            made[level, end - rollups.row_steps(level) + 1] = rollups.fold(
                below, rollups.every(rollups.FAN * rollups.ENTRIES, rollups.FAN)
            )
    if made:
        s.execute(
            _ROLLED_UP,
            [
                {
                    "job_id": job_id,
                    "level": level,
                    "first_step": begin,
                    "last_step": begin + rollups.row_steps(level) - 1,
                    "payload": rollups.encode(entries),
                }
                for (level, begin), entries in made.items()
            ],
        )


def _row_of_entries(
    s: Session, job_id: str, level: int, end: int, made: Mapping[tuple[int, int], rollups.Series]
) -> rollups.Series | None:
    """The entries of `level` that make one row of the level above, which ends at `end`.

    None where some were never written, or by a later version: plots are made of what is below then.
    """
    span = rollups.row_steps(level)
    begins = range(end - rollups.FAN * span + 1, end, span)
    found_rows = s.execute(
        select(metric_rollups.c.first_step, metric_rollups.c.payload).where(
            metric_rollups.c.job_id == job_id,
            metric_rollups.c.level == level,
            metric_rollups.c.first_step.in_([begin for begin in begins if (level, begin) not in made]),
        )
    )
    try:
        stored = {
            row.first_step: rollups.decode(row.payload, columns_table.RECORD.names) for row in found_rows
        }
    except NewerRecord:
        return None
    rows = [made.get((level, begin)) or stored.get(begin) for begin in begins]
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return None
    return {each: list(chain.from_iterable(row[each] for row in found)) for each in found[0]}


def _newest_chunk(s: Session, job_id: str) -> AnyRow | None:
    return s.execute(_NEWEST, {"of_job": job_id}).one_or_none()


def _cut(s: Session, job_id: str, newest: AnyRow, step: int) -> tuple[Totals, dict[str, list[Any]]]:
    """End the newest chunk at `step`; returns the totals there and the columns that are left of it."""
    if newest.last_step <= step:
        return Totals.unpack(newest.totals), chunks.decode(
            newest.payload, newest.first_step, columns_table.RECORD.names
        )
    columns = chunks.decode_all(newest.payload, newest.first_step)
    kept = {name: values[: step - newest.first_step + 1] for name, values in columns.items()}
    before = s.scalar(
        select(metric_chunks.c.totals)
        .where(metric_chunks.c.job_id == job_id, metric_chunks.c.first_step < newest.first_step)
        .order_by(metric_chunks.c.first_step.desc())
        .limit(1)
    )
    totals = (Totals() if before is None else Totals.unpack(before)).after(
        {name: kept[name] for name in NEEDED}
    )
    _replace(s, job_id, kept, totals)
    return totals, kept


def _replace(s: Session, job_id: str, columns: Columns, totals: Totals) -> None:
    steps = columns["step"]
    changed = {"last_step": steps[-1], "totals": totals.pack(), "payload": chunks.encode(columns)}
    s.execute(_REPLACED, {**changed, "of_job": job_id, "begin": steps[0]})


# The statements of every batch are composed once: that costs more than running them on SQLite does.
_NEWEST = (
    select(
        metric_chunks.c.first_step, metric_chunks.c.last_step, metric_chunks.c.totals, metric_chunks.c.payload
    )
    .where(metric_chunks.c.job_id == bindparam("of_job"))
    .order_by(metric_chunks.c.first_step.desc())
    .limit(1)
)
_REPLACED = update(metric_chunks).where(
    metric_chunks.c.job_id == bindparam("of_job"), metric_chunks.c.first_step == bindparam("begin")
)
_ADDED, _ROLLED_UP = insert(metric_chunks), insert(metric_rollups)
