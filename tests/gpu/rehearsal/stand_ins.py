"""What `torch.cuda` answers for the pretended device: one device of 8 GiB that is always done at once."""

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import torch

from tests.gpu.rehearsal.tensors import CUDA, DEVICE, TOTAL_BYTES

NAME = "pretended device"


class Event:
    """Passed as soon as it is recorded; times are the host's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        del stream
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        """A stream waits for it, not the host."""

    def synchronize(self) -> None:
        """The host waits for it: told to nobody, as under CUDA's debug mode."""

    def elapsed_time(self, end: "Event") -> float:
        return (end._at - self._at) * 1e3


class Stream:
    """The one stream that there is."""

    device, cuda_stream = CUDA, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        DEVICE.wait("Stream.synchronize")

    def query(self) -> bool:
        return True


def _properties(device: Any = None) -> SimpleNamespace:
    del device
    return SimpleNamespace(name=NAME, total_memory=TOTAL_BYTES, major=9, minor=0, multi_processor_count=132)


def _memory_stats(device: Any = None) -> dict[str, int]:
    del device
    return {
        "allocated_bytes.all.current": DEVICE.allocated,
        "allocated_bytes.all.peak": DEVICE.peak,
        "reserved_bytes.all.current": DEVICE.allocated,
        "reserved_bytes.all.peak": DEVICE.peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def _reset_peak(device: Any = None) -> None:
    del device
    DEVICE.peak = DEVICE.allocated


def _set_sync_debug_mode(mode: int | str) -> None:
    DEVICE.sync_debug_mode = mode


def install() -> None:
    """Put the answers in the places of torch's own. For the life of the process: nothing is put back."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": _properties,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": contextlib.nullcontext,
        "synchronize": lambda device=None: DEVICE.wait("torch.cuda.synchronize"),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "get_sync_debug_mode": lambda: DEVICE.sync_debug_mode,
        # Random numbers come from the CPU's generator, whoever asks.
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": lambda seed: None,
        "empty_cache": lambda: None,
        "memory_stats": _memory_stats,
        "memory_allocated": lambda device=None: DEVICE.allocated,
        "max_memory_allocated": lambda device=None: DEVICE.peak,
        "memory_reserved": lambda device=None: DEVICE.allocated,
        "max_memory_reserved": lambda device=None: DEVICE.peak,
        "reset_peak_memory_stats": _reset_peak,
        "mem_get_info": lambda device=None: (TOTAL_BYTES - DEVICE.allocated, TOTAL_BYTES),
    }
    for name, answer in answers.items():
        if not hasattr(torch.cuda, name):
            raise AttributeError(f"torch.cuda has no {name!r} any more: the stand-in needs a look")
        setattr(torch.cuda, name, answer)
    # A module's parameters become tensors of another class when it moves: they are swapped, not refilled.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # torch.tensor(…, device="cuda") makes its numbers on the host and then asks for a copy.
    torch._C._set_only_lift_cpu_tensors(True)
