"""Both ways for a step to end follow one rule, whatever gradients come."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.step import training_step
from tests.amp.runs import Recorded

LEVELS: dict[str, dict[str, Any]] = {
    "fp16": {"precision_level": "fp16"},
    "bf16": {"precision_level": "bf16"},
    "fp32": {"precision_level": "fp32"},
    "scaled": {"mode": "gradient_scaling", "precision_level": "fp32"},
    "manual": {"mode": "manual", "precision_level": "bf16"},
}
LIMITS: list[dict[str, Any]] = [
    {"initial_scale": 2.0**10, "min_scale": 1.0},
    {"initial_scale": 0.3, "min_scale": 0.1},  # FP32's 0.1 is above 0.1
    {"initial_scale": 2.0**-6, "min_scale": 2.0**-7, "underflow_threshold": 1e-6},
    {"initial_scale": 2.0**6, "dynamic_loss_scaling": False},
]
GRADIENTS = [1.0, -3.5, 1e-3, 1e-30, 1e20, 3e38, math.inf, -math.inf, math.nan, 0.0]
steps = st.lists(st.sampled_from(GRADIENTS) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12)
groups = st.lists(st.tuples(st.integers(1, 3), steps, st.sampled_from([0.0, 0.0, 0.0, math.nan])), max_size=4)


class Two(nn.Module):
    """Two parameters, in a group of the optimizer each, whose gradients are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(2))
        self.second = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, data: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += 1
        return self.first.float() * data[0] + self.second.float() * data[1]


def outcome(config: MixedPrecisionConfig, sequence: list[Any], kind: str, *, by_step: bool) -> list[Any]:
    """Everything that the steps of `sequence` leave behind, as text: NaN equals NaN, and each bit counts."""
    model = Two()
    groups = [{"params": [model.first], "lr": 0.5}, {"params": [model.second], "lr": 0.01}]
    made: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optimizer = made[kind.removesuffix("-fused")](groups, fused=kind.endswith("-fused"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    run = Recorded(
        config,
        model,
        optimizer,
        criterion=lambda output, extra: output.sum() + extra,
        scheduler=scheduler,
        scheduler_interval="step" if by_step else "epoch",
    )
    left: list[Any] = []
    for size, gradients, extra in sequence:
        for gradient in gradients:
            data = torch.tensor([gradient, 1.0]).reshape(2, 1)
            batches = [(data, torch.tensor(extra))] * size
            result = run.trainer.train_group(batches)
            left.append(
                [
                    repr(result[key])
                    for key in ("loss", "current_scale", "overflow_detected", "underflow_detected")
                ]
            )
            left.append([weight.detach().tolist() for weight in model.parameters()])
            left.append([model.seen.tolist(), [float(group["lr"]) for group in optimizer.param_groups]])
    run.trainer.flush()
    measured = ("step_time_ms", "memory_usage")
    left.extend(
        {
            name: repr(value)
            for name, value in row._asdict().items()
            if name not in measured and not name.startswith("memory_")
        }
        for row in run.rows
    )
    state = run.trainer.mixed_precision_manager.state_dict()["engine"]
    left.append({"step": state["step"], "supervisor": state["supervisor"], "counters": state["counters"]})
    return [repr(part) for part in left]


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example sets what it patches
)
@given(
    sequence=groups,
    level=st.sampled_from(sorted(LEVELS)),
    limits=st.sampled_from(LIMITS),
    most=st.sampled_from([None, 1.0, 0.05, 1e-20]),
    window=st.integers(1, 4),
    hysteresis=st.integers(1, 2),
    factor=st.sampled_from([2.0, 3.0]),
    kind=st.sampled_from(["sgd", "sgd-fused", "adamw", "adamw-fused"]),
    by_step=st.booleans(),
    enabled=st.sampled_from([True, True, True, False]),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_comes_both_ways_end_alike(
    sequence: list[Any],
    level: str,
    limits: dict[str, Any],
    most: float | None,
    window: int,
    hysteresis: int,
    factor: float,
    kind: str,
    by_step: bool,
    enabled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MixedPrecisionConfig(
        **LEVELS[level],
        **limits,
        enabled=enabled,
        max_grad_norm=most,
        scale_window=window,
        hysteresis=hysteresis,
        scale_factor=factor,
        max_consecutive_skips=1000,
        nan_handling=enabled,
    )
    ended = []
    for sees in (True, False):
        monkeypatch.setattr(training_step, "host_sees", lambda device, sees=sees: sees)
        ended.append(outcome(config, sequence, kind, by_step=by_step))
    for in_numbers, in_tensors in zip(*ended, strict=True):
        assert in_numbers == in_tensors


@pytest.mark.usefixtures("ending")
def test_a_scale_at_a_minimum_that_fp32_rounds_up_is_at_its_minimum() -> None:
    """The same overflow further on is no overflow that a smaller scale cures, on either way."""
    model = Two()
    run = Recorded(
        MixedPrecisionConfig(
            mode="gradient_scaling", precision_level="fp32", initial_scale=0.1, min_scale=0.1, hysteresis=2
        ),
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        criterion=lambda output, extra: output.sum() * 1e30 + extra,
    )
    [row] = run.run([(torch.tensor([[1e20], [1.0]]), torch.tensor(0.0))])
    assert row.skipped
    assert not row.overflow
    counters = run.trainer.mixed_precision_manager.state_dict()["engine"]["step"]["loss_scale"]["counters"]
    assert counters[1] == 2, "the hysteresis that was left"
