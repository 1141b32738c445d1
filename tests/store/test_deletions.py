"""Jobs that go: seen by nobody at once, and swept in transactions of a bounded number of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Engine, Table, event, func, select, text, update

from halfstep.service import dispatch
from halfstep.service.contract.states import JobState
from halfstep.service.dispatch import loop, sweeping
from halfstep.service.errors import NotFound
from halfstep.service.settings import Settings
from halfstep.service.store import events, jobs, record
from halfstep.service.store.jobs import Job, deletions
from halfstep.service.store.sql import schema
from halfstep.service.store.sql.database import Database, driver_url, make_engine
from halfstep.service.store.sql.ids import new_job_id
from halfstep.service.store.sql.schema import check_current, migrate
from halfstep.service.store.tables import deletions as deletion_rows
from halfstep.service.store.tables import job_events, metric_chunks, metric_rollups
from halfstep.service.store.tables import jobs as job_rows
from tests.databases import KINDS, empty_database
from tests.store.making import LIVE, running, step, steps, submitted
from tests.store.test_plots import small_grid

RECORD: tuple[Table, ...] = (metric_chunks, metric_rollups, job_events)


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_grid():
        yield


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


def ended(database: Database, number: int = 400) -> Job:
    """A job with several batches of chunks, roll-ups and events, that is over."""
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, number), LIVE)
        for index in range(number // 5):
            events.append(s, job.id, type="alert", level="info", message=f"number {index}")
        return jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)


def rows_left(database: Database, job_id: str) -> int:
    with database.read() as s:
        return sum(
            s.scalar(select(func.count()).select_from(table).where(table.c.job_id == job_id)) or 0
            for table in (*RECORD, deletion_rows)
        )


@contextmanager
def removed(database: Database) -> Iterator[list[list[int]]]:
    """For each transaction, how many rows each of its DELETEs removed."""
    transactions: list[list[int]] = []
    engine: Engine = database._engine

    def began(_connection: Any) -> None:
        transactions.append([])

    def executed(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE"):
            transactions[-1].append(cursor.rowcount)

    event.listen(engine, "begin", began)
    event.listen(engine, "after_cursor_execute", executed)
    try:
        yield transactions
    finally:
        event.remove(engine, "begin", began)
        event.remove(engine, "after_cursor_execute", executed)


def test_a_deleted_job_is_gone_before_its_record_is(database: Database) -> None:
    job, other = ended(database), ended(database, 40)
    before = rows_left(database, job.id)
    with removed(database) as transactions, database.begin() as s:
        jobs.delete(s, job.id, tenant="acme")
    assert sum(map(sum, transactions)) <= 1  # the job's own row; what is small goes with it
    assert rows_left(database, job.id) == before + 1
    with database.read() as s:
        for look in (
            lambda: jobs.get(s, job.id, tenant=None),
            lambda: record.summarise(s, job.id),
            lambda: record.read(s, job.id, limit=9, fields=None),
            lambda: record.downsample(s, job.id, from_step=1, to_step=9, max_points=2, fields=None),
        ):
            with pytest.raises(NotFound):
                look()
        assert [each.id for each in jobs.list_jobs(s, tenant="acme", limit=9)] == [other.id]
    with pytest.raises(NotFound), database.begin() as s:
        jobs.delete(s, job.id, tenant="acme")


def test_a_writer_waits_for_one_batch_of_a_sweep_at_most(database: Database, database_url: str) -> None:
    """Between two batches another connection, which does not wait at all, takes the lock and writes."""
    job, other = ended(database), running(database)
    with database.begin() as s:
        jobs.delete(s, job.id, tenant="acme")
    before = rows_left(database, job.id)
    impatient = Database(database_url, lock_seconds=0.001)
    written, done = 0, False
    with removed(database) as transactions:
        while not done:
            done = database.retry(lambda s: jobs.sweep(s, job.id))
            written += 1
            assert written <= before, "a sweep that removes nothing"
            with impatient.begin() as s:
                record.append(s, other.id, other.fence, [step(written)], LIVE)
    impatient.dispose()
    assert rows_left(database, job.id) == 0
    assert written == len(transactions) == 6  # 50 chunks, 94 roll-ups and 84 events by 64, and the end
    assert sum(map(sum, transactions)) == before
    assert all(sum(deleted) <= deletions.SWEEP_ROWS for deleted in transactions)
    with database.read() as s:
        assert record.summarise(s, other.id).current_step == written


def test_what_a_crash_leaves_of_a_sweep_the_dispatcher_finishes(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "enqueue", lambda *_: True)
    job, other = ended(database), ended(database, 40)
    untouched = rows_left(database, other.id)
    checkpoint = settings.data_dir / "jobs" / job.id / "1" / "10" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    with database.begin() as s:
        jobs.delete(s, job.id, tenant="acme")  # and then the process died before it removed a file
    with database.begin() as s:
        assert not jobs.sweep(s, job.id)
    whole = rows_left(database, job.id)
    with database.begin() as s:
        jobs.sweep(s, job.id)
        s.rollback()
    assert rows_left(database, job.id) == whole > 1
    monkeypatch.setattr(sweeping, "SECONDS", 0.0)
    rounds = 0
    while rows_left(database, job.id):
        dispatch.one_round(settings, database)
        rounds += 1
    assert rounds > 1  # one batch a round where there is no time for more
    assert not (settings.data_dir / "jobs").exists()
    assert rows_left(database, other.id) == untouched


def test_sweeping_is_for_deleted_jobs_alone(database: Database) -> None:
    job = ended(database, 40)
    before = rows_left(database, job.id)
    with database.begin() as s:
        assert jobs.sweep(s, job.id)
        assert jobs.unswept(s, limit=9) == []
    assert rows_left(database, job.id) == before


def test_of_several_deleted_jobs_the_longest_gone_is_swept_first_and_each_to_its_end(
    database: Database,
) -> None:
    gone = [ended(database, 40) for _ in range(3)]
    for job in reversed(gone):
        with database.begin() as s:
            jobs.delete(s, job.id, tenant="acme")
    with database.read() as s:
        assert [job_id for job_id, _ in jobs.unswept(s, limit=2)] == [gone[2].id, gone[1].id]
    assert any(database.retry(lambda s: jobs.sweep(s, gone[1].id)) for _ in range(9))
    assert rows_left(database, gone[1].id) == 0
    with database.read() as s:
        assert {job_id for job_id, _ in jobs.unswept(s, limit=9)} == {gone[0].id, gone[2].id}


def test_the_oldest_jobs_expire_first(database: Database) -> None:
    held = [ended(database, 1) for _ in range(3)]
    with database.begin() as s:
        for job, days in zip(held, (2.0, 4.0, 3.0), strict=True):
            s.execute(
                update(job_rows)
                .where(job_rows.c.id == job.id)
                .values(finished_at=job_rows.c.finished_at - days * 86_400)
            )
    with database.read() as s:
        assert jobs.expired(s, days=1.0, limit=2) == [held[1].id, held[2].id]
        assert jobs.expired(s, days=3.5, limit=9) == [held[1].id]


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_sweepers_do_not_wait_for_each_other(database: Database, database_url: str) -> None:
    job = ended(database)
    with database.begin() as s:
        jobs.delete(s, job.id, tenant="acme")
    second = Database(database_url, lock_seconds=0.001)
    with database.begin() as s:
        assert not jobs.sweep(s, job.id)
        with second.begin() as other:
            assert jobs.sweep(other, job.id)  # nothing left to do for this one
    second.dispose()


def test_jobs_are_deleted_once_they_are_old_enough_and_not_before_they_end(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "enqueue", lambda *_: True)
    old, recent, going, waiting = ended(database, 40), ended(database, 40), running(database), None
    waiting = submitted(database)
    with database.begin() as s:
        day = 86_400.0
        s.execute(update(job_rows).values(created_at=job_rows.c.created_at - 90 * day))
        for job, days in ((old, 30.1), (recent, 29.9)):
            s.execute(
                update(job_rows)
                .where(job_rows.c.id == job.id)
                .values(finished_at=job_rows.c.finished_at - days * day)
            )
    dispatch.one_round(settings, database)  # by default everything is kept
    with database.read() as s:
        assert len(jobs.list_jobs(s, tenant="acme", limit=9)) == 4
    dispatch.one_round(settings.model_copy(update={"retention_days": 30.0}), database)
    with database.read() as s:
        kept = {job.id for job in jobs.list_jobs(s, tenant="acme", limit=9)}
    assert kept == {recent.id, going.id, waiting.id}
    assert rows_left(database, old.id) == 0
    assert rows_left(database, recent.id) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_from_before_survives_the_migrations_and_can_be_deleted(kind: str, tmp_path: Path) -> None:
    with empty_database(kind, tmp_path) as url:
        engine = make_engine(
            driver_url(url), pool_size=1, statement_seconds=60, lock_seconds=60, idle_seconds=60
        )
        with schema._alone(engine) as connection:
            config = schema._config()
            config.attributes["connection"] = connection
            command.upgrade(config, "0003")
        engine.dispose()
        job_id = new_job_id()
        database = Database(url)
        with database.begin() as s:
            s.execute(
                text(
                    "INSERT INTO jobs (id, tenant, name, state, spec, tags, precedence, attempt,"
                    " max_attempts, device, needs_bf16, min_memory_bytes, fence, created_at, queued_at,"
                    " finished_at, publishes, publish_due) VALUES (:id, 'acme', 'old', 'succeeded',"
                    " '{}', '{}', 0, 1, 1, 'cpu', false, 0, 1, 1, 1, 2, 0, 1)"
                ),
                {"id": job_id},
            )
            for seq in (1, 2):
                s.execute(
                    text(
                        "INSERT INTO job_events (job_id, seq, at, type, level, message) "
                        "VALUES (:id, :seq, 1, 'state', 'info', 'x')"
                    ),
                    {"id": job_id, "seq": seq},
                )
                s.execute(
                    text(
                        "INSERT INTO metric_chunks (job_id, first_step, last_step, totals, payload) "
                        "VALUES (:id, :step, :step, :bytes, :bytes)"
                    ),
                    {"id": job_id, "step": seq, "bytes": b"\x00\x01"},
                )
        migrate(url)
        check_current(database)
        with database.read() as s:
            assert [event.seq for event in events.read(s, job_id)] == [1, 2]
            found = s.execute(select(metric_chunks.c.first_step, metric_chunks.c.payload)).all()
        assert [tuple(row) for row in found] == [(1, b"\x00\x01"), (2, b"\x00\x01")]
        with database.begin() as s:
            jobs.delete(s, job_id, tenant="acme")
        while not database.retry(lambda s: jobs.sweep(s, job_id)):
            pass
        assert rows_left(database, job_id) == 0
        database.dispose()
