"""Series: points in order however they came, cut, copied and swept with the record they belong to."""

import math
import random
from itertools import pairwise

import pytest
from sqlalchemy import delete, func, select

from halfstep.service.contract.metrics import Evaluation
from halfstep.service.contract.states import JobState
from halfstep.service.errors import NotFound, StaleFence
from halfstep.service.store import jobs, record, series
from halfstep.service.store.jobs import deletions
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import series_chunks
from tests.store.making import LIVE, running, steps


def evaluation(step: int, loss: float = 0.5, **metrics: float) -> Evaluation:
    return Evaluation(step=step, split="test", loss=loss, metrics=metrics, seconds=0.1)


def with_steps(database: Database, last: int) -> jobs.Job:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, last), LIVE)
    return job


def values(database: Database, job_id: str, name: str) -> dict[int, float]:
    with database.read() as s:
        columns = series.read(s, job_id, name, limit=10_000).columns
    return dict(zip(columns["step"], columns["value"], strict=True))


def test_points_are_read_in_order_however_they_were_added(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(series, "CHUNK_POINTS", 4)
    job = with_steps(database, 100)
    chance, model = random.Random(3), dict[int, float]()
    for _ in range(25):
        at = chance.sample(range(1, 101), chance.randint(1, 7))
        points = {step: chance.random() for step in at}
        model |= points
        with database.begin() as s:
            series.add(s, job.id, {"a/b": points, "other": {1: 1.0}})
    assert values(database, job.id, "a/b") == dict(sorted(model.items()))
    with database.read() as s:
        chunks = s.execute(
            select(series_chunks.c.first_step, series_chunks.c.last_step)
            .where(series_chunks.c.name == "a/b")
            .order_by(series_chunks.c.first_step)
        ).all()
        page = series.read(s, job.id, "a/b", from_step=10, to_step=60, limit=5)
        listed = series.listing(s, job.id)
    assert all(one.last_step < two.first_step for one, two in pairwise(chunks))
    inside = [step for step in sorted(model) if 10 <= step <= 60]
    assert page.columns["step"] == inside[:5]
    assert page.next_from_step == inside[5]
    last = max(model)
    assert listed == [
        series.Series("a/b", len(model), min(model), last, model[last]),
        series.Series("other", 1, 1, 1, 1.0),
    ]


def test_an_evaluation_gives_points_that_are_cut_with_the_record(database: Database) -> None:
    job = with_steps(database, 30)
    with database.begin() as s:
        for step, loss in ((10, 0.5), (20, math.nan), (30, math.inf)):
            record.evaluated(s, job.id, job.fence, evaluation(step, loss, accuracy=step / 100))
    assert str(values(database, job.id, "held_out/loss")) == "{10: 0.5, 20: nan, 30: inf}"
    with database.begin() as s:
        record.truncate_after(s, job.id, job.fence, 20)
    assert values(database, job.id, "held_out/accuracy") == {10: 0.1, 20: 0.2}
    with database.read() as s:
        assert s.scalar(select(func.max(series_chunks.c.last_step))) == 20
    with database.begin() as s, pytest.raises(StaleFence):
        record.evaluated(s, job.id, job.fence + 1, evaluation(20, 9.0))
    assert values(database, job.id, "held_out/accuracy") == {10: 0.1, 20: 0.2}


def test_evaluations_from_before_there_were_series_are_read_from_the_events(database: Database) -> None:
    job = with_steps(database, 30)
    with database.begin() as s:
        record.evaluated(s, job.id, job.fence, evaluation(10, 0.5, accuracy=0.1))
        record.evaluated(s, job.id, job.fence, evaluation(20, 0.4, accuracy=0.2))
        s.execute(delete(series_chunks))  # as an older worker leaves it
        record.evaluated(s, job.id, job.fence, evaluation(30, 0.3, accuracy=0.3))
    assert values(database, job.id, "held_out/loss") == {10: 0.5, 20: 0.4, 30: 0.3}
    with database.read() as s:
        assert [each.name for each in series.listing(s, job.id)] == ["held_out/accuracy", "held_out/loss"]


def test_a_copy_ends_where_the_retry_goes_on_from_and_a_deleted_job_leaves_none(database: Database) -> None:
    job, child = with_steps(database, 30), running(database)
    with database.begin() as s:
        for step in (10, 20, 30):
            record.evaluated(s, job.id, job.fence, evaluation(step, float(step)))
        record.inherit(s, child.id, source_id=job.id, step=20)
        s.execute(delete(series_chunks).where(series_chunks.c.job_id == job.id))
    assert values(database, child.id, "held_out/loss") == {10: 10.0, 20: 20.0}
    with database.begin() as s:
        jobs.finish(s, child.id, child.fence, JobState.SUCCEEDED, None)
        deletions.delete(s, child.id, tenant=None)
    with database.begin() as s:
        while not deletions.sweep(s, child.id):
            pass
        assert s.scalar(select(func.count()).select_from(series_chunks)) == 0


def test_buckets_have_the_ends_and_extremes_of_their_points(database: Database) -> None:
    job = with_steps(database, 10)
    numbers = [3.0, math.nan, 1.0, 5.0, 2.0, math.nan, math.nan]
    with database.begin() as s:
        series.add(s, job.id, {"x": dict(enumerate(numbers, start=1))})
    with database.read() as s:
        page = series.read(s, job.id, "x", limit=1, max_points=3)
    assert page.bucket_points == 3
    assert str(page.columns) == str(
        {
            "step": [3, 6, 7],
            "value": [1.0, math.nan, math.nan],
            "value_first": [3.0, 5.0, math.nan],
            "value_min": [1.0, 2.0, math.nan],
            "value_max": [3.0, 5.0, math.nan],
        }
    )


@pytest.mark.parametrize("name", ["", "a//b", "../b", "a/", "a b", "é", "x" * 201, "x" * 10_000])
def test_a_name_that_no_series_can_have_is_refused(database: Database, name: str) -> None:
    job = with_steps(database, 1)
    with database.begin() as s, pytest.raises(ValueError, match="no series can be named"):
        series.add(s, job.id, {name: {1: 1.0}})
    with database.read() as s, pytest.raises(NotFound):
        series.read(s, job.id, name, limit=10)
