"""The step record: its columns, their order and types, shared by the worker, the store and the API.

One record for every optimizer step. Flags and scale are that step's own, never cumulative.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

ComputeDtype = Literal["float32", "float16", "bfloat16"]
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = ("float32", "float16", "bfloat16")


class StepMetrics(NamedTuple):
    """One optimizer step, skipped or applied; non-finite values are kept as what they are."""

    step: int  # optimizer steps attempted, from 1
    epoch: int  # from 1
    loss: float  # mean over the step's micro-batches, unscaled
    scale: float  # the loss scale used in this step; 1.0 where nothing is scaled
    overflow: bool
    nan: bool
    underflow: bool
    skipped: bool
    has_inf: bool
    has_nan: bool
    underflow_estimate: float
    grad_norm: float  # unscaled, before clipping, over all parameters
    learning_rate: float  # of the first parameter group, as used in this step
    memory_usage: float  # share of the device's (or host's) memory, 0..1
    memory_allocated_bytes: int
    memory_reserved_bytes: int
    step_time_ms: float
    compute_dtype: ComputeDtype


METRIC_COLUMNS: tuple[str, ...] = StepMetrics._fields
FLAG_COLUMNS: tuple[str, ...] = ("overflow", "nan", "underflow", "skipped", "has_inf", "has_nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStats:
    """What the worker knows beyond the rows: written with each batch into the job's summary row."""

    current_scale: float  # the scale that the next step will use
    memory_peak_bytes: int
    steps_per_second: float
    samples_per_second: float
    step_time_ms_p50: float
    step_time_ms_p95: float
    step_time_ms_max: float
    host_syncs_per_step: float
    overflow_budget_exceeded: bool = False
    last_overflow: Mapping[str, Any] | None = None  # {step, layer, kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over the held-out split."""

    step: int
    split: str
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float
