"""What the store promises, as plain Python: dictionaries and lists, no SQL, no clock.

`test_state_machine` does everything twice, here and in a database, and compares. Time is one flag on a job:
its lease has run out or not. A call that the store must refuse raises the store's own error here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from halfstep.service.errors import Conflict, InvalidRequest, NotFound, StaleFence

# Written out once more, so that an edge added to the product by mistake is not thereby allowed.
EDGES = {
    "queued": {"starting", "paused", "cancelled", "failed"},
    "starting": {"running", "queued", "cancelling", "failed"},
    "running": {"succeeded", "failed", "queued", "pausing", "cancelling"},
    "pausing": {"paused", "cancelling", "succeeded", "failed"},
    "paused": {"queued", "cancelled"},
    "cancelling": {"cancelled", "succeeded", "failed"},
    "succeeded": set[str](),
    "failed": set[str](),
    "cancelled": set[str](),
}
TERMINAL = {"succeeded", "failed", "cancelled"}
LEASED = {"starting", "running", "pausing", "cancelling"}


@dataclass(frozen=True)
class Hold:
    """What a claim gave a worker. It keeps it for ever; the store decides what it is still good for."""

    job: str
    fence: int
    worker: str


@dataclass
class ModelJob:
    """One job. `rows[n - 1]` is the fence under which step n was written."""

    precedence: int
    max_attempts: int
    state: str = "queued"
    fence: int = 0
    attempt: int = 1
    worker: str | None = None
    expired: bool = False
    requested: str | None = None
    rows: list[int] = field(default_factory=list)
    newest_batch: tuple[int, int] | None = None  # fence and first step of the last append
    checkpoints: dict[int, int] = field(default_factory=dict)  # step → fence
    notes: list[int] = field(default_factory=list)  # fences under which an event was written
    history: list[str] = field(default_factory=lambda: ["queued"])


class Model:
    """All jobs, in the order in which they were submitted."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[str, tuple[str, str]] = {}  # idempotency key → body, job

    def repeats(self, key: str | None, body: str) -> str | None:
        """The job that a submission must return instead of making one."""
        if key is None or key not in self.keys:
            return None
        known, job_id = self.keys[key]
        if known != body:
            raise InvalidRequest("another body")
        return job_id

    def submit(self, job_id: str, *, priority: int, max_attempts: int, key: str | None, body: str) -> None:
        self.jobs[job_id] = ModelJob(-priority, max_attempts)
        if key is not None:
            self.keys[key] = body, job_id

    def claimable(self) -> str | None:
        queued = [
            (job.precedence, n, i) for n, (i, job) in enumerate(self.jobs.items()) if job.state == "queued"
        ]
        return min(queued)[2] if queued else None

    def claim(self, worker: str) -> Hold | None:
        job_id = self.claimable()
        if job_id is None:
            return None
        job = self.jobs[job_id]
        job.fence += 1
        job.worker, job.expired = worker, False
        self._enter(job, "starting")
        return Hold(job_id, job.fence, worker)

    def is_live(self, hold: Hold) -> bool:
        job = self.jobs.get(hold.job)
        return job is not None and job.fence == hold.fence and job.state in LEASED

    def renew(self, hold: Hold, worker: str) -> str | None:
        job = self._held(hold)
        if job.worker != worker:
            raise StaleFence("another worker's")
        job.expired = False
        return job.requested

    def mark_running(self, hold: Hold) -> None:
        job = self._held(hold, missing=NotFound)
        if job.state == "starting":
            self._enter(job, "running")
            if job.requested == "pause":
                self._enter(job, "pausing")

    def append(self, hold: Hold, first: int, count: int) -> None:
        job = self._held(hold)
        last = first + count - 1
        if job.newest_batch == (hold.fence, first) and last == len(job.rows):
            return
        if first != len(job.rows) + 1:
            raise Conflict("a gap")
        job.rows += [hold.fence] * count
        job.newest_batch = hold.fence, first

    def truncate(self, hold: Hold, step: int) -> int:
        job = self._held(hold)
        removed = max(0, len(job.rows) - step)
        if removed:
            del job.rows[step:]
            job.newest_batch = None
        return removed

    def checkpoint(self, hold: Hold, step: int) -> None:
        self._held(hold).checkpoints[step] = hold.fence

    def drop(self, hold: Hold, step: int) -> None:
        self._held(hold).checkpoints.pop(step, None)

    def note(self, hold: Hold) -> None:
        self._held(hold).notes.append(hold.fence)

    def finish(self, hold: Hold, state: str) -> None:
        job = self._there(hold.job)
        if job.fence == hold.fence and job.state == state:
            return
        self._held(hold)
        self._enter(job, state)

    def release(self, hold: Hold, *, charge: bool) -> None:
        job = self._there(hold.job)
        if job.fence == hold.fence and job.state in {"queued", "paused"}:
            return
        self._held(hold)
        self._give_back(job, charge=charge)

    def expire(self, job_id: str) -> None:
        if job_id in self.jobs:
            self.jobs[job_id].expired = self.jobs[job_id].state in LEASED

    def reap(self) -> dict[str, str]:
        lost = {job_id: job for job_id, job in self.jobs.items() if job.state in LEASED and job.expired}
        for job in lost.values():
            self._give_back(job, charge=True)
        return {job_id: job.state for job_id, job in lost.items()}

    def cancel(self, job_id: str) -> None:
        job = self._there(job_id)
        if job.state in {"cancelled", "cancelling"}:
            return
        if job.state in TERMINAL:
            raise Conflict("ended")
        if job.state in LEASED:
            self._enter(job, "cancelling")
            job.requested = "cancel"
        else:
            self._enter(job, "cancelled")

    def pause(self, job_id: str) -> None:
        job = self._there(job_id)
        match job.state:
            case "queued":
                self._enter(job, "paused")
            case "running":
                self._enter(job, "pausing")
                job.requested = "pause"
            case "starting":
                job.requested = "pause"
            case "cancelling" | "succeeded" | "failed" | "cancelled":
                raise Conflict("too late")

    def resume(self, job_id: str) -> None:
        job = self._there(job_id)
        if job.state == "paused":
            self._enter(job, "queued")
        elif job.requested is not None or job.state in {"pausing", *TERMINAL}:
            raise Conflict("not now")

    def delete(self, job_id: str) -> None:
        if self._there(job_id).state not in TERMINAL:
            raise Conflict("not ended")
        del self.jobs[job_id]
        self.keys = {key: kept for key, kept in self.keys.items() if kept[1] != job_id}

    def _there(self, job_id: str) -> ModelJob:
        if job_id not in self.jobs:
            raise NotFound("no job")
        return self.jobs[job_id]

    def _held(self, hold: Hold, *, missing: type[Exception] = StaleFence) -> ModelJob:
        job = self.jobs.get(hold.job)
        if job is None:
            raise missing("deleted")
        if job.fence != hold.fence or job.state not in LEASED:
            raise StaleFence("held no longer")
        return job

    def _give_back(self, job: ModelJob, *, charge: bool) -> None:
        if job.state in {"cancelling", "pausing"}:
            self._enter(job, {"cancelling": "cancelled", "pausing": "paused"}[job.state])
        elif charge and job.attempt == job.max_attempts:
            self._enter(job, "failed")
        else:
            asked = job.requested
            job.attempt += charge
            self._enter(job, "queued")
            if asked == "pause":
                self._enter(job, "paused")

    def _enter(self, job: ModelJob, state: str) -> None:
        if state not in EDGES[job.state]:
            raise Conflict(f"{job.state} to {state}")
        job.state = state
        job.history.append(state)
        if state not in LEASED:
            job.worker, job.requested, job.expired = None, None, False


def violations(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """What is wrong with a job's states, seen earlier and now, whatever any model says."""
    found = []
    if list(after[: len(before)]) != list(before):
        found.append(f"the past was rewritten: {before} became {after}")
    found += [f"{a} to {b} is no edge" for a, b in pairwise(after) if b not in EDGES[a]]
    if not after or after[0] != "queued":
        found.append("a job begins queued")
    return found
