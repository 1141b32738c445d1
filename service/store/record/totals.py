"""Running totals over a job's steps: what a summary needs of all steps, carried on in O(new steps).

Pure functions, no SQL. Sums are plain left-to-right additions, so that the totals of a record do not
depend on how it was cut into batches.
"""

import math
import operator
import struct
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

_LAYOUT = struct.Struct("<qqqqdqdqq")


class Totals(NamedTuple):
    """Totals over the steps 1..k. Losses are those of the newest epoch that are finite."""

    overflow_count: int = 0
    underflow_count: int = 0
    nan_count: int = 0
    skipped_steps: int = 0
    scale_sum: float = 0.0
    epoch: int = 0  # of the newest step; 0 before the first
    epoch_loss_sum: float = 0.0
    epoch_losses: int = 0
    last_overflow_step: int = 0  # 0: none yet

    def pack(self) -> bytes:
        """As stored beside a chunk."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> "Totals":
        """From what `pack` made."""
        return cls(*_LAYOUT.unpack(data))

    def after(self, columns: Mapping[str, Sequence[Any]]) -> "Totals":
        """The totals once these steps, which follow on, are added; needs NEEDED of them, at least one row."""
        epochs, losses, overflows = columns["epoch"], columns["loss"], columns["overflow"]
        epoch = epochs[-1]
        begin = len(epochs)
        while begin and epochs[begin - 1] == epoch:
            begin -= 1
        goes_on = begin == 0 and epoch == self.epoch
        finite = [loss for loss in losses[begin:] if math.isfinite(loss)]
        last_overflow = self.last_overflow_step
        if any(overflows):
            last_overflow = max(
                step for step, overflow in zip(columns["step"], overflows, strict=True) if overflow
            )
        return Totals(
            overflow_count=self.overflow_count + sum(overflows),
            underflow_count=self.underflow_count + sum(columns["underflow"]),
            nan_count=self.nan_count + sum(columns["nan"]),
            skipped_steps=self.skipped_steps + sum(columns["skipped"]),
            scale_sum=reduce(operator.add, columns["scale"], self.scale_sum),
            epoch=epoch,
            epoch_loss_sum=reduce(operator.add, finite, self.epoch_loss_sum if goes_on else 0.0),
            epoch_losses=len(finite) + (self.epoch_losses if goes_on else 0),
            last_overflow_step=last_overflow,
        )


NEEDED = ("step", "epoch", "loss", "scale", "overflow", "nan", "underflow", "skipped")
