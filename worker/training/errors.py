"""Why a training run cannot go on, each with the code under which the job is recorded.

    TrainingFailure
    ├── InvalidComponent    the specification names what does not exist or does not fit together
    ├── DataError           a dataset cannot be read, or holds what it may not
    ├── ComponentFailed     a component's own code raised while building or training
    ├── StorageFailed       a checkpoint that the job needs could not be written
    ├── NonFinite           the loss or the gradients stayed non-finite, or the scale reached its floor
    ├── OutOfMemory         the device or the host ran out of memory
    └── CheckpointDamaged   a checkpoint is missing, truncated, altered or not the one that was recorded

Messages say whose fault it is and name the next thing to try: a client reads them as they are.
"""

from collections.abc import Mapping
from typing import Any

from halfstep.service.contract.states import ReasonCode


class TrainingFailure(Exception):
    """The run ended before its work was done.

    Attributes:
        code: the reason under which the job is recorded.
        message: a sentence for the person who submitted the job.
        detail: figures and names behind the message, JSON values only.
    """

    code: ReasonCode = ReasonCode.COMPONENT_ERROR

    def __init__(
        self, message: str, *, detail: Mapping[str, Any] | None = None, code: ReasonCode | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.detail = dict(detail or {})
        if code is not None:
            self.code = code


class InvalidComponent(TrainingFailure):
    """The specification names a component that does not exist, or components that do not fit together."""

    code = ReasonCode.INVALID_COMPONENT


class DataError(TrainingFailure):
    """A dataset cannot be read, is empty, or lies where it may not."""

    code = ReasonCode.DATA_ERROR


class ComponentFailed(TrainingFailure):
    """A component's own code raised while it was built or trained."""

    code = ReasonCode.COMPONENT_ERROR


class StorageFailed(TrainingFailure):
    """A checkpoint could not be written where the job cannot do without it."""

    code = ReasonCode.STORAGE_ERROR


class NonFinite(TrainingFailure):
    """The loss or the gradients stayed non-finite until the run could not recover."""

    code = ReasonCode.NON_FINITE_GRADIENTS


class OutOfMemory(TrainingFailure):
    """The device or the host ran out of memory."""

    code = ReasonCode.OUT_OF_MEMORY_HOST


class CheckpointDamaged(TrainingFailure):
    """A checkpoint is missing, truncated, altered, or not the one that was recorded."""

    code = ReasonCode.STORAGE_ERROR
