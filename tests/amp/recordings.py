"""A stand-in for CUDA graphs on a CPU: records every operation of torch, with the memory it reads and writes.

It is as strict as a graph. Recording leaves no trace: what the work wrote is put back. A replay runs the same
operations on the same memory with the same numbers, whatever the host has changed since, and nothing of the
host's code. Reading a value while recording fails.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

T = TypeVar("T")
aten: Any = torch.ops.aten


class Recordings:
    """As `halfstep.worker.amp.faster.capture.Graphs`; counts what it is asked for."""

    def __init__(self) -> None:
        self.rehearsed = 0
        self.recorded = 0
        self.replayed = 0
        self.unfit: str | None = None
        self.refuse_at_end: Exception | None = None
        self.before_replay: Callable[[], None] = lambda: None

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str | None]:
        self.rehearsed += 1
        return work(), self.unfit

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        drawn = torch.get_rng_state()
        operations = _Operations()
        try:
            with operations:
                left = work()
            if self.refuse_at_end is not None:
                raise self.refuse_at_end
        finally:
            operations.put_back()
            torch.set_rng_state(drawn)
        self.recorded += 1

        def run() -> None:
            self.before_replay()
            self.replayed += 1
            operations.run()

        return run, left


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()
        self._kept: list[Any] = []
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        written = _written(func, args, kwargs)
        for tensor in written:
            self._remember(tensor)
        result = func(*args, **kwargs)
        made = _fresh(func, result)
        for tensor in made:
            self._made.add(tensor.untyped_storage()._cdata)
        self._kept.append((args, kwargs, result))
        if written or made:
            self._calls.append((func, args, kwargs, made))
        return result

    def run(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self._calls:
                result = func(*args, **kwargs)
                for place, value in zip(made, _fresh(func, result), strict=True):
                    place.copy_(value)

    def put_back(self) -> None:
        for storage, values in self._before.values():
            storage.copy_(values)

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._made and storage._cdata not in self._before:
            self._before[storage._cdata] = (storage, storage.clone())


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [one for one in tree_flatten(value)[0] if _is_tensor(one)]
    if func is aten.native_batch_norm.default:  # writes its running statistics without saying so
        found += [one for one in args[3:5] if _is_tensor(one)]
    return found


def _fresh(func: Any, result: Any) -> list[Tensor]:
    """The tensors of a result that are no other tensor's memory."""
    returns = func._schema.returns
    results = result if len(returns) > 1 else (result,)
    return [
        one
        for output, value in zip(returns, results, strict=bool(returns))
        if output.alias_info is None
        for one in tree_flatten(value)[0]
        if _is_tensor(one)
    ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
