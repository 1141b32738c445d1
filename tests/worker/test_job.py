"""What a job's process has ready when its order comes, and what it does without a database."""

from pathlib import Path

import pytest

from halfstep.service.contract.spec import JobSpec
from halfstep.service.settings import Settings
from halfstep.service.store import jobs, record
from halfstep.service.store.sql.database import Database
from halfstep.worker.job import execution
from halfstep.worker.protocol import RunOrder
from tests.store.making import CPU


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path))


@pytest.mark.usefixtures("_own_folder")
def test_a_waiting_process_is_connected(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_DATABASE_URL", database_url)
    prepared = execution.prepare(probe=False)
    try:
        assert prepared.database._engine.pool.checkedin() == 1  # type: ignore[attr-defined]
        assert prepared.ready.capability is None
    finally:
        prepared.database.dispose()


@pytest.mark.usefixtures("_own_folder")
def test_a_database_that_is_away_does_not_keep_a_process_from_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HALFSTEP_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    prepared = execution.prepare(probe=False)
    prepared.database.dispose()
    assert prepared.ready.versions["torch"]


def test_the_database_of_the_order_is_used_where_it_is_another(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings may come from a file that has changed since the worker started; the worker's own hold."""
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HALFSTEP_DATABASE_URL", f"sqlite:///{tmp_path / 'another.db'}")
    prepared = execution.Prepared(
        execution.prepare(probe=False).ready, Settings(), Database(Settings().sql_url)
    )
    spec = JobSpec.model_validate(
        {
            "model": {"name": "mlp", "params": {"hidden": [4]}},
            "dataset": {"name": "synthetic", "params": {"samples": 16, "held_out_samples": 4}},
            "training": {"max_steps": 3, "batch_size": 8},
        }
    )
    database.retry(lambda s: jobs.submit(s, tenant="default", spec=spec))
    claimed = database.retry(lambda s: jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=60))
    assert claimed is not None
    settings = Settings(database_url=database.url.render_as_string(hide_password=False))
    done = execution.run(
        prepared,
        RunOrder(
            job_id=claimed.id,
            fence=claimed.fence,
            attempt=1,
            spec=claimed.spec,
            settings=settings.model_dump(mode="json"),
            device="cpu",
            elapsed_seconds=0.0,
            checkpoints=[],
            speeds={},
        ),
        lambda: None,
        lambda _step, _seconds: None,
    )
    assert (done.outcome, done.step) == ("finished", 3)
    with database.read() as session:
        assert record.summarise(session, claimed.id).current_step == 3
