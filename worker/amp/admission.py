"""What a model must be to be trained here."""

import torch
from torch import nn

from halfstep.worker.amp.errors import SetupError


def device_of(model: nn.Module) -> torch.device:
    """The one device that all parameters of `model` are on.

    Raises:
        SetupError: there are several, or no parameter.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise SetupError(
            f"model: its parameters must be on one device, found {found}; move it, or pass `device`"
        )
    return devices.pop()


def check_weights(model: nn.Module) -> list[str]:
    """A sentence for each reason why the weights train badly in the type that they are in.

    Raises:
        SetupError: they cannot be trained in it.
    """
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    for name, dtype in trained.items():
        if dtype == torch.float16:
            raise SetupError(
                f"model: '{name}' is in float16, whose gradients cannot be unscaled and whose small updates "
                "are lost; pass the model in float32 (mode 'manual' lowers it and keeps FP32 masters)"
            )
    if torch.bfloat16 in trained.values():
        notice = (
            "model: weights in bfloat16 without FP32 masters stop moving once updates are below 1/256 of "
            "them; pass the model in float32 (mode 'manual' lowers it and keeps FP32 masters)"
        )
        return [notice]
    return []
