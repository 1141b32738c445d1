"""Learning rates: who steps the scheduler, when, and what rate a step used.

A scheduler moves on applied steps only (interval "step") or once at an epoch's end if one of its steps was
applied (interval "epoch"). Whether a step was applied is known on the device first. Where the optimizer is
fused, a scheduler of interval "step" is run ahead into a table on the device, from which the count of applied
steps picks the rate; the host's scheduler follows as it reads finished steps.
"""

import copy
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from worker.amp.errors import SetupError

Interval = Literal["epoch", "step"]

TABLE_STEPS = 2048
"""Rates that the table holds."""

_FIRST_STEPS = 128
_REFILL_BELOW = 64
"""The table is made anew at a decision step once fewer rates are left; decision steps are 32 apart."""


class Schedule:
    """The scheduler that was passed, or none.

    Attributes:
        needs_metric: it follows a metric (ReduceLROnPlateau).
        by_step: it moves on applied steps.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, interval: Interval) -> None:
        if interval not in {"epoch", "step"}:
            raise SetupError(f"scheduler_interval: 'epoch' or 'step', not {interval!r}")
        if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise SetupError("scheduler: made for another optimizer; make it for the one that is passed here")
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._table: _RateTable | None = None
        self._applied_in_epoch = False
        self.needs_metric = isinstance(scheduler, ReduceLROnPlateau)
        self.by_step = scheduler is not None and interval == "step" and not self.needs_metric

    @property
    def on_host(self) -> bool:
        """The host must know of every applied step as it ends."""
        return self.by_step and self._table is None

    def follow_on_device(self, device: torch.device) -> None:
        """Pick rates on the device from now on, where the scheduler can be run ahead."""
        if self.by_step and self._table is None:
            self._table = _RateTable.of(self._optimizer, self._scheduler, device)

    def rate_used(self) -> float:
        """Of the first parameter group in the step that ends; NaN where only `saw` can tell."""
        return float("nan") if self._table is not None else float(self._optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """A step was applied, the host knows it: step a scheduler of interval "step"."""
        if self._table is None and self.by_step:
            self._scheduler.step()

    def advance_where(self, found: Tensor) -> None:
        """A step ended; the device knows whether it was applied (`found`, bool, 0-d, is false)."""
        if self._table is not None:
            self._table.advance_where(found)

    def saw(self, *, applied: bool) -> float | None:
        """A finished step was read. Returns the rate it used, where the device picked it."""
        self._applied_in_epoch = self._applied_in_epoch or applied
        return None if self._table is None else self._table.saw(applied=applied)

    def refill(self) -> None:
        """Every finished step was read: bring the scheduler up to date and look ahead again."""
        if self._table is not None:
            self._table.refill()

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

    @contextmanager
    def settled(self) -> Iterator[None]:
        """While open, the scheduler is up to date and the optimizer's rates are plain numbers."""
        if self._table is None:
            yield
            return
        self._table.settle()
        try:
            yield
        finally:
            self._table.restart()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state and what this object adds to it; every finished step was read."""
        own = None if self._scheduler is None else copy.deepcopy(self._scheduler.state_dict())
        return {"scheduler": own, "applied_in_epoch": self._applied_in_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the optimizer's state was loaded before."""
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._applied_in_epoch = bool(state["applied_in_epoch"])
        if self._table is not None:
            self._table.restart()


class _RateTable:
    """The next learning rates of every parameter group, and the place in them, on the device."""

    def __init__(self, optimizer: Optimizer, scheduler: Any, device: torch.device) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        groups = len(optimizer.param_groups)
        # On a CPU float64, which equals a Python float there; CUDA's fused kernels take float32 alone.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._rates = torch.zeros((groups, TABLE_STEPS + 1), dtype=dtype, device=device)
        self._current = torch.zeros(groups, dtype=dtype, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._host_rates: deque[float] = deque()
        self._start_rates: list[float] = []
        self._behind = 0
        self._steps_ahead = _FIRST_STEPS

    @classmethod
    def of(cls, optimizer: Optimizer, scheduler: Any, device: torch.device) -> "_RateTable | None":
        """A table for a scheduler that can be run ahead and changes nothing but rates; else None."""
        plain_rates = all(not isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
        if not plain_rates or _run_ahead(optimizer, scheduler, 2) is None:
            return None
        table = cls(optimizer, scheduler, device)
        table.restart()
        return table

    def advance_where(self, found: Tensor) -> None:
        self._place.add_(~found)
        self._pick()

    def saw(self, *, applied: bool) -> float:
        used = self._host_rates[0]
        if applied:
            self._behind += 1
            if len(self._host_rates) > 1:
                self._host_rates.popleft()
        return used

    def refill(self) -> None:
        if self._steps_ahead - self._behind < _REFILL_BELOW:
            # Short at first, so that a short run does not wait for rates that it will not use.
            self._steps_ahead = min(4 * self._steps_ahead, TABLE_STEPS)
            self.settle()
            self.restart()

    def settle(self) -> None:
        self._unbind()
        for _ in range(self._behind):
            self._scheduler.step()
        self._behind = 0

    def restart(self) -> None:
        """Start from the scheduler as it is now."""
        self._unbind()
        self._behind = 0
        ahead = _run_ahead(self._optimizer, self._scheduler, self._steps_ahead)
        columns = ahead if ahead is not None else [[g["lr"] for g in self._optimizer.param_groups]]
        self._start_rates = columns[0]
        columns = columns + [columns[-1]] * (TABLE_STEPS + 1 - len(columns))
        table = torch.tensor(columns, dtype=torch.float64).T.to(self._rates.dtype).contiguous()
        if self._rates.is_cuda:
            table = table.pin_memory()  # a copy from pageable memory would make the host wait
        self._rates.copy_(table, non_blocking=True)
        self._place.zero_()
        self._host_rates = deque(column[0] for column in columns[: self._steps_ahead + 1])
        self._pick()
        for index, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._current[index]

    def _pick(self) -> None:
        self._current.copy_(self._rates.index_select(1, self._place).squeeze(1))

    def _unbind(self) -> None:
        for index, group in enumerate(self._optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"] = self._start_rates[index]


def _run_ahead(optimizer: Optimizer, scheduler: Any, steps: int) -> list[list[float]] | None:
    """The rates of all groups now and after each of `steps` steps; fewer where the scheduler ends before.

    None where that cannot be known: it has no state to put back, or it changes more than rates.
    """
    try:
        saved = copy.deepcopy(scheduler.state_dict())
    except (AttributeError, TypeError):
        return None
    groups = optimizer.param_groups
    before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    columns = [[float(group["lr"]) for group in groups]]
    only_rates = True
    try:
        with warnings.catch_warnings():
            # torch warns of a scheduler that is stepped before its optimizer; this one is put back.
            warnings.simplefilter("ignore")
            for _ in range(steps):
                scheduler.step()
                columns.append([float(group["lr"]) for group in groups])
                only_rates = only_rates and _same_but_for_rates(groups, before)
    except (ValueError, StopIteration, IndexError):
        pass  # its own end, which it will tell when it is really stepped there
    finally:
        scheduler.load_state_dict(saved)
        for group, old in zip(groups, before, strict=True):
            group.update(old)
    return columns if only_rates else None


def _same_but_for_rates(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    return all(
        group[key] == value
        for group, old in zip(groups, before, strict=True)
        for key, value in old.items()
        if key != "lr"
    )
