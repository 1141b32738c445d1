"""What listeners of a job are sent: messages of an event stream, read once for all who stand at one place.

A page is the bytes that lead from one position to the next. Listeners at the same position share the query
and the bytes, so that hundreds who follow a job cost what one does. Lives on one event loop.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from halfstep.service.api.answers.views import event_view
from halfstep.service.api.answers.wire import json_bytes, spelled_column
from halfstep.service.api.following.event_stream import Messages
from halfstep.service.contract.answers import Answer, Reason, StreamEnd, StreamState
from halfstep.service.contract.states import JobState
from halfstep.service.store.events import Event
from halfstep.service.store.record.following import News, Position, Standing, news
from halfstep.service.store.record.reading import MetricPage
from halfstep.service.store.sql.database import Database

STEPS_A_PAGE = 1000
EVENTS_A_PAGE = 200
READS_AT_ONCE = 2
"""Pages read at a time: listeners who catch up on long records must not take every thread."""
PAGES_KEPT = 64

_TOKEN = re.compile(r"s(\d{1,16})\.e(\d{1,16})\.j([0-9a-f]{6})(\.end)?")


@dataclass(frozen=True, slots=True)
class Page:
    """Messages from one position to another.

    Attributes:
        body: the messages, possibly none.
        version: the job's version that they bring a listener to, at least.
        position: where a listener is once it has them.
        complete: nothing more was there; otherwise the next page follows at once.
        ended: the last message is `end`.
    """

    body: bytes
    version: int
    position: Position
    complete: bool
    ended: bool


@dataclass(frozen=True, slots=True)
class _Key:
    job_id: str
    position: Position
    fields: tuple[str, ...] | None


class Feed:
    """The pages of all jobs that this process has listeners for."""

    def __init__(self, read: Callable[[Callable[[Session], News]], News]) -> None:
        self._read = read
        self._turns = asyncio.Semaphore(READS_AT_ONCE)
        self._pages: OrderedDict[_Key, asyncio.Task[Page]] = OrderedDict()

    @classmethod
    def of(cls, database: Database) -> "Feed":
        """The feed of the jobs in `database`."""

        def read(query: Callable[[Session], News]) -> News:
            with database.read() as session:
                return query(session)

        return cls(read)

    async def page(
        self, job_id: str, position: Position, fields: Sequence[str] | None, *, version: int
    ) -> Page:
        """What follows on `position`, from a read that saw the job at `version` or later.

        Raises:
            NotFound: there is no such job (any more).
            StoreUnavailable: the database did not answer.
        """
        key = _Key(job_id, position, None if fields is None else tuple(fields))
        held = self._pages.get(key)
        if held is None or (held.done() and _outdated(held, version)):
            held = self._pages[key] = asyncio.create_task(self._load(key), name="feed-page")
            held.add_done_callback(_seen)
        self._pages.move_to_end(key)
        while len(self._pages) > PAGES_KEPT:
            self._pages.popitem(last=False)
        # One listener that leaves must not cancel the read of the others.
        return await asyncio.shield(held)

    def forget(self) -> None:
        """Drop what is kept: nobody listens."""
        self._pages.clear()

    async def _load(self, key: _Key) -> Page:
        def query(session: Session) -> News:
            return news(
                session,
                key.job_id,
                key.position,
                fields=key.fields,
                most_steps=STEPS_A_PAGE,
                most_events=EVENTS_A_PAGE,
            )

        async with self._turns:
            return await run_in_threadpool(lambda: page_of(key.job_id, self._read(query)))


class JobSource:
    """What one listener of a job is told, from `position` on.

    Args:
        feed: Gives the pages.
        job_id: The job.
        position: What the listener has.
        fields: Columns of the step record; None: all.
    """

    def __init__(self, feed: Feed, job_id: str, position: Position, fields: Sequence[str] | None) -> None:
        self._feed, self.subject = feed, job_id
        self._position, self._fields = position, fields

    async def following(self, version: int) -> Messages:
        """The next page; see `event_stream.Source`."""
        page = await self._feed.page(self.subject, self._position, self._fields, version=version)
        self._position = page.position
        return Messages(page.body, page.version, page.complete, page.ended)

    def farewell(self) -> bytes:
        """The `end` of a job that was deleted."""
        return end_message(self.subject, self._position, None)

    def forget(self) -> None:
        """Drop the pages that are kept."""
        self._feed.forget()


def page_of(job_id: str, found: News) -> Page:
    """The messages that tell `found`."""
    parts = [_event_message(job_id, event, position) for event, position in found.events]
    if found.steps is not None:
        parts.append(message("metrics", token(job_id, found.position), _steps(found.standing, found.steps)))
    ended = found.complete and found.standing.state.is_terminal
    if ended:
        parts.append(end_message(job_id, found.position, found.standing))
    return Page(b"".join(parts), found.standing.version, found.position, found.complete, ended)


def end_message(job_id: str, position: Position, standing: Standing | None) -> bytes:
    """The last message; without a standing for a job that was deleted."""
    if standing is None:
        data = StreamEnd(job_id=job_id, is_terminal=True, deleted=True)
    else:
        reason = standing.status_reason
        data = StreamEnd(
            job_id=job_id,
            state=standing.state,
            is_terminal=True,
            status_reason=None if reason is None else Reason.model_validate(reason),
            attempt=standing.attempt,
            last_step=standing.current_step,
            deleted=False,
        )
    return message("end", token(job_id, position) + ".end", data)


def token(job_id: str, position: Position) -> str:
    """The id of a message: what `Last-Event-ID` brings back."""
    return f"s{position.step}.e{position.event}.j{job_id[-6:]}"


def parse_token(job_id: str, text: str) -> tuple[Position, bool] | None:
    """The position that an id names and whether it was the end's; None where it is no id of this job's."""
    found = _TOKEN.fullmatch(text)
    if found is None or found[3] != job_id[-6:]:
        return None
    step, event = int(found[1]), int(found[2])
    return Position(step, event, settled=event), found[4] is not None


def _event_message(job_id: str, event: Event, position: Position) -> bytes:
    state = event.data.get("state") if event.type == "state" and event.data else None
    if state is None:
        return message("event", token(job_id, position), event_view(event))
    told: dict[str, Any] = event.data or {}
    data = StreamState.model_validate(
        {
            "seq": event.seq,
            "at": event.at,
            "state": state,
            "is_terminal": JobState(state).is_terminal,
            "attempt": told.get("attempt"),
            "worker": told.get("worker"),
            "message": event.message,
        }
    )
    return message("state", token(job_id, position), data)


def _steps(standing: Standing, page: MetricPage) -> dict[str, Any]:
    return {
        "attempt": standing.attempt,
        "count": page.count,
        "columns": {name: spelled_column(column) for name, column in page.columns.items()},
        "next_after_step": page.next_after_step,
        "last_step": page.last_step,
    }


def message(kind: str, identifier: str, data: Answer | dict[str, Any]) -> bytes:
    """One message of an event stream."""
    # JSON of one line: it holds no line break that would end the field.
    return f"event: {kind}\nid: {identifier}\ndata: ".encode() + json_bytes(data) + b"\n\n"


def _outdated(held: "asyncio.Task[Page]", version: int) -> bool:
    return held.cancelled() or held.exception() is not None or held.result().version < version


def _seen(task: "asyncio.Task[Page]") -> None:
    """Take note of a failure that no listener was left to be told of."""
    if not task.cancelled():
        task.exception()
