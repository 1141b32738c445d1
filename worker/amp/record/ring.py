"""The ring: what a step leaves behind as it ends, one row of numbers, kept until the host reads many at once.

A row is what the device knows and no more: the head below, then the gradient norm of every parameter. What
the row means is worked out by whoever reads it, for many rows together.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RING_STEPS = 256
"""Rows that the ring holds. It is read every 32 steps, so a row is never overwritten unread."""

HEAD = ("loss", "grad_norm", "scale", "next_scale", "grad_bad", "range_exhausted")
"""A row's first columns: loss and norm unscaled, the scale used and the one after, and two flags (0 or 1)."""

Rows = npt.NDArray[np.float32]


class StepRing:
    """A fixed number of float32 rows on the device, read through host memory.

    On a GPU a row is written at a device-side index, and one asynchronous copy into pinned memory serves all
    rows since the last read; the host waits for that copy's event alone. On a CPU the host looks at, and
    may write, the ring's own memory.
    """

    def __init__(self, device: torch.device, *, norms: int) -> None:
        self._rows = torch.zeros((RING_STEPS, len(HEAD) + norms), dtype=torch.float32, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._written = 0
        self._read = 0
        self._on_gpu = device.type == "cuda"
        self._host_rows = self._rows
        if self._on_gpu:
            self._host_rows = torch.empty_like(self._rows, device="cpu", pin_memory=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not annotate it
        # Made once: the host reads through this, never by a tensor method inside a step.
        self._seen: Rows = self._host_rows.numpy()
        self._seen_heads = self._seen[:, : len(HEAD)]
        self._norms = self._host_rows[:, len(HEAD) :].unbind()

    def append(self, head: Sequence[Tensor], norms: Tensor) -> Tensor:
        """Write a row on the device.

        Args:
            head: as `HEAD`, 0-d tensors.
            norms: one number for each parameter that has a gradient, 1-d.

        Returns:
            The row, float32, as a tensor of its own.
        """
        row = torch.cat((torch.stack(tuple(head)), norms)).float()
        self._rows[:, : len(row)].index_copy_(0, self._index, row.unsqueeze(0))
        self._index.add_(1).remainder_(RING_STEPS)
        return row

    def put(self, head: tuple[float, ...], norms: Tensor) -> None:
        """Write a row from the host, which sees the ring's memory: on a CPU alone."""
        slot = self._written % RING_STEPS
        self._seen_heads[slot] = head
        place = self._norms[slot]
        (place if len(norms) == len(place) else place[: len(norms)]).copy_(norms)

    def count(self) -> None:
        """The host knows of one more row."""
        self._written += 1

    def read(self) -> Rows:
        """Every row not yet read, oldest first. Waits for the device to finish the last of them."""
        first, self._read = self._read, self._written
        slots = np.arange(first, self._written) % RING_STEPS
        if len(slots) and self._on_gpu:
            self._host_rows.copy_(self._rows, non_blocking=True)
            self._copied.record()
            self._copied.synchronize()  # the one deliberate wait, every 32 steps and at a flush
        return self._seen[slots]
