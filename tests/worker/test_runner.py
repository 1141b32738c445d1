"""When a worker claims: with a process ready, whoever woke it; and whom it wakes when it gives a job back."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from halfstep.service.contract.spec import JobSpec
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.sql.database import Database
from halfstep.worker.host import runner
from halfstep.worker.host.process import Exited
from halfstep.worker.host.runner import Runner
from halfstep.worker.host.slots import Slot
from halfstep.worker.protocol import Done, Message, Ready, RunOrder

CPU = Capability(
    device_type="cpu", bf16=True, fp16=True, memory_bytes=2**30, device_name="cpu", device_count=1
)
READY = Ready(capability=None, components=[], versions={})


class Child:
    """A process that runs its job and ends it as `outcome` says, as soon as it has its order."""

    def __init__(self, database: Database, outcome: str, on_order: Callable[[], None]) -> None:
        self.database, self.on_order = database, on_order
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.ready: Future[Ready] = Future()
        self.outcome, self.pid, self.alive, self.last_words = outcome, 1, True, ""

    def order(self, message: Message) -> bool:
        if not isinstance(message, RunOrder):
            return True
        self.on_order()
        self.alive = False
        self.database.retry(lambda s: jobs.mark_running(s, message.job_id, message.fence))
        self.inbox.put(Done(outcome=self.outcome, step=1))  # type: ignore[arg-type]
        self.inbox.put(Exited(0))
        return True

    def discard(self) -> None:
        self.alive = False


class Nursery:
    """A spawner of such children, each ready at once if `ready`."""

    def __init__(self, database: Database, *, ready: bool, outcome: str = "finished") -> None:
        self.children: list[Child] = []
        self.database, self.ready, self.outcome = database, ready, outcome
        self.on_order: Callable[[], None] = lambda: None

    def spawn(self, _environment: dict[str, str], *, probe: bool = False) -> Child:
        child = Child(self.database, self.outcome, self.on_order)
        self.children.append(child)
        if self.ready:
            child.ready.set_result(READY)
        return child


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ids: list[str] = []
    monkeypatch.setattr(runner, "enqueue", lambda _settings, *some: ids.extend(some) or True)
    return ids


@pytest.fixture(autouse=True)
def _all_ended(database: Database) -> Iterator[None]:
    yield  # then the database is closed
    for thread in threading.enumerate():
        if thread.name == "look":
            thread.join(timeout=10)


def made(database: Database, folder: Path, nursery: Nursery, *, slots: int = 1) -> Runner:
    return Runner(
        Settings(data_dir=folder, database_url=database.url.render_as_string(hide_password=False)),
        database,
        worker_id="w",
        capability=CPU,
        speeds={},
        slots=[Slot(n, "cpu", {}, nursery) for n in range(slots)],  # type: ignore[arg-type]
    )


def submit(database: Database, **fields: object) -> str:
    document = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}, **fields}
    spec = JobSpec.model_validate(document)
    return database.retry(lambda s: jobs.submit(s, tenant="default", spec=spec))[0].id


def state(database: Database, job_id: str) -> str:
    with database.read() as session:
        return str(jobs.get(session, job_id, tenant=None).state)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waiting_for_a_process(database: Database, folder: Path) -> tuple[Runner, Nursery, str]:
    """A runner that found a job, which one; its slot's process is started and not yet ready."""
    nursery = Nursery(database, ready=False)
    worker = made(database, folder, nursery)
    job_id = submit(database, max_attempts=1)
    worker.look()
    wait_for(lambda: len(nursery.children) == 1)
    return worker, nursery, job_id


def test_a_job_stays_free_for_others_until_a_process_is_ready(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    _, nursery, job_id = waiting_for_a_process(database, tmp_path)
    time.sleep(0.1)
    assert state(database, job_id) == "queued"
    nursery.ready = True
    nursery.children[0].ready.set_result(READY)
    wait_for(lambda: state(database, job_id) == "succeeded")
    assert woken == []


def test_nobody_waits_for_a_process_without_a_job(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    nursery = Nursery(database, ready=False)
    worker = made(database, tmp_path, nursery)
    worker.run_until_idle(None)  # returns, though no process is or gets ready
    assert nursery.children == []


def test_where_no_process_starts_no_job_is_claimed_and_the_slot_is_tried_again(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    worker, nursery, job_id = waiting_for_a_process(database, tmp_path)
    nursery.children[0].alive = False
    nursery.children[0].ready.set_exception(RuntimeError("no torch here"))
    nursery.ready = True
    wait_for(lambda: worker.look() or state(database, job_id) == "succeeded")
    assert len(nursery.children) >= 2


def test_a_worker_that_drains_meanwhile_claims_nothing(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    worker, nursery, job_id = waiting_for_a_process(database, tmp_path)
    worker.drain()
    nursery.children[0].ready.set_result(READY)
    time.sleep(0.1)
    nursery.children[0].discard()
    worker.run_until_idle(job_id)
    assert state(database, job_id) == "queued"
    assert len(nursery.children) == 1, "nor is a process started any more"


def test_jobs_are_found_without_a_message_at_every_free_slot(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    nursery = Nursery(database, ready=False)
    worker = made(database, tmp_path, nursery, slots=2)
    worker.look()
    time.sleep(0.05)
    assert nursery.children == [], "nothing waits"
    ids = [submit(database), submit(database)]
    worker.look()
    wait_for(lambda: len(nursery.children) == 2)
    worker.look()  # both are about to claim: no third comes
    nursery.ready = True
    for child in nursery.children[:2]:
        child.ready.set_result(READY)
    wait_for(lambda: [state(database, job_id) for job_id in ids] == ["succeeded"] * 2)


def test_a_wake_up_for_what_a_look_has_just_missed_is_not_lost(
    database: Database, tmp_path: Path, woken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = made(database, tmp_path, Nursery(database, ready=True))
    worker._slots[0].warm_up()
    claim, late = worker._claim, []

    def claim_and_then_a_job_comes(hint: str | None) -> jobs.Job | None:
        found = claim(hint)
        if not late:
            late.append(submit(database))
            worker.run_until_idle(late[0])  # the message's thread: it finds no free slot
        return found

    monkeypatch.setattr(worker, "_claim", claim_and_then_a_job_comes)
    worker.run_until_idle(None)
    assert state(database, late[0]) == "succeeded"


def test_what_this_worker_cannot_run_is_nothing_to_look_for(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    nursery = Nursery(database, ready=True)
    submit(database, resources={"device": "cuda"})
    made(database, tmp_path, nursery).look()
    time.sleep(0.1)
    assert nursery.children == []


def test_whoever_gives_a_job_back_wakes_another_for_it(
    database: Database, tmp_path: Path, woken: list[str]
) -> None:
    nursery = Nursery(database, ready=True, outcome="drain")
    worker = made(database, tmp_path, nursery)
    nursery.on_order = worker.drain
    job_id = submit(database)
    worker.look()
    wait_for(lambda: woken == [job_id])
    wait_for(lambda: worker.busy == 0)
    assert state(database, job_id) == "queued"
