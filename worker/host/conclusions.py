"""How a job ended, from how its process ended: the store call that an ending asks for.

Nothing is written here: the runner calls what this gives it, in one fenced transaction.
"""

import signal
from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.states import JobState, ReasonCode
from halfstep.service.store import jobs
from halfstep.worker.host.supervision import Ending
from halfstep.worker.protocol import Done
from halfstep.worker.remedies import less_memory

MOST_LAST_WORDS = 8_000  # characters: a traceback or two


def conclusion(
    job: jobs.Job, ending: Ending, *, host_memory_killed: bool
) -> Callable[[Session], jobs.Job] | None:
    """The store call that an ending asks for; None where this attempt may write nothing."""
    if ending.killed_for == "lost" or (ending.done is not None and ending.done.outcome == "stale"):
        return None
    if ending.done is not None:
        return told(job, ending.done)

    def give_back(
        why: str, *, charge_attempt: bool, exhausted: ReasonCode = ReasonCode.WORKER_LOST
    ) -> Callable[[Session], jobs.Job]:
        return lambda s: jobs.release(
            s,
            job.id,
            job.fence,
            charge_attempt=charge_attempt,
            why=why,
            exhausted=exhausted,
            left=left_by(ending),
        )

    match ending.killed_for:
        case "cancel":
            return lambda s: jobs.finish(s, job.id, job.fence, JobState.CANCELLED, _CANCELLED)
        case "pause":
            why = "the job did not stop in time; it goes on from its last checkpoint"
            return give_back(why, charge_attempt=False)
        case "drain":
            why = "the worker was drained; the job did not stop in time and goes on from its last checkpoint"
            return give_back(why, charge_attempt=False)
        case "stalled":
            why = f"no step was finished for too long after step {ending.last_step}"
            return give_back(why, charge_attempt=True, exhausted=ReasonCode.STALLED)
    if host_memory_killed and ending.returncode == -signal.SIGKILL:
        return lambda s: jobs.finish(s, job.id, job.fence, JobState.FAILED, _host_memory(job, ending))
    return give_back(f"the job's process ended with {exit_text(ending.returncode)}", charge_attempt=True)


def told(job: jobs.Job, done: Done) -> Callable[[Session], jobs.Job]:
    """The store call for a process that could tell how it ended."""
    reason: dict[str, Any] | None = None
    match done.outcome:
        case "drain":
            why = "the worker was drained"
            return lambda s: jobs.release(s, job.id, job.fence, charge_attempt=False, why=why)
        case "cancel":
            state, reason = JobState.CANCELLED, _CANCELLED
        case "pause":
            state = JobState.PAUSED
        case "failed":
            state, reason = JobState.FAILED, done.reason
        case _:
            state = JobState.SUCCEEDED
    return lambda s: jobs.finish(s, job.id, job.fence, state, reason)


_CANCELLED: dict[str, Any] = {
    "code": ReasonCode.CANCELLED_BY_USER.value,
    "message": "Cancelled on request; the record and the checkpoints are kept, and a retry can "
    "go on from one.",
    "detail": None,
}


def _host_memory(job: jobs.Job, ending: Ending) -> dict[str, Any]:
    return {
        "code": ReasonCode.OUT_OF_MEMORY_HOST.value,
        "message": f"The worker's host ran out of memory after step {ending.last_step}, and the kernel ended "
        f"the job's process. {less_memory(JobSpec.stored(job.spec))} A smaller data set or a worker "
        "with more memory helps as well.",
        "detail": left_by(ending),
    }


def left_by(ending: Ending) -> dict[str, Any]:
    """What is to be told of a process that could not tell it itself."""
    return {
        "step": ending.last_step,
        "returncode": ending.returncode,
        "last_words": ending.last_words[-MOST_LAST_WORDS:],
    }


def exit_text(returncode: int) -> str:
    """How a process ended, in words."""
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
