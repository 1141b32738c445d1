"""A record whose columns change: what was stored before, what another version stored, what stays."""

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select, update

from halfstep.service.contract import columns
from halfstep.service.contract.columns import Column
from halfstep.service.contract.metrics import METRIC_COLUMNS, StepMetrics
from halfstep.service.errors import NewerRecord
from halfstep.service.store import record
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import metric_chunks, metric_rollups
from tests.store.making import LIVE, running, step, steps
from tests.store.test_plots import small_grid

ADDED = (
    Column("entropy", "number", "Entropy of the output", unit="nats", nullable=True),
    Column("clipped", "flag", "The gradient was clipped"),
)
make_row: Any = namedtuple  # noqa: PYI024  # the type checker reads literal fields alone
Wider = make_row("Wider", (*StepMetrics._fields, "entropy", "clipped"))


@contextmanager
def wider() -> Iterator[None]:
    """A version that knows two columns more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(columns, "RECORD", columns.RECORD.plus(ADDED))
        yield


def wide(first: int, last: int) -> list[Any]:
    return [
        Wider(*row, None if row.step % 5 == 0 else row.step / 8, row.step % 3 == 0)
        for row in steps(first, last)
    ]


def append(database: Database, job: Any, rows: list[Any]) -> None:
    with database.begin() as s:
        record.append(s, job.id, job.fence, rows, LIVE)


def whole(database: Database, job: Any, fields: list[str] | None = None) -> dict[str, list[Any]]:
    with database.read() as s:
        return record.read(s, job.id, limit=10_000, fields=fields).columns


def versions_of(database: Database, table: Any) -> set[int]:
    with database.read() as s:
        return {payload[0] for payload in s.scalars(select(table.c.payload))}


def make_newer(database: Database, table: Any, first_step: int) -> None:
    """As a version to come will have written it."""
    with database.begin() as s:
        found = s.scalars(select(table.c.payload).where(table.c.first_step == first_step)).first()
        assert found is not None
        s.execute(update(table).where(table.c.first_step == first_step).values(payload=b"\x04" + found[1:]))


def test_the_columns_that_older_versions_know_are_written_as_these_read_them(database: Database) -> None:
    with small_grid():
        append(database, running(database), steps(1, 64))
    assert versions_of(database, metric_chunks) == versions_of(database, metric_rollups) == {2}


def test_an_added_column_is_null_before_it_was_and_has_its_values_after(database: Database) -> None:
    with small_grid():
        job = running(database)
        append(database, job, steps(1, 21))  # its last chunk is half full
        before = whole(database, job)
        with wider():
            append(database, job, wide(22, 64))
            found = whole(database, job)
        assert list(found) == [*METRIC_COLUMNS, "entropy", "clipped"]
        assert found["entropy"] == [None] * 21 + [None if n % 5 == 0 else n / 8 for n in range(22, 65)]
        assert found["clipped"] == [None] * 21 + [n % 3 == 0 for n in range(22, 65)]
        model = steps(1, 64)
        assert {name: found[name] for name in METRIC_COLUMNS} == {
            name: [getattr(row, name) for row in model] for name in METRIC_COLUMNS
        }
        assert {name: values[:21] for name, values in found.items() if name in before} == before
    assert versions_of(database, metric_chunks) == {2, 3}


@pytest.mark.parametrize("points", [1, 3, 7, 64])
def test_plots_fold_an_added_column_over_steps_that_lack_it(database: Database, points: int) -> None:
    with small_grid():
        job = running(database)
        append(database, job, steps(1, 21))
        with wider():
            append(database, job, wide(22, 50))
            append(database, job, wide(51, 64))
            with database.read() as s:
                page = record.downsample(
                    s, job.id, from_step=None, to_step=None, max_points=points, fields=["entropy", "clipped"]
                )
    values = [None if n < 22 or n % 5 == 0 else n / 8 for n in range(1, 65)]
    begin = 0
    for place, end in enumerate(page.columns["step"]):
        inside = [value for value in values[begin:end] if value is not None]
        assert page.columns["entropy"][place] == values[end - 1]
        assert page.columns["entropy_first"][place] == values[begin]
        assert page.columns["entropy_min"][place] == min(inside, default=None)
        assert page.columns["entropy_max"][place] == max(inside, default=None)
        there = [n % 3 == 0 for n in range(max(22, begin + 1), end + 1)]
        assert page.columns["clipped"][place] == (sum(there) if there else None)
        begin = end
    assert begin == 64


def test_a_version_that_lacks_a_column_passes_over_it_and_keeps_it(database: Database) -> None:
    with small_grid():
        job = running(database)
        with wider():
            append(database, job, wide(1, 21))
        narrow = whole(database, job)
        assert narrow == {name: [getattr(row, name) for row in steps(1, 21)] for name in METRIC_COLUMNS}
        append(database, job, steps(22, 40))  # joins a chunk that has what it does not know
        with database.begin() as s:
            record.truncate_after(s, job.id, job.fence, 22)
        with wider():
            found = whole(database, job, ["entropy", "clipped"])
    assert found["entropy"] == [None if n % 5 == 0 else n / 8 for n in range(1, 22)] + [None]
    assert found["clipped"] == [n % 3 == 0 for n in range(1, 22)] + [None]


def test_a_chunk_of_a_later_version_is_told_and_the_rest_is_read(database: Database) -> None:
    with small_grid():
        job = running(database)
        append(database, job, steps(1, 24))
        make_newer(database, metric_chunks, 9)
        with database.read() as s:
            first = record.read(s, job.id, limit=100, fields=None)
            rest = record.read(s, job.id, from_step=17, limit=100, fields=None)
            with pytest.raises(NewerRecord, match=r"steps 9 to 16 .* version 4.* up to version 3; upgrade"):
                record.read(s, job.id, after_step=8, limit=100, fields=None)
        assert first.columns["step"] == list(range(1, 9))
        assert (first.next_after_step, first.last_step) == (8, 24)
        assert rest.columns["step"] == list(range(17, 25))


def test_a_job_goes_on_behind_a_chunk_of_a_later_version_which_stays(database: Database) -> None:
    with small_grid():
        job = running(database)
        append(database, job, steps(1, 12))
        make_newer(database, metric_chunks, 9)
        append(database, job, steps(13, 30))
        with pytest.raises(NewerRecord, match="version 4"), database.begin() as s:
            record.truncate_after(s, job.id, job.fence, 10)
        with database.read() as s:
            kept = list(s.execute(select(metric_chunks.c.first_step, metric_chunks.c.last_step)))
            rest = record.read(s, job.id, from_step=13, limit=100, fields=None)
    assert sorted(map(tuple, kept)) == [(1, 8), (9, 12), (13, 16), (17, 24), (25, 30)]
    assert rest.columns["step"] == list(range(13, 31))


def test_plots_do_without_the_roll_ups_of_a_later_version(database: Database) -> None:
    with small_grid():
        job = running(database)
        append(database, job, [step(n, loss=float(n % 7)) for n in range(1, 65)])

        def plot() -> dict[str, list[Any]]:
            with database.read() as s:
                return record.downsample(
                    s, job.id, from_step=None, to_step=None, max_points=4, fields=["loss", "skipped"]
                ).columns

        before = plot()
        make_newer(database, metric_rollups, 1)
        assert plot() == before


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((Column("loss", "number", "The loss"),), "begin with step"),
        ((*columns.RECORD.columns, columns.RECORD.columns[2]), "twice"),
        ((*columns.RECORD.columns, Column("loss_max", "number", "Of all ranks")), "same name in plots"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(table: tuple[Column, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns.ColumnTable(table)
