"""The dispatcher's round: what it sends again, takes back and fails, over the real store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from halfstep.service import dispatch
from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import JobState
from halfstep.service.dispatch import loop
from halfstep.service.errors import StaleFence
from halfstep.service.files import storage
from halfstep.service.settings import Settings
from halfstep.service.store import jobs, record
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.jobs import retries
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.ids import new_job_id
from halfstep.service.store.tables import jobs as job_rows
from tests.store.making import LIVE, running, steps
from tests.stores import Store, store_in

CPU = Capability(
    device_type="cpu", bf16=True, fp16=True, memory_bytes=2**30, device_name="cpu", device_count=1
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, no_worker_seconds=1000)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ids: list[str] = []

    def send(_settings: Settings, *some: str) -> bool:
        ids.extend(some)
        return True

    monkeypatch.setattr(loop, "enqueue", send)
    return ids


def submit(database: Database, **fields: object) -> str:
    document = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}, **fields}
    spec = JobSpec.model_validate(document)
    return database.retry(lambda s: jobs.submit(s, tenant="default", spec=spec))[0].id


def age(database: Database, seconds: float, *columns: str) -> None:
    """Let every job's clock columns lie so far in the past."""
    values = {name: job_rows.c[name] - seconds for name in columns}
    database.retry(lambda s: s.execute(update(job_rows).values(**values)))


def state(database: Database, job_id: str) -> tuple[str, int]:
    with database.read() as session:
        job = jobs.get(session, job_id, tenant=None)
    return str(job.state), job.attempt


def test_a_job_that_nobody_claimed_is_sent_again_and_not_at_once(
    settings: Settings, database: Database, sent: list[str]
) -> None:
    job_id = submit(database)
    dispatch.one_round(settings, database)
    assert sent == []  # its first message may still be under way
    age(database, 5, "queued_at", "publish_due")
    dispatch.one_round(settings, database)
    dispatch.one_round(settings, database)
    assert sent == [job_id]
    age(database, 5, "publish_due")
    dispatch.one_round(settings, database)
    assert sent == [job_id, job_id]


def test_a_broker_that_is_down_costs_one_try_a_round_and_no_job(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def refuse(_settings: Settings, job_id: str) -> bool:
        tried.append(job_id)
        return False

    monkeypatch.setattr(loop, "enqueue", refuse)
    ids = [submit(database), submit(database)]
    age(database, 5, "queued_at", "publish_due")
    dispatch.one_round(settings, database)
    assert tried == ids[:1]
    dispatch.one_round(settings, database)
    assert tried == ids[:1] * 2  # still due: a failed sending is not counted as one


def test_an_expired_lease_goes_back_and_the_old_holder_is_refused(
    settings: Settings, database: Database, sent: list[str]
) -> None:
    job_id = submit(database)
    claimed = database.retry(lambda s: jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=60))
    assert claimed is not None
    dispatch.one_round(settings, database)
    assert state(database, job_id) == ("starting", 1)
    age(database, 120, "lease_until")
    dispatch.one_round(settings, database)
    assert state(database, job_id) == ("queued", 2)
    assert sent == [job_id], "somebody is woken for it at once"
    with pytest.raises(StaleFence):
        database.retry(lambda s: jobs.mark_running(s, job_id, claimed.fence))


def test_after_a_long_stop_workers_have_their_time_to_register(
    settings: Settings, database: Database, sent: list[str]
) -> None:
    job_id = submit(database)
    age(database, 86_400, "queued_at")
    dispatch.one_round(settings, database, up_seconds=999)
    assert state(database, job_id)[0] == "queued"
    dispatch.one_round(settings, database, up_seconds=1000)
    assert state(database, job_id)[0] == "failed"


def test_what_no_worker_can_run_fails_with_the_remedy(
    settings: Settings, database: Database, sent: list[str]
) -> None:
    job_id = submit(database, resources={"device": "cuda"})
    age(database, 500, "queued_at")
    dispatch.one_round(settings, database)
    assert state(database, job_id)[0] == "queued"
    age(database, 1000, "queued_at")
    dispatch.one_round(settings, database)
    with database.read() as session:
        job = jobs.get(session, job_id, tenant=None)
    assert job.state == "failed"
    assert job.status_reason is not None
    assert job.status_reason["code"] == "no_capable_worker"
    assert "cuda" in job.status_reason["message"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with store_in(tmp_path / "store") as made:
        yield made


def test_a_deleted_jobs_checkpoints_go_once_their_store_answers(
    tmp_path: Path, database: Database, sent: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path / "data", checkpoint_url=store.url)
    deleted, other = submit(database), submit(database)
    for job_id in (deleted, other):
        (store.directory / "jobs" / job_id / "checkpoints").mkdir(parents=True)
        (store.directory / "jobs" / job_id / "checkpoints" / "model.safetensors").touch()
    database.retry(lambda s: jobs.request_cancel(s, deleted, tenant=None))
    database.retry(lambda s: jobs.delete(s, deleted, tenant=None))

    def waiting() -> list[str]:
        with database.read() as session:
            return [job_id for job_id, _ in jobs.unswept(session, limit=10)]

    store.fails("rm", None, ConnectionError("refused"))
    dispatch.one_round(settings, database)
    assert waiting() == [deleted]
    # For a while it is not asked again, so that a round does not wait for it.
    store.recover()
    store.calls.clear()
    dispatch.one_round(settings, database)
    assert (store.calls, waiting()) == ([], [deleted])
    monkeypatch.setattr(storage.storage(settings), "_away_until", 0.0)
    dispatch.one_round(settings, database)
    assert waiting() == []
    assert [path.name for path in (store.directory / "jobs").iterdir()] == [other]


def test_a_store_that_is_away_holds_up_no_disk(
    tmp_path: Path, database: Database, sent: list[str], store: Store
) -> None:
    settings = Settings(data_dir=tmp_path / "data", checkpoint_url=store.url)
    deleted = [submit(database) for _ in range(3)]
    for job_id in deleted:
        (store.directory / "jobs" / job_id).mkdir(parents=True)
        (settings.data_dir / "jobs" / job_id).mkdir(parents=True)
        with database.begin() as s:
            jobs.request_cancel(s, job_id, tenant=None)
        with database.begin() as s:
            jobs.delete(s, job_id, tenant=None)
    store.fails("rm", None, ConnectionError("refused"))
    dispatch.one_round(settings, database)
    assert not (settings.data_dir / "jobs").exists()
    assert sorted(path.name for path in (store.directory / "jobs").iterdir()) == sorted(deleted)


def test_checkpoints_that_another_job_refers_to_stay_wherever_they_are(
    tmp_path: Path, database: Database, sent: list[str], store: Store
) -> None:
    settings = Settings(data_dir=tmp_path / "data", checkpoint_url=store.url)
    job = running(database)
    with database.begin() as s:
        record.append(s, job.id, job.fence, steps(1, 20), LIVE)
        for number in (10, 20):
            path = f"jobs/{job.id}/checkpoints/{number}"
            jobs.record_checkpoint(
                s, job.id, job.fence, step=number, path=path, bytes=0, sha256="ab" * 32, metrics=None
            )
            for place in (store.directory, settings.data_dir):
                (place / path).mkdir(parents=True)
                (place / path / "model.safetensors").touch()
        jobs.finish(s, job.id, job.fence, JobState.SUCCEEDED, None)
        retries.retry(s, job.id, tenant=None, new_id=new_job_id(), from_checkpoint=10)
        jobs.delete(s, job.id, tenant=None)
    dispatch.one_round(settings, database)
    for place in (store.directory, settings.data_dir):
        assert [path.name for path in (place / "jobs" / job.id / "checkpoints").iterdir()] == ["10"]
        assert (place / "jobs" / job.id / "checkpoints" / "10" / "model.safetensors").exists()
    with database.read() as s:
        assert jobs.unswept(s, limit=10) == []
