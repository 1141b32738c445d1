"""The account of a run: steps under way, finished steps that are not reported yet, what the epoch comes to.

It counts; what is done with the figures is decided by the run. Part of it is in every checkpoint.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from halfstep.service.contract.metrics import Evaluation, LiveStats, StepMetrics
from halfstep.worker.amp.record.rows import StepRow
from halfstep.worker.training.checkpoints.writing import HELD_OUT_LOSS
from halfstep.worker.training.data.plan import Position
from halfstep.worker.training.progress import RecentSteps


class Account:
    """What the steps of a run came to.

    Attributes:
        recent: how fast the run goes.
        evaluation: the newest one; None before the first.

    Args:
        patience: Skipped steps in a row that make a run hopeless.
    """

    def __init__(self, *, patience: int) -> None:
        self.recent = RecentSteps()
        self.evaluation: Evaluation | None = None
        self._patience = patience
        self._unread: deque[tuple[int, Position]] = deque()
        self._rows: list[StepMetrics] = []
        self._skipped: list[tuple[int, Position]] = []
        self._epoch, self._epoch_loss, self._epoch_steps = 1, 0.0, 0
        self._memory_peak = 0
        self._last_loss = math.nan

    def begin(self, step: int, position: Position) -> None:
        """The step is about to be taken, with the batches at `position`; its row comes later."""
        self._unread.append((step, position))

    def place_of(self, step: int) -> Position | None:
        """Where the batches of a step lie whose row is not taken in yet; None for any other step."""
        return next((position for begun, position in self._unread if begun == step), None)

    def finish(self, rows: Sequence[StepRow]) -> None:
        """Take in the rows of steps that were begun, in their order."""
        for row in rows:
            _, position = self._unread.popleft()
            if row.skipped:
                self._skipped.append((row.step, position))
            # The engine tells of a hopeless run at its next decision, when better steps may have followed.
            elif self._skipped and len(self._skipped) < self._patience:
                self._skipped.clear()
            epoch = position.epoch
            if epoch != self._epoch:
                self._epoch, self._epoch_loss, self._epoch_steps = epoch, 0.0, 0
            self._epoch_loss += row.loss
            self._epoch_steps += 1
            self._rows.append(_metrics(row, epoch))
        self._last_loss = rows[-1].loss
        self._memory_peak = max(self._memory_peak, *(row.memory_peak_bytes for row in rows))

    @property
    def waiting(self) -> int:
        """Finished steps that are not reported yet."""
        return len(self._rows)

    def take(self) -> list[StepMetrics]:
        """The finished steps that are not reported yet, which now count as reported."""
        rows, self._rows = self._rows, []
        return rows

    @property
    def skipped(self) -> list[tuple[int, Position]]:
        """Step and place of each step of the latest run of skips, the hopeless one where there was one."""
        return list(self._skipped)

    def live(self, stats: Mapping[str, Any]) -> LiveStats:
        """The summary's figures, from the engine's statistics and the run's own."""
        performance = stats["performance_metrics"]
        steps_per_second, samples_per_second = self.recent.rates()
        times = self.recent.step_times_ms()
        return LiveStats(
            current_scale=stats["current_scale"],
            memory_peak_bytes=self._memory_peak,
            steps_per_second=steps_per_second,
            samples_per_second=samples_per_second,
            step_time_ms_p50=times.p50,
            step_time_ms_p95=times.p95,
            step_time_ms_max=times.max,
            host_syncs_per_step=performance.get("host_syncs_per_step", math.nan),
            overflow_budget_exceeded=performance.get("overflow_budget_exceeded", False),
            last_overflow=stats["last_overflow"],
        )

    def figures(self, step: int) -> dict[str, float]:
        """What a checkpoint of `step` is told with: the figures that are finite."""
        figures = {
            "epoch": float(self._epoch),
            "loss": self._last_loss,
            "average_loss": self._epoch_loss / max(1, self._epoch_steps),
        }
        if self.evaluation is not None and self.evaluation.step == step:
            figures[HELD_OUT_LOSS] = self.evaluation.loss
            figures |= {f"held_out_{name}": value for name, value in self.evaluation.metrics.items()}
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "skipped": [[step, place.epoch, place.group] for step, place in self._skipped],
            "epoch": [self._epoch, self._epoch_loss, self._epoch_steps],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._skipped = [(step, Position(epoch, group)) for step, epoch, group in state["skipped"]]
        self._epoch, self._epoch_loss, self._epoch_steps = state["epoch"]


def _metrics(row: StepRow, epoch: int) -> StepMetrics:
    """The row as it is reported: by place, since this runs for every step; `_SAME` says that it may."""
    return StepMetrics(row[0], epoch, *row[1:_PEAK], *row[_PEAK + 1 :])  # type: ignore[arg-type]  # see _SAME


_PEAK = StepRow._fields.index("memory_peak_bytes")
_SAME = ("step", "epoch", *StepRow._fields[1:_PEAK], *StepRow._fields[_PEAK + 1 :])
if StepMetrics._fields != _SAME:
    raise ImportError(f"StepRow has {_SAME} where StepMetrics has {StepMetrics._fields}")
