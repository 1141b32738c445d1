"""Subtrees that stay in FP32 inside a region of autocast."""

from functools import partial

import torch
from torch import nn

from worker.amp.batches import cast_floating
from worker.amp.layers import BorderCast, LayerMatch, match_layers


def keep_in_fp32(model: nn.Module, patterns: tuple[str, ...], device_type: str) -> LayerMatch:
    """Run the layers that fp32_layers means without autocast, their floating inputs in FP32."""
    match = match_layers(model, patterns, field="fp32_layers")
    border = BorderCast(
        region=partial(torch.autocast, device_type, enabled=False),
        cast_inputs=partial(cast_floating, dtype=torch.float32),
        cast_outputs=None,
    )
    for module in match.modules.values():
        border.attach(module)
    return match
