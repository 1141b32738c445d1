"""After the commit: tell the queue that there are jobs to run."""

import structlog

from halfstep.service import queue
from halfstep.service.settings import Settings

_log = structlog.get_logger(__name__)


def wake_worker(settings: Settings, *job_ids: str) -> None:
    """Send a wake-up for each. The jobs are committed: no failure here may reach the client."""
    try:
        sent = queue.enqueue(settings, *job_ids)
    except Exception:  # noqa: BLE001  # whatever it is, the dispatcher sends what this could not
        _log.exception("enqueue_failed", job_ids=job_ids)
    else:
        if not sent:
            _log.warning("enqueue_failed", job_ids=job_ids, reason="the broker did not take the message")
