"""Subtrees that stay in FP32 inside a region of autocast."""

from functools import partial

import torch
from torch import nn

from halfstep.worker.amp.batches import cast_floating
from halfstep.worker.amp.layers import BorderCast, match_layers


class Fp32Islands:
    """The layers that fp32_layers means: run without autocast, their floating inputs in FP32.

    Attributes:
        border: around each of them.
        notices: a sentence for each pattern that means no layer.
    """

    def __init__(self, device_type: str, patterns: tuple[str, ...]) -> None:
        self._patterns = patterns
        self.border = BorderCast(
            region=partial(torch.autocast, device_type, enabled=False),
            cast_inputs=partial(cast_floating, dtype=torch.float32),
            cast_outputs=None,
        )
        self.notices: tuple[str, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Find the layers in `model` and put a border around each."""
        match = match_layers(model, self._patterns, field="fp32_layers")
        for module in match.modules.values():
            self.border.attach(module)
        self.notices = match.notices

    def detach(self) -> None:
        """Leave the layers as they were found."""
        self.border.detach()
