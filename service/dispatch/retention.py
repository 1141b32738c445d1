"""The duty that removes what is older than it is to be kept: jobs that have ended, entries of the outbox."""

from functools import partial

import structlog
from sqlalchemy.orm import Session

from halfstep.service.dispatch.rounds import BATCH, Round
from halfstep.service.errors import NotFound
from halfstep.service.store import jobs, outbox

log = structlog.get_logger(__name__)

ENTRIES = 1000  # of the outbox in one round


def remove_old(now: Round) -> None:
    """Delete the jobs that ended `retention_days` ago, and outbox entries older than `events_days`."""
    _delete_jobs(now)
    _remove_entries(now)


def _delete_jobs(now: Round) -> None:
    days = now.settings.retention_days
    if days is None:
        return
    with now.database.read() as session:
        old = jobs.expired(session, days=days, limit=BATCH)
    for job_id in old:
        try:
            now.database.retry(partial(jobs.delete, job_id=job_id, tenant=None))
        except NotFound:  # a client or another dispatcher was faster
            continue
        log.info("deleted by age", job_id=job_id, days=days)


def _remove_entries(now: Round) -> None:
    settings = now.settings
    with now.database.read() as session:
        if not outbox.any_older(session, days=settings.events_days):
            return

    def remove(session: Session) -> int:
        return outbox.remove_old(
            session, days=settings.events_days, most_days=settings.events_most_days, limit=ENTRIES
        )

    if removed := now.database.retry(remove):
        log.info("outbox entries removed by age", entries=removed)
