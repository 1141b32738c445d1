"""The record of steps between device and host: what a step leaves on both, and what the host makes of it."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.amp.errors import Cause
from worker.amp.layers import ParameterOrder
from worker.amp.memory import MemorySample
from worker.amp.schedule import Schedule
from worker.amp.telemetry import (
    Attribution,
    ComputeDtype,
    DeviceFigures,
    DeviceFlags,
    FinishedStep,
    StepRing,
    StepRow,
)


@dataclass(frozen=True, slots=True)
class HostPart:
    """What only the host knows of a step as it ends.

    Attributes:
        learning_rate: NaN where the device picked it.
        scaled: the step's loss was scaled, or its gradients were in FP16.
        attribution: where it went bad, if it was repeated to find out.
    """

    learning_rate: float
    memory: MemorySample
    step_time_ms: float
    compute_dtype: ComputeDtype
    micro_batches: int
    scaled: bool
    attribution: Attribution | None


class StepRecord:
    """Steps as they are written, and as the host reads them, in order."""

    def __init__(
        self, device: torch.device, *, order: ParameterOrder, schedule: Schedule, min_scale: float
    ) -> None:
        self._ring = StepRing(device)
        self._order = order
        self._schedule = schedule
        self._min_scale = min_scale
        self._pending: deque[HostPart] = deque()
        self._read_steps = 0

    def write(self, figures: DeviceFigures, flags: DeviceFlags) -> tuple[Tensor, Tensor]:
        """Write a step's device part; returns its figures and flags as device tensors of their own."""
        return self._ring.write(figures, flags)

    def write_host(self, part: HostPart) -> None:
        """Add the host's part of the step just written."""
        self._pending.append(part)

    def read(self) -> list[FinishedStep]:
        """Every finished step not yet read, in order."""
        finished = []
        for figures, flags in self._ring.read():
            self._read_steps += 1
            finished.append(self._finished(self._read_steps, figures, flags, self._pending.popleft()))
        return finished

    def restart(self, steps: int) -> None:
        """Count on from `steps`; what was not read is forgotten."""
        self._ring.read()
        self._pending.clear()
        self._read_steps = steps

    def _finished(
        self, step: int, figures: DeviceFigures, flags: DeviceFlags, host: HostPart
    ) -> FinishedStep:
        rate = self._schedule.saw(applied=not flags.skipped)
        row = StepRow(
            step=step,
            loss=figures.loss,
            scale=figures.scale,
            overflow=flags.overflow,
            nan=flags.nan,
            underflow=flags.underflow,
            skipped=flags.skipped,
            has_inf=flags.has_inf,
            has_nan=flags.has_nan,
            underflow_estimate=figures.underflow_estimate,
            grad_norm=figures.grad_norm,
            learning_rate=host.learning_rate if rate is None else rate,
            memory_usage=host.memory.usage,
            memory_allocated_bytes=host.memory.allocated,
            memory_reserved_bytes=host.memory.reserved,
            memory_peak_bytes=host.memory.peak,
            step_time_ms=host.step_time_ms,
            compute_dtype=host.compute_dtype,
        )
        return FinishedStep(
            row=row,
            cause=self._cause(row, grad_bad=flags.grad_bad, scaled=host.scaled),
            attribution=host.attribution or self._from_norms(row, int(figures.suspect)),
            next_scale=figures.next_scale,
            micro_batches=host.micro_batches,
            range_exhausted=flags.range_exhausted,
        )

    def _from_norms(self, row: StepRow, suspect: int) -> Attribution | None:
        """What the norms tell without repeating the step: a backward overflow enters at the deepest layer."""
        if not (row.overflow or row.nan):
            return None
        if not math.isfinite(row.loss):
            return Attribution(layer=None, kind="forward")
        return Attribution(layer=self._order.layer(suspect), kind="backward")

    def _cause(self, row: StepRow, *, grad_bad: bool, scaled: bool) -> Cause | None:
        if not (row.overflow or row.nan):
            return None
        if not math.isfinite(row.loss):
            return "non_finite_loss"
        if grad_bad and not row.overflow and scaled and row.scale <= self._min_scale:
            return "scale_exhausted"
        return "non_finite_gradients"
