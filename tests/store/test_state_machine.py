"""The store against a small model: any order of submissions, claims, deaths, stale writes and requests.

HALFSTEP_TEST_SEED repeats a run, HALFSTEP_TEST_EXAMPLES makes it longer; both are printed. No time passes: a
lease runs out when a rule says so.
"""

import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, func, select, update

from halfstep.service.contract.states import TRANSITIONS, JobState
from halfstep.service.errors import HalfstepError
from halfstep.service.store import events, jobs, record
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import checkpoints as checkpoint_rows
from halfstep.service.store.tables import job_events, job_stats, job_transitions
from halfstep.service.store.tables import jobs as job_rows
from tests.store.making import BROKEN, CPU, LIVE, spec, steps
from tests.store.model import EDGES, LEASED, TERMINAL, Hold, Model, violations

T = TypeVar("T")
WORKERS = ("w1", "w2", "w3")
LEASE = 3600.0  # never by the clock
NUMBERS = st.integers(0, 2**32 - 1)
WRITES = (
    "renew",
    *2 * ("run",),
    *5 * ("append",),
    "append_again",
    *2 * ("truncate",),
    "checkpoint",
    "drop_checkpoint",
    "note",
    "finish",
    "release",
)
REQUESTS = ("cancel", "delete", *2 * ("pause",), *2 * ("resume",))


class StoreMachine(RuleBasedStateMachine):
    """Each rule asks the model first, then the store; both must answer, or refuse, alike."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.seen: dict[str, tuple[int, list[str]]] = {}  # fence and states at the last look
        self.given: list[Hold] = []  # every claim ever made, the last one of a job newest
        with self.database.begin() as s:
            s.execute(delete(job_rows))

    def a_hold(self, draw: random.Random) -> Hold:
        """Of a worker that may write, of one whose job another holds now, or of any that ever could."""
        live = [hold for hold in self.given if self.model.is_live(hold)]
        held = {hold.job for hold in live}
        superseded = [hold for hold in self.given if hold.job in held and hold not in live]
        return draw.choice(draw.choice((live, live, superseded, self.given)) or live or self.given)

    def steps_of(self, hold: Hold) -> int:
        there = self.model.jobs.get(hold.job)
        return 0 if there is None else len(there.rows)

    def both(self, expected: Callable[[], T], actual: Callable[[Any], Any]) -> T | None:
        """What the model says, if the store did the same; None where both refused for the same reason."""
        try:
            wanted = expected()
        except HalfstepError as refusal:
            with pytest.raises(type(refusal)), self.database.begin() as s:
                actual(s)
            return None
        with self.database.begin() as s:
            got = actual(s)
        assert wanted is None or got == wanted
        return wanted

    @rule(number=NUMBERS)
    def something_happens(self, number: int) -> None:
        """One rule: of many, hypothesis switches most off in a run, and few jobs would get far."""
        draw = random.Random(number)
        match draw.choices(("submit", "claim", "write", "lose", "ask"), (2, 5, 16, 2, 4))[0]:
            case "submit" if len(self.model.jobs) < 3:
                self.submit(draw.randrange(2), draw.randint(1, 3), draw.choice((None, None, "a", "b")))
            case "write" if self.given:
                getattr(self, draw.choice(WRITES))(self.a_hold(draw), draw.randrange(2**16))
            case "lose" if self.given:
                self.lose_a_worker(self.a_hold(draw).job, reaped=draw.random() < 0.7)
            case "ask" if self.seen:
                self.reap()  # mostly where nothing is lost: then it must do nothing
                getattr(self, draw.choice(REQUESTS))(draw.choice(list(self.seen)))
            case _:
                self.claim(draw.choice(WORKERS))

    def submit(self, priority: int, max_attempts: int, key: str | None) -> None:
        wanted = spec(priority=priority, max_attempts=max_attempts)
        body = f"{priority} {max_attempts}"

        def store(s: Any) -> tuple[str, bool]:
            job, created = jobs.submit(s, tenant="acme", spec=wanted, idempotency_key=key, body_hash=body)
            return job.id, created

        try:
            known = self.model.repeats(key, body)
        except HalfstepError as refusal:
            with pytest.raises(type(refusal)), self.database.begin() as s:
                store(s)
            return
        with self.database.begin() as s:
            job_id, created = store(s)
        if known is not None:
            assert (job_id, created) == (known, False)
            return
        assert created
        self.model.submit(job_id, priority=priority, max_attempts=max_attempts, key=key, body=body)
        self.seen[job_id] = 0, []

    def claim(self, worker: str) -> None:
        def store(s: Any) -> Hold | None:
            job = jobs.claim(s, worker_id=worker, capability=CPU, lease_seconds=LEASE)
            return None if job is None else Hold(job.id, job.fence, worker)

        wanted = self.model.claim(worker)
        with self.database.begin() as s:
            assert store(s) == wanted
        if wanted is not None:
            self.given.append(wanted)

    def renew(self, hold: Hold, number: int) -> None:
        by = (hold.worker, *WORKERS)[number % 4]
        self.both(
            lambda: self.model.renew(hold, by),
            lambda s: jobs.renew(s, hold.job, hold.fence, lease_seconds=LEASE, worker_id=by),
        )

    def run(self, hold: Hold, _: int) -> None:
        self.both(lambda: self.model.mark_running(hold), lambda s: jobs.mark_running(s, hold.job, hold.fence))

    def append(self, hold: Hold, number: int) -> None:
        """The next steps; sometimes a batch that overlaps the record or leaves a gap."""
        count, beside = (1, 2, 3, 130)[number % 4], (0, 0, 0, -1, 1)[number // 4 % 5]
        self._append(hold, max(1, self.steps_of(hold) + 1 + beside), count)

    def append_again(self, hold: Hold, _: int) -> None:
        """The newest batch once more, as after a commit whose answer was lost."""
        there = self.model.jobs.get(hold.job)
        if there is not None and there.newest_batch is not None:
            first = there.newest_batch[1]
            self._append(hold, first, len(there.rows) - first + 1)

    def _append(self, hold: Hold, first: int, count: int) -> None:
        rows = steps(first, first + count - 1, loss=float(hold.fence))
        self.both(
            lambda: self.model.append(hold, first, count),
            lambda s: record.append(s, hold.job, hold.fence, rows, LIVE),
        )

    def truncate(self, hold: Hold, number: int) -> None:
        step = max(0, self.steps_of(hold) - (0, 1, 130, 10_000)[number % 4])
        self.both(
            lambda: self.model.truncate(hold, step),
            lambda s: record.truncate_after(s, hold.job, hold.fence, step),
        )

    def checkpoint(self, hold: Hold, number: int) -> None:
        step, path = number % 4 + 1, f"fence-{hold.fence}"
        self.both(
            lambda: self.model.checkpoint(hold, step),
            lambda s: jobs.record_checkpoint(
                s, hold.job, hold.fence, step=step, path=path, bytes=1, sha256="0" * 64, metrics=None
            ),
        )

    def drop_checkpoint(self, hold: Hold, number: int) -> None:
        step = number % 4 + 1
        self.both(
            lambda: self.model.drop(hold, step),
            lambda s: jobs.drop_checkpoint(s, hold.job, hold.fence, step),
        )

    def note(self, hold: Hold, _: int) -> None:
        def store(s: Any) -> None:
            data = {"fence": hold.fence}
            events.append(s, hold.job, type="worker", level="info", message="", data=data, fence=hold.fence)

        self.both(lambda: self.model.note(hold), store)

    def finish(self, hold: Hold, number: int) -> None:
        state = ("succeeded", "failed", "cancelled", "paused")[number % 4]
        self.both(
            lambda: self.model.finish(hold, state),
            lambda s: jobs.finish(s, hold.job, hold.fence, JobState(state), BROKEN),
        )

    def release(self, hold: Hold, number: int) -> None:
        charge = number % 2 == 1
        self.both(
            lambda: self.model.release(hold, charge=charge),
            lambda s: jobs.release(s, hold.job, hold.fence, charge_attempt=charge, why="it died"),
        )

    def lose_a_worker(self, job_id: str, *, reaped: bool) -> None:
        """Its lease runs out; the reaper comes now, or the worker may be back before it."""
        self.model.expire(job_id)
        with self.database.begin() as s:
            s.execute(
                update(job_rows)
                .where(job_rows.c.id == job_id, job_rows.c.lease_until.is_not(None))
                .values(lease_until=db_now() - 1.0)
            )
        if reaped:
            self.reap()

    def reap(self) -> None:
        self.both(self.model.reap, lambda s: {job.id: job.state for job in jobs.reap(s)})

    def cancel(self, job_id: str) -> None:
        self.both(lambda: self.model.cancel(job_id), lambda s: jobs.request_cancel(s, job_id, tenant="acme"))

    def pause(self, job_id: str) -> None:
        self.both(lambda: self.model.pause(job_id), lambda s: jobs.request_pause(s, job_id, tenant="acme"))

    def resume(self, job_id: str) -> None:
        self.both(lambda: self.model.resume(job_id), lambda s: jobs.request_resume(s, job_id, tenant="acme"))

    def delete(self, job_id: str) -> None:
        self.both(lambda: self.model.delete(job_id), lambda s: jobs.delete(s, job_id, tenant="acme"))

    @invariant()
    def the_database_is_as_the_model_says(self) -> None:
        with self.database.read() as s:
            rows = {row.id: row for row in s.execute(select(job_rows))}
            histories = jobs.transitions_of(s, list(rows))
            written = {
                job_id: record.read(s, job_id, limit=10_000, fields=["step", "loss"]).columns
                for job_id in rows
            }
            current = {row.job_id: row.current_step for row in s.execute(select(job_stats))}
            saved = s.execute(
                select(checkpoint_rows.c.job_id, checkpoint_rows.c.step, checkpoint_rows.c.fence)
            ).all()
            notes = s.execute(
                select(job_events.c.job_id, job_events.c.data)
                .where(job_events.c.type == "worker")
                .order_by(job_events.c.seq)
            ).all()
            numbered = s.execute(
                select(job_transitions.c.job_id, func.count(), func.max(job_transitions.c.seq)).group_by(
                    job_transitions.c.job_id
                )
            ).all()
        assert rows.keys() == self.model.jobs.keys()
        assert all(count == highest for _, count, highest in numbered)
        for job_id, job in self.model.jobs.items():
            row = rows[job_id]
            states = [str(step.state) for step in histories[job_id]]
            assert (row.state, row.fence, row.attempt) == (job.state, job.fence, job.attempt)
            assert (row.worker_id, row.requested) == (job.worker, job.requested)
            assert states == job.history
            assert written[job_id]["step"] == list(range(1, len(job.rows) + 1))
            assert written[job_id]["loss"] == job.rows
            assert current[job_id] == len(job.rows)
            assert {step: fence for i, step, fence in saved if i == job_id} == job.checkpoints
            assert [data["fence"] for i, data in notes if i == job_id and "fence" in data] == job.notes
            # What holds whatever the model believes.
            fence, before = self.seen[job_id]
            assert not violations(before, states)
            assert row.fence >= fence
            assert row.fence == states.count("starting")
            assert 1 <= row.attempt <= row.max_attempts
            assert (row.lease_until is not None) == (row.state in LEASED)
            assert (row.finished_at is not None) == (row.state in TERMINAL)
            assert not before or before[-1] not in TERMINAL or states == before
            self.seen[job_id] = row.fence, states


def test_the_store_does_what_the_model_does(database: Database) -> None:
    """Sixty short histories on each database; the same ones each time in CI."""
    drawn = 0 if os.environ.get("CI") == "true" else random.SystemRandom().randrange(2**32)
    number = int(os.environ.get("HALFSTEP_TEST_SEED") or drawn)
    examples = int(os.environ.get("HALFSTEP_TEST_EXAMPLES") or 60)
    print(f"HALFSTEP_TEST_SEED={number} HALFSTEP_TEST_EXAMPLES={examples}")

    @seed(number)
    class Machine(StoreMachine):
        pass

    Machine.database = database
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_edges_are_those_of_the_contract() -> None:
    assert {str(state): set(map(str, after)) for state, after in TRANSITIONS.items()} == EDGES
