"""What becomes of finished steps once the host reads them: counted, judged, delivered, logged.

Rows may arrive early or late; nothing here changes a step.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from halfstep.service.contract.precision import MixedPrecisionConfig
from halfstep.worker.amp.diagnosis.run_health import Supervisor
from halfstep.worker.amp.diagnosis.state import MixedPrecisionState
from halfstep.worker.amp.record.rows import EngineEvent, FinishedStep, StepRow

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Ledger:
    """Everything that a run has told so far, and whom it tells.

    Attributes:
        state: counters and short histories.
        supervisor: what is concluded from the steps.
        on_step: called with the rows of finished steps, in order, as they are read.
        on_event: called with what happens to the precision of the run.
        on_finished: called with each finished step as it is read.
    """

    def __init__(self, config: MixedPrecisionConfig, logger: logging.Logger) -> None:
        self._config = config
        self._logger = logger
        self.on_step: Callable[[Sequence[StepRow]], None] | None = None
        self.on_event: Callable[[EngineEvent], None] | None = None
        self.on_finished: Callable[[FinishedStep], None] | None = None
        self.open(scale=1.0)

    def open(self, *, scale: float) -> None:
        """A run begins: everything is counted from nothing."""
        self.state = MixedPrecisionState(current_scale=scale)
        self.supervisor = Supervisor(self._config, self.tell)

    def enter(self, finished: Sequence[FinishedStep]) -> None:
        """Take finished steps into account, in order, and deliver their rows."""
        rows = [done.row for done in finished]
        self.state.count(rows)
        self.state.current_scale = finished[-1].next_scale
        self.supervisor.observe(finished)
        if self.on_finished is not None:
            for done in finished:
                self.on_finished(done)
        if self._logger.isEnabledFor(logging.INFO):
            self._log(rows)
        if self.on_step is not None:
            self.on_step(rows)

    def tell(self, event: EngineEvent) -> None:
        """Something happened."""
        if self.on_event is not None:
            self.on_event(event)
        self._logger.log(_LEVELS[event.level], "%s", event.message)

    def statistics(self, performance: dict[str, Any]) -> dict[str, Any]:
        """The run so far; see `MixedPrecisionTrainer.get_mixed_precision_stats`."""
        state = self.state
        return {
            "current_step": state.total_steps,
            "current_scale": state.current_scale,
            "overflow_count": state.overflow_count,
            "underflow_count": state.underflow_count,
            "nan_count": state.nan_count,
            "skipped_steps": state.skipped_steps,
            "average_scale": state.average_scale,
            "memory_usage": state.memory_usage[-1] if state.memory_usage else 0.0,
            "last_overflow": self.supervisor.last_overflow,
            "performance_metrics": performance,
        }

    def _log(self, rows: Sequence[StepRow]) -> None:
        for row in rows:
            if row.step % self._config.logging_frequency == 0:
                self._logger.info(
                    "Step %d, Loss: %.4f, Scale: %.2e, Memory: %.2f",
                    row.step,
                    row.loss,
                    row.scale,
                    row.memory_usage,
                )
