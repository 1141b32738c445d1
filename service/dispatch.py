"""Dispatcher and reaper: what makes a broker's forgetting and a worker's death harmless.

A loop of compare-and-set statements on a timer, safe to run any number of times at once:
it re-sends queued jobs that nobody claimed, takes back expired leases, and fails what no
live worker can run. `python -m service.dispatch` starts it.
"""

import signal
import sys
import threading
from types import FrameType

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.errors import HalfstepError, StoreUnavailable
from service.faultpoints import reach
from service.logs import configure
from service.queue import enqueue
from service.settings import Settings
from service.store import jobs, schema
from service.store.database import Database

log = structlog.get_logger(__name__)

UNCLAIMED_SECONDS = 1.0  # a claim normally follows its message within milliseconds
BATCH = 100


def one_round(settings: Settings, database: Database) -> None:
    """Everything the dispatcher does, once.

    Raises:
        StoreUnavailable: The database is away; the next round tries again.
    """
    for job in database.retry(_reap):
        log.warning("lease expired", job_id=job.id, state=job.state, attempt=job.attempt)
    for job in database.retry(
        lambda s: jobs.fail_without_worker(
            s, seconds=settings.no_worker_seconds, live_seconds=3 * settings.heartbeat_seconds
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


def _reap(session: Session) -> list[jobs.Job]:
    given_back = jobs.reap(session)
    if given_back:
        reach("reap.before_commit")
    return given_back


def run(settings: Settings, stop: threading.Event) -> None:
    """Rounds every `dispatch_seconds` until `stop` is set."""
    database = Database(settings.sql_url)
    schema.check_current(database)
    log.info("dispatcher ready", every_seconds=settings.dispatch_seconds)
    away = False
    while not stop.is_set():
        try:
            one_round(settings, database)
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
    """Entry point of `python -m service.dispatch`; ends cleanly on SIGTERM and SIGINT."""
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
