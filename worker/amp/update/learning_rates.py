"""Learning rates: who steps the scheduler, when, and what rate a step used.

A scheduler moves on applied steps only (interval "step") or once at an epoch's end if one of its steps was
applied (interval "epoch"). Whether a step was applied is known on the device first. Where the optimizer is
fused, a scheduler of interval "step" is run ahead into a table, from which the count of applied steps picks
the rate, on a GPU on the device; the scheduler itself follows as finished steps are read.
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from halfstep.worker.amp.errors import SetupError

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

    def look_ahead(self, device: torch.device, *, on_host: bool) -> None:
        """Pick rates from a table from now on, where the scheduler can be run ahead.

        Args:
            device: where the optimizer is.
            on_host: the host knows of every step as it ends, and picks.
        """
        if self.by_step and self._table is None:
            self._table = _table_of(self._optimizer, self._scheduler, device, on_host=on_host)

    def rate_used(self) -> float:
        """Of the first parameter group in the coming step; NaN where only `saw` can tell."""
        return math.nan if self._table is not None else float(self._optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """A step was applied, the host knows it: move a scheduler of interval "step"."""
        if not self.by_step:
            return
        if self._table is None:
            self._scheduler.step()
        else:
            self._table.advance()

    def advance_where(self, found: Tensor) -> None:
        """A step ended; the device knows whether it was applied (`found`, bool, 0-d, is false)."""
        if self._table is not None:
            self._table.advance_where(found)

    def saw(self, skipped: Sequence[bool]) -> list[float] | None:
        """Finished steps were read. Returns the rates they used, where a table gave them."""
        self._applied_in_epoch = self._applied_in_epoch or not all(skipped)
        return None if self._table is None else [self._table.saw(applied=not one) for one in skipped]

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
    """The next learning rates of every parameter group, and how far the scheduler itself is behind them."""

    def __init__(self, optimizer: Optimizer, scheduler: Any) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._unread: deque[float] = deque()
        self._start_rates: list[float] = []
        self._behind = 0
        self._steps_ahead = _FIRST_STEPS

    def advance(self) -> None:
        """The host knows that a step was applied."""

    def advance_where(self, found: Tensor) -> None:
        """The device knows whether a step was applied (`found`, bool, 0-d, is false)."""

    def saw(self, *, applied: bool) -> float:
        """A finished step was read; returns its rate."""
        used = self._unread[0]
        if applied:
            self._behind += 1
            if len(self._unread) > 1:
                self._unread.popleft()
        return used

    def refill(self) -> None:
        """Look ahead again where few rates are left."""
        if self._steps_ahead - self._behind < _REFILL_BELOW:
            # Short at first, so that a short run does not wait for rates that it will not use.
            self._steps_ahead = min(4 * self._steps_ahead, TABLE_STEPS)
            self.settle()
            self.restart()

    def settle(self) -> None:
        """Bring the scheduler up to date; the optimizer has plain rates."""
        for group, rate in zip(self._optimizer.param_groups, self._start_rates, strict=True):
            group["lr"] = rate
        for _ in range(self._behind):
            self._scheduler.step()
        self._behind = 0

    def restart(self) -> None:
        """Start from the scheduler and the optimizer's rates as they are now."""
        self._behind = 0
        ahead = _run_ahead(self._optimizer, self._scheduler, self._steps_ahead)
        columns = ahead if ahead is not None else [[g["lr"] for g in self._optimizer.param_groups]]
        self._start_rates = columns[0]
        columns = columns + [columns[-1]] * (TABLE_STEPS + 1 - len(columns))
        self._unread = deque(column[0] for column in columns[: self._steps_ahead + 1])
        self._bind(columns)

    def _bind(self, columns: list[list[float]]) -> None:
        """Give the optimizer the first of these rates, and the others as steps are applied."""
        raise NotImplementedError


class _HostTable(_RateTable):
    """Picks rates on the host."""

    def _bind(self, columns: list[list[float]]) -> None:
        self._columns = iter(columns)
        self.advance()

    def advance(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, next(self._columns), strict=True):
            group["lr"] = rate


class _DeviceTable(_RateTable):
    """Picks rates on the device, by the count of applied steps there."""

    def __init__(self, optimizer: Optimizer, scheduler: Any, device: torch.device) -> None:
        super().__init__(optimizer, scheduler)
        groups = len(optimizer.param_groups)
        # On a CPU float64, which equals a Python float there; CUDA's fused kernels take float32 alone.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._rates = torch.zeros((groups, TABLE_STEPS + 1), dtype=dtype, device=device)
        self._current = torch.zeros(groups, dtype=dtype, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)

    def advance_where(self, found: Tensor) -> None:
        self._place.add_(~found)
        self._pick()

    def _bind(self, columns: list[list[float]]) -> None:
        table = torch.tensor(columns, dtype=torch.float64).T.to(self._rates.dtype).contiguous()
        if self._rates.is_cuda:
            table = table.pin_memory()  # a copy from pageable memory would make the host wait
        self._rates.copy_(table, non_blocking=True)
        self._place.zero_()
        self._pick()
        for index, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._current[index]

    def _pick(self) -> None:
        self._current.copy_(self._rates.index_select(1, self._place).squeeze(1))


def _table_of(
    optimizer: Optimizer, scheduler: Any, device: torch.device, *, on_host: bool
) -> _RateTable | None:
    """A table for a scheduler that can be run ahead and changes nothing but rates; else None."""
    plain_rates = all(not isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    if not plain_rates or _run_ahead(optimizer, scheduler, 2) is None:
        return None
    table = _HostTable(optimizer, scheduler) if on_host else _DeviceTable(optimizer, scheduler, device)
    table.restart()
    return table


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
