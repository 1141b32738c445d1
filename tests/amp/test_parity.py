"""The engine against hand-written loops, bit for bit."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from tests.amp.runs import OPTIMIZERS, Batch, Recorded, make_batches, make_mlp, make_norm_net

pytestmark = pytest.mark.usefixtures("ending")


def amp_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    *,
    accumulation: int = 1,
    window: int = 5,
    factor: float = 2.0,
) -> tuple[list[float], list[float], float]:
    """torch's own recipe; returns losses, the scales used and the last scale."""
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**16, growth_factor=factor, backoff_factor=1 / factor, growth_interval=window
    )
    criterion = nn.CrossEntropyLoss()
    losses, scales = [], []
    model.train()
    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for data, target in group:
            with torch.autocast("cpu", torch.float16):
                loss = criterion(model(data), target)
            total += loss.item()
            scaler.scale(loss / len(group)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        losses.append(total / len(group))
    return losses, scales, scaler.get_scale()


def assert_same_run(ours: Recorded, theirs: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    model, optimizer = theirs
    for (name, mine), other in zip(ours.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    for mine, other in zip(ours.optimizer.state.values(), optimizer.state.values(), strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            left, right = torch.as_tensor(mine[key]), torch.as_tensor(other[key])
            assert torch.equal(left, right), key


def test_automatic_is_torch_amp_for_every_optimizer(
    make_optimizer: Callable[[Any], torch.optim.Optimizer], torch_like: dict[str, Any]
) -> None:
    batches = make_batches(200)
    reference = make_mlp()
    reference_optimizer = make_optimizer(reference.parameters())
    losses, scales, last_scale = amp_loop(reference, reference_optimizer, batches)
    assert any(b > a for a, b in pairwise(scales)), "the reference run never grew"
    assert sum(b < a for a, b in pairwise(scales)) >= 5, "the reference run never overflowed"

    model = make_mlp()
    ours = Recorded(MixedPrecisionConfig(**torch_like), model, make_optimizer(model.parameters()))
    rows = ours.run(batches)

    assert [row.loss for row in rows] == losses
    assert [row.scale for row in rows] == scales
    assert ours.trainer.get_mixed_precision_stats()["current_scale"] == last_scale
    assert sum(row.overflow for row in rows) == sum(
        b < a for a, b in zip(scales, [*scales[1:], last_scale], strict=True)
    )
    assert_same_run(ours, (reference, reference_optimizer))


@pytest.mark.parametrize("factor", [1.5, 1.1, 3.0])
def test_scale_factors_that_are_no_power_of_two_move_as_torch_does(
    factor: float, torch_like: dict[str, Any]
) -> None:
    batches = make_batches(120)
    reference = make_mlp()
    optimizer = OPTIMIZERS["adamw"](reference.parameters())
    _, scales, _ = amp_loop(reference, optimizer, batches, factor=factor)
    model = make_mlp()
    config = MixedPrecisionConfig(**torch_like, scale_factor=factor)
    ours = Recorded(config, model, OPTIMIZERS["adamw"](model.parameters()))
    # torch multiplies by a rounded 1/f where we divide by f; at most the last bit may differ.
    assert [row.scale for row in ours.run(batches)] == pytest.approx(scales, rel=3e-7)


def test_accumulation_with_a_short_last_group_is_torch_amp(torch_like: dict[str, Any]) -> None:
    batches = make_batches(4 * 30 + 3)
    reference = make_mlp()
    reference_optimizer = OPTIMIZERS["adamw"](reference.parameters())
    losses, scales, _ = amp_loop(reference, reference_optimizer, batches, accumulation=4)
    model = make_mlp()
    ours = Recorded(
        MixedPrecisionConfig(**torch_like),
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        gradient_accumulation_steps=4,
    )
    summary = ours.trainer.train_epoch(batches)
    assert [row.loss for row in ours.rows] == pytest.approx(losses, rel=1e-6)
    assert [row.scale for row in ours.rows] == scales
    assert summary["num_batches"] == 123
    assert_same_run(ours, (reference, reference_optimizer))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_gradient_scaling_is_plain_fp32(fused: bool, max_grad_norm: float | None) -> None:
    batches = make_batches(100)
    reference = make_norm_net()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, fused=fused)
    torch.manual_seed(7)
    for data, target in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(data), target).backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        optimizer.step()

    model = make_norm_net()
    config = MixedPrecisionConfig(
        mode="gradient_scaling", precision_level="fp32", scale_window=7, max_grad_norm=max_grad_norm
    )
    ours = Recorded(config, model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused))
    torch.manual_seed(7)
    rows = ours.run(batches)
    assert len({row.scale for row in rows}) > 3, "the scale never grew"
    assert not any(row.skipped for row in rows)
    assert_same_run(ours, (reference, optimizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"enabled": False},
        {"precision_level": "fp32"},
        {
            "mode": "gradient_scaling",
            "precision_level": "fp32",
            "loss_scaling": False,
            "gradient_scaling": False,
        },
    ],
)
def test_without_low_precision_or_scaling_a_step_is_plain_fp32(settings: dict[str, Any]) -> None:
    batches = make_batches(40)
    reference = make_norm_net()
    optimizer = OPTIMIZERS["sgd-momentum"](reference.parameters())
    torch.manual_seed(3)
    for data, target in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(data), target).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    model = make_norm_net()
    ours = Recorded(MixedPrecisionConfig(**settings), model, OPTIMIZERS["sgd-momentum"](model.parameters()))
    torch.manual_seed(3)
    rows = ours.run(batches)
    assert {(row.scale, row.compute_dtype, row.skipped) for row in rows} == {(1.0, "float32", False)}
    assert_same_run(ours, (reference, optimizer))


def test_the_grad_norm_of_a_row_is_the_unscaled_norm_before_clipping() -> None:
    (batch,) = make_batches(1)
    reference = make_mlp()
    nn.functional.cross_entropy(reference(batch[0]), batch[1]).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    model = make_mlp()
    config = MixedPrecisionConfig(mode="gradient_scaling", precision_level="fp32", max_grad_norm=1e-3)
    ours = Recorded(config, model, OPTIMIZERS["adam"](model.parameters()))
    assert ours.run([batch])[0].grad_norm == expected.item()
