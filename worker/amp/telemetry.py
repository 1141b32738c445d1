"""The record of every step: written on the device as the step ends, read by the host in batches.

Here live the row that users see, the ring that holds rows until they are read, and the mapping that a
training step returns. What is concluded from the rows is in `supervision`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.amp.errors import Cause

ComputeDtype = Literal["float32", "float16", "bfloat16"]
EventLevel = Literal["info", "warning", "error"]

RING_STEPS = 256
"""Rows that the ring holds. It is read every 32 steps, so a row is never overwritten unread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One optimizer step, skipped or applied; flags and figures are this step's own."""

    step: int
    """From 1; skipped steps count."""
    loss: float
    """Mean of the step's micro-losses, unscaled."""
    scale: float
    """The loss scale used in this step; 1.0 where nothing is scaled."""
    overflow: bool
    """Non-finite gradients of the kind that a smaller scale cures."""
    nan: bool
    """A non-finite loss, or non-finite gradients that no scale cures."""
    underflow: bool
    skipped: bool
    has_inf: bool
    has_nan: bool
    underflow_estimate: float
    grad_norm: float
    """L2 norm of the unscaled gradients over all parameters, before clipping."""
    learning_rate: float
    """Of the first parameter group, as used in this step."""
    memory_usage: float
    """Share of the device's (or host's) memory, 0..1."""
    memory_allocated_bytes: int
    memory_reserved_bytes: int
    memory_peak_bytes: int
    step_time_ms: float
    """NaN where performance_monitoring is off."""
    compute_dtype: ComputeDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvent:
    """Something that happened to the precision of a run and is worth telling a person.

    `type` is one of: precision, overflow, nan, range_exhausted, overflow_budget_exceeded, warning.
    """

    type: str
    level: EventLevel
    message: str
    step: int
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """What a step leaves on the device: 0-d tensors. Also what the ring gives back, as Python numbers."""

    loss: Any
    scale: Any
    underflow_estimate: Any
    grad_norm: Any
    next_scale: Any
    suspect: Any
    """Rank in forward order of the deepest parameter with a non-finite gradient, -1 where there is none."""


@dataclass(frozen=True, slots=True)
class DeviceFlags:
    """A step's flags: 0-d bool tensors, or Python booleans where the ring gives them back."""

    overflow: Any
    nan: Any
    underflow: Any
    skipped: Any
    has_inf: Any
    has_nan: Any
    grad_bad: Any
    range_exhausted: Any


@dataclass(frozen=True, slots=True)
class Attribution:
    """Where a step's first non-finite value was seen.

    Attributes:
        layer: the module; "criterion" or "input" where it was the loss or the data; None where not known.
        kind: on which way it was seen.
        where: "output" or "input" of the module (forward); "grad_output" (the scale was too large before
            it), "grad_input" (this layer made it) or "weights" (its weights' gradient alone); None where not
            known.
        largest_finite: the largest finite magnitude seen beside it.
        verdict: "precision" where the same step is finite in FP32, else "data_or_model"; None: not tried.
    """

    layer: str | None
    kind: Literal["forward", "backward", "unknown"]
    where: str | None = None
    largest_finite: float | None = None
    verdict: Literal["precision", "data_or_model"] | None = None


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step as the host reads it.

    Attributes:
        row: the record that users see.
        cause: why it was bad; None for a good one.
        attribution: where it went bad, as far as that is known; None for a good one.
        next_scale: the scale after it.
        micro_batches: how many it was made of.
        range_exhausted: underflow asks for more than max_scale.
    """

    row: StepRow
    cause: Cause | None
    attribution: Attribution | None
    next_scale: float
    micro_batches: int
    range_exhausted: bool


_FIGURES = DeviceFigures.__slots__
_FLAGS = DeviceFlags.__slots__


class StepRing:
    """A fixed number of rows on the device, written at a device-side index and read through host memory.

    On a CPU the host looks at the ring's own memory. On a GPU one asynchronous copy into pinned memory
    serves all rows since the last read; the host waits for that copy's event alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._figures = torch.zeros((RING_STEPS, len(_FIGURES)), dtype=torch.float32, device=device)
        self._flags = torch.zeros((RING_STEPS, len(_FLAGS)), dtype=torch.bool, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._written = 0
        self._read = 0
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._host_figures = torch.empty_like(self._figures, device="cpu", pin_memory=True)
            self._host_flags = torch.empty_like(self._flags, device="cpu", pin_memory=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not annotate it
        else:
            self._host_figures, self._host_flags = self._figures, self._flags
        # Made once: the host reads through these, never by a tensor method inside a step.
        self._figures_view: npt.NDArray[np.float32] = self._host_figures.numpy()
        self._flags_view: npt.NDArray[np.bool_] = self._host_flags.numpy()

    @property
    def unread(self) -> int:
        """Rows written and not yet read."""
        return self._written - self._read

    def write(self, figures: DeviceFigures, flags: DeviceFlags) -> tuple[Tensor, Tensor]:
        """Append a row; returns its figures (float32) and flags (bool) as 1-d device tensors of their own."""
        figure_row = torch.stack([getattr(figures, name) for name in _FIGURES])
        flag_row = torch.stack([getattr(flags, name) for name in _FLAGS])
        self._figures.index_copy_(0, self._index, figure_row.unsqueeze(0))
        self._flags.index_copy_(0, self._index, flag_row.unsqueeze(0))
        self._index.add_(1).remainder_(RING_STEPS)
        self._written += 1
        return figure_row, flag_row

    def read(self) -> list[tuple[DeviceFigures, DeviceFlags]]:
        """Every row not yet read, oldest first. Waits for the device to finish the last of them."""
        if self._read == self._written:
            return []
        if self._on_gpu:
            self._host_figures.copy_(self._figures, non_blocking=True)
            self._host_flags.copy_(self._flags, non_blocking=True)
            self._copied.record()
            self._copied.synchronize()  # the one deliberate wait, every 32 steps and at a flush
        slots = [position % RING_STEPS for position in range(self._read, self._written)]
        self._read = self._written
        figures = self._figures_view[slots].tolist()
        flags = self._flags_view[slots].tolist()
        return [(DeviceFigures(*row), DeviceFlags(*bits)) for row, bits in zip(figures, flags, strict=True)]


class StepResult(Mapping[str, Any]):
    """What `train_step` returns: a mapping that asks the device for a value only when a key is read.

    Keys: loss (this micro-batch's), current_scale (the scale used), overflow_detected, underflow_detected,
    nan_detected (false until the step ends), memory_usage, output_shape, target_shape, device, is_step.
    """

    __slots__ = ("_read",)

    def __init__(
        self,
        *,
        loss: Tensor,
        scale: Tensor,
        flag_row: Tensor | None,
        memory_usage: float,
        output_shape: Any,
        target_shape: Any,
        device: torch.device,
    ) -> None:
        def flag(name: str) -> Callable[[], bool]:
            column = _FLAGS.index(name)
            return lambda: flag_row is not None and bool(flag_row[column].item())

        self._read: dict[str, Callable[[], Any]] = {
            "loss": lambda: float(loss.item()),
            "current_scale": lambda: float(scale.item()),
            "overflow_detected": flag("overflow"),
            "underflow_detected": flag("underflow"),
            "nan_detected": flag("nan"),
            "memory_usage": lambda: memory_usage,
            "output_shape": lambda: output_shape,
            "target_shape": lambda: target_shape,
            "device": lambda: str(device),
            "is_step": lambda: flag_row is not None,
        }

    def __getitem__(self, key: str) -> Any:
        return self._read[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def __repr__(self) -> str:
        return f"StepResult({dict(self)!r})"
