"""The ways of use that the library promises, each as a plain script would do it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import data

from halfstep.worker.amp import (
    MixedPrecisionConfig,
    MixedPrecisionMode,
    MixedPrecisionTrainer,
    PrecisionLevel,
)


@pytest.fixture
def dataset() -> data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 784, generator=generator)
    return data.TensorDataset(inputs, inputs[:, :10].argmax(1))


def test_advanced(dataset: data.TensorDataset) -> None:
    config = MixedPrecisionConfig(
        enabled=True,
        mode=MixedPrecisionMode.ADAPTIVE,
        precision_level=PrecisionLevel.DYNAMIC,
        gradient_scaling=True,
        loss_scaling=True,
        dynamic_loss_scaling=True,
        initial_scale=2**16,
        scale_factor=2.0,
        scale_window=2000,
        min_scale=1.0,
        max_scale=2**24,
        overflow_threshold=1e-4,
        underflow_threshold=1e-6,
        adaptive_threshold=0.1,
        memory_efficiency=True,
        performance_monitoring=True,
        nan_handling=True,
        overflow_handling=True,
        underflow_handling=True,
        selective_layers=["conv1", "conv2", "fc1"],
    )
    trainer = MixedPrecisionTrainer(config)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    criterion = nn.CrossEntropyLoss()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    trainer.setup_training(model, optimizer, criterion, scheduler)
    train_loader = data.DataLoader(dataset, batch_size=32, shuffle=True)
    history = trainer.train(train_loader, num_epochs=10)
    assert history[-1]["epoch_loss"] < 0.5 * history[0]["epoch_loss"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5), "the scheduler moves once an epoch"


@pytest.mark.parametrize("level", [PrecisionLevel.FP16, PrecisionLevel.BF16])
def test_manual(dataset: data.TensorDataset, level: PrecisionLevel) -> None:
    config = MixedPrecisionConfig(
        enabled=True,
        mode=MixedPrecisionMode.MANUAL,
        precision_level=level,
        gradient_scaling=True,
        loss_scaling=True,
        overflow_handling=True,
        underflow_handling=True,
    )
    trainer = MixedPrecisionTrainer(config)
    model = nn.Sequential(nn.Linear(784, 10))
    optimizer = torch.optim.Adam(model.parameters())
    criterion = nn.CrossEntropyLoss()
    trainer.setup_training(model, optimizer, criterion)
    train_loader = data.DataLoader(dataset, batch_size=32, shuffle=True)
    history = trainer.train(train_loader, num_epochs=10)
    assert history[-1]["epoch_loss"] < 0.7 * history[0]["epoch_loss"]
    assert model[0].weight.dtype is not torch.float32


def test_sparse_gradients_are_checked_and_measured() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 8, sparse=True)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(16, 4))
    losses: list[Any] = []
    for trainer_side in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(50, 8, sparse=True)
        model = nn.Sequential(table, nn.Flatten(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens, target = torch.tensor([[1, 2], [2, 2], [3, 1]]), torch.tensor([0, 1, 2])
        if trainer_side:
            trainer = MixedPrecisionTrainer(MixedPrecisionConfig(precision_level="fp32", max_grad_norm=None))
            trainer.setup_training(model, optimizer, nn.CrossEntropyLoss())
            losses.append([trainer.train_step(tokens, target)["loss"] for _ in range(5)])
        else:
            plain = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(tokens), target)
                loss.backward()
                optimizer.step()
                plain.append(loss.item())
            losses.append(plain)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
