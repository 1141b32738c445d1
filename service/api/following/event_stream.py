"""An answer that goes on: Server-Sent Events to one listener, as fast as it takes them.

What is sent comes from `feed`, when from `watch`. Here is what concerns the connection: back-pressure,
keep-alive, a client that leaves or takes nothing, and the end of the process.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from halfstep.service.api.following.changes import JobWatcher, until_gone
from halfstep.service.errors import NotFound, StoreUnavailable

KEEP_ALIVE_SECONDS = 15.0
PATIENCE_SECONDS = 60.0
"""A client that takes nothing for this long is given up."""
RETRY_MILLISECONDS = 2000
AWAY_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Messages:
    """The next messages of a stream.

    Attributes:
        body: Their bytes, possibly none.
        version: The version of the subject that they bring a listener to, at least.
        complete: Nothing more was there; otherwise the next ones follow at once.
        ended: The stream is over after them.
    """

    body: bytes
    version: int
    complete: bool
    ended: bool


class Source(Protocol):
    """What one listener is told, from where it is; it remembers how far the listener has come."""

    @property
    def subject(self) -> str:
        """The name by which a watcher knows what is listened to."""

    async def following(self, version: int) -> Messages:
        """What comes next, from a read that saw the subject at `version` or later.

        Raises:
            NotFound: What is listened to is no longer there.
            StoreUnavailable: The database did not answer; nothing is lost.
        """

    def farewell(self) -> bytes:
        """The last message, where what is listened to is no longer there."""

    def forget(self) -> None:
        """Drop what is kept for listeners: nobody listens."""


class EventStream(Response):
    """A stream to one listener.

    Args:
        source: Gives the messages.
        watcher: Tells when there may be more; a place of its is held while the stream lasts.
        version: A version of the source's subject that the stream begins no earlier than.
        allowed: Whether the listener may still listen; asked with every keep-alive.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(
        self,
        source: Source,
        watcher: JobWatcher,
        *,
        version: int,
        allowed: Callable[[], Awaitable[bool]],
    ) -> None:
        self.status_code = 200
        self.background = None
        # The second header keeps a proxy in front (nginx) from collecting messages before it passes them on.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._source, self._watcher = source, watcher
        self._version, self._allowed = version, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature
        """Serve the stream until it ends, the client leaves, or the process stops."""
        with self._watcher.place():
            gone = asyncio.ensure_future(until_gone(receive))
            try:
                await self._serve(gone, send)
            except TimeoutError:
                _log.warning("listener_given_up", job_id=self._source.subject, seconds=PATIENCE_SECONDS)
            except asyncio.CancelledError:
                if not self._watcher.stopped:
                    raise
            finally:
                gone.cancel()
        if not self._watcher.taken:
            self._source.forget()

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
        version = self._version
        while not self._watcher.stopped:
            try:
                found = await self._source.following(version)
            except NotFound:
                yield self._source.farewell()
                return
            except StoreUnavailable:
                # It may come back; the listener has lost nothing.
                await asyncio.wait([gone], timeout=AWAY_SECONDS)
                if gone.done():
                    return
                yield b": the database does not answer\n\n"
                continue
            if found.body:
                yield found.body
            if found.ended:
                return
            version = found.version
            if not found.complete:
                continue
            reached = await self._watcher.wait(
                self._source.subject, version, seconds=KEEP_ALIVE_SECONDS, gone=gone
            )
            if reached is not None:
                version = reached
            elif gone.done():
                return
            elif not self._watcher.stopped:
                if not await self._allowed():
                    return
                yield b": keep-alive\n\n"
        yield b": the server stops; come back with last-event-id\n\n"
