"""The duty that takes back expired leases: the worker is gone, and its job is queued again or fails."""

import structlog
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.dispatch.rounds import Round
from halfstep.service.faultpoints import reach
from halfstep.service.store import jobs

log = structlog.get_logger(__name__)


def take_back(now: Round) -> None:
    """Give back every job whose lease has run out, and send the wake-up of those that are queued again."""
    given_back = now.database.retry(_reap)
    for job in given_back:
        log.warning("lease expired", job_id=job.id, state=job.state, attempt=job.attempt)
    if queued := [job.id for job in given_back if job.state is JobState.QUEUED]:
        now.send(*queued)  # at once; `wake_ups` sees to it if this fails


def _reap(session: Session) -> list[jobs.Job]:
    given_back = jobs.reap(session)
    if given_back:
        reach("reap.before_commit")
    return given_back
