"""The places at which this host runs jobs: one per GPU, or the configured number on a CPU.

Devices are counted through the driver's management library, so that this process never imports torch and
never holds a CUDA context.
"""

import contextlib
import os

from halfstep.service.errors import ConfigurationError
from halfstep.service.settings import Settings
from halfstep.worker.host.process import Spawner
from halfstep.worker.host.slots import Slot

# A training step frees what the next one allocates again. By its changing defaults glibc may give that back
# to the kernel each time, and the next step faults thousands of pages in. With these it keeps up to 1 GiB,
# and every block up to 32 MiB, the most it allows. The resident set so stays at what the job once needed.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
}


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
