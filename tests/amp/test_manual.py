"""MANUAL: low-precision weights whose FP32 masters take the updates."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from tests.amp.runs import OPTIMIZERS, Recorded, make_batches, make_mlp, make_norm_net


def start(level: str, optimizer: str = "adamw", model: nn.Module | None = None, **fields: Any) -> Recorded:
    model = make_norm_net() if model is None else model
    config = MixedPrecisionConfig(mode="manual", precision_level=level, **fields)
    return Recorded(config, model, OPTIMIZERS[optimizer](model.parameters()))


def test_bf16_accumulates_a_thousand_updates_too_small_for_it() -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    config = MixedPrecisionConfig(mode="manual", precision_level="bf16", max_grad_norm=None)
    run = Recorded(
        config,
        model,
        torch.optim.SGD(model.parameters(), lr=1e-4),
        criterion=lambda output, target: output.sum() * target,
    )
    data, target = torch.ones(1, 4), torch.tensor(1.0)
    for _ in range(1000):
        run.trainer.train_step(data, target)
    assert model.weight.dtype is torch.bfloat16
    torch.testing.assert_close(
        run.trainer.state_dict()["model"]["weight"], torch.full((1, 4), 0.9), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(model.weight.float(), torch.full((1, 4), 0.9), rtol=2**-8, atol=0.0)
    plain = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(1000):
        plain -= 1e-4
    assert torch.equal(plain, torch.ones(4, dtype=torch.bfloat16)), "without masters nothing moves"


@pytest.mark.parametrize("level", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "optimizer", ["adamw-fused", "adam", "sgd-momentum-fused", "adagrad", "adagrad-fused"]
)
def test_the_optimizer_updates_fp32_masters_and_the_model_is_their_rounding(
    level: str, optimizer: str
) -> None:
    run = start(level, optimizer)
    before = copy.deepcopy(run.trainer.state_dict()["model"])
    rows = run.run(make_batches(20))
    assert not any(row.skipped for row in rows[1:])
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}[level]
    masters = run.trainer.state_dict()["model"]
    assert run.model[0].weight.dtype is low
    assert run.model[1].weight.dtype is torch.float32, "normalisation stays in FP32"
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, masters[name].to(weight.dtype)), name
    assert not torch.equal(masters["0.weight"], before["0.weight"])
    in_optimizer = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in in_optimizer} == {torch.float32}
    assert set(run.optimizer.state) <= set(in_optimizer)
    assert all(p.grad is None for p in [*run.model.parameters(), *in_optimizer])


def test_the_first_masters_are_the_weights_as_they_were_passed() -> None:
    model = make_mlp()
    before = copy.deepcopy(model.state_dict())
    run = start("bf16", model=model)
    assert not torch.equal(model[0].weight.float(), before["0.weight"])
    for name, value in run.trainer.state_dict()["model"].items():
        assert torch.equal(value, before[name]), name


def test_micro_batches_accumulate_in_fp32() -> None:
    model = nn.Linear(1, 1, bias=False)
    config = MixedPrecisionConfig(mode="manual", precision_level="bf16", max_grad_norm=None)
    run = Recorded(
        config,
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=lambda output, target: output.sum(),
    )
    before = run.trainer.state_dict()["model"]["weight"].clone()
    inputs = [torch.tensor([[value]]) for value in (256.0, *[1.0] * 31)]
    run.trainer.train_group([(data, torch.zeros(1)) for data in inputs])
    moved = (before - run.trainer.state_dict()["model"]["weight"]).item()
    # A sum in BF16 would stay at 256 / 32: adding 1 to 256 changes nothing there.
    assert moved == pytest.approx((256 + 31) / 32, rel=1e-5)


@pytest.mark.parametrize("level", ["fp16", "bf16"])
def test_resume_takes_the_masters_not_their_rounding(level: str) -> None:
    batches = make_batches(12)
    torch.manual_seed(4)
    straight = start(level)
    torch.manual_seed(5)
    expected = straight.run(batches)
    torch.manual_seed(4)
    first = start(level)
    torch.manual_seed(5)
    first.run(batches[:6])
    saved, rng = copy.deepcopy(first.trainer.state_dict()), torch.get_rng_state()
    torch.manual_seed(6)
    second = start(level)
    second.trainer.load_state_dict(saved)
    torch.set_rng_state(rng)
    rows = second.run(batches[6:])
    assert [row.loss for row in rows] == [row.loss for row in expected[6:]]
    for name, value in straight.trainer.state_dict()["model"].items():
        assert torch.equal(second.trainer.state_dict()["model"][name], value), name


def test_tied_weights_have_one_master() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 12)
            self.head = nn.Linear(12, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens))

    model = Tied()
    run = start("bf16", model=model)
    run.trainer.train_step(torch.arange(8), torch.arange(8))
    (master,) = run.optimizer.param_groups[0]["params"]
    saved = run.trainer.state_dict()["model"]
    assert torch.equal(saved["head.weight"], master)
    assert torch.equal(saved["table.weight"], master)
    assert model.head.weight is model.table.weight
