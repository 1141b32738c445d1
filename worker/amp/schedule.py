"""Learning rates: who steps the scheduler, when, and what rate a step used.

A scheduler moves on applied steps only (interval "step") or once at an epoch's end if one of its steps was
applied (interval "epoch"). Whether a step was applied is known on the device first; the host sees it when it
reads the step.
"""

import copy
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from worker.amp.errors import SetupError

Interval = Literal["epoch", "step"]


class Schedule:
    """The scheduler that was passed, or none, stepped on the host."""

    def __init__(self, optimizer: Optimizer, scheduler: Any, interval: Interval) -> None:
        if interval not in {"epoch", "step"}:
            raise SetupError(f"scheduler_interval: 'epoch' or 'step', not {interval!r}")
        if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise SetupError("scheduler: made for another optimizer; make it for the one that is passed here")
        self._optimizer = optimizer
        self._scheduler = scheduler
        self.needs_metric = isinstance(scheduler, ReduceLROnPlateau)
        self.by_step = scheduler is not None and interval == "step" and not self.needs_metric
        self._applied_in_epoch = False

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, as the next step will use it."""
        return float(self._optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """A step was applied: step a scheduler of interval "step"."""
        if self.by_step:
            self._scheduler.step()

    def saw(self, *, applied: bool) -> None:
        """A finished step was read: an epoch counts if at least one of its steps was applied."""
        self._applied_in_epoch = self._applied_in_epoch or applied

    def end_epoch(self, metric: float | None) -> None:
        """Step a scheduler of interval "epoch", or one that follows a metric."""
        applied, self._applied_in_epoch = self._applied_in_epoch, False
        if self._scheduler is None or self.by_step or not applied:
            return
        if self.needs_metric:
            if metric is not None:
                self._scheduler.step(metric)
        else:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state and what this object adds to it."""
        own = None if self._scheduler is None else copy.deepcopy(self._scheduler.state_dict())
        return {"scheduler": own, "applied_in_epoch": self._applied_in_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._applied_in_epoch = bool(state["applied_in_epoch"])
