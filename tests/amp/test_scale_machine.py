"""The scale's rule against a small model of it in plain Python, over random sequences of steps."""

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.update.loss_scale import EARLY_GROWTH_ROOM, EARLY_GROWTH_RUN, LossScale


@dataclass
class ModelScale:
    """Section by section what the rule says, one float or integer each."""

    f: float
    window: int
    h: int
    low: float
    high: float
    threshold: float
    early_growth: bool
    s: float

    def __post_init__(self) -> None:
        self.good = 0
        self.hyst = self.h
        self.since = math.inf
        self.refuted = False
        self.under = 0

    def step(self, kind: str, underflow: bool, norm: float) -> None:
        grad_bad, loss_bad = kind in {"overflow", "both"}, kind in {"nan", "both"}
        overflow = grad_bad and not loss_bad and self.s > self.low
        found = grad_bad or loss_bad
        underflow = underflow and not found
        self.hyst -= overflow
        back = overflow and self.hyst <= 0
        self.good = 0 if found else self.good + 1
        self.under = self.under + 1 if underflow else 0
        wait = max(self.window, math.ceil(self.h / self.threshold)) if self.refuted else self.window
        early = (
            self.early_growth
            and self.under >= EARLY_GROWTH_RUN
            and not self.refuted
            and self.s * self.f * norm <= EARLY_GROWTH_ROOM
        )
        up = self.good >= wait or early
        target = self.s / self.f if back else self.s * self.f if up else self.s
        target = min(max(target, self.low), self.high)
        grew = up and target > self.s
        self.since += 1
        if overflow and self.since <= self.window:
            self.refuted = True
        if grew:
            self.refuted = False
            self.since = 0
        if back or grew:
            self.hyst = self.h
        if back or up:
            self.good = 0
            self.under = 0
        self.s = target


def random_steps(seed: int, count: int) -> list[tuple[str, bool, float]]:
    """Runs of good steps between bad ones, so that windows are reached, missed and just met."""
    draw = random.Random(seed)
    steps: list[tuple[str, bool, float]] = []
    while len(steps) < count:
        underflow, norm = draw.random() < 0.7, draw.choice([0.0, 1e-3, 1.0])
        steps += [("good", underflow, norm)] * draw.randrange(0, draw.choice([2, 5, 14, 45]))
        steps.append((draw.choice(["overflow"] * 4 + ["nan", "both"]), draw.random() < 0.5, norm))
    return steps[:count]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    window=st.integers(1, 12),
    hysteresis=st.integers(1, 3),
    factor=st.sampled_from([2.0, 4.0]),
    threshold=st.sampled_from([0.05, 0.1, 0.5, 0.9]),
    bounds=st.sampled_from([(1.0, 2.0**24), (2.0**14, 2.0**18), (2.0**-8, 2.0**16)]),
    early=st.booleans(),
)
def test_the_scale_follows_its_rule(
    seed: int,
    window: int,
    hysteresis: int,
    factor: float,
    threshold: float,
    bounds: tuple[float, float],
    early: bool,
) -> None:
    config = MixedPrecisionConfig(
        precision_level="fp16",
        scale_window=window,
        hysteresis=hysteresis,
        scale_factor=factor,
        overflow_threshold=threshold,
        min_scale=bounds[0],
        max_scale=bounds[1],
        underflow_handling=early,
    )
    real = LossScale(config, torch.device("cpu"), active=True)
    model = ModelScale(factor, window, hysteresis, *bounds, threshold, early, 2.0**16)
    for position, (kind, underflow, norm) in enumerate(random_steps(seed, 200)):
        advance(real, kind, underflow, norm)
        model.step(kind, underflow, norm)
        assert real.scale.item() == model.s, position
        assert real.inverse.item() == 1 / model.s


def advance(scale: LossScale, kind: str, underflow: bool = False, norm: float = 1.0) -> bool:
    """One step of the scale in tensors, and of a twin in numbers, which must end alike to the bit."""
    before = {name: copy.deepcopy(value) for name, value in scale.state_dict().items()}
    twin = TWINS.setdefault(id(scale.config), LossScale(scale.config, torch.device("cpu"), active=True))
    twin.load_state_dict(before)
    grad_bad, loss_bad = torch.tensor(kind in {"overflow", "both"}), torch.tensor(kind in {"nan", "both"})
    underflowed = torch.tensor(underflow) & ~(grad_bad | loss_bad)
    exhausted = scale.update(
        grad_bad=grad_bad, loss_bad=loss_bad, underflow=underflowed, grad_norm=torch.tensor(norm)
    )
    told = twin.update_seen(
        grad_bad=bool(grad_bad),
        loss_bad=bool(loss_bad),
        underflow=bool(underflowed),
        grad_norm=float(torch.tensor(norm)),
    )
    assert told is bool(exhausted)
    assert twin.value == scale.scale.item()
    assert torch.equal(twin.inverse, scale.inverse)
    assert torch.equal(twin.state_dict()["counters"], scale.state_dict()["counters"])
    return told


TWINS: dict[int, LossScale] = {}


def make_scale(**fields: Any) -> LossScale:
    return LossScale(MixedPrecisionConfig(precision_level="fp16", **fields), torch.device("cpu"), active=True)


def test_a_static_scale_never_moves() -> None:
    scale = make_scale(dynamic_loss_scaling=False, scale_window=1)
    for kind in ("good", "overflow", "good", "nan"):
        advance(scale, kind)
        assert scale.scale.item() == 2.0**16


def test_a_refuted_growth_waits_for_the_budget() -> None:
    scale = make_scale(scale_window=4, overflow_threshold=0.1)
    for _ in range(4):
        advance(scale, "good")
    assert scale.scale.item() == 2.0**17
    advance(scale, "overflow")
    assert scale.scale.item() == 2.0**16
    for _ in range(9):
        advance(scale, "good")
    assert scale.scale.item() == 2.0**16, "1/overflow_threshold steps have not passed"
    advance(scale, "good")
    assert scale.scale.item() == 2.0**17


@pytest.mark.parametrize(("after", "next_growth"), [(4, 20), (5, 4)])
def test_a_growth_is_refuted_within_the_window_and_not_beyond(after: int, next_growth: int) -> None:
    scale = make_scale(scale_window=4, overflow_threshold=0.05, max_scale=2.0**17)
    for kind in ["good"] * 4 + ["good"] * (after - 1) + ["overflow"]:
        advance(scale, kind)
    assert scale.scale.item() == 2.0**16
    waited = 0
    while scale.scale.item() == 2.0**16:
        advance(scale, "good")
        waited += 1
    assert waited == next_growth


def test_a_refuted_growth_is_not_tried_early() -> None:
    scale = make_scale(scale_window=4, overflow_threshold=0.005)
    for kind in ["good"] * 4 + ["overflow"]:
        advance(scale, kind)
    for _ in range(2 * EARLY_GROWTH_RUN):
        advance(scale, "good", underflow=True, norm=1e-3)
    assert scale.scale.item() == 2.0**16


def test_underflow_at_max_scale_is_reported_once_per_run_of_underflows() -> None:
    scale = make_scale(max_scale=2.0**16, scale_window=10**6)
    reports = [advance(scale, "good", underflow=True, norm=1e-3) for _ in range(3 * EARLY_GROWTH_RUN)]
    assert [step for step, told in enumerate(reports, start=1) if told] == [32, 64, 96]
    assert scale.scale.item() == 2.0**16


def test_underflow_grows_early_only_where_there_is_room() -> None:
    roomy, tight = make_scale(scale_window=10**6), make_scale(scale_window=10**6)
    for _ in range(EARLY_GROWTH_RUN):
        advance(roomy, "good", underflow=True, norm=2.0**-3)
        advance(tight, "good", underflow=True, norm=2.0**-2)
    assert roomy.scale.item() == 2.0**17
    assert tight.scale.item() == 2.0**16


def test_a_saved_scale_goes_on_alike() -> None:
    config = MixedPrecisionConfig(
        precision_level="fp16", scale_window=3, hysteresis=2, overflow_threshold=0.1
    )
    kinds = ["good"] * 3 + ["overflow", "good", "overflow", "good"] + ["good"] * 20
    straight = LossScale(config, torch.device("cpu"), active=True)
    expected = []
    for kind in kinds:
        advance(straight, kind)
        expected.append(straight.scale.item())
    for stop in range(len(kinds)):
        first = LossScale(config, torch.device("cpu"), active=True)
        for kind in kinds[:stop]:
            advance(first, kind)
        second = LossScale(config, torch.device("cpu"), active=False)
        second.load_state_dict(first.state_dict())
        for position in range(stop, len(kinds)):
            advance(second, kinds[position])
            assert second.scale.item() == expected[position]


@pytest.mark.slow
def test_ten_thousand_random_sequences() -> None:
    fields: dict[str, Any] = {"scale_window": 2, "overflow_threshold": 0.25, "hysteresis": 2}
    draw = random.Random(0)
    real = make_scale(**fields, underflow_handling=False)
    for sequence in range(10_000):
        real.switch(active=True)
        model = ModelScale(2.0, 2, 2, 1.0, 2.0**24, 0.25, early_growth=False, s=2.0**16)
        for _ in range(draw.randrange(1, 12)):
            kind = draw.choice(["good", "good", "good", "overflow", "nan"])
            advance(real, kind)
            model.step(kind, underflow=False, norm=1.0)
        assert real.scale.item() == model.s, sequence
