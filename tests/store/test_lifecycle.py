"""A job's life: every edge of TRANSITIONS and none beside them, and what each one leaves behind."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from halfstep.service.contract.states import LEASED, TRANSITIONS, JobState, ReasonCode, RequestedAction
from halfstep.service.errors import Conflict, InvalidRequest, NotFound, StaleFence
from halfstep.service.store import events, jobs, record
from halfstep.service.store.job_rows import move
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.ids import new_job_id
from halfstep.service.store.tables import job_stats, job_transitions
from halfstep.service.store.tables import jobs as job_rows
from tests.store.making import BROKEN, CPU, LIVE, claimed, running, spec, state_of, steps, submitted

PAIRS = list(itertools.product(JobState, JobState))


def _put_into(s: Session, state: JobState) -> jobs.Job:
    """A job in this state, as if it had got there."""
    job, _ = jobs.submit(s, tenant="acme", spec=spec())
    held = {"lease_until": 1e12, "worker_id": "w1"} if state in LEASED else {}
    ended = {"finished_at": 1.0, "status_reason": BROKEN} if state.is_terminal else {}
    s.execute(update(job_rows).where(job_rows.c.id == job.id).values(state=state, fence=1, **held, **ended))
    return jobs.get(s, job.id, tenant=None)


def test_every_edge_of_the_table_is_taken_and_every_other_refused(database: Database) -> None:
    """All 81 pairs of states, by the one function that changes a state."""
    taken = set()
    for before, after in PAIRS:
        with database.begin() as s:
            job = _put_into(s, before)
        try:
            with database.begin() as s:
                held = {"lease_until": 1e12, "worker_id": "w1"} if after in LEASED else {}
                move(s, job, after, why=None, status_reason=BROKEN, **held)
        except Conflict:
            assert state_of(database, job) is before
        else:
            assert state_of(database, job) is after
            taken.add((before, after))
    assert taken == {(before, after) for before, edges in TRANSITIONS.items() for after in edges}


# What each function of the store does to a job in each state: the state after it, or the error.
FINISHES = [state for state in JobState if state.is_terminal or state is JobState.PAUSED]


def _finish(state: JobState, s: Session, job: jobs.Job) -> None:
    jobs.finish(s, job.id, job.fence, state, BROKEN)


CALLS: dict[str, Callable[[Session, jobs.Job], Any]] = {
    "cancel": lambda s, job: jobs.request_cancel(s, job.id, tenant="acme"),
    "pause": lambda s, job: jobs.request_pause(s, job.id, tenant="acme"),
    "resume": lambda s, job: jobs.request_resume(s, job.id, tenant="acme"),
    "run": lambda s, job: jobs.mark_running(s, job.id, job.fence),
    "drain": lambda s, job: jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained"),
    "lose": lambda s, job: jobs.release(s, job.id, job.fence, charge_attempt=True, why="lost"),
    **{f"finish {state}": partial(_finish, state) for state in FINISHES},
}


@pytest.mark.parametrize("call", CALLS)
def test_no_call_leaves_the_table(database: Database, call: str) -> None:
    for before in JobState:
        with database.begin() as s:
            job = _put_into(s, before)
        try:
            with database.begin() as s:
                CALLS[call](s, job)
        except (Conflict, StaleFence):
            assert state_of(database, job) is before
        after = state_of(database, job)
        assert after is before or after in TRANSITIONS[before], f"{call} took {before} to {after}"


def test_the_database_refuses_what_no_job_can_be(database: Database) -> None:
    """The CHECKs hold whatever writes."""
    job = submitted(database)
    impossible: list[dict[str, Any]] = [
        {"state": "asleep"},
        {"state": "running"},  # held, without a lease
        {"lease_until": 1.0, "worker_id": "w1"},  # queued, with a lease
        {"state": "succeeded"},  # ended, without a time
        {"finished_at": 1.0},
        {"state": "failed", "finished_at": 1.0},  # without a reason
        {"attempt": 4},
        {"attempt": 0},
        {"requested": "cancel"},  # asked of nobody
        {"requested": "sing"},
        {"device": "tpu"},
    ]
    for values in impossible:
        with pytest.raises(IntegrityError), database.begin() as s:
            s.execute(update(job_rows).where(job_rows.c.id == job.id).values(**values))
    with pytest.raises(IntegrityError), database.begin() as s:
        s.execute(insert(job_transitions).values(job_id="x", seq=1, state="queued", at=1.0))
    assert state_of(database, job) is JobState.QUEUED


def test_a_job_from_submission_to_success(database: Database) -> None:
    job = submitted(database, priority=3, tags={"team": "vision"}, name="digits")
    assert (job.state, job.attempt, job.max_attempts, job.priority, job.fence) == (
        JobState.QUEUED,
        1,
        3,
        3,
        0,
    )
    assert (job.tags, job.name, job.spec) == (
        {"team": "vision"},
        "digits",
        spec(priority=3, tags={"team": "vision"}, name="digits").model_dump(mode="json"),
    )
    held = claimed(database, worker="w7")
    assert (held.state, held.fence, held.worker, held.started_at) == (JobState.STARTING, 1, "w7", None)
    with database.begin() as s:
        jobs.mark_running(s, job.id, held.fence)
        jobs.mark_running(s, job.id, held.fence)  # a repeat changes nothing
    with database.begin() as s:
        assert jobs.renew(s, job.id, held.fence, lease_seconds=9, worker_id="w7") is None
        done = jobs.finish(s, job.id, held.fence, JobState.SUCCEEDED, None)
        assert jobs.finish(s, job.id, held.fence, JobState.SUCCEEDED, None) == done
    with database.read() as s:
        passed = jobs.transitions(s, job.id)
        told = events.read(s, job.id)
        assert jobs.get(s, job.id, tenant="acme") == done
    assert [step.state for step in passed] == ["queued", "starting", "running", "succeeded"]
    assert [step.at for step in passed] == sorted(step.at for step in passed)
    assert done.started_at == pytest.approx(passed[2].at, abs=0.1)
    assert done.finished_at is not None
    assert (done.status_reason, done.requested) == (None, None)
    assert [(event.seq, event.type) for event in told] == [(n, "state") for n in (1, 2, 3, 4)]


def test_cancel_before_a_worker_has_it_is_at_once_and_idempotent(database: Database) -> None:
    job = submitted(database)
    with database.begin() as s:
        first = jobs.request_cancel(s, job.id, tenant="acme")
        again = jobs.request_cancel(s, job.id, tenant="acme")
    assert first == again
    assert first.state is JobState.CANCELLED
    assert first.status_reason is not None
    assert first.status_reason["code"] == ReasonCode.CANCELLED_BY_USER
    with database.begin() as s:
        assert jobs.claim(s, worker_id="w1", capability=CPU, lease_seconds=60) is None


def test_cancel_of_a_held_job_reaches_its_worker(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        assert jobs.request_cancel(s, job.id, tenant="acme").state is JobState.CANCELLING
        assert jobs.request_cancel(s, job.id, tenant="acme").state is JobState.CANCELLING
        asked = jobs.renew(s, job.id, job.fence, lease_seconds=60, worker_id="w1")
        record.append(s, job.id, job.fence, steps(1, 2), LIVE)  # the step under way still counts
        done = jobs.finish(s, job.id, job.fence, JobState.CANCELLED, None)
    assert asked is RequestedAction.CANCEL
    assert (done.state, done.requested) == (JobState.CANCELLED, None)
    assert done.status_reason is not None


def test_a_cancelled_job_that_ended_first_keeps_its_outcome(database: Database) -> None:
    for outcome, reason in ((JobState.SUCCEEDED, None), (JobState.FAILED, BROKEN)):
        job = running(database)
        with database.begin() as s:
            jobs.request_cancel(s, job.id, tenant="acme")
            assert jobs.finish(s, job.id, job.fence, outcome, reason).status_reason == reason
        with pytest.raises(Conflict, match=rf"already {outcome}"), database.begin() as s:
            jobs.request_cancel(s, job.id, tenant="acme")


def test_a_job_cancelled_while_it_starts_does_not_run(database: Database) -> None:
    submitted(database)
    job = claimed(database)
    with database.begin() as s:
        jobs.request_cancel(s, job.id, tenant="acme")
        jobs.mark_running(s, job.id, job.fence)
    assert state_of(database, job) is JobState.CANCELLING
    with database.begin() as s:
        jobs.release(s, job.id, job.fence, charge_attempt=True, why="lost")
    assert state_of(database, job) is JobState.CANCELLED


def test_a_drain_charges_no_attempt_and_a_crash_does(database: Database) -> None:
    job = running(database, max_attempts=2)
    with database.begin() as s:
        drained = jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
        assert jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained") == drained
    assert (drained.state, drained.attempt, drained.worker) == (JobState.QUEUED, 1, "w1")
    job = claimed(database)
    assert job.fence == 2
    with database.begin() as s:
        crashed = jobs.release(s, job.id, job.fence, charge_attempt=True, why="exit code 1")
    assert (crashed.state, crashed.attempt) == (JobState.QUEUED, 2)
    job = claimed(database)
    with database.begin() as s:
        failed = jobs.release(s, job.id, job.fence, charge_attempt=True, why="exit code 1")
    assert (failed.state, failed.attempt) == (JobState.FAILED, 2)
    assert failed.status_reason is not None
    assert failed.status_reason["code"] == ReasonCode.WORKER_LOST
    assert "each of its 2 attempts" in failed.status_reason["message"]
    assert failed.status_reason["detail"] == {"last": "exit code 1"}


def test_the_last_stall_fails_as_stalled(database: Database) -> None:
    job = running(database, max_attempts=1)
    with database.begin() as s:
        failed = jobs.release(
            s, job.id, job.fence, charge_attempt=True, why="no step", exhausted=ReasonCode.STALLED
        )
    assert failed.status_reason is not None
    assert failed.status_reason["code"] == ReasonCode.STALLED
    assert "HALFSTEP_STALL_SECONDS" in failed.status_reason["message"]


def test_finish_refuses_what_is_no_end(database: Database) -> None:
    job = running(database)
    for state, reason, problem in (
        (JobState.QUEUED, None, "does not finish as queued"),
        (JobState.FAILED, None, "needs a reason"),
    ):
        with pytest.raises(ValueError, match=problem), database.begin() as s:
            jobs.finish(s, job.id, job.fence, state, reason)
    with pytest.raises(Conflict, match="running cannot become paused"), database.begin() as s:
        jobs.finish(s, job.id, job.fence, JobState.PAUSED, None)


def test_training_time_counts_over_the_attempts(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
    ats = {1: 100.0, 2: 110.0, 3: 111.0, 4: 131.0}  # queued, starting, running, queued again
    with database.begin() as s:
        for seq, at in ats.items():
            s.execute(
                update(job_transitions)
                .where(job_transitions.c.job_id == job.id, job_transitions.c.seq == seq)
                .values(at=at)
            )
        assert jobs.active_seconds(s, job.id) == 20.0
        with pytest.raises(NotFound):
            jobs.active_seconds(s, new_job_id())


def test_the_same_key_and_body_give_the_same_job(database: Database) -> None:
    with database.begin() as s:
        first, created = jobs.submit(s, tenant="acme", spec=spec(), idempotency_key="k", body_hash="a")
    with database.begin() as s:
        again, created_again = jobs.submit(s, tenant="acme", spec=spec(), idempotency_key="k", body_hash="a")
        other, created_other = jobs.submit(s, tenant="zeta", spec=spec(), idempotency_key="k", body_hash="b")
    assert (created, created_again, created_other) == (True, False, True)
    assert again == first != other
    with pytest.raises(InvalidRequest) as caught, database.begin() as s:
        jobs.submit(s, tenant="acme", spec=spec(), idempotency_key="k", body_hash="b")
    assert caught.value.code == "idempotency_key_reused"
    with database.read() as s:
        assert sum(jobs.counts(s).values()) == 2


def test_a_submission_sent_again_under_its_id_is_stored_once(database: Database) -> None:
    job_id = new_job_id()
    for _ in range(2):
        with database.begin() as s:
            job, created = jobs.submit(s, tenant="acme", spec=spec(tags={"a": "b"}), job_id=job_id)
        assert (job.id, created) == (job_id, True)
    with database.read() as s:
        assert len(jobs.transitions(s, job_id)) == 1


def test_ids_rise_and_are_version_7() -> None:
    made = [new_job_id() for _ in range(5000)]
    assert made == sorted(set(made))
    assert {(one[14], one[19] in "89ab", len(one)) for one in made} == {("7", True, 36)}


def test_listing_filters_and_pages_newest_first(database: Database) -> None:
    made = [
        submitted(database, name="even" if n % 2 == 0 else "odd", tags={"n": str(n), "all": "yes"})
        for n in range(7)
    ]
    foreign = submitted(database, tenant="zeta")
    with database.begin() as s:
        jobs.request_cancel(s, made[0].id, tenant="acme")
    newest = [job.id for job in reversed(made)]

    def ids(**wanted: Any) -> list[str]:
        with database.read() as s:
            return [job.id for job in jobs.list_jobs(s, **{"tenant": "acme", "limit": 100, **wanted})]

    assert ids() == newest
    assert ids(tenant=None) == [foreign.id, *newest]
    assert ids(name="odd") == [made[5].id, made[3].id, made[1].id]
    assert ids(states=[JobState.CANCELLED, JobState.FAILED]) == [made[0].id]
    assert ids(tags=[[("n", "4")], [("all", "yes")]]) == [made[4].id]
    assert ids(tags=[[("n", "4")], [("all", "no")]]) == []
    assert ids(tags=[[("n", "no"), ("n", "4")]]) == [made[4].id]
    pages: list[str] = []
    before = None
    while True:
        with database.read() as s:
            page = jobs.list_jobs(s, tenant="acme", limit=3, before=before)
        if not page:
            break
        pages += [job.id for job in page]
        before = (page[-1].created_at, page[-1].id)
    assert pages == newest


def test_jobs_of_the_same_instant_are_paged_without_loss(database: Database) -> None:
    made = [submitted(database) for _ in range(5)]
    with database.begin() as s:
        s.execute(update(job_rows).values(created_at=1000.5))
    with database.read() as s:
        first = jobs.list_jobs(s, tenant="acme", limit=2)
        rest = jobs.list_jobs(s, tenant="acme", limit=9, before=(first[-1].created_at, first[-1].id))
    assert [job.id for job in first + rest] == sorted((job.id for job in made), reverse=True)


def test_another_tenants_job_is_not_found(database: Database) -> None:
    job = submitted(database)
    with pytest.raises(NotFound), database.begin() as s:
        jobs.get(s, job.id, tenant="zeta")
    with pytest.raises(NotFound), database.begin() as s:
        jobs.request_cancel(s, job.id, tenant="zeta")
    with pytest.raises(NotFound), database.begin() as s:
        jobs.delete(s, job.id, tenant="zeta")
    assert state_of(database, job) is JobState.QUEUED


def test_deleting_leaves_nothing_but_other_jobs(database: Database) -> None:
    job = running(database, tags={"a": "b"})
    with database.begin() as s:
        child, _ = jobs.submit(s, tenant="acme", spec=spec(), parent_id=job.id, idempotency_key="k")
        record.append(s, job.id, job.fence, steps(1, 3), LIVE)
        for number in (1, 3):
            jobs.record_checkpoint(
                s, job.id, job.fence, step=number, path=f"/c/{number}", bytes=9, sha256="0" * 64, metrics=None
            )
    with pytest.raises(Conflict, match="cancel it"), database.begin() as s:
        jobs.delete(s, job.id, tenant="acme")
    with database.begin() as s:
        jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)
    with database.begin() as s:
        assert jobs.delete(s, job.id, tenant="acme") == jobs.Leftovers(["/c/1", "/c/3"], [])
        while not jobs.sweep(s, job.id):
            pass
    with database.read() as s:
        assert jobs.get(s, child.id, tenant="acme").parent_id is None
        for table in (
            "job_tags",
            "job_transitions",
            "job_events",
            "job_stats",
            "metric_chunks",
            "checkpoints",
        ):
            left = s.scalar(text(f"SELECT count(*) FROM {table} WHERE job_id = :id"), {"id": job.id})
            assert left == 0, table
        with pytest.raises(NotFound):
            jobs.get(s, job.id, tenant="acme")
        assert s.scalar(select(job_stats.c.job_id)) == child.id


def test_checkpoints_are_listed_newest_first_and_replaced_by_step(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        for number, path in ((10, "/a"), (20, "/b"), (20, "/c")):
            jobs.record_checkpoint(
                s, job.id, job.fence, step=number, path=path, bytes=9, sha256="0" * 64, metrics={"loss": 0.5}
            )
        kept = jobs.checkpoints(s, job.id)
        jobs.drop_checkpoint(s, job.id, job.fence, 10)
        jobs.drop_checkpoint(s, job.id, job.fence, 10)
        left = jobs.checkpoints(s, job.id)
    assert [(c.step, c.path, c.fence, c.metrics) for c in kept] == [
        (20, "/c", 1, {"loss": 0.5}),
        (10, "/a", 1, {"loss": 0.5}),
    ]
    assert [c.step for c in left] == [20]


def test_events_have_no_gaps_and_hold_any_text(database: Database) -> None:
    job = submitted(database)
    with database.begin() as s:
        seq = events.append(
            s, job.id, type="worker", level="error", message="died\x00of \ud800", data={"loss": float("inf")}
        )
        for _ in range(4):
            events.append(s, job.id, type="alert", level="info", message="x")
    with database.read() as s:
        told = events.read(s, job.id, after=1, limit=3)
    assert seq == 2
    assert [event.seq for event in told] == [2, 3, 4]
    assert (told[0].message, told[0].data) == ("died\ufffdof \ufffd", {"loss": float("inf")})
    with pytest.raises(NotFound), database.begin() as s:
        events.append(s, new_job_id(), type="alert", level="info", message="x")
