"""AUTOMATIC: torch's autocast chooses per operation; the weights stay in FP32."""

from contextlib import AbstractContextManager

import torch

from worker.amp.policies.interface import PrecisionPolicy


class AutomaticPolicy(PrecisionPolicy):
    """Forward pass and loss under autocast to one low type."""

    def __init__(self, device_type: str, dtype: torch.dtype, *, scales: bool) -> None:
        self._device_type = device_type
        self.compute_dtype = dtype
        self.scales = scales

    def region(self) -> AbstractContextManager[object]:
        """A region of its own each time: autocast forgets its cast weights when it ends."""
        return torch.autocast(self._device_type, dtype=self.compute_dtype)
