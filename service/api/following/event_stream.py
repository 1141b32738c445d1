"""An answer that goes on: Server-Sent Events to one listener, as fast as it takes them.

What is sent comes from `feed`, when from `watch`. Here is what concerns the connection: back-pressure,
keep-alive, a client that leaves or takes nothing, and the end of the process.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from halfstep.service.api.following.changes import JobWatcher, until_gone
from halfstep.service.api.following.feed import Feed, end_message
from halfstep.service.errors import NotFound, StoreUnavailable
from halfstep.service.store.record.following import Position

KEEP_ALIVE_SECONDS = 15.0
PATIENCE_SECONDS = 60.0
"""A client that takes nothing for this long is given up."""
RETRY_MILLISECONDS = 2000
AWAY_SECONDS = 1.0

_log = structlog.get_logger(__name__)


class EventStream(Response):
    """The stream of one job to one listener, from `position` on.

    Args:
        feed: Gives the pages.
        watcher: Tells when there may be another; a place of its is held while the stream lasts.
        job_id: The job.
        position: What the listener has.
        version: A version of the job that the stream begins no earlier than.
        fields: Columns of the step record; None: all.
        allowed: Whether the listener may still listen; asked with every keep-alive.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(
        self,
        feed: Feed,
        watcher: JobWatcher,
        *,
        job_id: str,
        position: Position,
        version: int,
        fields: Sequence[str] | None,
        allowed: Callable[[], Awaitable[bool]],
    ) -> None:
        self.status_code = 200
        self.background = None
        # The second header keeps a proxy in front (nginx) from collecting messages before it passes them on.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._feed, self._watcher = feed, watcher
        self._job_id, self._position, self._version = job_id, position, version
        self._fields, self._allowed = fields, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature
        """Serve the stream until the job ends, the client leaves, or the process stops."""
        with self._watcher.place():
            gone = asyncio.ensure_future(until_gone(receive))
            try:
                await self._serve(gone, send)
            except TimeoutError:
                _log.warning("listener_given_up", job_id=self._job_id, seconds=PATIENCE_SECONDS)
            except asyncio.CancelledError:
                if not self._watcher.stopped:
                    raise
            finally:
                gone.cancel()
        if not self._watcher.taken:
            self._feed.forget()

    async def _serve(self, gone: "asyncio.Future[None]", send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._parts(gone)) as parts:
            async for part in parts:
                if gone.done():
                    return
                # Returns once the connection's buffer has room: a slow client holds one page, not a queue.
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        if not gone.done():
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _parts(self, gone: "asyncio.Future[None]") -> AsyncGenerator[bytes]:
        yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
        position, version = self._position, self._version
        while not self._watcher.stopped:
            try:
                page = await self._feed.page(self._job_id, position, self._fields, version=version)
            except NotFound:
                yield end_message(self._job_id, position, None)
                return
            except StoreUnavailable:
                # It may come back; the listener has lost nothing.
                await asyncio.wait([gone], timeout=AWAY_SECONDS)
                if gone.done():
                    return
                yield b": the database does not answer\n\n"
                continue
            if page.body:
                yield page.body
            if page.ended:
                return
            position, version = page.position, page.version
            if not page.complete:
                continue
            reached = await self._watcher.wait(self._job_id, version, seconds=KEEP_ALIVE_SECONDS, gone=gone)
            if reached is not None:
                version = reached
            elif gone.done():
                return
            elif not self._watcher.stopped:
                if not await self._allowed():
                    return
                yield b": keep-alive\n\n"
        yield b": the server stops; come back with last-event-id\n\n"
