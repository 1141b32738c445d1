"""The batches of a step, from its place in the plan. Nothing here knows a model."""

from typing import Any

import torch
from torch import Tensor

from halfstep.worker.training.data.dataset import Split, epoch_order
from halfstep.worker.training.data.plan import Plan, Position
from halfstep.worker.training.errors import DataError, TrainingFailure

_SHARE_OF_DEVICE = 0.25
"""A training split is kept on the device when it takes at most this share of its free memory."""

MicroBatch = tuple[Any, Any]


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


def _placed(split: Split, device: torch.device) -> Split:
    if device.type != "cuda" or not split.nbytes:
        return split
    free, _ = torch.cuda.mem_get_info(device)
    return split.to(device) if split.nbytes <= free * _SHARE_OF_DEVICE else split
