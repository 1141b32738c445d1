"""Pays the first step's price before a job comes: what torch imports and builds only when training begins.

Runs on the CPU alone and creates no CUDA context, so that a waiting process holds no device memory.
"""

import torch
from torch import nn

from halfstep.worker.amp import MixedPrecisionConfig, MixedPrecisionTrainer, PrecisionLevel
from halfstep.worker.training.components import load_built_in

_QUIET = MixedPrecisionConfig(precision_level=PrecisionLevel.BF16, loss_scaling=False, gradient_scaling=False)
"""Nothing in it is worth a warning: what is printed here would look like the next job's."""


def take_a_step() -> None:
    """Train a tiny model for two steps in mixed precision; torch's global random generator is put back."""
    load_built_in()
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        trainer = MixedPrecisionTrainer(_QUIET)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        trainer.setup_training(model, optimizer, nn.CrossEntropyLoss(), device="cpu")
        batch = (torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))
        trainer.train_group([batch])
        trainer.train_group([batch])
        trainer.flush()
