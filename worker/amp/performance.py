"""How fast a run goes: step times, samples per second and the host's reads of the device."""

import time
from collections import deque
from typing import Any

_WINDOW_STEPS = 1000


class StepClock:
    """Wall-clock time from the end of one step to the end of the next; pauses are left out.

    On a GPU the host runs ahead of the device, so a single step's time is the host's; over many steps it is
    the device's, since the host is held back every 32 steps.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._mark: float | None = None
        self._times_ms: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._samples: deque[int] = deque(maxlen=_WINDOW_STEPS)
        self._max_ms = 0.0
        self._steps = 0
        self._host_syncs = 0

    def start(self) -> None:
        """A step begins; a running clock runs on."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def pause(self) -> None:
        """What follows is no training: evaluation, a checkpoint, the wait for the caller."""
        self._mark = None

    def finish(self, *, samples: int, host_syncs: int) -> float:
        """A step ends; returns its time in milliseconds, NaN where monitoring is off."""
        self._steps += 1
        self._host_syncs += host_syncs
        now = time.perf_counter()
        elapsed_ms = (now - (self._mark if self._mark is not None else now)) * 1e3
        self._mark = now
        if not self._enabled:
            return float("nan")
        self._times_ms.append(elapsed_ms)
        self._samples.append(samples)
        self._max_ms = max(self._max_ms, elapsed_ms)
        return elapsed_ms

    def metrics(self) -> dict[str, Any]:
        """Rates over the last 1000 steps; empty where monitoring is off or no step has finished."""
        if not self._times_ms:
            return {}
        seconds = sum(self._times_ms) / 1e3
        ordered = sorted(self._times_ms)
        return {
            "steps_per_second": len(ordered) / seconds if seconds > 0 else 0.0,
            "samples_per_second": sum(self._samples) / seconds if seconds > 0 else 0.0,
            "step_time_ms": {
                "p50": ordered[len(ordered) // 2],
                "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
                "max": self._max_ms,
            },
            "host_syncs_per_step": self._host_syncs / self._steps,
        }
