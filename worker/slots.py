"""The places at which jobs run: one per GPU, or the configured number on a CPU; each keeps a warm process.

Devices are counted through the driver's management library, so that this process never imports torch and
never holds a CUDA context.
"""

import contextlib
import os
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

import structlog

from halfstep.service.errors import ConfigurationError
from halfstep.service.settings import Settings
from halfstep.worker.process import ChildProcess, Spawner
from halfstep.worker.protocol import Ready

log = structlog.get_logger(__name__)

READY_SECONDS = 180.0  # until torch is imported, from however slow a disk

# A training step frees what the next one allocates again. By its changing defaults glibc may give that back
# to the kernel each time, and the next step faults thousands of pages in. With these it keeps up to 1 GiB,
# and every block up to 32 MiB, the most it allows. The resident set so stays at what the job once needed.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
}


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


def gpu_ids() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would name for each visible GPU; empty without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    try:
        import pynvml  # noqa: PLC0415 - optional: a CPU worker needs no NVIDIA library
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def build_slots(settings: Settings, spawner: Spawner) -> list[Slot]:
    """One slot per GPU, or `worker_slots` on the CPU, as `worker_device` asks.

    Raises:
        ConfigurationError: A GPU was asked for and none is visible.
    """
    gpus = [] if settings.worker_device == "cpu" else gpu_ids()
    if settings.worker_device == "cuda" and not gpus:
        raise ConfigurationError(
            "HALFSTEP_WORKER_DEVICE=cuda, but no NVIDIA GPU is visible; "
            "check the driver and CUDA_VISIBLE_DEVICES, or set it to auto or cpu"
        )
    # torch makes this directory when it is imported: beside our own data, not in the host's /tmp, where it
    # would outlive the installation and be lost with a container.
    kept = {
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", str(settings.data_dir / "cache" / "torchinductor")
        )
    }
    if gpus:
        return [
            Slot(index, "cuda:0", kept | {"CUDA_VISIBLE_DEVICES": gpu}, spawner)
            for index, gpu in enumerate(gpus)
        ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.worker_threads or max(1, cores // settings.worker_slots)
    environment = kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # By default threads spin while they wait for each other. Beside anything else that runs on the
        # machine, the API or a second job, that makes steps several times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        **ALLOCATOR,
    }
    environment |= {name: os.environ[name] for name in ("OMP_WAIT_POLICY", *ALLOCATOR) if name in os.environ}
    return [Slot(index, "cpu", environment, spawner) for index in range(settings.worker_slots)]
