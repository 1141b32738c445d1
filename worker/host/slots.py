"""A place at which jobs run, and the process that waits there with torch imported."""

import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

import structlog

from halfstep.worker.host.process import ChildProcess, Spawner
from halfstep.worker.protocol import Ready

log = structlog.get_logger(__name__)

READY_SECONDS = 180.0  # until torch is imported, from however slow a disk


@dataclass(slots=True)
class Slot:
    """One device, or one share of the CPU, and the process that waits there with torch imported."""

    index: int
    device: str  # as the job's process names it: "cpu", or "cuda:0" since it sees only its own GPU
    environment: dict[str, str]
    spawner: Spawner
    _warm: ChildProcess | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def warm_up(self, *, probe: bool = False) -> ChildProcess:
        """Have a process waiting; returns it. With `probe` a new one also reports what it found."""
        with self._lock:
            if self._warm is None or not self._warm.alive:
                self._warm = self._spawn(probe=probe)
            return self._warm

    @property
    def warm(self) -> bool:
        """Whether a process waits that is ready for an order."""
        with self._lock:
            return self._warm is not None and self._warm.alive and self._warm.ready.done()

    def wait_until_warm(self) -> bool:
        """Wait for the waiting process to be ready; False, and a line in the log, where none can be had."""
        child = self.warm_up()
        try:
            child.ready.result(timeout=READY_SECONDS)
        except FutureTimeoutError:
            log.error("the job's process did not start", slot=self.index, seconds=READY_SECONDS)
            self.close()
        except RuntimeError as error:
            log.error("the job's process cannot start", slot=self.index, error=str(error))
        else:
            return True
        return False

    def take(self) -> ChildProcess:
        """The waiting process, or a new one; it takes its order as soon as torch is imported."""
        with self._lock:
            child, self._warm = self._warm, None
        if child is not None and child.alive:
            return child
        log.info("no process is warm; the job waits for a new one", slot=self.index)
        return self._spawn(probe=False)

    def close(self) -> None:
        """End the waiting process."""
        with self._lock:
            child, self._warm = self._warm, None
        if child is not None:
            child.discard()

    def _spawn(self, *, probe: bool) -> ChildProcess:
        began = time.monotonic()
        child = self.spawner.spawn(self.environment, probe=probe)

        def tell(ready: "Future[Ready]") -> None:
            if ready.exception() is None:
                seconds = round(time.monotonic() - began, 2)
                log.debug("a process is warm", slot=self.index, pid=child.pid, seconds=seconds)

        child.ready.add_done_callback(tell)
        return child
