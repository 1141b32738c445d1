"""How fast a run goes: step times, samples per second and the host's reads of the device."""

import time
from collections import deque
from typing import Any, Protocol

import torch

from halfstep.service.contract.metrics import step_times
from halfstep.worker.amp.record.ring import RING_STEPS

_WINDOW_STEPS = 1000


class _Marks(Protocol):
    """Moments on the line of steps."""

    def mark(self) -> Any:
        """Now."""

    def milliseconds(self, begin: Any, end: Any) -> float:
        """From one moment to another."""


class _HostMarks:
    """Moments of the host's clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


class _DeviceMarks:
    """Moments of a GPU's own line of work, where the host runs ahead; read once they have passed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Used in turn: a step ends with one mark and may begin with another, and RING_STEPS may be unread.
        self._events: list[torch.cuda.Event] = []
        self._used = 0

    def mark(self) -> torch.cuda.Event:
        if len(self._events) <= self._used:
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]  # torch's own
        event = self._events[self._used]
        self._used = (self._used + 1) % (2 * RING_STEPS + 2)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(begin.elapsed_time(end))


class StepClock:
    """Time from the end of one step to the end of the next; pauses are left out.

    On a GPU it is the device's own time, by events that the host reads with the record, never waiting for
    one.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._enabled = enabled
        self._marks: _Marks = _DeviceMarks(device) if device.type == "cuda" else _HostMarks()
        self._mark: Any = None
        self._ended: list[tuple[Any, Any, int]] = []
        self._times_ms: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._samples: deque[int] = deque(maxlen=_WINDOW_STEPS)
        self._max_ms = 0.0
        self._steps = 0
        self._host_syncs = 0

    def start(self) -> None:
        """A step begins; a running clock runs on."""
        if self._mark is None and self._enabled:
            self._mark = self._marks.mark()

    def pause(self) -> None:
        """What follows is no training: evaluation, a checkpoint, the wait for the caller."""
        self._mark = None

    def finish(self, *, samples: int, host_syncs: int) -> None:
        """A step ends."""
        self._steps += 1
        self._host_syncs += host_syncs
        if self._enabled:
            begin, self._mark = self._mark, self._marks.mark()
            self._ended.append((begin, self._mark, samples))

    def read(self, steps: int) -> list[float]:
        """Milliseconds of each of the `steps` steps that ended since the last call, NaN without monitoring.

        The device has finished them all.
        """
        ended, self._ended = self._ended, []
        if not self._enabled:
            return [float("nan")] * steps
        milliseconds = self._marks.milliseconds
        times = [milliseconds(begin, end) for begin, end, _ in ended]
        self._times_ms.extend(times)
        self._samples.extend(samples for _, _, samples in ended)
        self._max_ms = max(self._max_ms, *times, 0.0)
        return times

    def forget(self) -> None:
        """Leave out the steps that ended and were not read."""
        self._ended.clear()
        self._mark = None

    def metrics(self) -> dict[str, Any]:
        """Rates over the last 1000 steps read; empty where monitoring is off or no step was read."""
        if not self._times_ms:
            return {}
        seconds = sum(self._times_ms) / 1e3
        times = step_times(self._times_ms)
        return {
            "steps_per_second": len(self._times_ms) / seconds if seconds > 0 else 0.0,
            "samples_per_second": sum(self._samples) / seconds if seconds > 0 else 0.0,
            "step_time_ms": {"p50": times.p50, "p95": times.p95, "max": self._max_ms},
            "host_syncs_per_step": self._host_syncs / self._steps,
        }
