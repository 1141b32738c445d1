"""How many steps the scale's rule loses to overflow, beside torch's rule, over long simulated runs.

A step overflows where scale * magnitude exceeds FP16's largest number. The rule is the pure-Python one that
`test_scale_machine` holds the engine to.
"""

import math
import random
from collections.abc import Callable

import pytest

from tests.amp.test_scale_machine import ModelScale

THRESHOLD = 1e-3
WINDOW = 200
STEPS = 120_000


def lost_share(magnitude: Callable[[int], float], *, threshold: float) -> float:
    scale = ModelScale(2.0, WINDOW, 1, 2.0**-100, 2.0**120, threshold, early_growth=False, s=2.0**16)
    lost = 0
    # The way down from the initial scale is no loss of the long run.
    for step in range(STEPS + WINDOW):
        overflow = scale.s * magnitude(step) > 65504.0
        lost += overflow and step >= WINDOW
        scale.step("overflow" if overflow else "good", underflow=False, norm=1.0)
    return lost / STEPS


def torch_share(magnitude: Callable[[int], float]) -> float:
    return lost_share(magnitude, threshold=0.999)


@pytest.mark.parametrize("magnitude", [1e-6, 0.7, 3e3])
def test_stationary_gradients_cost_no_more_than_the_budget(magnitude: float) -> None:
    ours, theirs = lost_share(lambda _: magnitude, threshold=THRESHOLD), torch_share(lambda _: magnitude)
    assert ours <= 1.2 * THRESHOLD
    assert 4 * THRESHOLD <= theirs <= 6 * THRESHOLD, "torch tries, and loses, every window"


@pytest.mark.parametrize("direction", ["up", "down", "wave"])
def test_slow_drift_costs_no_more_than_the_budget(direction: str) -> None:
    period = 2 / THRESHOLD

    def magnitude(step: int) -> float:
        octaves = step / period
        if direction == "wave":
            octaves = 8 - abs(octaves % 16 - 8)
        return 2.0 ** (-octaves if direction == "down" else octaves)

    assert lost_share(magnitude, threshold=THRESHOLD) <= 1.2 * THRESHOLD
    assert lost_share(magnitude, threshold=THRESHOLD) <= torch_share(magnitude)


@pytest.mark.parametrize("octaves_per_step", [1e-3, 2e-3, 5e-3])
@pytest.mark.parametrize("direction", ["up", "down", "wave"])
def test_fast_drift_costs_the_budget_and_what_it_takes_to_follow(
    octaves_per_step: float, direction: str
) -> None:
    def magnitude(step: int) -> float:
        octaves = step * octaves_per_step
        if direction == "wave" or octaves > 90:
            octaves = 8 - abs(octaves % 16 - 8)
        return 2.0 ** (-octaves if direction == "down" else octaves)

    ours = lost_share(magnitude, threshold=THRESHOLD)
    assert ours <= THRESHOLD + octaves_per_step
    assert ours <= torch_share(magnitude)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_costs_less_than_under_torchs_rule(seed: int) -> None:
    draw = random.Random(seed)
    noise = [math.exp(draw.gauss(0, 0.3)) for _ in range(STEPS + WINDOW)]
    assert lost_share(noise.__getitem__, threshold=THRESHOLD) < 0.7 * torch_share(noise.__getitem__)
