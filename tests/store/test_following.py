"""A follower of a job ends up with its record and its events, whatever was cut and retaken meanwhile."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from halfstep.service.contract.states import JobState
from halfstep.service.errors import NotFound
from halfstep.service.store import events, jobs, record
from halfstep.service.store.record.following import News, Position, news, standing
from halfstep.service.store.sql.database import Database

from .making import BROKEN, LIVE, claimed, running, step, submitted


class Follower:
    """What somebody holds who takes new steps in the place of all from the first of them on."""

    def __init__(self, database: Database, job_id: str, *, after_step: int = 0) -> None:
        self.database, self.job_id = database, job_id
        with database.read() as s:
            now = standing(s, job_id)
            whole = record.read(s, job_id, limit=10_000, fields=["loss"]).columns
        after = min(after_step, now.current_step)
        # What it has from elsewhere.
        self.losses = dict(zip(whole["step"][:after], whole["loss"][:after], strict=True))
        self.events: list[int] = []
        self.position = Position(after, 0, settled=now.last_event)

    def poll(self) -> News:
        with self.database.read() as s:
            found = news(s, self.job_id, self.position, fields=["loss"], most_steps=5, most_events=3)
        self.events += [event.seq for event, _ in found.events]
        if found.steps is not None:
            columns = found.steps.columns
            self._keep_up_to(columns["step"][0] - 1)
            self.losses.update(zip(columns["step"], columns["loss"], strict=True))
        if found.complete and found.standing.state.is_terminal:
            self._keep_up_to(found.standing.current_step)
        self.position = found.position
        return found

    def _keep_up_to(self, last: int) -> None:
        self.losses = {number: loss for number, loss in self.losses.items() if number <= last}

    def come_back(self) -> None:
        """As by the id of the last message: what was settled before is not in it."""
        self.position = Position(self.position.step, self.position.event, settled=self.position.event)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 12)),
        st.tuples(st.just("cut"), st.floats(0, 1)),
        st.tuples(st.just("note"), st.integers(1, 4)),
        st.tuples(st.just("poll"), st.integers(1, 4)),
        st.tuples(st.just("come back"), st.none()),
        st.tuples(st.just("follow"), st.integers(0, 20)),
    ),
    max_size=14,
)


@settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=ACTIONS)
# Cut and grown again beyond where the follower was, between two polls.
@example([("append", 5), ("poll", 4), ("cut", 0.4), ("append", 12), ("poll", 1), ("come back", None)])
# A follower that begins beyond an old cut has no use for it.
@example([("append", 12), ("cut", 0.1), ("append", 12), ("follow", 10), ("poll", 3), ("note", 1)])
# More events than a page holds, the cut among the later ones.
@example([("append", 5), ("poll", 9), ("note", 4), ("cut", 0.5), ("append", 12), ("poll", 1)])
def test_a_follower_ends_up_with_the_record(database: Database, history: list[tuple[str, Any]]) -> None:
    job = running(database)
    losses: list[float] = []
    written = 0
    followers = [Follower(database, job.id)]
    for action, argument in history:
        if action == "append":
            first = len(losses) + 1
            rows = [step(first + offset, loss=float(written + offset)) for offset in range(argument)]
            written += argument
            losses += [row.loss for row in rows]
            with database.begin() as s:
                record.append(s, job.id, job.fence, rows, LIVE)
        elif action == "cut":
            with database.begin() as s:
                jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
            job = claimed(database)
            kept = int(argument * len(losses))
            with database.begin() as s:
                jobs.mark_running(s, job.id, job.fence)
                removed = record.truncate_after(s, job.id, job.fence, kept)
                data = {"step": kept, "steps_repeated": removed}
                events.append(s, job.id, type="worker", level="info", message="resumed", data=data)
            del losses[kept:]
        elif action == "note":
            with database.begin() as s:
                for _ in range(argument):
                    events.append(s, job.id, type="alert", level="info", message="note", data={"step": 1})
        elif action == "poll":
            for follower in followers:
                for _ in range(argument):
                    follower.poll()
        elif action == "come back":
            for follower in followers:
                follower.come_back()
        else:
            followers.append(Follower(database, job.id, after_step=argument))
    with database.begin() as s:
        jobs.finish(s, job.id, job.fence, JobState.FAILED, BROKEN)
        last = standing(s, job.id).last_event
    for follower in followers:
        for _ in range(200):
            if (found := follower.poll()).complete:
                break
        assert found.complete
        assert found.standing.state is JobState.FAILED
        assert follower.losses == dict(enumerate(losses, 1))
        assert follower.events == list(range(1, last + 1))
    with database.begin() as s:
        jobs.delete(s, job.id, tenant=None)


def test_an_old_cut_sends_nobody_back_who_begins_after_it(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, [step(number) for number in range(1, 8)], LIVE)
        record.truncate_after(s, job.id, job.fence, 2)
        data = {"step": 2, "steps_repeated": 5}
        events.append(s, job.id, type="worker", level="info", message="resumed", data=data)
        record.append(s, job.id, job.fence, [step(number) for number in range(3, 8)], LIVE)
    follower = Follower(database, job.id, after_step=6)
    found = [follower.poll(), follower.poll()]
    assert [page.steps.columns["step"] for page in found if page.steps is not None] == [[7]]


def test_pages_are_bounded_and_events_come_first(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, [step(number) for number in range(1, 8)], LIVE)
    follower = Follower(database, job.id)
    first, second, third = (follower.poll() for _ in range(3))
    assert [event.type for event, _ in first.events] == ["state"] * 3
    assert first.steps is not None
    assert first.steps.columns["step"] == [1, 2, 3, 4, 5]
    assert not first.complete
    assert second.steps is not None
    assert second.steps.columns["step"] == [6, 7]
    assert second.complete
    assert (third.events, third.steps, third.complete) == ([], None, True)
    with database.begin() as s:
        for _ in range(4):
            events.append(s, job.id, type="alert", level="info", message="note")
        record.append(s, job.id, job.fence, [step(8)], LIVE)
    fourth = follower.poll()
    assert (len(fourth.events), fourth.steps, fourth.complete) == (3, None, False)
    assert follower.poll().steps is not None


def test_a_position_beyond_the_record_goes_on_at_its_end(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, [step(1), step(2)], LIVE)
        last = standing(s, job.id).last_event
    with database.read() as s:
        found = news(s, job.id, Position(9, last, settled=last), fields=None, most_steps=5, most_events=5)
    assert found.position.step == 2


def test_a_job_that_is_gone_or_anothers_has_no_standing(database: Database) -> None:
    job = submitted(database, tenant="acme")
    with database.read() as s:
        assert standing(s, job.id, tenant="acme").state is JobState.QUEUED
        with pytest.raises(NotFound):
            standing(s, job.id, tenant="rival")
        with pytest.raises(NotFound):
            standing(s, "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50")
