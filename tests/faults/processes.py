"""Faults of processes: workers and jobs that are killed, drained or frozen, and clocks that are wrong."""

import contextlib
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

from halfstep.service.contract.states import JobState
from halfstep.service.store import jobs
from tests.e2e.cluster import SOURCES, children_of
from tests.faults.injecting import Fault, Injecting
from tests.faults.installation import LEASE_SECONDS

MOST_FROZEN_SECONDS = 10.0 * LEASE_SECONDS  # where every other worker is busy with a long job
ZOMBIE_SECONDS = 0.3  # a job's process that woke before its worker, which ends it, has to write

CLOCK = Path(__file__).parent / "clock"  # its sitecustomize shifts the clock


class ProcessFaults(Injecting):
    """Each hits a worker that trains, and its job."""

    def kill_worker(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            self.installation.kill(worker)

    def kill_child(self, fault: Fault) -> None:
        worker = self.victim(fault)
        child = None if worker is None else self.installation.child(worker)
        fault.hit = child is not None
        if child is not None:
            os.kill(child, signal.SIGKILL)

    def term_then_kill_worker(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            process = self.installation.cluster.processes[worker]
            process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            process.kill()

    def drain_worker(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            process = self.installation.cluster.processes[worker]
            self.installation.kill(worker, signal.SIGTERM)

            def wait() -> None:
                process.wait()
                fault.drained = time.time() - fault.at

            threading.Thread(target=wait, name="drained", daemon=True).start()

    def freeze_worker(self, fault: Fault) -> None:
        """Its job's process trains on, and does not learn that the job belongs to another."""
        worker = self.victim(fault)
        if worker is not None:
            self._freeze(self.installation.pid(worker), [], fault)

    def freeze_worker_and_child(self, fault: Fault) -> None:
        worker = self.victim(fault)
        if worker is not None:
            pid = self.installation.pid(worker)
            self._freeze(pid, children_of(pid), fault)

    def _freeze(self, worker: int, children: list[int], fault: Fault) -> None:
        """Until another holds the job, and in half of all cases longer.

        The moment after a claim tells most: the new attempt has not yet cut the record back, so that nothing
        but the fence refuses what the old one adds. That moment is made long enough.
        """
        longer = self.draw.choice((0.0, self.draw.uniform(0.0, 2.0 * LEASE_SECONDS)))
        for pid in (worker, *children):
            send(pid, signal.SIGSTOP)
        deadline = time.monotonic() + MOST_FROZEN_SECONDS
        while not self._moved_on(fault) and time.monotonic() < deadline:
            time.sleep(0.01)
        newer = [] if longer else self._processes_of(fault.job_id)
        for pid in newer:
            send(pid, signal.SIGSTOP)
        time.sleep(longer)
        for pid in children:
            send(pid, signal.SIGCONT)
        if children:
            time.sleep(ZOMBIE_SECONDS)
        for pid in (*newer, worker):
            send(pid, signal.SIGCONT)

    def _processes_of(self, job_id: str | None) -> list[int]:
        """The worker that holds the job now, and its children."""
        for worker, (held, _, _) in self.installation.holders().items():
            if held == job_id:
                pid = self.installation.pid(worker)
                return [pid, *children_of(pid)]
        return []

    def _moved_on(self, fault: Fault) -> bool:
        """Another attempt has claimed the job, or none will."""
        if fault.job_id is None or fault.fence is None:
            return True
        job = self.installation.look(partial(jobs.get, job_id=fault.job_id, tenant=None))
        return job.fence > fault.fence or job.state.is_terminal or job.state is JobState.PAUSED

    def clock_an_hour_ahead(self, fault: Fault) -> None:
        self._restart_at(fault, 3600)

    def clock_an_hour_behind(self, fault: Fault) -> None:
        self._restart_at(fault, -3600)

    def _restart_at(self, fault: Fault, shift: int) -> None:
        """A worker starts again on a host whose clock is wrong; leases go by the database's."""
        worker = self.victim(fault)
        if worker is not None:
            path = os.pathsep.join((str(CLOCK), SOURCES))
            environment = {"PYTHONPATH": path, "HALFSTEP_TEST_CLOCK_SHIFT": str(shift)}
            self.installation.restart_under(worker, environment)


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
