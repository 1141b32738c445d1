"""The duty that fails what no live worker can run, once it has waited for long enough."""

import structlog

from halfstep.service.dispatch.rounds import Round
from halfstep.service.store import jobs

log = structlog.get_logger(__name__)


def fail_without_worker(now: Round) -> None:
    """Fail jobs that have been queued for `no_worker_seconds` while nobody could run them.

    A dispatcher that has not been up for as long fails none: workers must have had the time to register, and
    after a long stop or a restore nobody was seen lately.
    """
    settings = now.settings
    if now.up_seconds < settings.no_worker_seconds:
        return
    for job in now.database.retry(
        lambda s: jobs.fail_without_worker(
            s, seconds=settings.no_worker_seconds, live_seconds=settings.live_seconds
        )
    ):
        log.warning("no worker can run it", job_id=job.id)
