"""Which checkpoints a run writes, when, and which of them stay. How one is written is in `writing`."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.service.contract.spec import TrainingBlock
from halfstep.service.files.remote import Mirror
from halfstep.worker.training.checkpoints import writing
from halfstep.worker.training.checkpoints.writing import CheckpointInfo, CheckpointRef, Payload
from halfstep.worker.training.errors import StorageFailed


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that was written.

    Attributes:
        info: what there is to tell of it.
        superseded: those that are no longer needed because of it.
    """

    info: CheckpointInfo
    superseded: Sequence[CheckpointRef]


class Keeping:
    """The checkpoints of one run.

    Attributes:
        known: those that can be gone back to, newest first.

    Args:
        training: Says when one is due, and how many stay.
        directory: Where they go.
        fence: The attempt's; part of every checkpoint's path.
        mirror: The remote store that keeps them; None: the directory does.
        known: Of earlier attempts.
    """

    def __init__(
        self,
        training: TrainingBlock,
        *,
        directory: Path,
        fence: int,
        mirror: Mirror | None,
        known: Sequence[CheckpointRef],
    ) -> None:
        self.known = list(known)
        self._training = training
        self._directory, self._fence, self._mirror = directory, fence, mirror
        self._saved_at = self._failed = 0
        self._best_loss, self._best_at = math.inf, 0
        self._due_at = math.inf
        self.put_off()

    def due(self, step: int, now: float) -> bool:
        """Whether one is to be written after `step`, at `now` of the monotonic clock."""
        every = self._training.checkpoint_every_steps
        if (every is not None and step % every == 0) or now >= self._due_at:
            return True
        return self._training.checkpoint_on_best and self._best_at == step

    def put_off(self) -> None:
        """Count `checkpoint_every_seconds` from now."""
        seconds = self._training.checkpoint_every_seconds
        self._due_at = math.inf if seconds is None else time.monotonic() + seconds

    def has(self, step: int) -> bool:
        """Whether the newest one is that of `step`."""
        return self._saved_at == step

    def score(self, loss: float, step: int) -> None:
        """Take in the held-out loss after `step`."""
        if loss < self._best_loss:
            self._best_loss, self._best_at = loss, step

    def write(self, step: int, payload: Payload, *, metrics: Mapping[str, float], rollbacks: int) -> Kept:
        """Write one, and choose those that stay.

        Raises:
            StorageFailed: it could not be written; those before it are whole.
        """
        try:
            info = writing.save(
                self._directory,
                self._fence,
                step,
                payload,
                metrics=metrics,
                rollbacks=rollbacks,
                failures=self._failed,
                mirror=self._mirror,
            )
        except StorageFailed:
            self._failed += 1
            raise
        self._saved_at = step
        known = [info.ref, *self.known]
        self.known = writing.retained(
            known, self._training.keep_checkpoints, best=self._training.keep_best_checkpoint
        )
        return Kept(info, [ref for ref in known if ref not in self.known])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best": [self._best_loss, self._best_at]}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from what `state` gave in the checkpoint of `step`."""
        self._saved_at = step
        self._best_loss, self._best_at = state.get("best", (math.inf, 0))
