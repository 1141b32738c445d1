"""Plots against brute force over the steps: every bucket exact, however the record came about."""

import base64
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, insert, select, update

from halfstep.service.contract.metrics import COMPUTE_DTYPES, FLAG_COLUMNS, METRIC_COLUMNS, StepMetrics
from halfstep.service.contract.states import JobState
from halfstep.service.store import jobs, record
from halfstep.service.store.record import chunks, rollups
from halfstep.service.store.record import rows as record_rows
from halfstep.service.store.record.totals import Totals
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import job_stats, metric_chunks, metric_rollups
from tests.store.making import LIVE, claimed, running, step, steps
from tests.store.test_metrics import any_row, exact, numbered

GRID = 8  # steps of a chunk in the tests that shrink everything


@contextmanager
def small_grid() -> Iterator[None]:
    """Chunks of 8 steps; rows of 4 entries of 2, 4, 8, … steps: a hundred steps have several levels."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(record_rows, "CHUNK_STEPS", GRID)
        patched.setattr(rollups, "_LOWEST_STEPS", 2)
        patched.setattr(rollups, "ENTRIES", 4)
        patched.setattr(rollups, "FAN", 2)
        yield


def brute_force(rows: Sequence[StepMetrics]) -> dict[str, Any]:
    """A bucket by its definition."""
    bucket: dict[str, Any] = {"step": rows[-1].step}
    for name in METRIC_COLUMNS[1:]:
        values = [getattr(row, name) for row in rows]
        if name in FLAG_COLUMNS:
            bucket[name] = values.count(True)
            continue
        bucket[name], bucket[f"{name}_first"] = values[-1], values[0]
        if name != "compute_dtype":
            numbers = [value for value in values if not math.isnan(value)] or values
            bucket[f"{name}_min"], bucket[f"{name}_max"] = min(numbers), max(numbers)
    return bucket


def assert_exact(
    database: Database,
    job_id: str,
    model: Sequence[StepMetrics],
    *,
    from_step: int | None = None,
    to_step: int | None = None,
    max_points: int,
    fields: Sequence[str] | None = None,
) -> record.MetricPage:
    with database.read() as s:
        page = record.downsample(
            s, job_id, from_step=from_step, to_step=to_step, max_points=max_points, fields=fields
        )
    begin, end = max(1, from_step or 1), min(len(model), len(model) if to_step is None else to_step)
    lasts, width = page.columns["step"], page.bucket_steps
    assert width is not None
    assert page.count == len(lasts) <= max_points
    if end < begin:
        assert lasts == []
        return page
    assert (lasts[-1], page.next_after_step, page.last_step) == (end, end, len(model))
    firsts = [begin, *(last + 1 for last in lasts[:-1])]
    lengths = [last - first + 1 for first, last in zip(firsts, lasts, strict=True)]
    assert all(length == width for length in lengths[1:-1])
    assert all(0 < length <= width for length in lengths)
    for index, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        wanted = brute_force(model[first - 1 : last])
        for name, column in page.columns.items():
            assert len(column) == page.count
            assert exact(column[index]) == exact(wanted[name]), (name, first, last)
    if fields is None:
        assert set(page.columns) == set(brute_force(model[:1]))
    return page


append = st.tuples(st.just("append"), st.lists(any_row, min_size=1, max_size=40))
attempt = st.tuples(st.just("attempt"), st.floats(0, 1))
histories = st.lists(st.one_of(append, append, append, attempt), min_size=2, max_size=8)


@settings(
    max_examples=30,
    # Shrinking through a database takes longer than a test may: the history found is short as it is.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    history=histories,
    points=st.integers(1, 12),
    low=st.integers(0, 60),
    length=st.integers(0, 80),
)
@example(
    history=[("append", [step(1)] * 40), ("attempt", 0.5), ("append", [step(1, loss=9.0)] * 40)],
    points=3,
    low=0,
    length=60,
)
def test_every_bucket_equals_brute_force(
    database: Database, history: list[tuple[str, Any]], points: int, low: int, length: int
) -> None:
    with small_grid():
        job = running(database)
        model: list[StepMetrics] = []
        for action, argument in history:
            if action == "append":
                batch = numbered(argument, len(model))
                for _ in range(2):  # a batch sent again changes no roll-up
                    with database.begin() as s:
                        record.append(s, job.id, job.fence, batch, LIVE)
                model += batch
            else:
                with database.begin() as s:
                    jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
                job = claimed(database)
                kept = int(argument * len(model))
                with database.begin() as s:
                    jobs.mark_running(s, job.id, job.fence)
                    record.truncate_after(s, job.id, job.fence, kept)
                del model[kept:]
        for asked in (points, 1, 2):
            assert_exact(database, job.id, model, max_points=asked)
        assert_exact(database, job.id, model, from_step=low, to_step=low + length, max_points=points)
        assert_exact(database, job.id, model, from_step=low, max_points=points, fields=["loss", "nan"])
        assert_complete(database, job.id, len(model))
        with database.begin() as s:
            jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)


def assert_complete(database: Database, job_id: str, newest: int) -> None:
    """Exactly the rows of entries that are there whose steps all are."""
    with database.read() as s:
        found = s.execute(
            select(metric_rollups.c.level, metric_rollups.c.first_step, metric_rollups.c.last_step)
            .where(metric_rollups.c.job_id == job_id)
            .order_by(metric_rollups.c.level, metric_rollups.c.first_step)
        ).all()
    wanted = []
    level = 1
    while (span := rollups.row_steps(level)) <= newest:
        wanted += [(level, end - span + 1, end) for end in range(span, newest + 1, span)]
        level += 1
    assert [tuple(row) for row in found] == wanted


def test_long_and_short_batches_give_the_same_roll_ups(database: Database) -> None:
    """At the grid's real size, over three levels, by batches that end anywhere and by single long ones."""
    last = 2 * rollups.row_steps(3) // 2 + 1234
    rows = [step(n, loss=math.sin(n) if n % 977 else math.nan, overflow=n % 501 == 0) for n in range(1, last)]
    made = []
    for sizes in ((8192,), (256, 1000, 3)):
        job = running(database)
        begin = 0
        while begin < len(rows):
            for size in sizes:
                if begin < len(rows):
                    with database.begin() as s:
                        record.append(s, job.id, job.fence, rows[begin : begin + size], LIVE)
                    begin += size
        assert_complete(database, job.id, len(rows))
        with database.begin() as s:
            made.append(
                s.execute(
                    select(metric_rollups.c.level, metric_rollups.c.first_step, metric_rollups.c.payload)
                    .where(metric_rollups.c.job_id == job.id)
                    .order_by(metric_rollups.c.level, metric_rollups.c.first_step)
                ).all()
            )
            jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)
    assert made[0] == made[1]
    windows: list[tuple[int, int | None]] = [(500, None), (10, 1000), (100, 12_345), (7, None)]
    for points, first in windows:
        assert_exact(database, job.id, rows, from_step=first, max_points=points, fields=["loss", "overflow"])


def counted_readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each chunk or roll-up that is read from now on."""
    decoded: list[int] = []

    def counted(unpack: Callable[..., Any], *arguments: Any) -> Any:
        decoded.append(1)
        return unpack(*arguments)

    for module in (chunks, rollups):
        monkeypatch.setattr(module, "unpack", partial(counted, module.unpack))
    return decoded


def test_a_plot_reads_as_much_of_a_long_record_as_of_a_short_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = counted_readings(monkeypatch)
    with small_grid():
        job = running(database)
        read = []
        for first in range(1, 4096, 512):
            with database.begin() as s:
                record.append(s, job.id, job.fence, steps(first, first + 511), LIVE)
            decoded.clear()
            with database.read() as s:
                record.downsample(s, job.id, from_step=3, to_step=None, max_points=10, fields=["loss"])
            read.append(len(decoded))
    # 10 buckets of 3 to 6 entries, 4 of them in a row, and a few rows of each level at both ends.
    assert max(read) <= 15 + 2 * 12
    assert read[-1] <= read[0] + 12


@pytest.mark.parametrize("first", [2, 66, 130])
def test_a_plot_that_begins_inside_a_row_of_entries_reads_that_row(
    database: Database, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    decoded = counted_readings(monkeypatch)
    with small_grid():
        monkeypatch.setattr(rollups, "ENTRIES", 32)
        job = running(database)
        with database.begin() as s:
            record.append(s, job.id, job.fence, steps(1, 4096), LIVE)
        decoded.clear()
        with database.read() as s:
            record.downsample(s, job.id, from_step=first, to_step=None, max_points=40, fields=["loss"])
    assert len(decoded) <= 10  # made of the levels below instead, the rest of that row takes 13 or more


def test_wide_buckets_are_rounded_up_to_whole_entries_and_fill_most_of_the_points(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 20_000), LIVE)
    with database.read() as s:
        pages = {
            points: record.downsample(
                s, job.id, from_step=None, to_step=None, max_points=points, fields=["loss"]
            )
            for points in (1, 20, 200, 400, 5000)
        }
    assert {points: page.bucket_steps for points, page in pages.items()} == {
        1: 24_576,
        20: 1024,
        200: 128,
        400: 50,  # narrow: made of the steps, and not rounded
        5000: 4,
    }
    assert {points: page.count for points, page in pages.items()} == {
        1: 1,
        20: 20,
        200: 157,
        400: 400,
        5000: 5000,
    }


# Five steps as the first version of this store packed them.
OLD_PAYLOAD = base64.b64decode(
    "AQUAAABCAQAAAAAAAAAFAAAAAAAAAQFkAAAAAAAAAAAoAAAAAAAAAAAA4D8AAAAAAAD4fwAAAAAAAPB/mpmZmZmZuT8AAAAA"
    "AAAAgGYAAAAAAAAAABQAAAAAAIBHAACARwAAgEcAAABHAAAAR0IAAAAAAAAAAAUAAAAAAAEAAEIAAAAAAAAAAAUAAAAAAQAA"
    "AGsAAAAAAAAAAAAAAABCAAAAAAAAAAAFAAAAAAABAABCAAAAAAAAAAAFAAAAAAABAABrAAAAAAAAAAAAAAAAawAAAAAAAAAA"
    "CAAAAJXWJugLLhE+ZgAAAAAAAAAAFAAAAAAAAD8AAMB/AACAfwAAgD4AAIA/awAAAAAAAAAACAAAAPyp8dJNYlA/awAAAAAA"
    "AAAACAAAAAAAAAAAAOA/SCwBAAACAAAACgAAAAAALAFYAoQDsARRAAAAAAABAAAoAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAA"
    "AgAAAAAAAAADAAAAAAAAAAQAAGsAAAAAAAAAAAgAAAAAAAAAAAD4P0IAAAAAAAAAAAUAAAABAQAAAA=="
)
OLD_ROWS = [
    step(
        n,
        epoch=1 + n // 4,
        loss=[0.5, math.nan, math.inf, 0.1, -0.0][n - 1],
        grad_norm=[0.5, math.nan, math.inf, 0.25, 1.0][n - 1],
        scale=65536.0 if n < 4 else 32768.0,
        overflow=n == 3,
        has_inf=n == 3,
        skipped=n == 3,
        nan=n == 2,
        compute_dtype="float16" if n < 3 else "float32",
        memory_allocated_bytes=2**33 + n * 300,
        memory_reserved_bytes=2**40 * n,
    )
    for n in range(1, 6)
]


def packed_before(rows: Sequence[StepMetrics]) -> bytes:
    """The first version's layout, in its widest forms alone: float64, and 64-bit offsets."""
    parts = [struct.pack("<BI", 1, len(rows))]
    for name in METRIC_COLUMNS[1:]:
        values = [getattr(row, name) for row in rows]
        if name == "compute_dtype":
            values = [COMPUTE_DTYPES.index(value) for value in values]
        form = "d" if isinstance(values[0], float) else "Q"
        data = struct.pack(f"<{len(values)}{form}", *values)
        parts.append(struct.pack("<cqI", form.encode(), 0, len(data)) + data)
    return b"".join(parts)


def write_as_before(
    database: Database, job_id: str, rows: Sequence[StepMetrics], ends: Sequence[int]
) -> None:
    """A record as the first version left it: chunks of its layout that end anywhere, and no roll-ups."""
    totals, begin = Totals(), 0
    with database.begin() as s:
        for end in ends:
            part = rows[begin:end]
            totals = totals.after({name: [getattr(row, name) for row in part] for name in METRIC_COLUMNS})
            payload = OLD_PAYLOAD if (begin, end) == (0, 5) else packed_before(part)
            s.execute(
                insert(metric_chunks).values(
                    job_id=job_id,
                    first_step=begin + 1,
                    last_step=end,
                    totals=totals.pack(),
                    payload=payload,
                )
            )
            begin = end
        s.execute(
            update(job_stats)
            .where(job_stats.c.job_id == job_id)
            .values(**totals._asdict(), current_step=begin)
        )


def test_a_record_from_before_the_roll_ups_reads_and_goes_on(database: Database) -> None:
    with small_grid():
        job, other = running(database), running(database)
        with database.begin() as s:  # its chunks begin elsewhere
            record.append(s, other.id, other.fence, steps(1, 120), LIVE)
        rows = OLD_ROWS + [step(n, loss=float(n % 7), nan=n % 11 == 0) for n in range(6, 120)]
        old = rows[:75]
        write_as_before(database, job.id, old, [5, 6, 29, 61, 71, 75])
        for points in (1, 4, 9, 75):
            assert_exact(database, job.id, old, max_points=points)
        assert_exact(database, job.id, old, from_step=45, to_step=66, max_points=30)
        with database.begin() as s:  # on from step 75, inside the cell that began at 73
            record.append(s, job.id, job.fence, rows[75:118], LIVE)
        for points, low in ((1, 1), (4, 1), (9, 20), (118, 1), (5, 60)):
            assert_exact(database, job.id, rows[:118], from_step=low, max_points=points)
        with database.read() as s:
            whole = record.read(s, job.id, limit=1000, fields=None)
            wanted = [tuple(map(exact, row)) for row in rows[:118]]
            begins = s.scalars(
                select(metric_chunks.c.first_step)
                .where(metric_chunks.c.job_id == job.id)
                .order_by("first_step")
            ).all()
            assert [tuple(map(exact, row)) for row in zip(*whole.columns.values(), strict=True)] == wanted
            sealed = s.scalars(
                select(metric_rollups.c.first_step)
                .where(metric_rollups.c.job_id == job.id, metric_rollups.c.level == 1)
                .order_by("first_step")
            ).all()
        # The old chunk 72..75 began in another cell of the grid, and is not joined.
        assert begins == [1, 6, 7, 30, 62, 72, 76, 81, 89, 97, 105, 113]
        assert sealed == [73, 81, 89, 97, 105]
        with database.begin() as s:
            record.truncate_after(s, job.id, job.fence, 67)  # inside an old chunk
            record.append(s, job.id, job.fence, rows[67:100], LIVE)
        assert_exact(database, job.id, rows[:100], max_points=4)
        with database.read() as s:
            assert record.summarise(s, job.id).nan_count == sum(row.nan for row in rows[:100])


def test_a_roll_up_that_is_missing_is_made_up_for(database: Database) -> None:
    with small_grid():
        job = running(database)
        rows = steps(1, 128)
        with database.begin() as s:
            record.append(s, job.id, job.fence, rows, LIVE)
            s.execute(
                delete(metric_rollups).where(
                    metric_rollups.c.first_step.in_([33, 49]), metric_rollups.c.level < 4
                )
            )
            left = s.scalar(select(func.count()).select_from(metric_rollups))
        assert left == (16 - 2) + (8 - 2) + (4 - 1) + 2 + 1
        for points in range(1, 40):
            assert_exact(database, job.id, rows, max_points=points)


@pytest.mark.parametrize("kept", [8, 33, 64, 100])
def test_a_job_that_goes_on_from_another_ones_checkpoint_has_its_roll_ups(
    database: Database, kept: int
) -> None:
    with small_grid():
        source = running(database)
        rows = steps(1, 100)
        with database.begin() as s:
            record.append(s, source.id, source.fence, rows, LIVE)
            jobs.finish(s, source.id, source.fence, JobState.SUCCEEDED, None)
        job = running(database)
        with database.begin() as s:
            record.inherit(s, job.id, source_id=source.id, step=kept)
        assert_exact(database, job.id, rows[:kept], max_points=4)
        assert_complete(database, job.id, kept)
        more = steps(kept + 1, 130, loss=3.0)
        with database.begin() as s:
            record.append(s, job.id, job.fence, more, LIVE)
        assert_exact(database, job.id, rows[:kept] + more, max_points=4)
        assert_exact(database, source.id, rows, max_points=4)
