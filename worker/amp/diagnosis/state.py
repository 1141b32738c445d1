"""What a run has seen so far: the counters and the short histories that its statistics are made of."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfstep.worker.amp.record.rows import StepRow

HISTORY_STEPS = 10_000


@dataclass(slots=True)
class MixedPrecisionState:
    """Counters over all steps of a run, read from the device in batches, every 32 steps at the latest."""

    current_scale: float = 1.0
    """The scale that the next step will use."""
    total_steps: int = 0
    """Optimizer steps attempted, skipped ones included."""
    overflow_count: int = 0
    underflow_count: int = 0
    nan_count: int = 0
    skipped_steps: int = 0
    average_scale: float = 0.0
    """Running mean of the scales used."""
    scale_history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))
    memory_usage: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))

    def count(self, rows: Sequence[StepRow]) -> None:
        """Take finished steps into account, in order."""
        steps, average = self.total_steps, self.average_scale
        for row in rows:
            steps += 1
            # One by one: the mean must not depend on how many steps are read at once.
            average += (row.scale - average) / steps
            self.overflow_count += row.overflow
            self.underflow_count += row.underflow
            self.nan_count += row.nan
            self.skipped_steps += row.skipped
        self.total_steps, self.average_scale = steps, average
        self.scale_history.extend([row.scale for row in rows])
        self.memory_usage.extend([row.memory_usage for row in rows])

    def state_dict(self) -> dict[str, Any]:
        """Primitives only; the histories stay behind."""
        return {
            "current_scale": self.current_scale,
            "total_steps": self.total_steps,
            "overflow_count": self.overflow_count,
            "underflow_count": self.underflow_count,
            "nan_count": self.nan_count,
            "skipped_steps": self.skipped_steps,
            "average_scale": self.average_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the histories start empty."""
        for name in self.state_dict():
            setattr(self, name, state[name])
        self.scale_history.clear()
        self.memory_usage.clear()
