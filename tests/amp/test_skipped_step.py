"""A step with non-finite values changes nothing but the record and the scale."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.errors import NonFiniteGradient, NonFiniteLoss, TooManySkips
from tests.amp.runs import OPTIMIZERS, Batch, Recorded, make_batches, make_norm_net

pytestmark = pytest.mark.usefixtures("ending")

FP16 = {"precision_level": "fp16"}
BF16 = {"precision_level": "bf16"}
UNCAST = {"mode": "gradient_scaling", "precision_level": "fp32"}


def poisoned(batch: Batch, value: float = float("nan")) -> Batch:
    data = batch[0].clone()
    data[0, 0] = value
    return data, batch[1]


def frozen_copy(run: Recorded) -> dict[str, Any]:
    return copy.deepcopy({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})


def assert_identical(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    else:
        assert left == right


@pytest.mark.parametrize("settings", [FP16, BF16, UNCAST], ids=["fp16", "bf16", "gradient_scaling"])
@pytest.mark.parametrize("good_steps_before", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves(
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    settings: dict[str, Any],
    good_steps_before: int,
    value: float,
) -> None:
    model = make_norm_net()
    run = Recorded(MixedPrecisionConfig(**settings), model, make_optimizer(model.parameters()))
    batches = make_batches(good_steps_before + 2)
    run.run(batches[:good_steps_before])
    before = frozen_copy(run)
    # Twice: the first skipped step of a run is repeated to see what was wrong, the second is not.
    for _ in range(2):
        bad = run.run([poisoned(batches[-2], value)])[-1]
        assert_identical(frozen_copy(run), before)
    assert bad.skipped
    assert bad.nan
    assert not bad.overflow
    assert bad.step == good_steps_before + 2
    good = run.run([batches[-1]])[-1]
    assert not good.skipped
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert any(not torch.equal(value, before["model"][name]) for name, value in model.state_dict().items()), (
        "the good step after it did not train"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "sgd-momentum-fused"])
def test_an_overflowing_first_step_leaves_no_state_behind(optimizer: str) -> None:
    config = MixedPrecisionConfig(**FP16, initial_scale=2.0**40, max_scale=2.0**40)
    model = make_norm_net()
    run = Recorded(config, model, OPTIMIZERS[optimizer](model.parameters()))
    before = frozen_copy(run)
    first = run.run(make_batches(1))[0]
    assert first.overflow
    assert first.skipped
    assert not first.nan
    assert_identical(frozen_copy(run), before)
    rows = run.run(make_batches(40))
    assert [row.scale for row in rows[:3]] == [2.0**40, 2.0**39, 2.0**38]
    applied = [row for row in rows if not row.skipped]
    assert len(applied) >= 10
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_nan_leaves_the_scale_and_overflow_halves_it() -> None:
    model = make_norm_net()
    run = Recorded(MixedPrecisionConfig(**FP16), model, OPTIMIZERS["adamw"](model.parameters()))
    batches = make_batches(22)
    rows = run.run([batches[0], *(poisoned(batch) for batch in batches[1:21]), batches[21]])
    assert {row.scale for row in rows} == {2.0**16}
    stats = run.trainer.get_mixed_precision_stats()
    assert (stats["nan_count"], stats["overflow_count"], stats["skipped_steps"]) == (20, 0, 20)
    assert stats["current_scale"] == 2.0**16


def test_a_step_scheduler_does_not_move_on_a_skipped_step(
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model = make_norm_net()
    optimizer = make_optimizer(model.parameters())
    start = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    run = Recorded(
        MixedPrecisionConfig(**BF16), model, optimizer, scheduler=scheduler, scheduler_interval="step"
    )
    a, b, c, d = make_batches(4)
    rows = run.run([a, poisoned(b), poisoned(c), d, a])
    assert [row.learning_rate / start for row in rows] == [1.0, 0.5, 0.5, 0.5, 0.25]


def test_an_epoch_scheduler_waits_for_an_applied_step() -> None:
    model = make_norm_net()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    run = Recorded(MixedPrecisionConfig(**BF16), model, optimizer, scheduler=scheduler)
    batches = make_batches(3)
    run.trainer.train_epoch([poisoned(batch) for batch in batches])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    run.trainer.train_epoch([poisoned(batches[0]), batches[1]])
    assert optimizer.param_groups[0]["lr"] == 5e-3


@pytest.mark.parametrize("settings", [FP16, BF16, UNCAST], ids=["fp16", "bf16", "gradient_scaling"])
@pytest.mark.parametrize("fused", [False, True])
def test_one_bad_micro_batch_of_four_costs_its_whole_step(settings: dict[str, Any], fused: bool) -> None:
    model = make_norm_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    run = Recorded(MixedPrecisionConfig(**settings), model, optimizer, gradient_accumulation_steps=4)
    batches = make_batches(12)
    run.run(batches[:4])
    before = frozen_copy(run)
    results = [
        run.trainer.train_step(*batch) for batch in [batches[4], poisoned(batches[5]), batches[6], batches[7]]
    ]
    assert_identical(frozen_copy(run), before)
    assert [result["is_step"] for result in results] == [False, False, False, True]
    assert [result["nan_detected"] for result in results] == [False, False, False, True]
    assert run.run(batches[8:])[-1].skipped is False
    assert [row.skipped for row in run.rows] == [False, True, False]


def test_skips_without_end_are_an_error_that_names_cause_and_step() -> None:
    model = make_norm_net()
    run = Recorded(
        MixedPrecisionConfig(**BF16, max_consecutive_skips=5), model, OPTIMIZERS["adamw"](model.parameters())
    )
    batches = make_batches(40)
    with pytest.raises(TooManySkips, match="5 steps in a row") as caught:
        run.run([batches[0], *(poisoned(batch) for batch in batches)])
    assert caught.value.cause == "non_finite_loss"
    assert caught.value.step == 6
    assert run.trainer.current_step == 32, "failures are raised at decision steps"
    assert len(run.rows) == 32


def test_a_run_of_skips_that_ends_is_no_failure() -> None:
    model = make_norm_net()
    run = Recorded(
        MixedPrecisionConfig(**BF16, max_consecutive_skips=5), model, OPTIMIZERS["adamw"](model.parameters())
    )
    batches = make_batches(64)
    bad = [poisoned(batch) if index % 5 else batch for index, batch in enumerate(batches)]
    assert sum(row.skipped for row in run.run(bad)) == 51


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused"])
def test_the_floor_of_the_scale_is_reported_as_exhausted(optimizer: str) -> None:
    config = MixedPrecisionConfig(
        **FP16, initial_scale=2.0**40, max_scale=2.0**40, min_scale=2.0**38, max_consecutive_skips=4
    )
    model = make_norm_net()
    run = Recorded(config, model, OPTIMIZERS[optimizer](model.parameters()))
    with pytest.raises(TooManySkips) as caught:
        run.trainer.train_epoch(make_batches(5))
    assert caught.value.cause == "scale_exhausted"
    assert [(row.scale, row.overflow, row.nan) for row in run.rows] == [
        (2.0**40, True, False),
        (2.0**39, True, False),
        (2.0**38, False, True),
        (2.0**38, False, True),
        (2.0**38, False, True),
    ]


def test_switched_off_handling_raises_at_the_next_decision_step() -> None:
    model = make_norm_net()
    run = Recorded(
        MixedPrecisionConfig(**BF16, nan_handling=False), model, OPTIMIZERS["adamw"](model.parameters())
    )
    batches = make_batches(40)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match="nan_handling is false") as caught:
        run.run([poisoned(batches[0]), *batches])
    assert caught.value.step == 1
    assert run.rows[0].skipped
    assert_identical(run.rows[0].step, 1)
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])

    model = make_norm_net()
    config = MixedPrecisionConfig(**FP16, overflow_handling=False, initial_scale=2.0**40, max_scale=2.0**40)
    run = Recorded(config, model, OPTIMIZERS["adamw-fused"](model.parameters()))
    with pytest.raises(NonFiniteGradient, match="overflow_handling is false"):
        run.run(make_batches(32))


def test_disabled_measures_nan_and_skips_nothing() -> None:
    model = nn.Linear(12, 4)
    config = MixedPrecisionConfig(enabled=False, max_consecutive_skips=40)
    run = Recorded(config, model, torch.optim.SGD(model.parameters(), lr=0.1))
    (batch,) = make_batches(1)
    row = run.run([poisoned(batch)])[0]
    assert (row.nan, row.overflow, row.underflow, row.skipped, row.scale) == (True, False, False, False, 1.0)
    assert torch.isnan(model.weight).any(), "a disabled engine applies what it is given"
    with pytest.raises(TooManySkips):
        run.run([batch] * 70)


def test_an_exception_in_the_forward_pass_leaves_the_next_step_clean() -> None:
    model = make_norm_net()
    run = Recorded(MixedPrecisionConfig(**BF16), model, OPTIMIZERS["adamw"](model.parameters()))
    batches = make_batches(3)
    run.run(batches[:1])
    before = frozen_copy(run)
    with pytest.raises(IndexError):
        run.trainer.train_step(batches[1][0], torch.full((8,), 99))
    assert_identical(frozen_copy(run), before)
    assert [row.step for row in run.run(batches[1:])] == [1, 2, 3]


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("overflow_first", [False, True])
def test_fused_sgd_whose_layer_sees_its_first_gradient_late(dampening: float, overflow_first: bool) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.late = nn.Linear(12, 4), nn.Linear(12, 4)
            self.use_late = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.always(x) + self.late(x) if self.use_late else self.always(x)

    def train(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        model = Late()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, dampening=dampening, fused=fused, foreach=False
        )
        run = Recorded(MixedPrecisionConfig(precision_level="fp32"), model, optimizer)
        batches = make_batches(6)
        run.run(batches[:2])
        model.use_late = True
        if overflow_first:
            run.run([poisoned(batches[0])])
        run.run(batches[2:])
        return model

    for fused, plain in zip(train(fused=True).parameters(), train(fused=False).parameters(), strict=True):
        torch.testing.assert_close(fused, plain)


def test_fused_sgd_on_a_cpu_is_not_fused_for_low_precision_weights() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp32", max_grad_norm=None),
        model,
        optimizer,
        criterion=lambda output, target: output.float().square().sum(),
    )
    before = model.weight.detach().clone()
    run.trainer.train_step(torch.ones(2, 64, dtype=torch.bfloat16), torch.zeros(1))
    assert (model.weight != before).all(), "whole SIMD blocks were left as they were"


@pytest.mark.parametrize("fused", [False, True])
def test_an_infinite_loss_with_finite_gradients_is_skipped(fused: bool) -> None:
    model = nn.Linear(12, 4)
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp16"),
        model,
        torch.optim.AdamW(model.parameters(), fused=fused),
        criterion=lambda output, target: output.float().mean() + float("inf"),
    )
    before = frozen_copy(run)
    row = run.run(make_batches(1))[0]
    assert (row.skipped, row.nan, row.overflow, row.has_inf, row.has_nan) == (True, True, False, True, False)
    assert_identical(frozen_copy(run), before)


# A scale that is below 1 from the start, and one that comes there.
@pytest.mark.parametrize("initial_scale", [2.0**-30, 1.0])
def test_a_gradient_that_overflows_as_it_is_unscaled_is_skipped(initial_scale: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-5)
    config = MixedPrecisionConfig(**UNCAST, initial_scale=initial_scale, min_scale=2.0**-30)
    run = Recorded(
        config,
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=lambda output, target: output.sum() * 1e9,
    )
    # The gradient is 1e39, beyond FP32; scaled by 2^-2 it is not.
    rows = run.run([(torch.full((1, 1), 1e30), torch.zeros(1))] * 4)
    assert [row.skipped for row in rows] == [True] * 4
    assert rows[-1].scale < 0.25
    assert model.weight.item() == pytest.approx(1e-5)


def test_a_gradient_that_overflows_as_it_is_stretched_is_skipped() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-5)
    run = Recorded(
        MixedPrecisionConfig(precision_level="fp32"),
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=lambda output, target: output.sum() * 1e9,
        gradient_accumulation_steps=4,
    )
    # The gradient is 1e39, beyond FP32; the quarter that one of four micro-batches adds is not.
    run.trainer.train_step(torch.full((1, 1), 1e30), torch.zeros(1))
    assert run.trainer.finish_accumulation()
    assert [row.skipped for row in run.run([])] == [True]
    assert model.weight.item() == pytest.approx(1e-5)
