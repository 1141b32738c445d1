"""AUTOMATIC: torch's autocast chooses per operation; the weights stay in FP32."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.optim import Optimizer

from worker.amp.policies.interface import PrecisionPolicy
from worker.amp.policies.islands import keep_in_fp32


class AutomaticPolicy(PrecisionPolicy):
    """Forward pass and loss under autocast to one low type."""

    def __init__(
        self, device_type: str, dtype: torch.dtype, *, scales: bool, fp32_layers: tuple[str, ...] = ()
    ) -> None:
        self._device_type = device_type
        self._fp32_layers = fp32_layers
        self._notices: tuple[str, ...] = ()
        self.compute_dtype = dtype
        self.scales = scales

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Keep fp32_layers out of autocast."""
        del optimizer
        self._notices = keep_in_fp32(model, self._fp32_layers, self._device_type).notices

    def region(self) -> AbstractContextManager[object]:
        """A region of its own each time: autocast forgets its cast weights when it ends."""
        return torch.autocast(self._device_type, dtype=self.compute_dtype)

    def notices(self) -> Iterable[str]:
        """Patterns that mean no layer."""
        return self._notices
