"""Following one job until it ends, through outages of the service.

Polls the stats conditionally, so an idle job costs one request every ten seconds and a busy one is
seen as soon as its numbers change. A service that is away for a while is waited for.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, Self, TypeVar

from halfstep.service.client.http import Api, ServerRefused, ServerUnreachable

PAUSE_SECONDS = 0.25  # at least this long between two polls
FIRST_RETRY_SECONDS = 0.5
AWAY_SECONDS = 120.0  # how long a service may be away before watching gives up
RETRY_STATUSES = frozenset({429, 502, 503, 504})
T = TypeVar("T")


class View(Protocol):
    """Something that shows a job's progress."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *args: object) -> None: ...
    def show(self, stats: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        """Take in new numbers."""

    def away(self, why: str) -> None:
        """The service does not answer at the moment."""


def follow(api: Api, job_id: str, view: View) -> tuple[dict[str, Any], dict[str, Any]]:
    """Show the job until it ends; its final stats and the Job.

    Raises:
        ServerUnreachable: No answer for two minutes on end.
        ServerRefused: The job is gone, or the key may not read it.
    """
    etag: str | None = None
    job: dict[str, Any] = {}
    with view:
        while True:
            polled = _patiently(partial(api.poll_stats, job_id, etag), view.away)
            etag = polled.etag
            stats = polled.body
            if stats is not None:
                if _changed(job, stats):
                    job = _patiently(partial(api.job, job_id), view.away)
                view.show(stats, job)
                if stats.get("is_terminal") and job.get("is_terminal"):
                    return stats, job
            time.sleep(PAUSE_SECONDS if etag else 1.0)


def all_events(
    api: Api, *, types: Sequence[str], after: str | None, follow_on: bool, away: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The events of all jobs beyond the cursor `after`, in order; with `follow_on` also those to come.

    `away` is told when the service does not answer; nothing is missed meanwhile.

    Raises:
        ServerUnreachable: No answer for two minutes on end.
        ServerRefused: The cursor is no longer good, or the key may not read.
    """
    while True:
        page = _patiently(partial(api.events, after, types=types, wait=follow_on), away)
        yield from page["items"]
        after = page["next_after"]
        if not page["items"] and not follow_on:
            return


def _changed(job: Mapping[str, Any], stats: Mapping[str, Any]) -> bool:
    return job.get("state") != stats.get("state") or job.get("attempt") != stats.get("attempt")


def _patiently(request: Callable[[], T], away: Callable[[str], None]) -> T:
    pause = FIRST_RETRY_SECONDS
    patience = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return request()
        except ServerUnreachable as error:
            if time.monotonic() > patience:
                raise
            away(str(error))
        except ServerRefused as error:
            if error.status not in RETRY_STATUSES or time.monotonic() > patience:
                raise
            away(str(error))
        time.sleep(pause)
        pause = min(pause * 2, 5.0)
