"""What decides the bits of a run besides its specification: versions, device, threads.

Stored in each checkpoint; a resumed run compares it and says what differs.
"""

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def describe(device: torch.device, *, deterministic: bool) -> dict[str, Any]:
    """The environment as primitives, keyed by what a person would call it."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "deterministic": deterministic,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "device": device.type,
    }
    if device.type == "cuda":
        described |= {
            "device_name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # unannotated in torch
        }
    return described


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What changed since, as name → [then, now]."""
    names = sorted(stored.keys() | present.keys())
    return {
        name: [stored.get(name), present.get(name)] for name in names if stored.get(name) != present.get(name)
    }
