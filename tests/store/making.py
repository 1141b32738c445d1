"""Jobs, workers and steps for the store's tests."""

from typing import Any

from halfstep.service.contract.metrics import LiveStats, StepMetrics
from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import JobState
from halfstep.service.store import jobs
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.jobs import Job
from halfstep.service.store.sql.database import Database

CPU = Capability("cpu", bf16=True, fp16=True, memory_bytes=2**33, device_name="cpu", device_count=1)
LIVE = LiveStats(
    current_scale=65536.0,
    memory_peak_bytes=7,
    steps_per_second=4.0,
    samples_per_second=128.0,
    step_time_ms_p50=1.0,
    step_time_ms_p95=2.0,
    step_time_ms_max=3.0,
    host_syncs_per_step=0.0,
)
BROKEN = {"code": "component_error", "message": "It broke.", "detail": None}


def spec(**changes: Any) -> JobSpec:
    return JobSpec.model_validate({"model": {"name": "mlp"}, "dataset": {"name": "digits"}, **changes})


def submitted(db: Database, *, tenant: str = "acme", **changes: Any) -> Job:
    with db.begin() as s:
        return jobs.submit(s, tenant=tenant, spec=spec(**changes))[0]


def claimed(db: Database, *, lease_seconds: float = 60.0, worker: str = "w1") -> Job:
    with db.begin() as s:
        job = jobs.claim(s, worker_id=worker, capability=CPU, lease_seconds=lease_seconds)
    assert job is not None
    return job


def running(db: Database, **changes: Any) -> Job:
    submitted(db, **changes)
    job = claimed(db)
    with db.begin() as s:
        jobs.mark_running(s, job.id, job.fence)
    return job


def state_of(db: Database, job: Job) -> JobState:
    with db.read() as s:
        return jobs.get(s, job.id, tenant=None).state


def step(number: int, **changes: Any) -> StepMetrics:
    plain = StepMetrics(
        step=number,
        epoch=1,
        loss=1.0 / number,
        scale=65536.0,
        overflow=False,
        nan=False,
        underflow=False,
        skipped=False,
        has_inf=False,
        has_nan=False,
        underflow_estimate=1e-9,
        grad_norm=0.25,
        learning_rate=1e-3,
        memory_usage=0.5,
        memory_allocated_bytes=1000 + number,
        memory_reserved_bytes=2000,
        step_time_ms=1.5,
        compute_dtype="bfloat16",
    )
    return plain._replace(**changes)


def steps(first: int, last: int, **changes: Any) -> list[StepMetrics]:
    return [step(number, **changes) for number in range(first, last + 1)]
