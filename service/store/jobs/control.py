"""What a client asks of a job that is there: cancel, pause, resume.

Nobody holds a queued or paused job, so it changes at once; a worker that holds one is asked by heartbeat.
Each is idempotent: asked again, it returns the job as it is. What a retry does is in `retries`.
"""

from sqlalchemy import update
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState, ReasonCode, RequestedAction
from halfstep.service.errors import Conflict
from halfstep.service.store import events
from halfstep.service.store.job_rows import JOB_COLUMNS, Job, job_from, lock, move, status
from halfstep.service.store.tables import jobs


def request_cancel(s: Session, job_id: str, *, tenant: str | None) -> Job:
    """Cancel a job: at once where nobody holds it, else by asking its worker. Repeating it changes nothing.

    Raises:
        NotFound: there is no such job of this tenant's.
        Conflict: it has already succeeded or failed.
    """
    job = lock(s, job_id, tenant=tenant)
    if job.state in {JobState.CANCELLED, JobState.CANCELLING}:
        return job
    if job.state.is_terminal:
        raise Conflict(f"the job has already {job.state}; a job that has ended cannot be cancelled")
    if job.state.is_leased:
        return move(s, job, JobState.CANCELLING, why="cancel requested", requested=RequestedAction.CANCEL)
    reason = status(ReasonCode.CANCELLED_BY_USER, "The job was cancelled on request. A retry makes it anew.")
    return move(s, job, JobState.CANCELLED, why="cancelled on request", status_reason=reason)


def request_pause(s: Session, job_id: str, *, tenant: str | None) -> Job:
    """Pause a job: at once while it is queued, else by asking its worker for a checkpoint.

    No edge leads from `starting` to `pausing`. The request of a job that is being built is kept beside its
    state, and obeyed the moment it runs (`leases.mark_running`) or goes back to the queue.

    Raises:
        NotFound: there is no such job of this tenant's.
        Conflict: it has ended, or is being cancelled.
    """
    job = lock(s, job_id, tenant=tenant)
    if job.state in {JobState.PAUSING, JobState.PAUSED}:
        return job
    if job.state is JobState.QUEUED:
        return move(s, job, JobState.PAUSED, why="paused on request before a worker took it")
    if job.state is JobState.RUNNING:
        return move(s, job, JobState.PAUSING, why="pause requested", requested=RequestedAction.PAUSE)
    if job.state is JobState.STARTING:
        return _ask(s, job, RequestedAction.PAUSE)
    if job.state is JobState.CANCELLING:
        raise Conflict("the job is being cancelled; a retry of it can go on from a checkpoint")
    raise Conflict(f"the job has already {job.state}; a job that has ended cannot be paused")


def request_resume(s: Session, job_id: str, *, tenant: str | None) -> Job:
    """Send a paused job back to the queue; one that is queued or runs already stays as it is.

    Raises:
        NotFound: there is no such job of this tenant's.
        Conflict: it has ended, is being cancelled, or its pause is not over yet.
    """
    job = lock(s, job_id, tenant=tenant)
    if job.state is JobState.PAUSED:
        return move(s, job, JobState.QUEUED, why="resumed on request")
    # The worker may have been told to pause already: a request cannot be taken back, only answered later.
    if job.state is JobState.PAUSING or job.requested is RequestedAction.PAUSE:
        raise Conflict("the job's pause is not over yet; resume it once its state is paused")
    if job.state is JobState.CANCELLING:
        raise Conflict("the job is being cancelled; a retry of it can go on from a checkpoint")
    if job.state.is_terminal:
        raise Conflict(f"the job has already {job.state}; retry makes a new job of it")
    return job


def _ask(s: Session, job: Job, action: RequestedAction) -> Job:
    if job.requested is action:
        return job
    row = s.execute(
        update(jobs)
        .where(jobs.c.id == job.id, jobs.c.state == job.state, jobs.c.fence == job.fence)
        .values(requested=action)
        .returning(*JOB_COLUMNS)
    ).one()
    message = "pause requested; it takes effect as soon as the job runs"
    events.append(s, job.id, type="worker", level="info", message=message, data={"requested": action})
    return job_from(row)
