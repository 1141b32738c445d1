"""Models that the fault suite's jobs name: small, exact, and slow enough to be interrupted.

Loaded into the job's process by HALFSTEP_COMPONENT_MODULES, as an operator's own would be.
"""

import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from halfstep.worker.training.components.parameters import Count, NonNegative, Parameters, Share, Width
from halfstep.worker.training.components.registry import register_model
from halfstep.worker.training.data.dataset import DataInfo, InputKind, Task


class PacedParameters(Parameters):
    """Parameters of `paced`."""

    hidden: Width = 16
    dropout: Share = 0.2
    milliseconds: NonNegative = 10.0
    hungry_at: Count | None = None
    gate: str | None = None
    gate_at: Count | None = None


class Paced(nn.Module):
    """Linear, batch normalisation, dropout, linear; a training step takes `milliseconds` and no CPU."""

    def __init__(self, parameters: PacedParameters, data: DataInfo) -> None:
        super().__init__()
        self._seconds = parameters.milliseconds / 1e3
        self._hungry_at = parameters.hungry_at
        self._gate, self._gate_at = parameters.gate, parameters.gate_at
        self._passes = 0
        self.first = nn.Linear(data.shape[0], parameters.hidden)
        self.norm = nn.BatchNorm1d(parameters.hidden)
        self.dropout = nn.Dropout(parameters.dropout)
        self.last = nn.Linear(parameters.hidden, data.outputs)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            time.sleep(self._seconds)
            self._passes += 1
            if self._passes == self._hungry_at:
                _eat()
            # Held here until a test lets it go on, however slow the machine is.
            while self._gate and self._passes == self._gate_at and not Path(self._gate).exists():
                time.sleep(0.01)
        found: Tensor = self.last(self.dropout(torch.relu(self.norm(self.first(features)))))
        return found


def _eat() -> None:
    """Ask for more memory than this process may have."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    torch.empty(2**30)


@register_model(
    "paced",
    PacedParameters,
    summary="A small network that takes its time; for tests of faults.",
    inputs=(InputKind.FEATURES,),
    tasks=(Task.CLASSIFICATION,),
)
def build_paced(parameters: PacedParameters, data: DataInfo) -> nn.Module:
    return Paced(parameters, data)
