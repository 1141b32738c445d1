"""What a worker tells of a run: a row for every optimizer step, live figures, evaluations.

Flags and scale of a row are that step's own, never cumulative. What each column means and how it is stored
and folded is in `columns`.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from halfstep.service.contract import columns
from halfstep.service.contract.columns import COMPUTE_DTYPES
from halfstep.service.contract.precision import ComputeDtype

__all__ = [
    "COMPUTE_DTYPES",
    "FLAG_COLUMNS",
    "METRIC_COLUMNS",
    "ComputeDtype",
    "Evaluation",
    "LiveStats",
    "StepMetrics",
]


class StepMetrics(NamedTuple):
    """One optimizer step, skipped or applied; non-finite values are kept as what they are."""

    step: int
    epoch: int
    loss: float
    scale: float
    overflow: bool
    nan: bool
    underflow: bool
    skipped: bool
    has_inf: bool
    has_nan: bool
    underflow_estimate: float
    grad_norm: float
    learning_rate: float
    memory_usage: float
    memory_allocated_bytes: int
    memory_reserved_bytes: int
    step_time_ms: float
    compute_dtype: ComputeDtype


METRIC_COLUMNS: tuple[str, ...] = StepMetrics._fields
FLAG_COLUMNS: tuple[str, ...] = columns.RECORD.of_type("flag")
if columns.RECORD.names != METRIC_COLUMNS:
    raise ImportError(f"a row has {METRIC_COLUMNS} where the table of columns has {columns.RECORD.names}")


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


class StepTimes(NamedTuple):
    """Figures of some step times, in the unit of the times."""

    p50: float
    p95: float
    max: float


def step_times(times: Collection[float]) -> StepTimes:
    """The median, the 95th percentile and the maximum of these times; NaN without any.

    A percentile is one of the times by the nearest-rank rule: the smallest that is not below that share of
    all of them. The median of an even number is the upper one of the two in the middle.
    """
    if not times:
        return StepTimes(math.nan, math.nan, math.nan)
    ordered = sorted(times)
    rank = -(-len(ordered) * 95 // 100)
    return StepTimes(p50=ordered[len(ordered) // 2], p95=ordered[rank - 1], max=ordered[-1])
