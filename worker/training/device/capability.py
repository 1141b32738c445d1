"""What this worker's devices can do, asked of torch and measured."""

from pathlib import Path
from typing import Any

import torch

from halfstep.worker.amp.capability import capability_of
from halfstep.worker.amp.record.memory import host_memory_bytes
from halfstep.worker.training.device.speed import DIRECTORY, device_speeds


def probe(data_dir: Path | None = None) -> dict[str, Any]:
    """The worker's capability as JSON values. On a GPU this creates a CUDA context.

    Args:
        data_dir: where measured speeds are kept for the next start; None: nowhere.

    Returns:
        device_type ("cpu" or "cuda"), device_name, device_count, memory_bytes (of one device, or what the
        process may use), bf16 (natively), fp16, torch (its version), and speed: a `DtypeSpeed` by data type.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    found = capability_of(device)
    if on_gpu:
        memory = int(torch.cuda.get_device_properties(device).total_memory)
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name(device)
    else:
        memory, count, name = host_memory_bytes(), 1, f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    speeds = device_speeds(device, None if data_dir is None else data_dir / DIRECTORY)
    return {
        "device_type": device.type,
        "device_name": name,
        "device_count": count,
        "memory_bytes": memory,
        "bf16": found.bf16,
        "fp16": found.fp16,
        "torch": str(torch.__version__),
        "speed": {dtype: speed.model_dump() for dtype, speed in speeds.items()},
    }
