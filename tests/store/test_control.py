"""What a client asks of a job: pause and resume in every state, and what a worker makes of the request."""

from typing import Any

import pytest

from halfstep.service.contract.states import JobState, RequestedAction
from halfstep.service.errors import Conflict, NotFound
from halfstep.service.store import events, jobs
from halfstep.service.store.sql.database import Database
from tests.store.making import CPU, claimed, running, state_of, submitted
from tests.store.test_lifecycle import _put_into


def pause(database: Database, job: jobs.Job) -> jobs.Job:
    with database.begin() as s:
        return jobs.request_pause(s, job.id, tenant="acme")


def resume(database: Database, job: jobs.Job) -> jobs.Job:
    with database.begin() as s:
        return jobs.request_resume(s, job.id, tenant="acme")


# State → what a pause and what a resume make of it; None: a conflict.
ANSWERS: dict[JobState, tuple[JobState | None, JobState | None]] = {
    JobState.QUEUED: (JobState.PAUSED, JobState.QUEUED),
    JobState.STARTING: (JobState.STARTING, JobState.STARTING),
    JobState.RUNNING: (JobState.PAUSING, JobState.RUNNING),
    JobState.PAUSING: (JobState.PAUSING, None),
    JobState.PAUSED: (JobState.PAUSED, JobState.QUEUED),
    JobState.CANCELLING: (None, None),
    JobState.SUCCEEDED: (None, None),
    JobState.FAILED: (None, None),
    JobState.CANCELLED: (None, None),
}


@pytest.mark.parametrize("before", JobState)
def test_the_answer_in_every_state_and_to_the_same_question_again(
    database: Database, before: JobState
) -> None:
    for ask, after in zip((pause, resume), ANSWERS[before], strict=True):
        with database.begin() as s:
            job = _put_into(s, before)
        if after is None:
            with pytest.raises(Conflict):
                ask(database, job)
            assert state_of(database, job) is before
            continue
        first = ask(database, job)
        assert (first.state, first.attempt) == (after, job.attempt)
        with database.read() as s:
            told = len(events.read(s, job.id))
        assert ask(database, job) == first
        with database.read() as s:
            assert len(events.read(s, job.id)) == told


def test_a_running_job_is_paused_by_its_worker_and_goes_on_uncharged(database: Database) -> None:
    job = running(database)
    assert pause(database, job).requested is RequestedAction.PAUSE
    with database.begin() as s:
        asked = jobs.renew(s, job.id, job.fence, lease_seconds=60, worker_id="w1")
        paused = jobs.finish(s, job.id, job.fence, JobState.PAUSED, None)
    assert asked is RequestedAction.PAUSE
    assert (paused.state, paused.attempt, paused.requested, paused.status_reason) == (
        JobState.PAUSED,
        1,
        None,
        None,
    )
    assert resume(database, job).attempt == 1
    again = claimed(database)
    assert (again.id, again.fence, again.attempt) == (job.id, 2, 1)


def test_a_pause_while_a_job_starts_is_obeyed_as_soon_as_it_runs(database: Database) -> None:
    submitted(database)
    job = claimed(database)
    asked = pause(database, job)
    assert (asked.state, asked.requested) == (JobState.STARTING, RequestedAction.PAUSE)
    with pytest.raises(Conflict, match="not over yet"):
        resume(database, job)
    with database.begin() as s:
        assert jobs.renew(s, job.id, job.fence, lease_seconds=60, worker_id="w1") is RequestedAction.PAUSE
        jobs.mark_running(s, job.id, job.fence)
        jobs.mark_running(s, job.id, job.fence)
    assert state_of(database, job) is JobState.PAUSING
    with database.begin() as s:
        jobs.finish(s, job.id, job.fence, JobState.PAUSED, None)
        passed = [step.state for step in jobs.transitions(s, job.id)]
    assert passed == ["queued", "starting", "running", "pausing", "paused"]


@pytest.mark.parametrize(("charge", "attempt"), [(True, 2), (False, 1)])
def test_a_job_that_goes_back_while_its_pause_waits_is_paused(
    database: Database, charge: bool, attempt: int
) -> None:
    submitted(database)
    job = claimed(database)
    pause(database, job)
    for _ in range(2):  # the second time as after a commit whose answer was lost
        with database.begin() as s:
            back = jobs.release(s, job.id, job.fence, charge_attempt=charge, why="lost")
        assert (back.state, back.attempt, back.requested) == (JobState.PAUSED, attempt, None)


def test_a_lost_worker_while_pausing_is_a_pause(database: Database) -> None:
    job = running(database)
    pause(database, job)
    with database.begin() as s:
        back = jobs.release(s, job.id, job.fence, charge_attempt=True, why="lost")
    assert (back.state, back.attempt) == (JobState.PAUSED, 1)


def test_a_cancel_overrides_a_pause_that_waits(database: Database) -> None:
    submitted(database)
    job = claimed(database)
    pause(database, job)
    with database.begin() as s:
        cancelled = jobs.request_cancel(s, job.id, tenant="acme")
    assert (cancelled.state, cancelled.requested) == (JobState.CANCELLING, RequestedAction.CANCEL)
    with pytest.raises(Conflict, match="being cancelled"):
        pause(database, job)


def test_nobody_claims_a_paused_job(database: Database) -> None:
    job = submitted(database)
    pause(database, job)
    with database.begin() as s:
        assert jobs.claim(s, worker_id="w1", capability=CPU, lease_seconds=60) is None


@pytest.mark.parametrize("ask", [jobs.request_pause, jobs.request_resume])
def test_another_tenants_job_is_not_found(database: Database, ask: Any) -> None:
    job = submitted(database)
    with pytest.raises(NotFound), database.begin() as s:
        ask(s, job.id, tenant="zeta")
    assert state_of(database, job) is JobState.QUEUED
