"""Keeps what a forward pass moves, registered buffers and random number generators, as it was before a step.

A forward pass moves BatchNorm's running statistics before anyone knows that its loss is infinite. Weights
are not guarded here: a skipped step never writes them.
"""

import torch
from torch import Tensor, nn

from halfstep.worker.amp.kernels import Kernels


class RandomStates:
    """The states of torch's random number generators that a step on `device` draws from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class BufferGuard:
    """A snapshot of every registered buffer, written back on the device where a step is skipped."""

    def __init__(self, model: nn.Module, kernels: Kernels) -> None:
        # By owner and name: a module may put a new tensor in a buffer's place.
        self._places = [
            (module, name)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
            if buffer is not None
        ]
        self._kernels = kernels
        self._live: list[Tensor] = []
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember every buffer; call it before the step's first forward pass."""
        if not self._places:
            return
        self._live = [getattr(module, name) for module, name in self._places]
        if len(self._saved) != len(self._live) or any(
            saved.shape != live.shape or saved.dtype != live.dtype or saved.device != live.device
            for saved, live in zip(self._saved, self._live, strict=True)
        ):
            self._saved = [torch.empty_like(live) for live in self._live]
        self._kernels.copy(self._saved, self._live)

    @torch.no_grad()
    def restore_where(self, found: Tensor) -> None:
        """Write the snapshot back where `found` (bool, 0-d, on the device) is true, without a host read."""
        if not self._places:
            return
        self._put_back_replaced()
        self._kernels.copy(
            self._live,
            [torch.where(found, saved, live) for saved, live in zip(self._saved, self._live, strict=True)],
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Write the snapshot back."""
        if not self._places:
            return
        self._put_back_replaced()
        self._kernels.copy(self._live, self._saved)

    def forget_replaced(self) -> None:
        """Put the tensors of the snapshot back in their places, whatever took these: it holds no values."""
        if self._live:
            for (module, name), live in zip(self._places, self._live, strict=True):
                setattr(module, name, live)

    def _put_back_replaced(self) -> None:
        # A buffer that the forward pass replaced by another tensor: move its value into the tensor we
        # snapshot, so that both outcomes can be chosen on the device.
        for (module, name), live in zip(self._places, self._live, strict=True):
            current = getattr(module, name)
            if current is not live:
                live.copy_(current)
                setattr(module, name, live)
