"""Steps as a training run reports them, for benchmarks of the record: noisy losses, overflows, memory, times.

Values have the types and the grain that a worker gives them: device figures are float32 widened to float64,
times are float64 differences of a clock, the learning rate follows a cosine. No SQL, no HTTP.
"""

import math
import random
import struct
from collections.abc import Iterator
from typing import Any

from halfstep.service.contract.metrics import LiveStats, StepMetrics

PERIOD = 65_536  # values repeat after so many steps: far beyond what any one chunk could make use of
EPOCH_STEPS = 5_000

LIVE = LiveStats(
    current_scale=65536.0,
    memory_peak_bytes=2**31,
    steps_per_second=400.0,
    samples_per_second=12_800.0,
    step_time_ms_p50=2.4,
    step_time_ms_p95=3.1,
    step_time_ms_max=40.0,
    host_syncs_per_step=0.0,
)


def batches(first: int, last: int, size: int) -> Iterator[list[StepMetrics]]:
    """The steps first..last in batches of `size`."""
    for begin in range(first, last + 1, size):
        yield [_step(number) for number in range(begin, min(begin + size, last + 1))]


def _step(number: int) -> StepMetrics:
    return StepMetrics(number, 1 + number // EPOCH_STEPS, *_VALUES[number % PERIOD])


def _single(value: float) -> float:
    """As float32 holds it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _values() -> list[tuple[Any, ...]]:
    draw = random.Random(0)
    scale, good, total = 65536.0, 0, 80 * 2**30
    allocated, reserved = 3 * 2**30, 4 * 2**30
    rows: list[tuple[Any, ...]] = []
    for number in range(PERIOD):
        overflow = draw.random() < 5e-4
        nan = draw.random() < 2e-5
        skipped = overflow or nan
        used = scale
        good = 0 if skipped else good + 1
        if skipped:
            scale = max(1.0, scale / 2)
        elif good == 2000:
            scale, good = min(scale * 2, 2.0**24), 0
        if draw.random() < 0.02:  # a batch of another length
            allocated = 3 * 2**30 + 512 * draw.randrange(200_000)
        if draw.random() < 1e-3:
            reserved = 4 * 2**30 + 2 * 2**20 * draw.randrange(200)
        rows.append(
            (
                math.nan if nan else _single(2.5 * math.exp(-number / 40_000) + draw.gauss(0.3, 0.08)),
                used,
                overflow,
                nan,
                draw.random() < 1e-3,
                skipped,
                overflow,
                nan,
                _single(draw.expovariate(2e5)),
                math.inf if overflow else math.nan if nan else _single(draw.lognormvariate(0, 0.4)),
                5e-4 * (1 + math.cos(math.pi * number / PERIOD)),
                allocated / total,
                allocated,
                reserved,
                round(draw.lognormvariate(0.9, 0.1) * 1e6) / 1e9 * 1e3,
                "bfloat16",
            )
        )
    return rows


_VALUES = _values()
