"""How much memory the process or its device uses, read cheaply enough for every step.

On a GPU the figures are the caching allocator's; on a CPU they are the process's resident set and the memory
of its cgroup or machine.
"""

import os
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

_SAMPLE_SECONDS = 0.02
"""Reading the allocator costs tens of microseconds; between samples the last one stands."""

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class MemorySample(NamedTuple):
    """Memory in bytes, and `usage`, the allocated share of the total (0..1)."""

    usage: float
    allocated: int
    reserved: int
    peak: int


class MemoryMonitor:
    """Samples one device's memory, at most fifty times a second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self.total_bytes = (
            torch.cuda.get_device_properties(device).total_memory if self._on_gpu else host_memory_bytes()
        )
        self._page = resource.getpagesize()
        self._last = self.sample()
        self._next_at = 0.0

    def recent(self) -> MemorySample:
        """The last sample, or a new one where it is older than 20 ms."""
        now = time.monotonic()
        if now >= self._next_at:
            self._last = self.sample()
            self._next_at = now + _SAMPLE_SECONDS
        return self._last

    def sample(self) -> MemorySample:
        """A new sample."""
        if self._on_gpu:
            stats = torch.cuda.memory_stats(self._device)
            allocated = int(stats.get("allocated_bytes.all.current", 0))
            reserved = int(stats.get("reserved_bytes.all.current", 0))
            peak = int(stats.get("allocated_bytes.all.peak", 0))
        else:
            peak = peak_resident_bytes()
            allocated = reserved = self._resident_bytes() or peak
            peak = max(peak, allocated)
        return MemorySample(allocated / self.total_bytes, allocated, reserved, peak)

    def peak_share(self) -> float:
        """The peak so far as a share of the total (0..1)."""
        return self.sample().peak / self.total_bytes

    def _resident_bytes(self) -> int | None:
        try:
            with open("/proc/self/statm", "rb", buffering=0) as statm:  # noqa: PTH123 -- unbuffered, on the step's path
                return int(statm.read(128).split()[1]) * self._page
        except OSError:
            return None


def peak_resident_bytes() -> int:
    """The process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_memory_bytes() -> int:
    """The memory this process may use: its cgroup's limit, else the machine's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for path in _CGROUP_LIMITS if (text := _read(path)).isdigit()]
    return min([machine, *(limit for limit in limits if limit > 0)])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
