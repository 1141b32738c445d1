"""AUTOMATIC: torch's autocast chooses per operation; the weights stay in FP32."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.optim import Optimizer

from halfstep.worker.amp.layers import BorderCast
from halfstep.worker.amp.policies.interface import PrecisionPolicy
from halfstep.worker.amp.policies.islands import Fp32Islands


class AutomaticPolicy(PrecisionPolicy):
    """Forward pass and loss under autocast to one low type."""

    def __init__(
        self, device_type: str, dtype: torch.dtype, *, scales: bool, fp32_layers: tuple[str, ...] = ()
    ) -> None:
        self._device_type = device_type
        self._islands = Fp32Islands(device_type, fp32_layers)
        self.compute_dtype = dtype
        self.scales = scales

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Keep fp32_layers out of autocast."""
        del optimizer
        self._islands.attach(model)

    def detach(self) -> None:
        """Take the borders away again."""
        self._islands.detach()

    def region(self) -> AbstractContextManager[object]:
        """A region of its own each time: autocast forgets its cast weights when it ends."""
        return torch.autocast(self._device_type, dtype=self.compute_dtype)

    def borders(self) -> Iterable[BorderCast]:
        """Around fp32_layers."""
        return (self._islands.border,)

    def notices(self) -> Iterable[str]:
        """Patterns that mean no layer."""
        return self._islands.notices
