"""The soak's verdict: which steps are missing or doubled, and how memory moved."""

import pytest

from benchmarks.soak import Sample, add_figures, faults
from benchmarks.support.report import Report


def test_every_step_once_is_no_fault() -> None:
    assert faults(range(1, 11), 10) == ([], [])


def test_missing_doubled_and_foreign_steps_are_named() -> None:
    assert faults([1, 2, 2, 5, 6, 11, 0], 6) == ([3, 4], [0, 2, 11])


def test_memory_is_told_at_its_moments_and_its_slope_counts_from_the_warm_up() -> None:
    megabytes = {0: 100.0, 100_000: 400.0, 500_000: 402.0, 1_000_000: 404.5}
    samples = [
        Sample(step, step / 1000, {"child": size, "worker": 100.0, "api": 90.0})
        for step, size in megabytes.items()
    ]
    told = Report("soak", {})
    add_figures(told, samples, 1_000_000)
    medians = {name: figure.median for name, figure in told.figures.items()}
    assert medians["steps per second"] == pytest.approx(1000.0)
    assert medians["child/resident at 10%"] == 400.0
    assert medians["child/resident at 50%"] == 402.0
    assert medians["child/resident at 100%"] == 404.5
    assert medians["child/slope once warm"] == pytest.approx(5.0, abs=0.1)
    assert medians["worker/slope once warm"] == 0.0


def test_too_short_a_soak_has_no_slope() -> None:
    with pytest.raises(ValueError, match="take more steps"):
        add_figures(Report("soak", {}), [Sample(1, 0.0, {}), Sample(99, 1.0, {})], 100)
