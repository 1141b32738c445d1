"""Waiting for jobs to change: one poller a process, however many wait.

A waiter costs an event, not a thread or a query: each round asks the database once for the versions of all
jobs that somebody waits for. Lives on one event loop; nothing here is thread-safe.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.errors import StoreUnavailable

MOST_WAITERS = 1000
POLL_SECONDS = 0.2
RETRY_AFTER_SECONDS = 5
STOP_SECONDS = 2.0
"""What a stopping process gives those who hold a place to leave by themselves."""

_GONE = 2**63  # beyond every version
_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Waiter:
    job_id: str
    version: int
    reached: int | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class JobWatcher:
    """Wakes who waits for a job to change.

    Args:
        versions: From job ids to the present version of each job; a job that is gone has no entry.
            Called in a thread.
        poll_seconds: Between two rounds.
        most: Places: requests that wait or listen at a time.
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
        self._places: set[asyncio.Task[Any]] = set()
        self._waiting: set[_Waiter] = set()
        self._poller: asyncio.Task[None] | None = None
        self.stopped = False

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return len(self._places)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places, for the task that runs the block.

        Raises:
            ProblemError: 503 with Retry-After when all are taken.
        """
        if len(self._places) >= self._most:
            raise ProblemError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too_many_waiting",
                f"{self._most} requests wait for changes already; ask again later, or poll without waiting.",
                headers={"retry-after": str(RETRY_AFTER_SECONDS)},
            )
        holder = asyncio.current_task()
        assert holder is not None  # noqa: S101  # a context manager of coroutines
        self._places.add(holder)
        try:
            yield
        finally:
            self._places.discard(holder)

    async def wait(
        self, job_id: str, version: int, *, seconds: float, gone: asyncio.Future[Any]
    ) -> int | None:
        """Return when the job is beyond `version`, after `seconds`, once `gone`, or when stopped.

        Returns:
            The version that the job has reached, beyond every version for one that is no longer there; None
            if nothing was seen to change.
        """
        if self.stopped:
            return None
        waiter = _Waiter(job_id, version)
        self._waiting.add(waiter)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll(), name="job-poller")
        changed: asyncio.Future[Any] = asyncio.ensure_future(waiter.changed.wait())
        try:
            await asyncio.wait([changed, gone], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            self._waiting.discard(waiter)
        return waiter.reached

    def stop(self) -> None:
        """Wake everybody and let nobody wait again: the process is about to end.

        Who holds a place and is stuck, as behind a client that takes nothing, is cancelled a little later.
        """
        if self.stopped:
            return
        self.stopped = True
        for waiter in self._waiting:
            waiter.changed.set()
        for holder in self._places:
            holder.get_loop().call_later(STOP_SECONDS, self._cancel, holder)

    def _cancel(self, holder: asyncio.Task[Any]) -> None:
        if holder in self._places:
            holder.cancel()

    async def _poll(self) -> None:
        reachable = True
        while self._waiting and not self.stopped:
            await asyncio.sleep(self._poll_seconds)
            asked = {waiter.job_id for waiter in self._waiting}
            try:
                versions = await run_in_threadpool(self._versions, sorted(asked))
            except StoreUnavailable as error:
                if reachable:
                    _log.warning("poll_failed", error=str(error))
                reachable = False
                continue
            reachable = True
            # Who came while the database was asked may wait for a job that it was not asked for.
            for waiter in self._waiting:
                reached = versions.get(waiter.job_id, _GONE)
                if waiter.job_id in asked and reached > waiter.version:
                    waiter.reached = reached
                    waiter.changed.set()


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
