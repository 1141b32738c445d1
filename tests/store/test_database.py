"""Transactions: what is committed, what is refused, what is tried again, and how long anything may take."""

import threading
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import event, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, OperationalError
from sqlalchemy.orm import Session

from halfstep.service.errors import StoreUnavailable
from halfstep.service.settings import Settings
from halfstep.service.store import jobs, record
from halfstep.service.store.sql.database import Database, connect, is_transient
from halfstep.service.store.tables import jobs as job_rows
from tests.store.making import LIVE, running, spec, steps, submitted


def test_an_error_rolls_the_whole_transaction_back(database: Database) -> None:
    def submit_then_fail() -> None:
        with database.begin() as s:
            jobs.submit(s, tenant="acme", spec=spec())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        submit_then_fail()
    with database.read() as s:
        assert sum(jobs.counts(s).values()) == 0


def test_a_read_transaction_cannot_write(database: Database) -> None:
    with pytest.raises((OperationalError, InternalError, StoreUnavailable)), database.read() as s:
        jobs.submit(s, tenant="acme", spec=spec())
    submitted(database)  # the connection went back able to write


def test_a_transient_failure_repeats_the_whole_transaction(database: Database) -> None:
    runs = 0

    def work(s: Session) -> str:
        nonlocal runs
        runs += 1
        job, _ = jobs.submit(s, tenant="acme", spec=spec())
        if runs < 3:
            raise StoreUnavailable("gone for a moment")
        return job.id

    job_id = database.retry(work)
    assert runs == 3
    with database.read() as s:
        assert [job.id for job in jobs.list_jobs(s, tenant="acme", limit=9)] == [job_id]


def test_other_errors_are_not_repeated(database: Database) -> None:
    runs = 0

    def work(s: Session) -> None:
        nonlocal runs
        runs += 1
        s.execute(text("INSERT INTO job_tags (job_id, key, value) VALUES ('x', 'a', 'b')"))
        s.execute(text("INSERT INTO job_tags (job_id, key, value) VALUES ('x', 'a', 'b')"))

    with pytest.raises(IntegrityError):
        database.retry(work)
    assert runs == 1


def test_retries_end(database: Database) -> None:
    def work(_: Session) -> None:
        raise StoreUnavailable("gone")

    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="gone"):
        database.retry(work, seconds=0.3)
    assert time.monotonic() - began < 2


def test_a_batch_is_stored_once_when_the_answer_to_its_commit_is_lost(database: Database) -> None:
    """The commit takes place, its answer does not arrive, and the whole transaction runs again."""
    job = running(database)
    lost: list[Session] = []

    def lose_the_answer(session: Session) -> None:
        if not lost:
            lost.append(session)
            raise OperationalError("COMMIT", {}, Exception("connection reset"), connection_invalidated=True)

    event.listen(Session, "after_commit", lose_the_answer)
    try:
        database.retry(lambda s: record.append(s, job.id, job.fence, steps(1, 5), LIVE))
    finally:
        event.remove(Session, "after_commit", lose_the_answer)
    assert len(lost) == 1
    with database.read() as s:
        assert record.read(s, job.id, limit=10, fields=["loss"]).columns["step"] == [1, 2, 3, 4, 5]
        assert record.summarise(s, job.id).current_step == 5


def test_waiting_for_a_lock_ends_as_unavailable(database_url: str) -> None:
    hasty = Database(database_url, lock_seconds=0.3)
    job = submitted(hasty)
    locked, finished = threading.Event(), threading.Event()

    def hold() -> None:
        with hasty.begin() as s:
            s.execute(text("UPDATE jobs SET name = 'held'"))
            locked.set()
            finished.wait(timeout=30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert locked.wait(timeout=10)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer"), hasty.begin() as s:
            jobs.request_cancel(s, job.id, tenant=None)
        assert 0.2 < time.monotonic() - began < 5
        with hasty.read() as s:  # readers do not wait for writers
            assert jobs.get(s, job.id, tenant=None).name == "job"
    finally:
        finished.set()
        holder.join()
        hasty.dispose()


def test_a_summary_is_one_statement_that_reads_one_row_of_each_table(database: Database) -> None:
    """However many steps and chunks the job has: the plan looks rows up by key and never scans."""
    job = running(database)
    with database.begin() as s:
        for first in range(1, 2000, 200):
            record.append(s, job.id, job.fence, steps(first, first + 199), LIVE)
    statements: list[tuple[str, object]] = []
    with database.read() as s:
        bind = s.connection()
        event.listen(
            bind, "before_cursor_execute", lambda _c, _u, sql, given, *_: statements.append((sql, given))
        )
        assert record.summarise(s, job.id).current_step == 2000
        ((statement, given),) = statements
        explain = "EXPLAIN QUERY PLAN " if database.dialect == "sqlite" else "EXPLAIN "
        if database.dialect == "postgresql":
            bind.exec_driver_sql("SET enable_seqscan = off")  # a table of one row would rightly be scanned
        plan = "\n".join(str(row) for row in bind.exec_driver_sql(explain + statement, given))  # type: ignore[arg-type]  # the driver's own parameters
    assert "metric_chunks" not in statement
    lookups = plan.count("SEARCH") if database.dialect == "sqlite" else plan.count("Index Scan")
    assert lookups == 2
    assert "SCAN" not in plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_is_durable_and_checks_references(database: Database) -> None:
    with database.begin() as s:
        pragmas = {
            name: s.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 3000}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_sqlite_file_that_cannot_be_opened_is_unavailable(database: Database, tmp_path: Path) -> None:
    nowhere = Database(f"sqlite:///{tmp_path / 'absent' / 'halfstep.db'}")
    with pytest.raises(StoreUnavailable, match="unable to open"):
        nowhere.ping()
    nowhere.dispose()
    database.ping()


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_postgres_runs_under_timeouts(database_url: str) -> None:
    db = Database(database_url, statement_seconds=0.5, lock_seconds=0.25, idle_seconds=0.75)
    with db.begin() as s:
        shown = {
            name: s.execute(text(f"SHOW {name}")).scalar_one()
            for name in (
                "statement_timeout",
                "lock_timeout",
                "idle_in_transaction_session_timeout",
                "transaction_isolation",
            )
        }
    assert shown == {
        "statement_timeout": "500ms",
        "lock_timeout": "250ms",
        "idle_in_transaction_session_timeout": "750ms",
        "transaction_isolation": "read committed",
    }
    with pytest.raises(StoreUnavailable, match="statement timeout"), db.begin() as s:
        s.execute(text("SELECT pg_sleep(30)"))
    db.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_a_frozen_process_has_locked_is_free_when_its_lease_ends(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    job = running(database)
    with database.begin() as s:
        s.execute(update(job_rows).values(lease_until=job_rows.c.created_at))
    settings = Settings(
        data_dir=tmp_path, database_url=database_url, lease_seconds=0.5, heartbeat_seconds=0.1
    )
    frozen = connect(settings)

    def write_and_pause() -> None:
        with frozen.begin() as s:
            record.append(s, job.id, job.fence, steps(1, 5), LIVE)
            time.sleep(0.2)
            assert database.retry(jobs.reap) == [], "it still has what it has locked"
            deadline = time.monotonic() + 3.0
            while not (back := database.retry(jobs.reap)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert [each.id for each in back] == [job.id]

    with pytest.raises(StoreUnavailable):
        write_and_pause()
    frozen.dispose()
    with database.read() as s:
        assert record.summarise(s, job.id).current_step == 0, "what it had not committed is gone"


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_the_server_ends_is_replaced_and_the_work_repeated(database: Database) -> None:
    job = running(database)
    runs = 0

    def work(s: Session) -> None:
        nonlocal runs
        runs += 1
        record.append(s, job.id, job.fence, steps(1, 5), LIVE)
        if runs == 1:
            own = s.execute(text("SELECT pg_backend_pid()")).scalar_one()
            with database.begin() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": own})

    database.retry(work)
    assert runs == 2
    with database.read() as s:
        assert record.summarise(s, job.id).current_step == 5


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_server_that_is_not_there_is_unavailable(database: Database) -> None:
    away = Database(database.url.set(port=1).render_as_string(hide_password=False))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer"):
        away.ping()
    assert time.monotonic() - began < 10
    away.dispose()


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (psycopg.errors.DiskFull, True),
        (psycopg.errors.OutOfMemory, True),
        (psycopg.errors.SerializationFailure, True),
        (psycopg.errors.UniqueViolation, False),
        (psycopg.errors.UndefinedTable, False),
    ],
)
def test_what_an_operator_can_cure_is_worth_another_try(cause: type[psycopg.Error], passes: bool) -> None:
    assert is_transient(DBAPIError("INSERT", {}, cause())) is passes
