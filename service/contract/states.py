"""Job states, the edges between them, and why a job ended.

Every process agrees on this table; the store turns it into a CHECK and into compare-and-set
statements. No I/O and no database here.
"""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"  # stored, waiting for a worker that can run it
    STARTING = "starting"  # claimed under a lease; its process is being built
    RUNNING = "running"  # training
    PAUSING = "pausing"  # asked to pause; the next step boundary takes a checkpoint
    PAUSED = "paused"  # checkpointed; holds neither lease nor device
    CANCELLING = "cancelling"  # asked to stop; the worker has not confirmed yet
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """True for the three states that never change again."""
        return self in TERMINAL

    @property
    def is_leased(self) -> bool:
        """True where a worker holds the job's lease."""
        return self in LEASED


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
LEASED = frozenset({JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING})

# A job that ends before a request reaches it keeps its real outcome: hence the edges
# pausing|cancelling -> succeeded|failed. A lost worker returns a job to the queue.
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.PAUSED, JobState.CANCELLED, JobState.FAILED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.QUEUED, JobState.CANCELLING, JobState.FAILED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED, JobState.PAUSING, JobState.CANCELLING}
    ),
    JobState.PAUSING: frozenset({JobState.PAUSED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class ReasonCode(StrEnum):
    """Why a job ended other than by finishing; `StatusReason.code` on the wire."""

    OUT_OF_MEMORY_DEVICE = "out_of_memory_device"
    OUT_OF_MEMORY_HOST = "out_of_memory_host"
    NON_FINITE_GRADIENTS = "non_finite_gradients"
    NON_FINITE_LOSS = "non_finite_loss"
    SCALE_EXHAUSTED = "scale_exhausted"
    WORKER_LOST = "worker_lost"
    STALLED = "stalled"
    TIME_LIMIT = "time_limit"
    INVALID_COMPONENT = "invalid_component"
    DATA_ERROR = "data_error"
    COMPONENT_ERROR = "component_error"
    STORAGE_ERROR = "storage_error"
    CANCELLED_BY_USER = "cancelled_by_user"
    NO_CAPABLE_WORKER = "no_capable_worker"


class RequestedAction(StrEnum):
    """What a client asked of a job that a worker holds; it reaches the worker by heartbeat."""

    CANCEL = "cancel"
    PAUSE = "pause"
