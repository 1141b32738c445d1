"""The duty that sweeps up after deleted jobs: their files, and their rows little by little."""

import time
from functools import partial

import structlog

from halfstep.service.dispatch.rounds import BATCH, Round
from halfstep.service.files.storage import storage
from halfstep.service.store import jobs

log = structlog.get_logger(__name__)

SECONDS = 0.5  # of a round: leases and queue must not wait for a long record to go


def sweep(now: Round) -> None:
    """Remove what deleted jobs have left, in small transactions, as far as a round's time allows."""
    end = time.monotonic() + SECONDS
    with now.database.read() as session:
        left = jobs.unswept(session, limit=BATCH)
    stored = storage(now.settings)
    told = False
    for job_id, files in left:
        failed = stored.remove_job(job_id, files.removable, keep=files.shared)
        for path, error in failed.items():
            log.error("path not removed", path=path, error=str(error))
        refused = stored.remove_remote_job(job_id, files.removable, keep=files.shared)
        if refused is not None:  # the deletion stays on record, and is tried again
            if not told:
                log.warning("checkpoints not removed yet", job_id=job_id, error=str(refused))
            told = True
            continue
        while True:
            began = time.monotonic()
            done = now.database.retry(partial(jobs.sweep, job_id=job_id))
            # Whoever waits for SQLite's lock looks for it now and then: half of the time it must be free.
            time.sleep(time.monotonic() - began)
            if time.monotonic() > end:
                return
            if done:
                break
