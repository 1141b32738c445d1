"""The global random number generators: seeded, captured and restored; and torch's deterministic switch.

Datasets and the order of batches use generators of their own and are no business of this file.
"""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_FRESH_MEMORY: Any = torch.utils.deterministic
"""A module whose properties type checkers do not see."""


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, CUDA's included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture(device: torch.device) -> dict[str, Any]:
    """The state of every global generator, as tensors and primitives."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every generator back to a captured state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Refuse operations without a deterministic kernel inside the block.

    The process's switches return after it.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _FRESH_MEMORY.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    if enabled:
        # cuBLAS reads it when the process first uses CUDA.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # Filling every fresh tensor costs time in each step and guards only against reading uninitialised memory.
    _FRESH_MEMORY.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _FRESH_MEMORY.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]
