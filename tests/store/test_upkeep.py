"""Claim order and fit, lost leases, wake-ups, and jobs that nobody can run."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import update

from halfstep.service.contract.states import JobState, ReasonCode
from halfstep.service.errors import NotFound, StaleFence
from halfstep.service.store import jobs
from halfstep.service.store.fleet import workers
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import jobs as job_rows
from halfstep.service.store.tables import workers as worker_rows
from tests.store.making import CPU, claimed, running, spec, state_of, submitted

GPU = replace(CPU, device_type="cuda", bf16=False, memory_bytes=16 * 2**30, device_name="T4")


def _register(db: Database, worker_id: str = "w1", capability: workers.Capability = CPU) -> None:
    with db.begin() as s:
        workers.register(
            s,
            worker_id=worker_id,
            name=f"host-{worker_id}",
            pid=1,
            capability=capability,
            versions={},
            slots=2,
        )


def _age(db: Database, table: object, **columns: float) -> None:
    """Move times into the past by so many seconds."""
    rows = {"jobs": job_rows, "workers": worker_rows}[str(table)]
    with db.begin() as s:
        s.execute(update(rows).values({name: rows.c[name] - seconds for name, seconds in columns.items()}))


def test_the_highest_priority_then_the_oldest_is_claimed_first(database: Database) -> None:
    made = [submitted(database, priority=priority) for priority in (0, 5, -5, 5, 0)]
    order = [claimed(database).id for _ in made]
    assert order == [made[1].id, made[3].id, made[0].id, made[4].id, made[2].id]


def test_a_job_given_back_keeps_its_place(database: Database) -> None:
    first = running(database)
    submitted(database)
    with database.begin() as s:
        jobs.release(s, first.id, first.fence, charge_attempt=True, why="lost")
    assert claimed(database).id == first.id


@pytest.mark.parametrize(
    ("wanted", "capability", "fits"),
    [
        ({"resources": {"device": "auto"}}, CPU, True),
        ({"resources": {"device": "auto"}}, GPU, True),
        ({"resources": {"device": "cuda"}}, CPU, False),
        ({"resources": {"device": "cuda"}}, GPU, True),
        ({"resources": {"device": "cpu"}}, GPU, False),
        ({"resources": {"min_memory_bytes": GPU.memory_bytes}}, GPU, True),
        ({"resources": {"min_memory_bytes": GPU.memory_bytes + 1}}, GPU, False),
        ({"precision": {"precision_level": "bf16"}}, CPU, True),
        ({"precision": {"precision_level": "bf16"}}, GPU, False),
        ({"precision": {"precision_level": "bf16", "allow_emulated_bf16": True}}, GPU, True),
        ({"precision": {"precision_level": "bf16", "enabled": False}}, GPU, True),
    ],
)
def test_a_worker_gets_only_what_it_can_run(
    database: Database, wanted: dict[str, Any], capability: workers.Capability, fits: bool
) -> None:
    """The same rule for a claim, for the count that a dry run shows, and for giving a job up."""
    _register(database, capability=capability)
    submitted(database, **wanted)
    _age(database, "jobs", queued_at=100.0)
    with database.begin() as s:
        needs = jobs.requirements(spec(**wanted))
        live = workers.list_workers(s, live_seconds=30)
        assert workers.count_capable(live, needs) == int(fits)
        assert bool(jobs.fail_without_worker(s, seconds=60)) == (not fits)
        job = jobs.claim(s, worker_id="w1", capability=capability, lease_seconds=60)
        assert (job is not None) == fits
        assert job is None or job.worker == "host-w1"


def test_a_hint_does_not_jump_the_queue(database: Database) -> None:
    made = [submitted(database) for _ in range(3)]
    with database.begin() as s:
        job = jobs.claim(s, worker_id="w1", capability=CPU, lease_seconds=60, hint=made[2].id)
        assert job is not None
        assert job.id == made[0].id


def test_an_expired_lease_is_reaped_and_a_live_one_is_not(database: Database) -> None:
    live = running(database)
    lost = running(database, max_attempts=2)
    with database.begin() as s:
        s.execute(update(job_rows).where(job_rows.c.id == lost.id).values(lease_until=1.0))
        reaped = jobs.reap(s)
        assert jobs.reap(s) == []
    assert [(job.id, job.state, job.attempt) for job in reaped] == [(lost.id, JobState.QUEUED, 2)]
    assert state_of(database, live) is JobState.RUNNING
    claimed(database)
    with database.begin() as s:
        s.execute(update(job_rows).where(job_rows.c.id == lost.id).values(lease_until=1.0))
        (failed,) = jobs.reap(s)
    assert failed.state is JobState.FAILED
    assert failed.status_reason is not None
    assert failed.status_reason["code"] == ReasonCode.WORKER_LOST


def test_a_lease_lasts_as_long_as_it_was_given_by_the_databases_clock(database: Database) -> None:
    submitted(database)
    job = claimed(database, lease_seconds=1000)
    with database.begin() as s:
        jobs.renew(s, job.id, job.fence, lease_seconds=-1, worker_id="w1")
        assert [lost.id for lost in jobs.reap(s)] == [job.id]


def test_a_lost_worker_of_a_cancelled_job_ends_it(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        jobs.request_cancel(s, job.id, tenant=None)
        s.execute(update(job_rows).values(lease_until=1.0))
        (reaped,) = jobs.reap(s)
    assert (reaped.state, reaped.attempt) == (JobState.CANCELLED, 1)


def test_unclaimed_jobs_are_woken_again_at_growing_intervals(database: Database) -> None:
    made = [submitted(database, priority=priority) for priority in (0, 1)]
    with database.begin() as s:
        assert jobs.unclaimed(s, older_than=5.0, limit=10) == []
    intervals = []
    for _ in range(9):
        _age(database, "jobs", queued_at=1000.0, publish_due=1000.0)
        with database.begin() as s:
            ids = jobs.unclaimed(s, older_than=5.0, limit=10)
            assert ids == [made[1].id, made[0].id]
            assert jobs.unclaimed(s, older_than=5.0, limit=1) == ids[:1]
            before = s.execute(update(job_rows).values(publish_due=0).returning(job_rows.c.id)).all()
            assert len(before) == 2
            jobs.mark_published(s, ids)
            assert jobs.unclaimed(s, older_than=5.0, limit=10) == []
            due = s.execute(job_rows.select().where(job_rows.c.id == ids[0])).one().publish_due
            low, high = 0.0, 128.0
            while high - low > 0.25:  # the due time against the database's clock, found by asking it
                middle = (low + high) / 2
                s.execute(update(job_rows).where(job_rows.c.id == ids[0]).values(publish_due=due - middle))
                low, high = (low, middle) if jobs.unclaimed(s, older_than=5.0, limit=10) else (middle, high)
            intervals.append(round(high))
    assert intervals == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    claimed(database)
    claimed(database)
    with database.begin() as s:
        jobs.mark_published(s, [])
        assert jobs.unclaimed(s, older_than=0.0, limit=10) == []


def test_a_job_nobody_could_run_fails_with_what_it_needs(database: Database) -> None:
    _register(database)
    job = submitted(database, resources={"device": "cuda", "min_memory_bytes": 123})
    with database.begin() as s:
        assert jobs.fail_without_worker(s, seconds=60) == []
    _age(database, "jobs", queued_at=61.0)
    with database.begin() as s:
        (failed,) = jobs.fail_without_worker(s, seconds=60)
    assert (failed.id, failed.state) == (job.id, JobState.FAILED)
    assert failed.status_reason is not None
    assert failed.status_reason["code"] == ReasonCode.NO_CAPABLE_WORKER
    assert "device cuda, 123 bytes of device memory" in failed.status_reason["message"]


def test_a_capable_worker_seen_lately_keeps_its_jobs_waiting(database: Database) -> None:
    """Busy, restarted or lost a moment ago: only `seconds` without any such worker give a job up."""
    _register(database)
    submitted(database)
    _age(database, "jobs", queued_at=1000.0)
    with database.begin() as s:
        workers.remove(s, "w1")
        assert workers.list_workers(s, live_seconds=30) == []
        assert jobs.fail_without_worker(s, seconds=60, live_seconds=30) == []
    _age(database, "workers", last_seen=61.0)
    with database.begin() as s:
        assert len(jobs.fail_without_worker(s, seconds=60, live_seconds=30)) == 1


def test_workers_are_listed_while_they_live(database: Database) -> None:
    _register(database, "b", GPU)
    _register(database, "a")
    with database.begin() as s:
        workers.beat(s, "a", busy=2, draining=True)
        with pytest.raises(NotFound):
            workers.beat(s, "c", busy=0, draining=False)
    with database.read() as s:
        listed = workers.list_workers(s, live_seconds=30)
        needs = jobs.requirements(spec())
        assert workers.count_capable(listed, needs) == 1  # a draining one takes nothing new
    assert [(w.id, w.name, w.capability, w.slots, w.busy, w.draining) for w in listed] == [
        ("a", "host-a", CPU, 2, 2, True),
        ("b", "host-b", GPU, 2, 0, False),
    ]
    _age(database, "workers", last_seen=31.0)
    with database.read() as s:
        assert workers.list_workers(s, live_seconds=30) == []
    _register(database, "a")
    with database.read() as s:
        (again,) = workers.list_workers(s, live_seconds=30)
        assert (again.busy, again.draining) == (0, False)


def test_workers_not_seen_for_a_week_are_forgotten(database: Database) -> None:
    _register(database, "a")
    _age(database, "workers", last_seen=8 * 86400.0)
    _register(database, "b")
    with database.begin() as s:
        with pytest.raises(NotFound):
            workers.beat(s, "a", busy=0, draining=False)
        workers.beat(s, "b", busy=0, draining=False)


def test_what_a_restored_copy_says_is_held_is_given_back_uncharged(database: Database) -> None:
    last = running(database, max_attempts=1)
    cancelled, paused = running(database), running(database)
    starting = submitted(database)
    claimed(database)
    queued = submitted(database)
    with database.begin() as s:
        jobs.request_cancel(s, cancelled.id, tenant=None)
        jobs.request_pause(s, paused.id, tenant=None)
    with database.begin() as s:
        given_back = jobs.give_back_held(s)
    assert {job.id for job in given_back} == {last.id, cancelled.id, paused.id, starting.id}
    assert {job.attempt for job in given_back} == {1}
    assert [state_of(database, job) for job in (last, starting, queued)] == [JobState.QUEUED] * 3
    assert state_of(database, cancelled) is JobState.CANCELLED
    assert state_of(database, paused) is JobState.PAUSED
    with pytest.raises(StaleFence), database.begin() as s:
        jobs.renew(s, last.id, last.fence, lease_seconds=60.0, worker_id="w1")
    with database.begin() as s:
        assert jobs.give_back_held(s) == []
