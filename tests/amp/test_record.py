"""A row is its own step's, whatever lay in its place before and whichever layers took part."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.record.ring import RING_STEPS
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches

pytestmark = pytest.mark.usefixtures("ending")

FP32 = {"precision_level": "fp32"}


class Sparing(nn.Module):
    """Two layers, of which the first or the second may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 4), nn.Linear(12, 4)
        self.without: set[str] = set()

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        used = [layer for name, layer in self.named_children() if name not in self.without]
        return torch.stack([layer(data) for layer in used]).sum(dim=0)


def start(model: nn.Module, **settings: Any) -> Recorded:
    return Recorded(MixedPrecisionConfig(**settings), model, OPTIMIZERS["adamw-fused"](model.parameters()))


def test_each_row_and_result_stays_its_own_when_the_ring_goes_round() -> None:
    run = start(Sparing(), **FP32)
    batches = make_batches(RING_STEPS + 50)
    for place in (2, 40):
        batches[place] = (batches[place][0] * math.nan, batches[place][1])
    results = [run.trainer.train_step(*batch) for batch in batches]
    run.trainer.flush()
    assert [row.step for row in run.rows] == list(range(1, RING_STEPS + 51))
    assert [row.step for row in run.rows if row.nan] == [3, 41]
    assert len({row.loss for row in run.rows if not row.nan}) == RING_STEPS + 48
    # Read now, long after other steps have been written to the same place.
    assert [repr(result["loss"]) for result in results] == [repr(row.loss) for row in run.rows]
    assert [result["nan_detected"] for result in results] == [row.nan for row in run.rows]


def test_a_layer_that_is_left_out_has_no_norm_of_the_step_before_in_its_place() -> None:
    model = Sparing()
    run = start(model, **FP32)
    batches = make_batches(RING_STEPS + 1)
    spoilt = model.second.weight.register_hook(lambda gradient: gradient * math.nan)
    run.run(batches[:1])
    spoilt.remove()
    model.without = {"second"}
    run.run(batches[1:])
    assert [(row.step, row.has_nan) for row in run.rows if row.nan or row.has_nan] == [(1, True)]


@pytest.mark.parametrize("without", ["first", "second"])
def test_the_norms_are_those_of_the_layers_that_took_part(without: str) -> None:
    model = Sparing()
    model.without = {without}
    (used,) = {"first", "second"} - {without}
    run = start(model, precision_level="bf16")
    once = model.get_submodule(used).weight.register_hook(lambda gradient: gradient * math.inf)
    model.get_submodule(used).weight.register_hook(lambda _: once.remove())  # not there when it is repeated
    run.run(make_batches(1))
    (event,) = [event for event in run.events if event.type == "nan"]
    assert (event.data["layer"], event.data["kind"], event.data["verdict"]) == (used, "backward", None)


def test_an_underflow_estimate_counts_the_elements_that_took_part() -> None:
    model = Sparing()
    model.without = {"first"}
    (row,) = start(model, precision_level="fp16").run(make_batches(1))
    elements = sum(parameter.numel() for parameter in model.second.parameters())
    assert row.underflow_estimate == pytest.approx(
        math.sqrt(elements) * 2.0**-25 / (row.scale * row.grad_norm)
    )


@pytest.mark.parametrize(
    ("value", "expected"), [(math.nan, (False, True)), (math.inf, (True, False)), (-math.inf, (True, False))]
)
@pytest.mark.parametrize("of", ["loss", "gradients"])
def test_infinite_is_told_from_not_a_number(of: str, value: float, expected: tuple[bool, bool]) -> None:
    model = Sparing()
    run = Recorded(
        MixedPrecisionConfig(**FP32),
        model,
        OPTIMIZERS["adamw-fused"](model.parameters()),
        criterion=lambda output, _: output.mean() + (value if of == "loss" else 0.0),
    )
    if of == "gradients":
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
    (row,) = run.run(make_batches(1))
    assert (row.has_inf, row.has_nan) == expected
    assert row.skipped


def test_a_micro_batch_keeps_the_scale_that_it_was_scaled_by() -> None:
    model = Sparing()
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp16", initial_scale=2.0**40, max_scale=2.0**40),
        model,
        OPTIMIZERS["adamw-fused"](model.parameters()),
        gradient_accumulation_steps=2,
    )
    results = [run.trainer.train_step(*batch) for batch in make_batches(4)]
    assert [row.overflow for row in run.run([])] == [True, True]
    assert [result["current_scale"] for result in results] == [2.0**40, 2.0**40, 2.0**39, 2.0**39]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-fused"])
def test_a_run_that_is_switched_off_asks_the_device_nothing_and_says_so(optimizer: str) -> None:
    model = Sparing()
    run = Recorded(MixedPrecisionConfig(enabled=False), model, OPTIMIZERS[optimizer](model.parameters()))
    run.run(make_batches(5))
    assert run.trainer.get_mixed_precision_stats()["performance_metrics"]["host_syncs_per_step"] == 0.0
