"""Where a run stands in its data: epochs of groups, each group the micro-batches of one optimizer step.

A job's steps form one line of places. The order of an epoch comes from `dataset.epoch_order`; nothing here
draws a random number.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass


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


def excluded_from(state: Collection[Collection[int]]) -> frozenset[Position]:
    """Positions from the [epoch, group] pairs that a checkpoint holds."""
    return frozenset(Position(*pair) for pair in state)
