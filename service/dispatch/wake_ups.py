"""The duty that sends wake-ups again for queued jobs that nobody claimed: a broker may forget anything."""

import structlog

from halfstep.service.dispatch.rounds import BATCH, Round
from halfstep.service.faultpoints import reach
from halfstep.service.store import jobs

log = structlog.get_logger(__name__)

UNCLAIMED_SECONDS = 1.0  # a claim normally follows its message within milliseconds


def send_again(now: Round) -> None:
    """Send the wake-ups that are due, until the broker refuses one."""
    waiting = now.database.retry(lambda s: jobs.unclaimed(s, older_than=UNCLAIMED_SECONDS, limit=BATCH))
    sent: list[str] = []
    for job_id in waiting:
        if not now.send(job_id):
            break
        sent.append(job_id)
        reach("dispatch.after_send")
    if sent:
        now.database.retry(lambda s: jobs.mark_published(s, sent))
        log.debug("sent again", jobs=len(sent))
