"""The reporter between the training loop and SQL: order, batches, a database that is away, a lost fence."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.contract.metrics import LiveStats, StepMetrics
from halfstep.service.contract.spec import JobSpec
from halfstep.service.errors import StaleFence, StoreUnavailable
from halfstep.service.store import events, jobs, record
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.sql.database import Database
from halfstep.worker.job.reporting import Reporter
from halfstep.worker.training.checkpoints.writing import CheckpointInfo, CheckpointRef

SOON = 20.0
CPU = Capability(
    device_type="cpu", bf16=True, fp16=True, memory_bytes=2**30, device_name="cpu", device_count=1
)
LIVE = LiveStats(
    current_scale=1.0,
    memory_peak_bytes=1,
    steps_per_second=1.0,
    samples_per_second=1.0,
    step_time_ms_p50=20.0,
    step_time_ms_p95=1.0,
    step_time_ms_max=1.0,
    host_syncs_per_step=0.0,
)


def row(step: int) -> StepMetrics:
    flags = dict.fromkeys(("overflow", "nan", "underflow", "skipped", "has_inf", "has_nan"), False)
    return StepMetrics(
        step=step,
        epoch=1,
        loss=1.0 / step,
        scale=1.0,
        underflow_estimate=0.0,
        grad_norm=1.0,
        learning_rate=0.1,
        memory_usage=0.5,
        memory_allocated_bytes=1,
        memory_reserved_bytes=1,
        step_time_ms=1.0,
        compute_dtype="float32",
        **flags,
    )


class Away(Database):
    """A database that can be away."""

    away = False

    def retry(self, fn, *, seconds=5.0):
        if self.away:
            raise StoreUnavailable("the database is away")
        return super().retry(fn, seconds=seconds)


@pytest.fixture
def database(database_url: str) -> Iterator[Away]:
    made = Away(database_url)
    yield made
    made.dispose()


@pytest.fixture
def job(database: Away) -> jobs.Job:
    spec = JobSpec.model_validate({"model": {"name": "mlp"}, "dataset": {"name": "digits"}})
    database.retry(lambda s: jobs.submit(s, tenant="default", spec=spec))
    claimed = database.retry(lambda s: jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=60))
    assert claimed is not None
    return claimed


def reporter(database: Away, job: jobs.Job, **options: int) -> Reporter:
    return Reporter(database, job.id, job.fence, on_progress=lambda step, seconds: None, **options)


def stored_steps(database: Away, job: jobs.Job) -> list[int]:
    with database.read() as session:
        return record.read(session, job.id, after_step=0, limit=10_000, fields=["step"]).columns["step"]


def test_what_is_reported_is_stored_in_order_before_close_returns(database: Away, job: jobs.Job) -> None:
    told = reporter(database, job)
    told.opened(total_steps=30)
    for step in range(1, 31):
        told.steps([row(step)], LIVE)
        if step == 10:
            told.event("alert", "info", "ten steps", {"step": 10})
    told.close()
    assert stored_steps(database, job) == list(range(1, 31))
    with database.read() as session:
        assert "ten steps" in [event.message for event in events.read(session, job.id)]
        assert jobs.get(session, job.id, tenant=None).state == "running"


def test_a_lost_fence_is_raised_in_the_loop_and_nothing_more_is_written(
    database: Away, job: jobs.Job
) -> None:
    told = reporter(database, job)
    told.opened(total_steps=None)
    told.steps([row(1)], LIVE)
    told._drain()
    database.retry(lambda s: jobs.release(s, job.id, job.fence, charge_attempt=True, why="its lease ran out"))
    successor = database.retry(lambda s: jobs.claim(s, worker_id="v", capability=CPU, lease_seconds=60))
    assert successor is not None
    assert successor.fence > job.fence

    def go_on() -> None:
        for step in range(2, 10_000):
            told.steps([row(step)], LIVE)
            time.sleep(0.001)

    with pytest.raises(StaleFence):
        go_on()
    assert stored_steps(database, job) == [1]


def test_resuming_removes_what_lies_beyond_before_it_returns(database: Away, job: jobs.Job) -> None:
    told = reporter(database, job)
    told.opened(total_steps=None)
    told.steps([row(step) for step in range(1, 8)], LIVE)
    told.resumed(5)
    assert stored_steps(database, job) == [1, 2, 3, 4, 5]
    told.steps([row(6)], LIVE)
    told.close()
    assert stored_steps(database, job) == [1, 2, 3, 4, 5, 6]


def test_a_first_attempt_trains_without_waiting_for_the_database(
    database: Away, job: jobs.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.worker.job.reporting.RETRY_SECONDS", 0.01)
    database.away = True
    told = reporter(database, job)
    told.opened(total_steps=1)
    told.resumed(0)
    told.event("precision", "warning", "slow here", {"code": "slow_precision"})
    told.steps([row(1)], LIVE)
    database.away = False
    told.close()
    assert stored_steps(database, job) == [1]


def test_a_later_attempt_waits_until_what_an_earlier_one_left_is_removed(
    database: Away, job: jobs.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.worker.job.reporting.RETRY_SECONDS", 0.01)
    first = reporter(database, job)
    first.opened(total_steps=None)
    first.steps([row(1), row(2)], LIVE)
    first.close()
    database.retry(lambda s: jobs.release(s, job.id, job.fence, charge_attempt=True, why="its lease ran out"))
    again = database.retry(lambda s: jobs.claim(s, worker_id="v", capability=CPU, lease_seconds=60))
    assert again is not None
    database.away = True
    told = reporter(database, again)
    told.opened(total_steps=None)
    returned = threading.Event()

    def resume() -> None:
        told.resumed(0)
        returned.set()

    threading.Thread(target=resume, daemon=True).start()
    assert not returned.wait(0.3)
    database.away = False
    assert returned.wait(SOON)
    assert stored_steps(database, again) == []
    told.close()


def test_a_checkpoints_files_go_only_after_its_successor_is_referred_to(
    database: Away, job: jobs.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.worker.job.reporting.RETRY_SECONDS", 0.01)
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
    made = [
        CheckpointInfo(step=step, path=folder, bytes=1, sha256=f"{step:064d}", manifest_sha256=f"{step:064x}")
        for step, folder in enumerate(folders, 1)
    ]
    told = reporter(database, job)
    told.opened(total_steps=None)
    told.steps([row(1), row(2)], LIVE)
    told.checkpointed(made[0])
    told._drain()
    database.away = True
    told.checkpointed(made[1])
    told.superseded([CheckpointRef(step=1, path=folders[0], sha256=made[0].sha256)])
    time.sleep(0.1)
    assert folders[0].exists()
    database.away = False
    told.close()
    assert not folders[0].exists()
    with database.read() as session:
        assert [kept.step for kept in jobs.checkpoints(session, job.id)] == [2]


def test_a_notice_is_told_once_over_attempts_and_any_number_of_events(
    database: Database, job: jobs.Job
) -> None:
    seen = {"code": "nan", "step": 20, "batch": [1, 19]}
    notices: list[tuple[str, str, str, dict[str, Any]]] = [
        ("warning", "warning", "FP16 on a CPU is slow", {"code": "warning", "step": 0}),
        ("warning", "warning", "nothing is cast", {"code": "warning", "step": 0}),
        ("nan", "warning", "step 20 was skipped, first seen in 'head'", seen),
        ("alert", "warning", "4 of 40 steps were lost", {"code": "overflow_budget_exceeded", "step": 20}),
    ]
    told = reporter(database, job)
    for notice in notices:
        told.event(*notice)
    for number in range(120):
        told.event("checkpoint", "error", "the disk is full", {"code": "checkpoint_failed", "number": number})
    told.close()
    database.retry(lambda s: jobs.release(s, job.id, job.fence, charge_attempt=False, why="drained"))
    again = database.retry(lambda s: jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=60))
    assert again is not None
    resumed = reporter(database, again)
    for notice in notices:
        resumed.event(*notice)
    resumed.event("nan", "warning", "step 20 was skipped, first seen in 'tail'", seen)
    for news in ({"step": 200}, {"step": 2}, {"batch": [1, 23]}, {"batch": [1, 1]}):
        resumed.event("nan", "warning", "step 20 was skipped, first seen in 'head'", seen | news)
    resumed.event("checkpoint", "error", "the disk is full", {"code": "checkpoint_failed", "number": 1})
    resumed.close()
    with database.read() as session:
        found = [e for e in events.read(session, job.id, limit=1000) if e.type not in {"state", "worker"}]
    said = [(event.type, event.message) for event in found if event.type != "checkpoint"]
    assert said == [(kind, message) for kind, _, message, _ in notices] + [notices[2][0:3:2]] * 4
    assert len(found) - len(said) == 121


def test_a_warning_is_told_once(database: Away, job: jobs.Job) -> None:
    told = reporter(database, job)
    for _ in range(2):
        told.event("warning", "warning", "FP16 on a CPU is slow")
        told.event("alert", "warning", "a step was slow")
    told.close()
    with database.read() as session:
        messages = [event.message for event in events.read(session, job.id)]
    assert messages.count("FP16 on a CPU is slow") == 1
    assert messages.count("a step was slow") == 2
