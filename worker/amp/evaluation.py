"""Evaluating between two steps without touching training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halfstep.worker.amp.batches import to_device
from halfstep.worker.amp.policies import PrecisionPolicy


@contextmanager
def evaluating(
    model: nn.Module, policy: PrecisionPolicy, device: torch.device
) -> Iterator[Callable[[Any], Any]]:
    """Eval mode, no gradients, the casts of the current step, no scaling, while the context is open.

    Gives a function from an input batch to the model's output. On leaving, every module's mode and the
    random number generators are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []

    def predict(data_batch: Any) -> Any:
        # Its own region for every call: autocast would hand weights cast without gradients to the next step.
        with policy.region():
            return policy.cast_output(model(policy.cast_input(to_device(data_batch, device))))

    with torch.random.fork_rng(devices=devices, device_type=device.type), torch.no_grad():
        model.eval()
        try:
            yield predict
        finally:
            for module, training in modes:
                module.training = training
