"""What a device can compute in, asked of torch."""

import torch

from halfstep.service.contract.precision import DeviceCapability
from halfstep.worker.amp.errors import SetupError


def capability_of(device: torch.device) -> DeviceCapability:
    """The capability of a CPU or CUDA device.

    Raises:
        SetupError: another kind of device.
    """
    if device.type == "cpu":
        return DeviceCapability(device_type="cpu", bf16=True, fp16=True, name="cpu")
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
        return DeviceCapability(device_type="cuda", bf16=native, fp16=True, name=name)
    raise SetupError(f"device: '{device}' is neither a CPU nor a CUDA device; move the model to one")
