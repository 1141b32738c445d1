"""Small models, batches, optimizers and a trainer that keeps what it delivers, for the engine's tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig, MixedPrecisionTrainer
from halfstep.worker.amp.record.rows import StepRow

Batch = tuple[torch.Tensor, torch.Tensor]


class Recorded:
    """A trainer and every row and event that it delivered."""

    def __init__(self, config: MixedPrecisionConfig, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        self.rows: list[StepRow] = []
        self.events: list[Any] = []
        self.model = model
        self.optimizer = optimizer
        self.trainer = MixedPrecisionTrainer(config)
        self.trainer.on_step = self.rows.extend
        self.trainer.on_event = self.events.append
        criterion = kwargs.pop("criterion", nn.CrossEntropyLoss())
        self.trainer.setup_training(model, optimizer, criterion, **kwargs)

    def run(self, batches: list[Batch]) -> list[StepRow]:
        self.model.train()
        for data, target in batches:
            self.trainer.train_step(data, target)
        self.trainer.flush()
        return self.rows


def make_mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def make_norm_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def make_batches(count: int, *, seed: int = 1, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 12, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for _ in range(count)
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "sgd-momentum-foreach": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, foreach=True),
    "sgd-momentum-fused": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, fused=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1e-1, fused=True),
    "sgd-dampened-fused": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, dampening=0.5, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1),
    "adagrad-foreach": lambda p: torch.optim.Adagrad(p, lr=1e-1, foreach=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=1e-1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}
