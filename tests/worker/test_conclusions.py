"""What is written when a job's process has ended: one store call per ending, over the real store."""

from collections.abc import Callable

import pytest
from sqlalchemy.orm import Session

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import RequestedAction
from halfstep.service.store import jobs
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.sql.database import Database
from halfstep.worker.host.conclusions import conclusion
from halfstep.worker.host.supervision import Ending
from halfstep.worker.protocol import Done

CPU = Capability(
    device_type="cpu", bf16=True, fp16=True, memory_bytes=2**30, device_name="cpu", device_count=1
)


@pytest.fixture
def database(database_url: str):
    opened = Database(database_url)
    yield opened
    opened.dispose()


def running(database: Database, *, attempts: int = 3, cancelling: bool = False) -> jobs.Job:
    document = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}, "max_attempts": attempts}
    spec = JobSpec.model_validate(document)
    database.retry(lambda s: jobs.submit(s, tenant="default", spec=spec))
    job = database.retry(lambda s: jobs.claim(s, worker_id="w", capability=CPU, lease_seconds=60))
    assert job is not None
    database.retry(lambda s: jobs.mark_running(s, job.id, job.fence))
    if cancelling:
        database.retry(lambda s: jobs.request_cancel(s, job.id, tenant=None))
    return job


def ending(done: Done | None = None, returncode: int = 0, killed_for: str | None = None) -> Ending:
    return Ending(done=done, returncode=returncode, killed_for=killed_for, last_step=7, last_words="")  # type: ignore[arg-type]


def concluded(database: Database, job: jobs.Job, how: Ending, *, memory: bool = False) -> jobs.Job:
    write: Callable[[Session], jobs.Job] | None = conclusion(job, how, host_memory_killed=memory)
    assert write is not None
    return database.retry(write)


FAILED = Done(outcome="failed", step=1, reason={"code": "data_error", "message": "m", "detail": None})
ENDINGS = {
    "finished": (ending(Done(outcome="finished", step=9)), "succeeded", None, 1),
    "failed": (ending(FAILED), "failed", "data_error", 1),
    "drained": (ending(Done(outcome="drain", step=9)), "queued", None, 1),
    "killed in a drain": (ending(returncode=-15, killed_for="drain"), "queued", None, 1),
    "crashed": (ending(returncode=-11), "queued", None, 2),
    "exited": (ending(returncode=1), "queued", None, 2),
    "stalled": (ending(returncode=-9, killed_for="stalled"), "queued", None, 2),
    "killed after a cancel": (
        ending(returncode=-9, killed_for="cancel"),
        "cancelled",
        "cancelled_by_user",
        1,
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_an_ending_becomes_its_state(database: Database, name: str) -> None:
    how, state, code, attempt = ENDINGS[name]
    after = concluded(database, running(database, cancelling=state == "cancelled"), how)
    assert (after.state, after.attempt) == (state, attempt)
    assert (after.status_reason or {}).get("code") == code
    assert after.requested is None


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (ending(returncode=-11), "worker_lost"),
        (ending(returncode=-9, killed_for="stalled"), "stalled"),
    ],
)
def test_the_last_attempt_fails_with_its_own_reason(database: Database, how: Ending, code: str) -> None:
    after = concluded(database, running(database, attempts=1), how)
    assert (after.state, (after.status_reason or {})["code"]) == ("failed", code)


def test_memory_is_blamed_only_for_a_kill_that_the_kernel_counted(database: Database) -> None:
    blamed = concluded(database, running(database), ending(returncode=-9), memory=True)
    assert (blamed.state, (blamed.status_reason or {})["code"]) == ("failed", "out_of_memory_host")
    assert concluded(database, running(database), ending(returncode=-9)).state == "queued"
    assert concluded(database, running(database), ending(returncode=1), memory=True).state == "queued"


def test_a_job_that_ends_before_its_cancel_arrives_keeps_its_outcome(database: Database) -> None:
    job = running(database, cancelling=True)
    with database.read() as session:
        assert jobs.get(session, job.id, tenant=None).requested is RequestedAction.CANCEL
    assert concluded(database, job, ending(Done(outcome="finished", step=9))).state == "succeeded"


def test_a_crash_while_cancelling_is_a_cancel(database: Database) -> None:
    assert (
        concluded(database, running(database, cancelling=True), ending(returncode=-11)).state == "cancelled"
    )


@pytest.mark.parametrize(
    "how", [ending(returncode=-9, killed_for="lost"), ending(Done(outcome="stale", step=0))]
)
def test_who_lost_the_lease_writes_nothing(database: Database, how: Ending) -> None:
    assert conclusion(running(database), how, host_memory_killed=False) is None
