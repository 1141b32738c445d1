"""Batches as they come: tensors, or nested dicts, lists and (named) tuples of them, moved and cast whole."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to every tensor; anything else is kept as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on `device`, copied without waiting where the source is pinned."""
    return map_tensors(
        batch, lambda tensor: tensor if tensor.device == device else tensor.to(device, non_blocking=True)
    )


def cast_floating(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating tensors in `dtype`; token ids, masks and labels stay what they are."""
    return map_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def shapes_of(batch: Any) -> Any:
    """The shape of a tensor, or the same nesting of shapes."""
    if isinstance(batch, Tensor):
        return batch.shape
    if isinstance(batch, Mapping):
        return {key: shapes_of(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(shapes_of(value) for value in batch)
    return None


def samples_in(batch: Any) -> int:
    """The batch's first dimension, 1 for a scalar, 0 where it holds no tensor."""
    for tensor in tensors_of(batch):
        return int(tensor.shape[0]) if tensor.dim() else 1
    return 0
