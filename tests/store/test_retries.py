"""A retry is a new job that owes the old one nothing: its files, its record, its end."""

import threading
from typing import Any

import pytest
from sqlalchemy import text

from halfstep.service.contract.metrics import METRIC_COLUMNS
from halfstep.service.contract.states import TERMINAL, JobState
from halfstep.service.errors import Conflict, InvalidRequest, NotFound
from halfstep.service.store import jobs, record
from halfstep.service.store.jobs import retries
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.ids import new_job_id
from tests.store.making import BROKEN, LIVE, claimed, running, steps, submitted
from tests.store.test_lifecycle import _put_into

HASH = "ab" * 32


def ended(
    database: Database, *, saved: tuple[int, ...] = (10, 20), last: int = 25, **changes: Any
) -> jobs.Job:
    """A failed job with steps and checkpoints."""
    job = running(database, **changes)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, last), LIVE)
        for number in saved:
            jobs.record_checkpoint(
                s,
                job.id,
                job.fence,
                step=number,
                path=f"{job.id}/{number}",
                bytes=9,
                sha256=HASH,
                metrics={"loss": 0.5},
            )
        return jobs.finish(s, job.id, job.fence, JobState.FAILED, BROKEN)


def again(database: Database, job: jobs.Job, **wanted: Any) -> tuple[jobs.Job, bool]:
    with database.begin() as s:
        return retries.retry(s, job.id, **{"tenant": "acme", "new_id": new_job_id(), **wanted})


def test_from_the_start_it_is_the_same_job_anew(database: Database) -> None:
    job = ended(database, name="n", tags={"a": "b"}, priority=3, max_attempts=2)
    child, created = again(database, job)
    assert created
    assert (child.state, child.attempt, child.fence) == (JobState.QUEUED, 1, 0)
    assert (child.parent_id, child.from_checkpoint) == (job.id, None)
    assert (child.spec, child.name, child.tags, child.priority, child.max_attempts) == (
        job.spec,
        "n",
        {"a": "b"},
        3,
        2,
    )
    with database.read() as s:
        assert jobs.checkpoints(s, child.id) == []
        assert record.summarise(s, child.id).current_step == 0
        [entered] = jobs.transitions(s, child.id)
    assert entered.reason == f"retry of {job.id}"


@pytest.mark.parametrize("step", [10, 20])
def test_from_a_checkpoint_it_has_the_record_up_to_there(database: Database, step: int) -> None:
    job = ended(database)
    child, _ = again(database, job, from_checkpoint=step)
    assert (child.parent_id, child.from_checkpoint) == (job.id, step)
    with database.read() as s:
        [kept] = jobs.checkpoints(s, child.id)
        whole = record.read(s, job.id, after_step=0, limit=100, fields=METRIC_COLUMNS)
        page = record.read(s, child.id, after_step=0, limit=100, fields=METRIC_COLUMNS)
        stats = record.summarise(s, child.id)
        assert kept == next(c for c in jobs.checkpoints(s, job.id) if c.step == step)
        assert record.summarise(s, job.id).current_step == 25
    assert page.columns == {name: values[:step] for name, values in whole.columns.items()}
    assert (stats.current_step, stats.loss, stats.average_scale) == (step, 1 / step, 65536.0)
    held = claimed(database)
    assert held.fence > kept.fence
    with database.begin() as s:
        record.append(s, child.id, held.fence, steps(step + 1, 30), LIVE)
        assert record.truncate_after(s, child.id, held.fence, 5) == 25
        assert record.summarise(s, child.id).current_step == 5


def test_a_retry_of_a_retry_goes_on_from_what_it_took_over(database: Database) -> None:
    job = ended(database)
    child, _ = again(database, job, from_checkpoint=20)
    with database.begin() as s:
        jobs.request_cancel(s, child.id, tenant="acme")
    grandchild, _ = again(database, child, from_checkpoint=20)
    with database.begin() as s:
        assert jobs.delete(s, job.id, tenant="acme") == jobs.Leftovers([f"{job.id}/10"], [f"{job.id}/20"])
        assert jobs.delete(s, child.id, tenant="acme") == jobs.Leftovers([], [f"{job.id}/20"])
        [kept] = jobs.checkpoints(s, grandchild.id)
        jobs.request_cancel(s, grandchild.id, tenant="acme")
        assert jobs.delete(s, grandchild.id, tenant="acme") == jobs.Leftovers([f"{job.id}/20"], [])
    assert kept.path == f"{job.id}/20"


def test_a_worker_that_drops_a_shared_checkpoint_leaves_its_files(database: Database) -> None:
    job = ended(database)
    child, _ = again(database, job, from_checkpoint=20)
    held = claimed(database)
    with database.begin() as s:
        assert not jobs.drop_checkpoint(s, child.id, held.fence, 20)
        assert not jobs.drop_checkpoint(s, child.id, held.fence, 20)
        jobs.record_checkpoint(
            s, child.id, held.fence, step=30, path="own", bytes=9, sha256=HASH, metrics=None
        )
        assert jobs.drop_checkpoint(s, child.id, held.fence, 30)
        assert [c.step for c in jobs.checkpoints(s, job.id)] == [20, 10]


@pytest.mark.parametrize("before", JobState)
def test_only_what_has_ended_is_retried(database: Database, before: JobState) -> None:
    with database.begin() as s:
        job = _put_into(s, before)
    if before in TERMINAL:
        assert again(database, job)[1]
        return
    with pytest.raises(Conflict, match="cancel it first"):
        again(database, job)
    with database.read() as s:
        assert sum(jobs.counts(s).values()) == 1


def test_asked_again_it_is_the_retry_that_is_there_until_that_has_ended(database: Database) -> None:
    job = ended(database)
    first, _ = again(database, job)
    assert again(database, job) == (first, False)
    other, created = again(database, job, from_checkpoint=20)
    assert created
    assert again(database, job, from_checkpoint=20) == (other, False)
    with database.begin() as s:
        jobs.request_cancel(s, first.id, tenant="acme")
    assert again(database, job)[1]


def test_a_key_decides_instead(database: Database) -> None:
    job = ended(database)
    one, _ = again(database, job, idempotency_key="1")
    assert again(database, job, idempotency_key="2")[1]
    assert again(database, job, idempotency_key="1") == (one, False)
    with pytest.raises(InvalidRequest) as caught:
        again(database, job, idempotency_key="1", from_checkpoint=20)
    assert caught.value.code == "idempotency_key_reused"


def test_a_repeat_under_the_same_id_creates_nothing(database: Database) -> None:
    job = ended(database)
    new_id = new_job_id()
    first, _ = again(database, job, from_checkpoint=20, new_id=new_id, idempotency_key="k")
    assert again(database, job, from_checkpoint=20, new_id=new_id, idempotency_key="k")[0] == first
    with database.read() as s:
        assert len(jobs.checkpoints(s, first.id)) == 1


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(database: Database) -> None:
    for job, known in ((ended(database), "20, 10"), (ended(database, saved=()), "it has none")):
        with pytest.raises(InvalidRequest) as caught:
            again(database, job, from_checkpoint=7)
        [problem] = caught.value.problems
        assert problem.pointer == "/from_checkpoint"
        assert known in problem.detail


def test_another_tenants_job_is_not_found(database: Database) -> None:
    job = ended(database)
    with pytest.raises(NotFound):
        again(database, job, tenant="zeta")
    with pytest.raises(NotFound):
        again(database, submitted(database, tenant="zeta"))


def test_a_failure_on_the_way_leaves_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transaction: whatever dies in it, there is no child without its checkpoint or its record."""
    job = ended(database)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "inherit", die)
    with pytest.raises(KeyboardInterrupt):
        again(database, job, from_checkpoint=20)
    with database.read() as s:
        assert sum(jobs.counts(s).values()) == 1


def test_two_that_ask_at_once_get_one_job(database: Database) -> None:
    job = ended(database)
    ready = threading.Barrier(4)
    made: list[str] = []

    def ask() -> None:
        ready.wait()
        new_id = new_job_id()
        child, _ = database.retry(lambda s: retries.retry(s, job.id, tenant="acme", new_id=new_id))
        made.append(child.id)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_of_two_jobs_deleted_at_once_one_removes_the_files(database: Database) -> None:
    job = ended(database, saved=(20,))
    child, _ = again(database, job, from_checkpoint=20)
    with database.begin() as s:
        jobs.request_cancel(s, child.id, tenant="acme")
    second: list[jobs.Leftovers] = []
    thread = threading.Thread(
        target=lambda: second.append(database.retry(lambda s: jobs.delete(s, child.id, tenant="acme")))
    )
    with database.begin() as s:
        first = jobs.delete(s, job.id, tenant="acme")
        thread.start()
        while thread.is_alive() and not _waiters(database):
            thread.join(0.01)
    thread.join()
    assert [first, *second] == [
        jobs.Leftovers([], [f"{job.id}/20"]),
        jobs.Leftovers([f"{job.id}/20"], []),
    ]


def _waiters(database: Database) -> int:
    """Transactions in this database that wait for another's lock."""
    with database.read() as s:
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return int(s.execute(waiting).scalar_one())
