"""Figures of the last moments of a run: how fast it goes and how long its steps take.

Per-step figures are the engine's rows; nothing here is part of a checkpoint.
"""

import math
import time
from collections import deque
from collections.abc import Sequence

from halfstep.service.contract.metrics import StepMetrics, StepTimes, step_times

_WINDOW_STEPS = 1000
_WINDOW_SECONDS = 10.0


class RecentSteps:
    """A window over the newest steps.

    Rates are wall-clock rates of training: evaluation and checkpoints are left out.
    """

    def __init__(self) -> None:
        self._times_ms: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._marks: deque[tuple[float, int, int]] = deque()
        self._away = 0.0
        self._left_at: float | None = None
        self._steps = 0
        self._samples = 0
        self.mark()

    def add(self, rows: Sequence[StepMetrics]) -> None:
        """Take finished steps into account."""
        self._times_ms.extend(row.step_time_ms for row in rows if not math.isnan(row.step_time_ms))

    def count(self, samples: int) -> None:
        """A step over so many samples was taken."""
        self._steps += 1
        self._samples += samples

    def leave(self) -> None:
        """What follows is no training."""
        self._left_at = time.monotonic()

    def come_back(self) -> None:
        """Training goes on."""
        if self._left_at is not None:
            self._away += time.monotonic() - self._left_at
            self._left_at = None

    def mark(self) -> None:
        """Remember how far the run is now.

        The rates are taken between the oldest mark kept and the newest.
        """
        now = time.monotonic() - self._away
        self._marks.append((now, self._steps, self._samples))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _WINDOW_SECONDS:
            self._marks.popleft()

    def rates(self) -> tuple[float, float]:
        """Steps and samples per second."""
        (began, steps, samples), (ended, last_steps, last_samples) = self._marks[0], self._marks[-1]
        seconds = ended - began
        if seconds <= 0:
            return 0.0, 0.0
        return (last_steps - steps) / seconds, (last_samples - samples) / seconds

    def step_times_ms(self) -> StepTimes:
        """The median, the 95th percentile and the maximum of the step times in the window, in ms."""
        return step_times(self._times_ms)
