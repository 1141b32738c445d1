"""Dispatcher and reaper: what makes a broker's forgetting and a worker's death harmless.

A loop of compare-and-set statements on a timer, safe to run any number of times at once:
it re-sends queued jobs that nobody claimed, takes back expired leases, fails what no live
worker can run, deletes what is older than it is to be kept, and sweeps up after deleted jobs.
`python -m halfstep.service.dispatch` starts it.
"""

import math
import signal
import sys
import threading
import time
from functools import partial
from types import FrameType

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from halfstep.service.contract.states import JobState
from halfstep.service.errors import HalfstepError, NotFound, StoreUnavailable
from halfstep.service.faultpoints import reach
from halfstep.service.files.storage import storage
from halfstep.service.logs import configure
from halfstep.service.queue import enqueue
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.sql import schema
from halfstep.service.store.sql.database import Database, connect

log = structlog.get_logger(__name__)

UNCLAIMED_SECONDS = 1.0  # a claim normally follows its message within milliseconds
BATCH = 100
SWEEP_SECONDS = 0.5  # of a round: leases and queue must not wait for a long record to go


def one_round(settings: Settings, database: Database, *, up_seconds: float = math.inf) -> None:
    """Everything the dispatcher does, once.

    Args:
        settings: Of this process.
        database: Where the jobs are.
        up_seconds: For how long this process has been up. Until workers have had `no_worker_seconds` to
            register, no job fails for want of one: after a long stop or a restore nobody was seen lately.

    Raises:
        StoreUnavailable: The database is away; the next round tries again.
    """
    given_back = database.retry(_reap)
    for job in given_back:
        log.warning("lease expired", job_id=job.id, state=job.state, attempt=job.attempt)
    if queued := [job.id for job in given_back if job.state is JobState.QUEUED]:
        enqueue(settings, *queued)  # at once; what comes of it the rounds below see to
    if up_seconds >= settings.no_worker_seconds:
        for job in database.retry(
            lambda s: jobs.fail_without_worker(
                s, seconds=settings.no_worker_seconds, live_seconds=settings.live_seconds
            )
        ):
            log.warning("no worker can run it", job_id=job.id)
    waiting = database.retry(lambda s: jobs.unclaimed(s, older_than=UNCLAIMED_SECONDS, limit=BATCH))
    sent: list[str] = []
    for job_id in waiting:
        if not enqueue(settings, job_id):
            break
        sent.append(job_id)
        reach("dispatch.after_send")
    if sent:
        database.retry(lambda s: jobs.mark_published(s, sent))
        log.debug("sent again", jobs=len(sent))
    _delete_expired(settings, database)
    _sweep(settings, database)


def _reap(session: Session) -> list[jobs.Job]:
    given_back = jobs.reap(session)
    if given_back:
        reach("reap.before_commit")
    return given_back


def _delete_expired(settings: Settings, database: Database) -> None:
    days = settings.retention_days
    if days is None:
        return
    with database.read() as session:
        old = jobs.expired(session, days=days, limit=BATCH)
    for job_id in old:
        try:
            database.retry(partial(jobs.delete, job_id=job_id, tenant=None))
        except NotFound:  # a client or another dispatcher was faster
            continue
        log.info("deleted by age", job_id=job_id, days=days)


def _sweep(settings: Settings, database: Database) -> None:
    """Remove what deleted jobs have left, in small transactions, as far as a round's time allows."""
    end = time.monotonic() + SWEEP_SECONDS
    with database.read() as session:
        left = jobs.unswept(session, limit=BATCH)
    stored = storage(settings)
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
            done = database.retry(partial(jobs.sweep, job_id=job_id))
            # Whoever waits for SQLite's lock looks for it now and then: half of the time it must be free.
            time.sleep(time.monotonic() - began)
            if time.monotonic() > end:
                return
            if done:
                break


def run(settings: Settings, stop: threading.Event) -> None:
    """Rounds every `dispatch_seconds` until `stop` is set."""
    storage(settings)  # a URL that nothing serves is told now
    database = connect(settings)
    schema.check_current(database)
    log.info("dispatcher ready", every_seconds=settings.dispatch_seconds)
    away = False
    began = time.monotonic()
    while not stop.is_set():
        try:
            one_round(settings, database, up_seconds=time.monotonic() - began)
        except StoreUnavailable as error:
            if not away:
                log.warning("database away", error=str(error))
            away = True
        else:
            if away:
                log.info("database back")
            away = False
        stop.wait(settings.dispatch_seconds)
    database.dispose()


def main() -> None:
    """Entry point of `python -m halfstep.service.dispatch`; ends cleanly on SIGTERM and SIGINT."""
    try:
        settings = Settings()
    except (ValidationError, ValueError) as error:
        sys.exit(f"halfstep dispatch: {error}")
    configure(settings, "dispatch")
    stop = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        run(settings, stop)
    except HalfstepError as error:
        sys.exit(f"halfstep dispatch: {error}")
    log.info("dispatcher stopped")


if __name__ == "__main__":
    main()
