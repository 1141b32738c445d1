"""What this worker's devices can do, asked of torch and measured."""

import math
import time
from functools import cache
from typing import Any

import torch

from worker.amp.capability import capability_of
from worker.amp.memory import host_memory_bytes

_EDGE = {"cpu": 128, "cuda": 2048}
"""Small enough that several products fit the budget where FP16 is a hundred times slower than FP32; on a GPU
large enough that the launch does not count."""
_BUDGET_SECONDS = 0.05


def probe() -> dict[str, Any]:
    """The worker's capability as JSON values. On a GPU this creates a CUDA context.

    Returns:
        device_type ("cpu" or "cuda"), device_name, device_count, memory_bytes (of one device, or what the
        process may use), bf16 (natively), fp16, torch (its version), and matmul_relative: the speed of a
        square matrix product in float16 and bfloat16 over float32's, measured here.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    found = capability_of(device)
    if on_gpu:
        memory = int(torch.cuda.get_device_properties(device).total_memory)
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name(device)
    else:
        memory, count, name = host_memory_bytes(), 1, f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device_type": device.type,
        "device_name": name,
        "device_count": count,
        "memory_bytes": memory,
        "bf16": found.bf16,
        "fp16": found.fp16,
        "torch": str(torch.__version__),
        "matmul_relative": relative_speed(device.type),
    }


@cache
def relative_speed(device_type: str) -> dict[str, float]:
    """The speed of a matrix product in float16 and bfloat16 over float32's, measured once in a process."""
    device = torch.device(device_type)
    full = _products_per_second(device, torch.float32)
    return {
        str(dtype).removeprefix("torch."): float(f"{_products_per_second(device, dtype) / full:.2g}")
        for dtype in (torch.float16, torch.bfloat16)
    }


def _products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """By the fastest product seen: on a machine that does other work, the others tell of that work."""
    left = torch.ones(_EDGE[device.type], _EDGE[device.type], dtype=dtype, device=device)
    out = left @ left
    _wait(device)
    fastest, deadline = math.inf, time.perf_counter() + _BUDGET_SECONDS
    while True:
        began = time.perf_counter()
        torch.mm(left, left, out=out)
        _wait(device)
        ended = time.perf_counter()
        fastest = min(fastest, ended - began)
        if ended >= deadline:
            return 1.0 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
