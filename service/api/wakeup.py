"""After the commit: tell the queue that there is a job to run."""

import structlog

from service import queue
from service.settings import Settings

_log = structlog.get_logger(__name__)


def wake_worker(settings: Settings, job_id: str) -> None:
    """Send a wake-up. The job is committed: no failure here may reach the client."""
    try:
        sent = queue.enqueue(settings, job_id)
    except Exception:  # noqa: BLE001  # whatever it is, the dispatcher sends what this could not
        _log.exception("enqueue_failed", job_id=job_id)
    else:
        if not sent:
            _log.warning("enqueue_failed", job_id=job_id, reason="the broker did not take the message")
