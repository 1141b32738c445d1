"""What every kind of fault needs: an installation, whom to hit, and what came of it."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.store import jobs
from tests.faults.checker import Change
from tests.faults.client import Client
from tests.faults.installation import Installation
from tests.faults.kinds import DRAIN, KILLS


@dataclass(slots=True)
class Fault:
    """One injected fault. `job_id` and `fence` are of the job that it hit, if it hit one.

    `point` is the fault point that it armed: it has hit once a process came by. `drained` is how many seconds
    a worker took to be gone after SIGTERM.
    """

    kind: str
    at: float
    hit: bool = False
    job_id: str | None = None
    fence: int | None = None
    point: str | None = None
    drained: float | None = None
    took: float = 0.0  # seconds until the injector was free again


class Injecting:
    """Injects faults by name; everything random comes from the seed."""

    def __init__(self, installation: Installation, client: Client, draw: random.Random) -> None:
        self.installation, self.client, self.draw = installation, client, draw
        self.faults: list[Fault] = []

    def inject(self, kind: str) -> Fault:
        fault = Fault(kind, time.time())
        self.faults.append(fault)
        began = time.monotonic()
        getattr(self, kind.replace(" ", "_"))(fault)
        fault.took = time.monotonic() - began
        return fault

    def victim(self, fault: Fault) -> str | None:
        """A worker that trains now; waited for a little, since workers are between jobs at times."""
        deadline = time.monotonic() + 8.0
        while time.monotonic() < deadline:
            held = {
                worker: job
                for worker, job in self.installation.holders().items()
                if job[1] == "running" and worker in self.installation.workers
            }
            if held:
                worker = self.draw.choice(sorted(held))
                fault.job_id, _, fault.fence = held[worker]
                fault.hit, fault.at = True, time.time()
                return worker
            time.sleep(0.05)
        return None

    def judge(self, changes: Sequence[Change]) -> None:
        """Say what hit, now that all is over.

        A fault that armed a point did where a process came by; a kill or a drain where the job went back to
        the queue for it, since a job may end in the very moment that its process is chosen.
        """
        for met in self.installation.hits():
            armed = [f for f in self.faults if f.point == met["point"] and f.at <= met["at"]]
            if armed:
                armed[-1].hit = True
        given_back: dict[tuple[str, int], float] = {
            (change.job_id, change.old_fence): change.at
            for change in changes
            if change.kind == "state" and change.new == JobState.QUEUED
        }
        for fault in self.faults:
            if fault.kind in {*KILLS, DRAIN} and fault.job_id is not None and fault.fence is not None:
                at = given_back.get((fault.job_id, fault.fence), 0.0)
                fault.hit = fault.hit and at >= fault.at

    def somebody_runs(self, fault: Fault) -> None:
        deadline = time.monotonic() + 5.0
        while not (running := bool(self.installation.holders())) and time.monotonic() < deadline:
            time.sleep(0.05)
        fault.hit = running

    def arm(self, fault: Fault, point: str, action: str = "kill", *, skip: int = 0, times: int = 1) -> None:
        fault.point = point
        self.installation.arm(point, action, skip=skip, times=times)


def newest(s: Session) -> list[jobs.Job]:
    """The last hundred jobs."""
    return jobs.list_jobs(s, tenant=None, limit=100)
