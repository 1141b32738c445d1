"""Where a run stands in its data, and the batches of its next step.

A job's steps form one line: epochs of groups, each group the micro-batches of one optimizer step. The order
of an epoch comes from `data.epoch_order`; nothing here draws a random number or knows a model.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfstep.worker.training.data import Split, epoch_order
from halfstep.worker.training.errors import DataError, TrainingFailure

_SHARE_OF_DEVICE = 0.25
"""A training split is kept on the device when it takes at most this share of its free memory."""

MicroBatch = tuple[Any, Any]


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """The next step's place: epoch from 1, group from 0 within it."""

    epoch: int = 1
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the samples of a split become the steps of a job.

    Attributes:
        samples: samples of one epoch.
        batch_size: samples of a micro-batch; the last one of an epoch may be shorter.
        accumulation: micro-batches of a step; the last step of an epoch may have fewer.
        epochs: epochs of the job, None when only max_steps bounds it.
        max_steps: steps of the job at most.
        excluded: groups that are left out.
    """

    samples: int
    batch_size: int
    accumulation: int
    epochs: int | None
    max_steps: int | None
    excluded: frozenset[Position] = frozenset()

    @property
    def steps_per_epoch(self) -> int:
        """Groups of an epoch, left-out ones included."""
        return math.ceil(math.ceil(self.samples / self.batch_size) / self.accumulation)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole job."""
        bounds = []
        if self.epochs is not None:
            left_out = sum(position.epoch <= self.epochs for position in self.excluded)
            bounds.append(self.epochs * self.steps_per_epoch - left_out)
        if self.max_steps is not None:
            bounds.append(self.max_steps)
        return min(bounds, default=None)

    @property
    def total_epochs(self) -> int | None:
        """Epochs that are finished when the job ends, None when nothing bounds it."""
        total = self.total_steps
        return None if total is None else math.ceil(total / self.steps_per_epoch)

    def first(self) -> Position:
        """The place of step 1."""
        return self._skip(Position())

    def after(self, position: Position) -> Position:
        """The place of the step after the one at `position`."""
        return self._skip(self._next(position))

    def _next(self, position: Position) -> Position:
        if position.group + 1 < self.steps_per_epoch:
            return Position(position.epoch, position.group + 1)
        return Position(position.epoch + 1, 0)

    def _skip(self, position: Position) -> Position:
        while position in self.excluded:
            position = self._next(position)
        return position


class Batches:
    """The micro-batches of any position, assembled in this process from the split's own tensors."""

    def __init__(self, split: Split, plan: Plan, *, seed: int, device: torch.device) -> None:
        self._split = _placed(split, device)
        self._plan = plan
        self._seed = seed
        self._epoch = 0
        self._order = torch.empty(0, dtype=torch.int64)

    def group(self, position: Position) -> list[MicroBatch]:
        """The (input, target) pairs of one step, in order.

        Raises:
            DataError: the dataset's own code raised.
        """
        if position.epoch != self._epoch:
            order = epoch_order(self._seed, position.epoch, self._plan.samples)
            self._order = order.to(self._split.device)
            self._epoch = position.epoch
        plan = self._plan
        begin = position.group * plan.accumulation * plan.batch_size
        end = min(begin + plan.accumulation * plan.batch_size, plan.samples)
        return [
            fetch(self._split, self._order[start : min(start + plan.batch_size, end)])
            for start in range(begin, end, plan.batch_size)
        ]

    def samples(self, position: Position) -> int:
        """Samples of the step at `position`."""
        per_step = self._plan.accumulation * self._plan.batch_size
        return min(per_step, self._plan.samples - position.group * per_step)


def fetch(split: Split, indices: Tensor) -> MicroBatch:
    """One batch of a split.

    Raises:
        DataError: the dataset's own code raised.
    """
    try:
        return split.batch(indices)
    except (TrainingFailure, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DataError(
            f"the dataset could not give a batch of {len(indices)} samples: {error!r}; check its files and "
            "its code"
        ) from error


def excluded_from(state: Collection[Collection[int]]) -> frozenset[Position]:
    """Positions from the [epoch, group] pairs that a checkpoint holds."""
    return frozenset(Position(*pair) for pair in state)


def _placed(split: Split, device: torch.device) -> Split:
    if device.type != "cuda" or not split.nbytes:
        return split
    free, _ = torch.cuda.mem_get_info(device)
    return split.to(device) if split.nbytes <= free * _SHARE_OF_DEVICE else split
