"""What is told of a run: the row of a step, the events, and a finished step as the engine itself sees it.

Only types live here. How a row comes from the device is in `ring` and `record`, what is concluded from rows
in `supervision`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from halfstep.service.contract.precision import ComputeDtype
from halfstep.worker.amp.errors import Cause, Verdict

EventLevel = Literal["info", "warning", "error"]


class StepRow(NamedTuple):
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
    verdict: Verdict | None = None


class FinishedStep(NamedTuple):
    """A step as the host reads it."""

    row: StepRow
    """The record that users see."""
    cause: Cause | None
    """Why it was bad; None for a good one."""
    attribution: Attribution | None
    """Where it went bad, as far as that is known; None for a good one."""
    next_scale: float
    """The scale after it."""
    micro_batches: int
    """How many it was made of."""
    range_exhausted: bool
    """Underflow asks for more than max_scale."""
