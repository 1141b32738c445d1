"""A server over a migrated database of each kind, on loopback, with a small published catalogue."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from starlette.testclient import TestClient

from halfstep.service import queue
from halfstep.service.api import create_app
from halfstep.service.contract.metrics import LiveStats, StepMetrics
from halfstep.service.contract.states import JobState
from halfstep.service.files.storage import MODEL_FILE
from halfstep.service.settings import Settings
from halfstep.service.store import jobs, record
from halfstep.service.store.fleet import components, workers
from halfstep.service.store.sql.database import Database
from tests.databases import _migrated_file, _migrated_postgres, database, database_url

from .catalogue import INFOS

__all__ = ["_migrated_file", "_migrated_postgres", "database", "database_url"]

CPU = workers.Capability(
    "cpu", bf16=True, fp16=True, memory_bytes=8 * 2**30, device_name="cpu", device_count=1
)
SPEC: dict[str, Any] = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}}


@pytest.fixture(autouse=True)
def log() -> Iterator[list[Any]]:
    """What is logged, kept instead of printed."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        data_dir=tmp_path,
        database_url=database_url,
        broker_url="redis://127.0.0.1:1/0",  # nothing listens there
    )


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The job ids that the API woke a worker for."""
    ids: list[str] = []

    def enqueue(_settings: Settings, *job_ids: str) -> bool:
        ids.extend(job_ids)
        return True

    monkeypatch.setattr(queue, "enqueue", enqueue)
    return ids


@pytest.fixture
def bare_client(settings: Settings, database: Database, sent: list[str]) -> Iterator[TestClient]:
    """A client on this machine; no worker has ever started."""
    app = create_app(settings, database)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000)) as client:
        yield client


@pytest.fixture
def client(bare_client: TestClient, database: Database) -> TestClient:
    """The same with a published catalogue and one live CPU worker."""
    with database.begin() as session:
        components.publish(session, INFOS)
        workers.register(
            session,
            worker_id="w1",
            name="host-1",
            pid=7,
            capability=CPU,
            versions={"torch": "2.13.0"},
            slots=1,
        )
    return bare_client


class Trainer:
    """What a worker would do to a job, straight in the store."""

    def __init__(self, database: Database, data_dir: Path) -> None:
        self._database, self._data_dir = database, data_dir

    def claim(self, job_id: str) -> int:
        """Take the job to running; returns its fence."""
        with self._database.begin() as session:
            job = jobs.claim(session, worker_id="w1", capability=CPU, lease_seconds=60, hint=job_id)
            assert job is not None
            assert job.id == job_id
            jobs.mark_running(session, job_id, job.fence)
            return job.fence

    def steps(self, job_id: str, fence: int, first: int, last: int, **changes: Any) -> None:
        """Append the steps first..last; `changes` replace values of every row."""
        with self._database.begin() as session:
            record.append(
                session, job_id, fence, [step_row(step, **changes) for step in range(first, last + 1)], LIVE
            )

    def checkpoint(self, job_id: str, fence: int, step: int, weights: bytes = b"weights") -> Path:
        """Leave a checkpoint on disk and refer to it; returns its directory."""
        path = f"jobs/{job_id}/checkpoints/fence-{fence:06d}-step-{step:010d}"
        place = self._data_dir / path
        place.mkdir(parents=True)
        (place / MODEL_FILE).write_bytes(weights)
        with self._database.begin() as session:
            jobs.record_checkpoint(
                session,
                job_id,
                fence,
                step=step,
                path=path,
                bytes=len(weights),
                sha256=hashlib.sha256(weights).hexdigest(),
                metrics={"loss": 0.5},
            )
        return place

    def end(self, job_id: str, fence: int, state: JobState = JobState.SUCCEEDED, **reason: str) -> None:
        """Finish the job."""
        with self._database.begin() as session:
            jobs.finish(session, job_id, fence, state, reason or None)


LIVE = LiveStats(
    current_scale=2.0,
    memory_peak_bytes=300,
    steps_per_second=10.0,
    samples_per_second=320.0,
    step_time_ms_p50=1.0,
    step_time_ms_p95=2.0,
    step_time_ms_max=3.0,
    host_syncs_per_step=0.0,
)


def step_row(step: int, **changes: Any) -> StepMetrics:
    row = StepMetrics(
        step=step,
        epoch=1,
        loss=1.0 / step,
        scale=4.0,
        overflow=False,
        nan=False,
        underflow=False,
        skipped=False,
        has_inf=False,
        has_nan=False,
        underflow_estimate=0.0,
        grad_norm=0.5,
        learning_rate=0.001,
        memory_usage=0.1,
        memory_allocated_bytes=100,
        memory_reserved_bytes=200,
        step_time_ms=1.5,
        compute_dtype="float16",
    )
    return row._replace(**changes)


@pytest.fixture
def trainer(database: Database, settings: Settings) -> Trainer:
    return Trainer(database, settings.data_dir)


@pytest.fixture
def submit(client: TestClient) -> Callable[..., str]:
    def call(**changes: Any) -> str:
        answer = client.post("/jobs", json={**SPEC, **changes})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    return call
