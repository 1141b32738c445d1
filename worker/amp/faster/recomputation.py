"""Recomputing activations in the backward pass instead of keeping them (activation_checkpointing)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model: nn.Module) -> tuple[str, ...]:
    """Make every block of `model` recompute its activations; returns the blocks' names.

    A block is a module with submodules and parameters, at the top of the model or in its containers
    (ModuleList, ModuleDict, and a Sequential that holds blocks). Inside a block nothing is changed.
    """
    names = []
    for name, block in _blocks(model, ""):
        # A bound method, so that a copy of the model recomputes its own blocks.
        block.forward = MethodType(_recomputing_forward, block)
        names.append(name)
    return tuple(names)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (
            isinstance(child, nn.Sequential) and any(map(_is_block, child.children()))
        ):
            yield from _blocks(child, path)
        elif _is_block(child):
            yield path, child


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _recomputing_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, block), **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return nullcontext(), _buffers_kept(block)


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    # The second forward pass of a block would move BatchNorm's statistics a second time.
    saved = [(buffer, buffer.detach().clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
