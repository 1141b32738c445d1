"""What a job saw go wrong stays in its events, once, whatever becomes of its record."""

from pathlib import Path
from typing import Any

import pytest

from halfstep.service.settings import Settings
from halfstep.service.store import events, jobs
from halfstep.service.store.sql.database import Database
from halfstep.worker.job import execution
from halfstep.worker.protocol import RunOrder
from tests.store.making import claimed
from tests.training.jobs import job as job_spec

HEALS = job_spec(
    dataset={
        "name": "synthetic",
        "params": {"samples": 16 * 20, "held_out_samples": 8, "non_finite_steps": [5, 10, 11, 12]},
    },
    precision={"precision_level": "bf16", "max_consecutive_skips": 3},
    training={"epochs": 1, "batch_size": 16},
)
"""Skips one bad batch, then goes back to the start without the three that follow each other."""


@pytest.fixture
def held(database: Database) -> jobs.Job:
    database.retry(lambda s: jobs.submit(s, tenant="acme", spec=HEALS))
    return claimed(database)


def attempt(database: Database, held: jobs.Job, folder: Path) -> None:
    settings = Settings(data_dir=folder, database_url=database.url.render_as_string(hide_password=False))
    prepared = execution.Prepared(execution.prepare(probe=False).ready, settings, database)
    order = RunOrder(
        job_id=held.id,
        fence=held.fence,
        attempt=held.attempt,
        spec=held.spec,
        settings=settings.model_dump(mode="json"),
        device="cpu",
        elapsed_seconds=0.0,
        checkpoints=[],
        speeds={},
    )
    done = execution.run(prepared, order, lambda: None, lambda _step, _seconds: None)
    assert (done.outcome, done.step) == ("finished", 17)


def told(database: Database, job_id: str) -> list[tuple[str, Any, Any]]:
    """Code, step and batch of every incident and alert, in order."""
    with database.read() as s:
        found = events.read(s, job_id, limit=1000)
    incidents = [event.data or {} for event in found if event.type in {"nan", "overflow", "alert"}]
    return [(data["code"], data["step"], data.get("batch")) for data in incidents]


def test_a_job_that_healed_keeps_the_evidence_and_tells_it_once(
    database: Database, held: jobs.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path))
    attempt(database, held, tmp_path)
    first = told(database, held.id)
    assert [each for each in first if each[0] == "batches_excluded"]
    assert ("nan", 5, [1, 4]) in first

    # Its worker is lost before anything is kept: the same steps are taken, and seen to go wrong, again.
    database.retry(lambda s: jobs.release(s, held.id, held.fence, charge_attempt=True, why="lost"))
    attempt(database, claimed(database), tmp_path)
    assert told(database, held.id) == first
