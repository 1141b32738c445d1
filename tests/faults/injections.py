"""The faults, by name: each does one thing to an installation, at a random moment of a random job.

A fault answers whom it hit; what came of it is the checker's to say.
"""

import random
import threading
import time
from functools import partial

from halfstep.service.contract.states import JobState
from halfstep.service.store import jobs
from tests.faults.client import Client
from tests.faults.disk_faults import DiskFaults
from tests.faults.injecting import Fault, newest
from tests.faults.installation import Installation
from tests.faults.kinds import POINTS
from tests.faults.processes import ProcessFaults
from tests.faults.server_faults import ServerFaults

__all__ = ["Fault", "Injector"]


class Injector(ProcessFaults, ServerFaults, DiskFaults):
    """All of them, with what a client does: cancels, pauses, and points armed anywhere."""

    def __init__(self, installation: Installation, client: Client, draw: random.Random) -> None:
        super().__init__(installation, client, draw)
        self.crowded = threading.Event()  # asks for more jobs than there are workers
        self.to_resume: set[str] = set()  # asked to pause; whoever waits for the end resumes them

    def hung_step(self, fault: Fault) -> None:
        self.arm(fault, "child.step", "hang", skip=self.draw.randrange(40))

    def crash_point(self, fault: Fault) -> None:
        # One that is armed already, the step that is to hang above all, stays as it is.
        point = self.draw.choice([each for each in POINTS if each not in self.installation.armed()])
        self.arm(fault, point, times=self.draw.randint(1, 2), skip=self.draw.randrange(4))

    def cancel_what_is_queued(self, fault: Fault) -> None:
        self.crowded.set()
        self._cancel(fault, self._find(JobState.QUEUED))
        self.crowded.clear()

    def cancel_what_starts(self, fault: Fault) -> None:
        self._cancel(fault, self._find(JobState.STARTING))

    def cancel_what_runs(self, fault: Fault) -> None:
        self._cancel(fault, self._find(JobState.RUNNING))

    def cancel_twice(self, fault: Fault) -> None:
        job_id = self._find(JobState.RUNNING)
        self._cancel(fault, job_id)
        self._cancel(fault, job_id)

    def cancel_what_pauses(self, fault: Fault) -> None:
        job_id = self._pause()
        self._cancel(fault, job_id if self._state(job_id) is JobState.PAUSING else None)

    def cancel_what_is_paused(self, fault: Fault) -> None:
        job_id = self._pause()
        deadline = time.monotonic() + 5.0
        while self._state(job_id) is JobState.PAUSING and time.monotonic() < deadline:
            time.sleep(0.02)
        self._cancel(fault, job_id if self._state(job_id) is JobState.PAUSED else None)

    def pause_and_resume(self, fault: Fault) -> None:
        fault.job_id = self._pause()
        fault.hit = fault.job_id is not None

    def _pause(self) -> str | None:
        """Ask a job that runs to pause; whoever waits for the end resumes it where it is still paused."""
        job_id = self._find(JobState.RUNNING)
        if job_id is None:
            return None
        self.to_resume.add(job_id)
        return job_id if self._insist(f"/jobs/{job_id}/pause", job_id) else None

    def _cancel(self, fault: Fault, job_id: str | None) -> None:
        if job_id is not None:
            fault.job_id = job_id
            fault.hit = self._insist(f"/jobs/{job_id}/cancel", job_id)

    def _insist(self, path: str, job_id: str) -> bool:
        """Ask until there is an answer; whether it was yes."""
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            status, _ = self.client.ask("POST", path, job_id=job_id)
            if status not in {None, 503}:
                return status == 200
            time.sleep(0.1)
        return False

    def _find(self, state: JobState) -> str | None:
        """A job in this state; waited for a little."""
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            found = [job.id for job in self.installation.look(newest) if job.state is state]
            if found:
                return self.draw.choice(found)
            time.sleep(0.01)
        return None

    def _state(self, job_id: str | None) -> JobState | None:
        if job_id is None:
            return None
        return self.installation.look(partial(jobs.get, job_id=job_id, tenant=None)).state

    def resume_paused(self) -> None:
        for job_id in list(self.to_resume):
            state = self.installation.look(partial(jobs.get, job_id=job_id, tenant=None)).state
            if state.is_terminal:
                self.to_resume.discard(job_id)
            elif state == "paused":
                self.client.ask("POST", f"/jobs/{job_id}/resume", job_id=job_id)
