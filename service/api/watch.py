"""Waiting for a job's summary to change: one poller a process, however many wait.

A waiter costs an event, not a thread or a query: each round asks the database once for the versions of all
jobs that somebody waits for. Lives on one event loop; nothing here is thread-safe.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import structlog
from starlette.concurrency import run_in_threadpool

from service.api.problems import ProblemError
from service.errors import StoreUnavailable

MOST_WAITERS = 1000
POLL_SECONDS = 0.2
RETRY_AFTER_SECONDS = 5

_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Waiter:
    job_id: str
    version: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class StatsWatcher:
    """Wakes who waits for a job's summary.

    Args:
        versions: From job ids to the present version of each job's summary; a job that is gone has no entry.
            Called in a thread.
        poll_seconds: Between two rounds.
        most: Waiters at a time.
    """

    def __init__(
        self,
        versions: Callable[[Sequence[str]], Mapping[str, int]],
        *,
        poll_seconds: float = POLL_SECONDS,
        most: int = MOST_WAITERS,
    ) -> None:
        self._versions = versions
        self._poll_seconds = poll_seconds
        self._most = most
        self._waiting: set[_Waiter] = set()
        self._poller: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._waiting)

    async def wait(self, job_id: str, version: int, *, seconds: float, gone: asyncio.Future[Any]) -> None:
        """Return when the summary of `job_id` is not at `version` any more, after `seconds`, or once `gone`.

        Raises:
            ProblemError: 503 with Retry-After when too many wait already.
        """
        if self._stopped:
            return
        if len(self._waiting) >= self._most:
            raise ProblemError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too_many_waiting",
                f"{self._most} requests wait for changes already; ask again later, or without wait_seconds.",
                headers={"retry-after": str(RETRY_AFTER_SECONDS)},
            )
        waiter = _Waiter(job_id, version)
        self._waiting.add(waiter)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll(), name="stats-poller")
        changed: asyncio.Future[Any] = asyncio.ensure_future(waiter.changed.wait())
        try:
            await asyncio.wait([changed, gone], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            self._waiting.discard(waiter)

    def stop(self) -> None:
        """Wake everybody and let nobody wait again: the process is about to end."""
        self._stopped = True
        for waiter in self._waiting:
            waiter.changed.set()

    async def _poll(self) -> None:
        reachable = True
        while self._waiting and not self._stopped:
            await asyncio.sleep(self._poll_seconds)
            watched = sorted({waiter.job_id for waiter in self._waiting})
            try:
                versions = await run_in_threadpool(self._versions, watched)
            except StoreUnavailable as error:
                if reachable:
                    _log.warning("stats_poll_failed", error=str(error))
                reachable = False
                continue
            reachable = True
            for waiter in self._waiting:
                if versions.get(waiter.job_id) != waiter.version:
                    waiter.changed.set()
