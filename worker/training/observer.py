"""Who is told how a run goes: the interface between the training loop and whoever keeps the record."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from halfstep.service.contract.metrics import Evaluation, LiveStats, StepMetrics
from halfstep.worker.training.checkpoints.writing import CheckpointInfo, CheckpointRef


class Observer(Protocol):
    """The calls of a run, in order. What an observer raises ends the run and leaves `train` unchanged."""

    def opened(self, *, total_steps: int | None) -> None:
        """The components are built; None: nothing bounds the steps."""

    def resumed(self, step: int) -> None:
        """Training goes on after `step`, or from the start where it is 0.

        Returns once the record holds nothing beyond it.
        """

    def steps(self, rows: Sequence[StepMetrics], live: LiveStats) -> None:
        """Finished steps, contiguous and in order."""

    def event(self, type: str, level: str, message: str, data: Mapping[str, Any] | None = None) -> None:  # noqa: A002 - the wire's name
        """Something a person should see. A `precision` event is durable when this returns."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """One pass over the held-out split."""

    def checkpointed(self, info: CheckpointInfo) -> None:
        """A checkpoint is safely on disk."""

    def superseded(self, checkpoints: Sequence[CheckpointRef]) -> None:
        """These are no longer needed.

        Their files may go (`checkpoint.remove`) once everything reported before this call is durable and the
        record names them no more: a record must never name only files that are gone.
        """
