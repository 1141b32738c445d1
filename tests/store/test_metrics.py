"""The step record against a plain list: what is appended, cut and read back, bit for bit."""

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from halfstep.service.contract.metrics import (
    COMPUTE_DTYPES,
    FLAG_COLUMNS,
    METRIC_COLUMNS,
    Evaluation,
    StepMetrics,
)
from halfstep.service.contract.states import JobState
from halfstep.service.errors import Conflict, InvalidRequest, NotFound, StaleFence
from halfstep.service.store import events, jobs, record
from halfstep.service.store.record import rows as record_rows
from halfstep.service.store.record.chunks import CHUNK_STEPS
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import metric_chunks
from tests.store.making import LIVE, claimed, running, step, steps, submitted

FLOATS = ("loss", "scale", "underflow_estimate", "grad_norm", "learning_rate", "memory_usage", "step_time_ms")
BYTES = ("memory_allocated_bytes", "memory_reserved_bytes")

any_float = st.one_of(
    st.floats(),  # NaN, infinities, subnormals, -0.0
    st.floats(width=32),
    st.sampled_from([65536.0, 1.0, math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1]),
)
any_row = st.builds(
    StepMetrics,
    step=st.just(0),
    epoch=st.integers(1, 3),
    compute_dtype=st.sampled_from(COMPUTE_DTYPES),
    **dict.fromkeys(FLAG_COLUMNS, st.booleans()),
    **dict.fromkeys(FLOATS, any_float),
    **dict.fromkeys(BYTES, st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))),
)
append = st.tuples(st.just("append"), st.lists(any_row, min_size=1, max_size=12))
repeat = st.tuples(st.just("repeat"), st.none())
attempt = st.tuples(st.just("attempt"), st.floats(0, 1))
histories = st.lists(st.one_of(append, append, append, repeat, attempt), min_size=1, max_size=10)


def exact(value: Any) -> Any:
    """Floats by their bits, so that NaN equals itself and -0.0 is not 0.0."""
    return struct.pack("<d", value) if isinstance(value, float) else value


def rows_of(page: record.MetricPage) -> list[tuple[Any, ...]]:
    return [tuple(map(exact, row)) for row in zip(*page.columns.values(), strict=True)]


def numbered(rows: Sequence[StepMetrics], after: int) -> list[StepMetrics]:
    return [row._replace(step=after + 1 + offset) for offset, row in enumerate(rows)]


def newest_epoch(model: Sequence[StepMetrics]) -> list[StepMetrics]:
    tail: list[StepMetrics] = []
    for row in reversed(model):
        if row.epoch != model[-1].epoch:
            break
        tail.insert(0, row)
    return tail


@settings(
    max_examples=25,
    # Shrinking through a database takes longer than a test may: the history found is short as it is.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=histories, page=st.integers(1, 9))
@example(history=[("append", [step(1)] * 12), ("attempt", 0.5), ("append", [step(1)] * 3)], page=4)
def test_the_record_equals_a_list(database: Database, history: list[tuple[str, Any]], page: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(record_rows, "CHUNK_STEPS", 8)
        _play(database, history, page)


def _play(database: Database, history: list[tuple[str, Any]], page: int) -> None:
    job = running(database)
    model: list[StepMetrics] = []
    newest_batch: list[StepMetrics] = []
    for action, argument in history:
        if action == "append":
            newest_batch = numbered(argument, len(model))
            with database.begin() as s:
                record.append(s, job.id, job.fence, newest_batch, LIVE)
            model += newest_batch
        elif action == "repeat" and newest_batch:
            with database.begin() as s:
                record.append(s, job.id, job.fence, newest_batch, LIVE)
        elif action == "attempt":
            with database.begin() as s:
                jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
            job = claimed(database)
            kept = int(argument * len(model))
            with database.begin() as s:
                jobs.mark_running(s, job.id, job.fence)
                assert record.truncate_after(s, job.id, job.fence, kept) == len(model) - kept
            del model[kept:]
            newest_batch = []
    assert_equal(database, job.id, model, page)
    with database.begin() as s:
        jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)
        jobs.delete(s, job.id, tenant=None)
        while not jobs.sweep(s, job.id):
            pass
        left = select(func.count()).select_from(metric_chunks).where(metric_chunks.c.job_id == job.id)
        assert s.scalar(left) == 0


def assert_equal(database: Database, job_id: str, model: list[StepMetrics], page: int) -> None:
    with database.read() as s:
        whole = record.read(s, job_id, limit=10_000, fields=None)
        assert list(whole.columns) == list(METRIC_COLUMNS)
        assert rows_of(whole) == [tuple(map(exact, row)) for row in model]
        assert (whole.count, whole.last_step) == (len(model), len(model))

        polled: list[tuple[Any, ...]] = []
        after = 0
        while (part := record.read(s, job_id, after_step=after, limit=page, fields=None)).count:
            assert part.count <= page
            assert part.next_after_step > after
            polled += rows_of(part)
            after = part.next_after_step
        assert polled == rows_of(whole)

        low, high = page, page + 5
        some = record.read(s, job_id, from_step=low, to_step=high, limit=100, fields=["loss", "nan"])
        assert list(some.columns) == ["step", "loss", "nan"]
        assert rows_of(some) == [(r.step, exact(r.loss), r.nan) for r in model if low <= r.step <= high]

        bounds = s.execute(
            select(metric_chunks.c.first_step, metric_chunks.c.last_step)
            .where(metric_chunks.c.job_id == job_id)
            .order_by(metric_chunks.c.first_step)
        ).all()
        covered = [number for first, last in bounds for number in range(first, last + 1)]
        assert covered == list(range(1, len(model) + 1))
        assert_summary(record.summarise(s, job_id), model)


def assert_summary(stats: record.Stats, model: list[StepMetrics]) -> None:
    assert stats.current_step == len(model)
    assert stats.overflow_count == sum(row.overflow for row in model)
    assert stats.underflow_count == sum(row.underflow for row in model)
    assert stats.nan_count == sum(row.nan for row in model)
    assert stats.skipped_steps == sum(row.skipped for row in model)
    if not model:
        assert (stats.epoch, stats.loss, stats.average_loss, stats.average_scale) == (None,) * 4
        assert (stats.grad_norm, stats.current_scale, stats.last_step_at) == (None,) * 3
        return
    last = model[-1]
    for name in ("epoch", "loss", "grad_norm", "learning_rate", "memory_usage", "underflow_estimate", *BYTES):
        shown, stored = getattr(stats, name), getattr(last, name)
        assert shown == stored or (math.isnan(shown) and math.isnan(stored)), name
    assert stats.precision["compute_dtype"] == last.compute_dtype
    scales, losses = 0.0, 0.0
    for row in model:
        scales += row.scale
    finite = [row.loss for row in newest_epoch(model) if math.isfinite(row.loss)]
    for loss in finite:
        losses += loss
    assert stats.average_scale is not None
    assert exact(stats.average_scale) == exact(scales / len(model)) or math.isnan(scales)
    assert exact(stats.average_loss) == (exact(losses / len(finite)) if finite else None)
    overflows = [row.step for row in model if row.overflow]
    assert (stats.last_overflow or {}).get("step") == (overflows[-1] if overflows else None)


def test_a_batch_must_follow_on_without_gap_or_overlap(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 10), LIVE)
    refused = [
        steps(12, 13),
        steps(10, 12),
        steps(5, 10),
        steps(1, 9),
        [step(11), step(13)],
        [step(12), step(11)],
    ]
    for rows in refused:
        with pytest.raises(Conflict) as caught, database.begin() as s:
            record.append(s, job.id, job.fence, rows, LIVE)
        assert caught.value.code == "steps_not_contiguous"
    with pytest.raises(ValueError, match="at least one step"), database.begin() as s:
        record.append(s, job.id, job.fence, [], LIVE)
    with database.read() as s:
        assert record.read(s, job.id, limit=100, fields=["loss"]).columns["step"] == list(range(1, 11))


def test_a_batch_sent_again_is_stored_once(database: Database) -> None:
    job = running(database)
    for _ in range(2):
        with database.begin() as s:
            record.append(s, job.id, job.fence, steps(1, 3), LIVE)
    with database.read() as s:
        before = record.summarise(s, job.id)
    for _ in range(2):
        with database.begin() as s:
            record.append(s, job.id, job.fence, steps(4, 5), LIVE)
    with database.read() as s:
        assert record.read(s, job.id, limit=100, fields=[]).columns == {"step": [1, 2, 3, 4, 5]}
        after = record.summarise(s, job.id)
    assert (before.current_step, after.current_step) == (3, 5)
    assert after.version == before.version + 1


def test_a_new_attempt_does_not_inherit_the_repeat(database: Database) -> None:
    """Only the attempt that stored a batch may send it again."""
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 3), LIVE)
        jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained")
    again = claimed(database)
    with pytest.raises(Conflict), database.begin() as s:
        record.append(s, job.id, again.fence, steps(1, 3), LIVE)


def test_after_a_cut_no_batch_counts_as_sent_again(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 1), LIVE)
        record.append(s, job.id, job.fence, steps(2, 5), LIVE)
        record.truncate_after(s, job.id, job.fence, 3)
    with pytest.raises(Conflict), database.begin() as s:
        record.append(s, job.id, job.fence, steps(2, 3), LIVE)
    with database.begin() as s:
        assert record.append(s, job.id, job.fence, steps(4, 5), LIVE)


def test_after_a_cut_the_summary_is_that_of_the_steps_left(database: Database) -> None:
    job = running(database)
    kept = [*steps(1, 3), step(4, scale=8.0, overflow=True)]
    attributed = {"step": 6, "layer": "head", "kind": "inf"}
    with database.begin() as s:
        record.append(s, job.id, job.fence, kept, LIVE)
        record.append(
            s, job.id, job.fence, [step(5), step(6, overflow=True)], replace(LIVE, last_overflow=attributed)
        )
        assert record.summarise(s, job.id).last_overflow == attributed
        record.truncate_after(s, job.id, job.fence, 6)  # cuts nothing off
        assert record.summarise(s, job.id).last_overflow == attributed
        record.truncate_after(s, job.id, job.fence, 4)
        stats = record.summarise(s, job.id)
        record.truncate_after(s, job.id, job.fence, 3)
        before_any = record.summarise(s, job.id)
    assert (stats.current_step, stats.current_scale, stats.overflow_count) == (4, 8.0, 1)
    assert stats.last_overflow == {"step": 4, "layer": None, "kind": "unknown"}
    assert stats.performance_metrics["steps_per_second"] is None  # of an attempt that is over
    assert stats.performance_metrics["samples_per_second"] is None
    assert stats.last_step_at is not None
    assert before_any.last_overflow is None


def test_an_overflow_on_a_batchs_first_step_is_told(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 2), LIVE)
        record.append(s, job.id, job.fence, [step(3, overflow=True), step(4)], LIVE)
        told = record.summarise(s, job.id).last_overflow
    assert told == {"step": 3, "layer": None, "kind": "unknown"}


def test_an_evaluation_at_the_cut_stays(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 4), LIVE)
        record.evaluated(s, job.id, job.fence, Evaluation(step=3, split="test", loss=0.5, seconds=1.0))
        record.truncate_after(s, job.id, job.fence, 3)
        stats = record.summarise(s, job.id)
    assert stats.evaluation is not None
    assert stats.evaluation["step"] == 3


def test_nothing_is_written_under_an_old_fence(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 3), LIVE)
        jobs.release(s, job.id, job.fence, charge_attempt=True, why="lost")
    successor = claimed(database)
    evaluation = Evaluation(step=3, split="test", loss=0.5, seconds=1.0)
    writes = [
        lambda s: record.append(s, job.id, job.fence, steps(4, 5), LIVE),
        lambda s: record.append(s, job.id, job.fence, steps(1, 3), LIVE),
        lambda s: record.truncate_after(s, job.id, job.fence, 0),
        lambda s: record.opened(s, job.id, job.fence, total_steps=9),
        lambda s: record.evaluated(s, job.id, job.fence, evaluation),
        lambda s: events.append(s, job.id, type="warning", level="info", message="x", fence=job.fence),
        lambda s: jobs.record_checkpoint(
            s, job.id, job.fence, step=3, path="/x", bytes=1, sha256="0" * 64, metrics=None
        ),
        lambda s: jobs.drop_checkpoint(s, job.id, job.fence, 3),
        lambda s: jobs.mark_running(s, job.id, job.fence),
        lambda s: jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None),
        lambda s: jobs.release(s, job.id, job.fence, charge_attempt=True, why="x"),
        lambda s: jobs.renew(s, job.id, job.fence, lease_seconds=60, worker_id="w1"),
    ]
    with database.read() as s:
        before = record.summarise(s, job.id)
    for write in writes:
        with pytest.raises(StaleFence), database.begin() as s:
            write(s)
    with database.read() as s:
        assert record.summarise(s, job.id) == before
        assert jobs.get(s, job.id, tenant=None) == successor
        assert jobs.checkpoints(s, job.id) == []


def test_nothing_is_written_once_a_job_has_ended(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)
    with pytest.raises(StaleFence), database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 1), LIVE)


def test_chunks_end_on_the_grid_however_long_the_batches(database: Database) -> None:
    job = running(database)
    with database.begin() as s:
        for number in range(1, CHUNK_STEPS + 11):
            record.append(s, job.id, job.fence, steps(number, number), LIVE)
        record.append(s, job.id, job.fence, steps(523, 1600), LIVE)
    with database.read() as s:
        sizes = s.scalars(
            select(metric_chunks.c.last_step - metric_chunks.c.first_step + 1).order_by(
                metric_chunks.c.first_step
            )
        ).all()
    assert sizes == [512, 512, 512, 64]


def test_the_summary_tells_how_the_job_goes(database: Database) -> None:
    job = running(database, precision={"overflow_threshold": 0.1})
    overflow = step(5, overflow=True, skipped=True, has_inf=True, grad_norm=math.inf)
    with database.begin() as s:
        record.opened(s, job.id, job.fence, total_steps=20)
        record.append(s, job.id, job.fence, [*steps(1, 4), overflow], LIVE)
        early = record.summarise(s, job.id)
        record.append(s, job.id, job.fence, steps(6, 10, epoch=2), LIVE)
    with database.read() as s:
        stats = record.summarise(s, job.id)
    assert early.overflow_rate is None  # not before 1 / overflow_threshold steps
    assert early.grad_norm == math.inf
    assert (stats.state, stats.is_terminal, stats.attempt) == (JobState.RUNNING, False, 1)
    assert (stats.current_step, stats.total_steps, stats.progress, stats.epoch) == (10, 20, 0.5, 2)
    assert stats.eta_seconds == 10 / LIVE.steps_per_second
    assert stats.overflow_rate == 0.1
    assert stats.average_loss == pytest.approx(sum(1 / n for n in range(6, 11)) / 5)
    assert stats.last_overflow == {"step": 5, "layer": None, "kind": "unknown"}
    assert stats.performance_metrics == {
        "steps_per_second": 4.0,
        "samples_per_second": 128.0,
        "step_time_ms": {"p50": 1.0, "p95": 2.0, "max": 3.0},
        "host_syncs_per_step": 0.0,
    }
    assert stats.memory_peak_bytes == 7
    assert stats.last_step_at is not None
    assert stats.last_step_at <= stats.updated_at


def test_an_evaluation_is_in_the_summary_and_in_the_events_once(database: Database) -> None:
    job = running(database)
    evaluation = Evaluation(step=2, split="test", loss=math.nan, metrics={"accuracy": 0.975}, seconds=0.25)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 2), LIVE)
    for _ in range(2):
        with database.begin() as s:
            record.evaluated(s, job.id, job.fence, evaluation)
    with database.read() as s:
        stats = record.summarise(s, job.id)
        told = [event for event in events.read(s, job.id) if event.type == "evaluation"]
    assert stats.evaluation is not None
    assert stats.evaluation["metrics"] == {"accuracy": 0.975}
    assert math.isnan(stats.evaluation["loss"])
    assert [event.message for event in told] == ["step 2: test loss nan, accuracy 0.975"]
    with database.begin() as s:
        record.truncate_after(s, job.id, job.fence, 1)
        assert record.summarise(s, job.id).evaluation is None


def test_the_version_rises_with_steps_states_and_events(database: Database) -> None:
    job = running(database)
    seen = []
    changes = [
        lambda s: record.append(s, job.id, job.fence, steps(1, 1), LIVE),
        lambda s: events.append(s, job.id, type="alert", level="warning", message="look"),
        lambda s: jobs.request_cancel(s, job.id, tenant=None),
        lambda s: jobs.finish(s, job.id, job.fence, JobState.CANCELLED, None),
    ]
    for change in changes:
        with database.begin() as s:
            change(s)
        with database.read() as s:
            seen.append(record.versions(s, [job.id])[job.id])
            assert record.summarise(s, job.id).version == seen[-1]
    assert seen == sorted(set(seen))


def test_buckets_keep_every_spike(database: Database) -> None:
    job = running(database)
    rows = [
        step(
            n,
            loss=1000.0 if n == 140 else math.nan if n == 8 else 0.5,
            overflow=n in {3, 140},
            skipped=n == 3,
        )
        for n in range(1, 1001)
    ]
    with database.begin() as s:
        for first in range(0, 1000, 300):
            record.append(s, job.id, job.fence, rows[first : first + 300], LIVE)
    with database.read() as s:
        page = record.downsample(
            s,
            job.id,
            from_step=None,
            to_step=None,
            max_points=30,
            fields=["loss", "overflow", "compute_dtype"],
        )
        part = record.downsample(s, job.id, from_step=101, to_step=110, max_points=30, fields=["loss"])
        none = record.downsample(s, job.id, from_step=2000, to_step=None, max_points=30, fields=["loss"])
    assert page.bucket_steps == 34
    assert (page.count, page.columns["step"][-1]) == (30, 1000)
    assert max(page.columns["loss_max"]) == 1000.0
    assert page.columns["loss_max"][4] == 1000.0
    assert page.columns["loss_min"] == [0.5] * 30
    assert page.columns["loss_first"] == page.columns["loss"] == [0.5] * 30
    assert (sum(page.columns["overflow"]), page.columns["overflow"][4]) == (2, 1)
    assert set(page.columns["compute_dtype_first"]) == {"bfloat16"}
    assert (part.columns["step"], part.bucket_steps) == (list(range(101, 111)), 1)
    assert (none.count, none.columns["step"]) == (0, [])


def test_a_wrong_field_is_named_with_the_choice(database: Database) -> None:
    job = submitted(database)
    with pytest.raises(InvalidRequest, match=r"'lss'.*choose from step, epoch, loss"), database.read() as s:
        record.read(s, job.id, limit=10, fields=["lss"])


@pytest.mark.parametrize("unknown", ["01a208d5-00a9-7fe4-b553-af1ba85f6db3", "nonsense", "\x00", ""])
def test_an_unknown_job_has_no_record(database: Database, unknown: str) -> None:
    with database.read() as s:
        for look in (
            lambda: record.summarise(s, unknown),
            lambda: record.read(s, unknown, limit=1, fields=None),
            lambda: record.downsample(s, unknown, from_step=1, to_step=2, max_points=1, fields=None),
        ):
            with pytest.raises(NotFound):
                look()


def test_another_tenants_summary_is_not_found(database: Database) -> None:
    job = submitted(database, tenant="acme")
    with database.read() as s:
        assert record.summarise(s, job.id, tenant="acme").job_id == job.id
        assert set(record.summaries(s, [job.id, "01a208d5-00a9-7fe4-b553-af1ba85f6db3"])) == {job.id}
        with pytest.raises(NotFound):
            record.summarise(s, job.id, tenant="other")
