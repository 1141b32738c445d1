"""Tensors that say `cuda:0` and keep their numbers on the CPU, and the mode under which they are made.

Each operation is looked at before it runs: do its devices agree, as CUDA would demand; does the host wait for
it; does its result fit the device? Then it runs on the CPU, and its results say `cuda:0`.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
TOTAL_BYTES = 8 * 2**30

# What CUDA answers only once the device has come so far.
_ANSWERS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
}


class Held:
    """Lives as long as the tensor whose memory it stands for: torch swaps no tensor with a weak reference."""


@dataclass
class Device:
    """What is known of the one pretended device.

    Attributes:
        waits: how often the host waited for it, by what made it wait.
        sync_debug_mode: as `torch.cuda.set_sync_debug_mode` takes it; "error" makes the next wait raise.
        allocated, peak: bytes of tensors alive now, and at most since the peak was reset.
    """

    waits: Counter[str] = field(default_factory=Counter)
    sync_debug_mode: int | str = "default"
    allocated: int = 0
    peak: int = 0
    _storages: dict[int, tuple[int, int]] = field(default_factory=dict)  # address: wrappers, bytes

    def wait(self, what: str) -> None:
        """The host waits for the device.

        Raises:
            RuntimeError: under the debug mode "error", as CUDA does.
        """
        self.waits[what] += 1
        if self.sync_debug_mode in ("error", 2):
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def reserve(self, size: int) -> None:
        """Find room for `size` bytes.

        Raises:
            torch.OutOfMemoryError: there is none.
        """
        if self.allocated + size > TOTAL_BYTES:
            wanted, total, free = (
                f"{each / 2**30:.2f} GiB" for each in (size, TOTAL_BYTES, TOTAL_BYTES - self.allocated)
            )
            told = f"Tried to allocate {wanted}. GPU 0 has {total}, of which {free} is free."
            raise torch.OutOfMemoryError(f"CUDA out of memory. {told}")

    def hold(self, storage: torch.UntypedStorage) -> "Held":
        """Count a storage's memory for as long as what is returned lives."""
        address, size = storage.data_ptr(), storage.nbytes()
        count, known = self._storages.get(address, (0, size))
        if not count:
            self.allocated += known
            self.peak = max(self.peak, self.allocated)
        self._storages[address] = (count + 1, known)
        held = Held()
        weakref.finalize(held, self._let_go, address).atexit = False
        return held

    def _let_go(self, address: int) -> None:
        count, size = self._storages.pop(address)
        if count > 1:
            self._storages[address] = (count - 1, size)
        else:
            self.allocated -= size


DEVICE = Device()


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; `on_host` has its numbers."""

    on_host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: torch.Tensor, *, requires_grad: bool = False) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            layout=on_host.layout,
            device=CUDA,
            requires_grad=requires_grad,
        )
        made._keep(on_host)
        return made

    def _keep(self, on_host: torch.Tensor) -> None:
        self.on_host, self._held = on_host, DEVICE.hold(on_host.untyped_storage())

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes contents for tensors of its own
        return f"PretendedTensor({self.on_host!r})"

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self._keep(value.on_host)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


class Rehearsal(TorchDispatchMode):
    """While this mode is on, what asks for a CUDA device is made on the pretended one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: its devices checked, its waits counted, its numbers from the CPU."""
    tensors: list[torch.Tensor] = []
    host_args, host_kwargs = _on_host(args, tensors), _on_host(kwargs, tensors)
    there = [isinstance(each, PretendedTensor) for each in tensors]
    asked = kwargs.get("device")
    result_there = torch.device(asked).type == "cuda" if asked is not None else any(there)
    if func is aten._to_copy.default:
        if there[0] is not result_there and not kwargs.get("non_blocking"):
            DEVICE.wait("a copy between host and device")
    elif func is aten.copy_.default:
        result_there = there[0]
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if there[0] is not there[1] and not non_blocking:
            DEVICE.wait("a copy between host and device")
    elif any(there):
        for tensor, on_device in zip(tensors, there, strict=True):
            if not on_device and tensor.dim():
                told = "Expected all tensors to be on the same device, but found at least two devices"
                raise RuntimeError(f"{told}, cuda:0 and cpu! ({func})")
        if func in _ANSWERS or _picks_by_a_mask(func, args):
            DEVICE.wait(str(func))
    if result_there and not tensors:
        DEVICE.reserve(_asked_bytes(args, kwargs))
    out = func(*host_args, **host_kwargs)
    if result_there:
        out = pytree.tree_map_only(torch.Tensor, PretendedTensor, out)
    elif any(there):
        return out
    return return_and_correct_aliasing(func, args, kwargs, out) if _returns_an_argument(func) else out


def _on_host(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value with every tensor as it is on the host; the tensors as they came are added to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.on_host if isinstance(value, PretendedTensor) else value
    if isinstance(value, list | tuple):
        return type(value)([_on_host(each, tensors) for each in value])
    if isinstance(value, dict):
        return {name: _on_host(each, tensors) for name, each in value.items()}
    return torch.device("cpu") if isinstance(value, torch.device) else value


@cache
def _returns_an_argument(func: Any) -> bool:
    """Whether a result is an argument, or a view of one, by the operation's schema."""
    return any(each.alias_info is not None for each in func._schema.returns)


def _picks_by_a_mask(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the size of the result depends on the numbers: an index of truth values."""
    if func is not aten.index.Tensor:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _asked_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    size = args[0] if args and isinstance(args[0], list | tuple) else ()
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return math.prod(size) * int(dtype.itemsize) if all(isinstance(each, int) for each in size) else 0
