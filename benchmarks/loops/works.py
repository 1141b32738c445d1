"""What the loops under comparison train: models, data and batches, the same for each of them."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halfstep.service.contract.spec import JobSpec
from halfstep.worker.training import randomness
from halfstep.worker.training.assembly import Assembly, assemble
from halfstep.worker.training.data.dataset import epoch_order
from halfstep.worker.training.data.plan import Plan

MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4

WORKS: dict[str, dict[str, Any]] = {
    # 784-512-10, batch 32: 407 050 parameters in 4 tensors.
    "mlp": {
        "model": {"name": "mlp", "params": {"hidden": [512]}},
        "dataset": {"name": "synthetic", "params": {"samples": 4096, "features": 784, "outputs": 10}},
        "training": {"batch_size": 32},
    },
    # 28x28 images, batch 32.
    "cnn": {
        "model": {"name": "cnn"},
        "dataset": {"name": "synthetic", "params": {"samples": 4096, "features": 784, "outputs": 10}},
        "training": {"batch_size": 32},
    },
    # 4 layers, width 256, 128 bytes: 3.3 M parameters in 52 tensors. A small batch: overhead is largest.
    "gpt": {
        "model": {"name": "gpt", "params": {"layers": 4, "heads": 4, "width": 256, "context": 128}},
        "dataset": {"name": "text", "params": {"max_bytes": 1_048_576}},
        "training": {"batch_size": 4},
    },
}

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"mode": "automatic", "precision_level": "bf16"},
    "fp32": {"mode": "automatic", "precision_level": "fp32"},
    # FP32 with a loss scale, beside a loop with torch's GradScaler: most bookkeeping per unit of work.
    "scaled": {"mode": "gradient_scaling", "precision_level": "fp32"},
}


class Loop(Protocol):
    """A way of training. It lives through all rounds of a comparison."""

    def run(self, steps: int) -> float:
        """Train for so many steps; returns the seconds that they took, start-up left out."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One comparison: what is trained, in which precision."""

    work: str
    precision: str

    @property
    def spec(self) -> JobSpec:
        """The job that trains it; endless, without evaluation or checkpoint."""
        document = dict(WORKS[self.work])
        document["training"] = document["training"] | {"max_steps": 2**40, "evaluate_every_steps": 2**40}
        document["optimizer"] = {"name": "adamw", "params": {"lr": LEARNING_RATE}}
        document["precision"] = PRECISIONS[self.precision] | {"max_grad_norm": MAX_GRAD_NORM}
        return JobSpec.model_validate(document)

    def parts(self) -> Assembly:
        """Model, data, criterion and fused optimizer, fresh."""
        spec = self.spec
        randomness.seed_all(spec.training.seed)
        parts = assemble(spec, torch.device("cpu"), (), self._plan)
        parts.model.train()
        return parts

    def batches(self, parts: Assembly) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches without end, gathered by index as a job gathers them."""
        epoch, size = 0, self.spec.training.batch_size
        while True:
            epoch += 1
            order = epoch_order(0, epoch, len(parts.dataset.train))
            for start in range(0, len(order) - size + 1, size):
                yield parts.dataset.train.batch(order[start : start + size])

    def _plan(self, samples: int) -> Plan:
        size = self.spec.training.batch_size
        return Plan(samples=samples, batch_size=size, accumulation=1, epochs=None, max_steps=None)


def scratch() -> Path:
    """A directory of this process for what a loop writes."""
    return Path(tempfile.mkdtemp(prefix="overhead-"))
