"""What happens to all jobs of a tenant, in one order that a client can follow without a gap."""

import asyncio
import time
from functools import partial
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from halfstep.service.api.access import Credentials, Reader, may_still_listen
from halfstep.service.api.answers.formats import EVENT_STREAM, JSON, negotiated
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.answers.views import tenant_event_view
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import Context, ContextDep
from halfstep.service.api.following.changes import until_gone
from halfstep.service.api.following.event_stream import EventStream
from halfstep.service.api.following.tenant_events import Selection, TenantEvents, extent, page
from halfstep.service.api.requests.cursors import LATEST, events_cursor, events_position
from halfstep.service.api.requests.parameters import KnownQuery, wrong_header, wrong_query
from halfstep.service.contract.answers import TenantEventPage
from halfstep.service.contract.answers.examples import TENANT_EVENT_STREAM
from halfstep.service.contract.events import EventType
from halfstep.service.store.outbox import Page

router = APIRouter(prefix="/events", tags=["progress"], dependencies=[KnownQuery])


@router.get(
    "",
    response_model=TenantEventPage,
    responses={
        200: {
            "description": "Events in order; with `Accept: text/event-stream` a stream that does not end, of "
            "messages `event` whose data is a TenantEvent.",
            "content": {EVENT_STREAM: {"schema": {"type": "string"}, "example": TENANT_EVENT_STREAM}},
        },
        **declares(HTTPStatus.NOT_ACCEPTABLE, HTTPStatus.GONE),
    },
)
async def list_all_events(
    request: Request,
    context: ContextDep,
    caller: Reader,
    credentials: Credentials,
    type: Annotated[  # noqa: A002  # the parameter's name on the wire
        list[EventType], Query(default_factory=list, description="Any of these; repeatable.")
    ],
    after: Annotated[
        str | None,
        Query(
            max_length=200,
            description=f"`next_after` of the page before, or `{LATEST}` for what happens from now on. "
            "Without it: from the oldest event that is kept.",
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    wait_seconds: Annotated[
        float,
        Query(ge=0, le=30, allow_inf_nan=False, description="Answer when there is one, or after so long."),
    ] = 0.0,
    accept: Annotated[str | None, Header(description=f"{JSON} or {EVENT_STREAM}.")] = None,
    last_event_id: Annotated[
        str | None,
        Header(max_length=200, description="Of a stream: the `id` of its last message, in place of `after`."),
    ] = None,
) -> Response:
    """What happened to all jobs of the caller's tenant, in one order, and who did it.

    `next_after` leads on without a gap and without a repeat, whatever happens meanwhile and to whichever job;
    a job's own events keep their order. Events go with their job when it is deleted. A cursor that is older
    than what is kept (HALFSTEP_EVENTS_DAYS) is answered with 410: events were missed, begin again without it.
    """
    media_type = negotiated(accept, (JSON, EVENT_STREAM))
    wanted = Selection(caller.tenant, tuple(type))
    cursor = partial(events_cursor, caller.tenant)
    start = await run_in_threadpool(_start, context, caller.tenant, after, last_event_id)
    if media_type == EVENT_STREAM:
        return EventStream(
            TenantEvents(context.database, wanted, start, cursor),
            context.watcher,
            version=start,
            allowed=partial(may_still_listen, request, credentials),
        )
    found = await run_in_threadpool(page, context.database, wanted, after=start, limit=limit)
    if wait_seconds > 0 and not found.entries:
        found = await _wait(request, context, wanted, found, limit=limit, seconds=wait_seconds)
    items = [tenant_event_view(entry) for entry in found.entries]
    return json_answer(TenantEventPage(items=items, next_after=cursor(found.position)))


def _start(context: Context, tenant: str, after: str | None, last_event_id: str | None) -> int:
    """The position that the request begins after; see `events_position` for what is refused."""
    there = extent(context.database)
    if last_event_id:
        position = events_position(tenant, last_event_id, partial(wrong_header, "last-event-id"))
    elif after is None:
        return there.removed
    elif after == LATEST:
        return there.newest
    else:
        position = events_position(tenant, after, partial(wrong_query, "after"))
    if position < there.removed:
        raise ProblemError(
            HTTPStatus.GONE,
            "cursor_expired",
            "Events after this cursor are no longer kept. Begin again without it, and look the jobs up that "
            "you follow: GET /jobs tells how they are now.",
        )
    if position > there.newest:
        raise ProblemError(
            HTTPStatus.GONE,
            "cursor_ahead",
            "This cursor is ahead of all events: the database was restored from an earlier copy. Begin again "
            "without it, and look the jobs up that you follow: GET /jobs tells how they are now.",
        )
    return position


async def _wait(
    request: Request, context: Context, wanted: Selection, found: Page, *, limit: int, seconds: float
) -> Page:
    """The first page that is not empty, or the last one before the time is up or the client has gone."""
    end = time.monotonic() + seconds
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        with context.watcher.place():
            while not found.entries and (left := end - time.monotonic()) > 0:
                reached = await context.watcher.wait(wanted.subject, found.position, seconds=left, gone=gone)
                found = await run_in_threadpool(
                    page, context.database, wanted, after=found.position, limit=limit
                )
                if reached is None:
                    break
    finally:
        gone.cancel()
    return found
