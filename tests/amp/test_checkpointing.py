"""Recomputed activations give the same run: gradients, buffers and random draws."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig
from halfstep.worker.amp.faster.recomputation import recompute_blocks
from tests.amp.runs import Recorded, make_batches, make_mlp


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.drop(torch.relu(self.norm(self.linear(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Linear(12, 16),
            nn.ModuleList([Block(), Block()]),
            nn.Linear(16, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision_level": "fp32"},
        {"precision_level": "bf16"},
        {"mode": "manual", "precision_level": "bf16"},
        {"mode": "selective", "precision_level": "bf16", "selective_layers": ["blocks.*.linear", "head"]},
        {
            "mode": "adaptive",
            "precision_level": "fp16",
            "adaptive_threshold": 0.0,
            "fp32_layers": ["blocks.1"],
        },
    ],
    ids=["fp32", "bf16", "manual", "selective", "adaptive-fp16"],
)
def test_recomputing_changes_no_number(settings: dict[str, Any]) -> None:
    def train(recompute: bool) -> tuple[Recorded, torch.Tensor]:
        torch.manual_seed(0)
        model = Net()
        config = MixedPrecisionConfig(**settings, activation_checkpointing=recompute)
        run = Recorded(config, model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
        torch.manual_seed(1)
        run.run(make_batches(12))
        return run, torch.rand(3)

    (plain, plain_draws), (recomputed, draws) = train(recompute=False), train(recompute=True)
    assert plain.model.blocks[0].calls == 12
    assert recomputed.model.blocks[0].calls == 24
    assert [row.loss for row in plain.rows] == [row.loss for row in recomputed.rows]
    assert torch.equal(plain_draws, draws)
    for name, value in plain.trainer.state_dict()["model"].items():
        assert torch.equal(value, recomputed.trainer.state_dict()["model"][name]), name


def test_fewer_activations_are_kept() -> None:
    def kept(recompute: bool) -> int:
        torch.manual_seed(0)
        model = Net()
        config = MixedPrecisionConfig(precision_level="fp32", activation_checkpointing=recompute)
        Recorded(config, model, torch.optim.AdamW(model.parameters()))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(64, 12))
        return sum(sizes)

    assert kept(recompute=True) < 0.6 * kept(recompute=False)


def test_a_copy_of_the_model_recomputes_its_own_blocks() -> None:
    model = Net()
    config = MixedPrecisionConfig(activation_checkpointing=True)
    Recorded(config, model, torch.optim.AdamW(model.parameters()))
    twin = copy.deepcopy(model)
    twin(torch.randn(4, 12)).sum().backward()
    assert (twin.blocks[0].calls, model.blocks[0].calls) == (2, 0)
    assert twin.blocks[0].linear.weight.grad is not None
    assert model.blocks[0].linear.weight.grad is None


def test_a_model_without_blocks_is_told_so() -> None:
    model = make_mlp()
    run = Recorded(
        MixedPrecisionConfig(activation_checkpointing=True), model, torch.optim.AdamW(model.parameters())
    )
    assert any("nothing is recomputed" in event.message for event in run.events)


def test_blocks_are_found_in_containers_and_not_inside_each_other() -> None:
    model = nn.Sequential(
        nn.Linear(4, 16),
        nn.Sequential(Block(), nn.Sequential(Block(), Block())),
        nn.ModuleDict({"a": Block(), "b": nn.Linear(4, 4)}),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    )
    assert recompute_blocks(model) == ("1.0", "1.1.0", "1.1.1", "2.a", "3")
