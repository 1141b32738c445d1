"""Which skipped steps are repeated to see where they went wrong, and that the repetition leaves no trace."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.worker.amp.diagnosis.attribution import Repeated, Tracer
from halfstep.worker.amp.policies import PrecisionPolicy
from halfstep.worker.amp.record.rows import Attribution
from halfstep.worker.amp.update.snapshots import BufferGuard, RandomStates

WATCHED_STEPS = 32
"""On a GPU: so many steps after the start and after an incident the host waits to know of a skipped step."""

_FREE_REPETITIONS = 16
_STEPS_PER_REPETITION = 50
"""A run may repeat so many steps at once, and one more for every so many: each costs two passes."""


class IncidentProbe:
    """Repeats the first skipped step of a run of them."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        policy: PrecisionPolicy,
        parameters: Sequence[nn.Parameter],
        *,
        buffers: BufferGuard,
        device: torch.device,
        waits: bool,
    ) -> None:
        self._tracer = Tracer(model, criterion, policy, parameters)
        self._buffers = buffers
        self._device = device
        self._waits = waits
        self._repetitions = 0
        self._watched_until = WATCHED_STEPS
        self._last_skipped = -2

    def watches(self, step: int) -> bool:
        """Whether a skipped step could be repeated: always on a CPU, on a GPU soon after an incident."""
        return not self._waits or step < self._watched_until

    def must_wait(self, step: int) -> bool:
        """Whether the host has to wait for the device to know whether this step was skipped."""
        return self._waits and self.watches(step)

    def watch_closely(self, step: int) -> None:
        """An incident was read: watch the steps that follow."""
        self._watched_until = step + WATCHED_STEPS

    def look_into(
        self,
        step: int,
        *,
        micro_batches: Sequence[tuple[Any, Any]],
        random_states: RandomStates | None,
        scale: Tensor | float,
    ) -> Attribution | None:
        """Repeat a skipped step on the weights and buffers before it; None where nothing was learnt.

        Args:
            step: its number, from 0.
            micro_batches: (input, target) on the device.
            random_states: of the generators before it; None where it was not watched.
            scale: the loss scale it used.
        """
        first_of_run = self._last_skipped != step - 1
        self._last_skipped = step
        spent = self._repetitions > _FREE_REPETITIONS + step // _STEPS_PER_REPETITION
        if random_states is None or not first_of_run or spent:
            return None
        self._repetitions += 1
        now = RandomStates(self._device)
        repeated = Repeated(micro_batches, scale)
        try:
            random_states.restore()
            found = self._tracer.first_non_finite(repeated)
            if found is None:
                return None
            random_states.restore()
            self._buffers.restore()
            return replace(found, verdict=self._tracer.in_full_precision(repeated))
        finally:
            now.restore()
            self._buffers.restore()
            self._tracer.release()
