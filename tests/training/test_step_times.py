"""The library and a job sum up step times by one rule."""

import math
from typing import Any

import pytest

from halfstep.service.contract.metrics import step_times
from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.training.progress import RecentSteps
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp


@pytest.mark.parametrize(
    ("count", "p50", "p95"), [(1, 1, 1), (2, 2, 2), (19, 10, 19), (20, 11, 19), (21, 11, 20), (100, 51, 95)]
)
def test_a_percentile_is_the_least_time_that_enough_of_them_do_not_exceed(
    count: int, p50: int, p95: int
) -> None:
    times = [float(time) for time in range(count, 0, -1)]
    assert step_times(times) == (p50, p95, count)


def test_no_time_has_no_figures() -> None:
    assert all(math.isnan(figure) for figure in step_times([]))


@pytest.mark.parametrize("steps", [1, 20, 40])
def test_the_library_and_a_job_tell_the_same_of_the_same_steps(steps: int) -> None:
    model = make_mlp()
    run = Recorded(MixedPrecisionConfig(), model, OPTIMIZERS["adamw-fused"](model.parameters()))
    rows: list[Any] = run.run(make_batches(steps))
    recent = RecentSteps()
    recent.add(rows)
    told = run.trainer.get_mixed_precision_stats()["performance_metrics"]["step_time_ms"]
    assert told == recent.step_times_ms()._asdict()
    assert told == step_times([row.step_time_ms for row in rows])._asdict()
