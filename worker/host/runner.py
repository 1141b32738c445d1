"""From a wake-up to a job's end: claim, process, supervision, and the one fenced write that concludes it.

The composition root of the worker: what this file builds, the rooms below only use. The message names a
job, but the claim decides: highest priority, then oldest, of what this worker can run.
"""

import threading
import time
from collections.abc import Mapping

import structlog
from celery import Celery
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState, RequestedAction
from halfstep.service.errors import StaleFence, StoreUnavailable
from halfstep.service.faultpoints import reach
from halfstep.service.queue import RUN_JOB, enqueue
from halfstep.service.settings import Settings
from halfstep.service.store import events, jobs
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.sql.database import Database
from halfstep.worker.host import memory_kills
from halfstep.worker.host.conclusions import conclusion, exit_text, left_by
from halfstep.worker.host.lease import LeaseKeeper
from halfstep.worker.host.process import ChildProcess
from halfstep.worker.host.slots import Slot
from halfstep.worker.host.supervision import Ending, Graces, LeaseLost, StopRequested, supervise
from halfstep.worker.protocol import RunOrder

log = structlog.get_logger(__name__)


class Runner:
    """Runs jobs at the slots of one worker until it drains."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        worker_id: str,
        capability: Capability,
        speeds: Mapping[str, Mapping[str, float]],
        slots: list[Slot],
    ) -> None:
        self._settings, self._database = settings, database
        self._worker_id, self._capability = worker_id, capability
        self._speeds = {dtype: dict(speed) for dtype, speed in speeds.items()}
        self._slots = slots
        self._lock = threading.Lock()
        self._free = list(slots)
        self._wake_ups = 0  # those that found no free slot are not lost: whoever has one looks again
        self._running: dict[str, ChildProcess] = {}
        self._draining = threading.Event()

    @property
    def busy(self) -> int:
        """Slots that run a job now."""
        with self._lock:
            return len(self._running)

    @property
    def draining(self) -> bool:
        """True once `drain` was called."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Claim nothing more; let each running job take a checkpoint and go back to the queue."""
        self._draining.set()
        with self._lock:
            for child in self._running.values():
                child.inbox.put(StopRequested("drain"))
        reach("drain.asked")

    def close(self) -> None:
        """End what still runs or waits. After `drain` and its grace."""
        with self._lock:
            for child in self._running.values():
                child.inbox.put(LeaseLost("the worker stops"))
        for slot in self._slots:
            slot.close()

    def look(self) -> None:
        """Start on what waits, without a message: brokers lose them, and workers that hang take them."""
        if self._draining.is_set() or not (free := len(self._free)) or not self._any_waiting():
            return
        for _ in range(free):
            threading.Thread(target=self.run_until_idle, args=(None,), name="look", daemon=True).start()

    def run_until_idle(self, hint: str | None) -> None:
        """Run jobs one after another at a free slot until none is left that this worker can run.

        A job is claimed only once a process is ready for it: until then another worker may take it, and
        a host on which no process starts costs no job an attempt.

        Args:
            hint: The id in the message; claimed first only if nothing more urgent waits.
        """
        with self._lock:
            self._wake_ups += 1
            if not self._free:
                return
            slot = self._free.pop(0)
        try:
            while True:
                seen = self._wake_ups
                self._run_what_waits(slot, hint)
                hint = None
                with self._lock:
                    # One that came while this slot was looking may be for a job that its look did not see.
                    if self._wake_ups == seen or self._draining.is_set():
                        self._free.append(slot)
                        return
        except BaseException:
            with self._lock:
                self._free.append(slot)
            raise

    def _run_what_waits(self, slot: Slot, hint: str | None) -> None:
        while self._may_claim(slot):
            job = self._claim(hint)
            if job is None:
                return
            hint = None
            with structlog.contextvars.bound_contextvars(job_id=job.id, attempt=job.attempt):
                self._run(slot, job)

    def _may_claim(self, slot: Slot) -> bool:
        # One of Celery's threads waits here, which takes no message meanwhile: only for a job that is there.
        if self._draining.is_set() or not (slot.warm or self._any_waiting()):
            return False
        return slot.wait_until_warm() and not self._draining.is_set()

    def _any_waiting(self) -> bool:
        try:
            with self._database.read() as session:
                return jobs.any_waiting(session, capability=self._capability)
        except StoreUnavailable as error:
            log.warning("nothing claimed: the database is away", error=str(error))
            return False

    def _claim(self, hint: str | None) -> jobs.Job | None:
        def claim(session: Session) -> jobs.Job | None:
            job = jobs.claim(
                session,
                worker_id=self._worker_id,
                capability=self._capability,
                lease_seconds=self._settings.lease_seconds,
                hint=hint,
            )
            if job is not None:
                reach("claim.before_commit")
            return job

        try:
            claimed = self._database.retry(claim)
        except StoreUnavailable as error:
            log.warning("nothing claimed: the database is away", error=str(error))
            return None
        if claimed is not None:
            reach("claim.after_commit")
        return claimed

    def _run(self, slot: Slot, job: jobs.Job) -> None:
        log.info("job claimed", name=job.name, fence=job.fence)
        oom_kills = memory_kills.count()
        child = slot.take()
        keeper = LeaseKeeper(
            self._database,
            job_id=job.id,
            fence=job.fence,
            worker_id=self._worker_id,
            lease_seconds=self._settings.lease_seconds,
            heartbeat_seconds=self._settings.heartbeat_seconds,
            on_request=lambda asked: child.inbox.put(
                StopRequested("cancel" if asked is RequestedAction.CANCEL else "pause")
            ),
            on_lost=lambda why: child.inbox.put(LeaseLost(why)),
        )
        with self._lock:
            self._running[job.id] = child
        try:
            if self._draining.is_set():
                child.inbox.put(StopRequested("drain"))
            order = self._order(slot, job)
            reach("order.before")
            child.order(order)
            reach("order.after")
            graces = Graces(drain=self._settings.drain_seconds)
            ending = supervise(
                child,
                keeper,
                graces=graces,
                stall_seconds=self._settings.stall_seconds,
                on_first_step=slot.warm_up,  # the next job's process gets ready while this one trains
            )
            self._conclude(job, ending, host_memory_killed=memory_kills.count() > oom_kills)
        finally:
            keeper.release()
            with self._lock:
                del self._running[job.id]
            if not self._draining.is_set():
                slot.warm_up()

    def _order(self, slot: Slot, job: jobs.Job) -> RunOrder:
        with self._database.read() as session:
            kept = jobs.checkpoints(session, job.id)
            elapsed = jobs.active_seconds(session, job.id)
        return RunOrder(
            job_id=job.id,
            fence=job.fence,
            attempt=job.attempt,
            spec=job.spec,
            settings=self._settings.model_dump(mode="json"),
            device="cpu" if job.spec.get("resources", {}).get("device") == "cpu" else slot.device,
            elapsed_seconds=elapsed,
            checkpoints=[
                {
                    "step": c.step,
                    "path": c.path,
                    "sha256": c.sha256,
                    "manifest_sha256": c.manifest_sha256,
                    "held_out_loss": (c.metrics or {}).get("held_out_loss"),
                }
                for c in kept
            ],
            speeds=self._speeds,
        )

    def _conclude(self, job: jobs.Job, ending: Ending, *, host_memory_killed: bool) -> None:
        """Write how it ended, under the fence, for as long as the lease can last."""
        write = conclusion(job, ending, host_memory_killed=host_memory_killed)
        if write is None:
            log.warning("the job belongs to another attempt; nothing is written")
            return

        def conclude(session: Session) -> jobs.Job:
            if ending.done is None and ending.killed_for not in {"cancel", "pause", "drain"}:
                message = (
                    f"the job's process ended with {exit_text(ending.returncode)} at step {ending.last_step}"
                )
                events.append(
                    session,
                    job.id,
                    type="worker",
                    level="error",
                    message=message,
                    data=left_by(ending),
                    fence=job.fence,
                )
            after = write(session)
            reach("conclude.before_commit")
            return after

        try:
            reach("conclude.before")
            after = self._database.retry(conclude, seconds=self._settings.lease_seconds)
        except StaleFence:
            log.warning("the job belongs to another attempt; its end was not written")
        except StoreUnavailable as error:
            log.error("the job's end could not be written; it runs again after its lease", error=str(error))
        else:
            reach("conclude.after_commit")
            if after.state is JobState.QUEUED:  # another worker may have a process ready
                enqueue(self._settings, job.id)
            log.info(
                "job ended",
                state=str(after.state),
                step=ending.done.step if ending.done else ending.last_step,
            )


def register(celery: Celery, runner: Runner) -> None:
    """Make `runner` answer the queue's messages. Garbage in a message is a wake-up without a hint."""

    @celery.task(name=RUN_JOB, ignore_result=True)  # type: ignore[untyped-decorator]  # celery has no annotations
    def run_job(job_id: object = None, *_: object, **__: object) -> None:
        started = time.monotonic()
        try:
            runner.run_until_idle(job_id if isinstance(job_id, str) else None)
        except Exception:
            log.exception("a wake-up failed", seconds=round(time.monotonic() - started, 1))
            raise
