"""A job as it happens: states, events and steps as Server-Sent Events."""

from functools import partial
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from halfstep.service.api.access import Credentials, Reader, may_still_listen
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.context import Context, ContextDep
from halfstep.service.api.following.event_stream import EventStream
from halfstep.service.api.following.feed import JobSource, parse_token
from halfstep.service.api.requests.parameters import (
    Fields,
    JobPath,
    KnownQuery,
    Ordinal,
    metric_columns,
    wrong_header,
)
from halfstep.service.contract.answers.examples import STREAM
from halfstep.service.store.record.following import Position, Standing, standing

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])


@router.get(
    "/{job_id}/stream",
    response_class=Response,
    responses={
        200: {
            "description": "The stream. Its last message is `end`, unless the connection is lost before.",
            "content": {EventStream.media_type: {"schema": {"type": "string"}, "example": STREAM}},
        },
        204: {"description": "Last-Event-ID is that of `end`: there is nothing more, now or later."},
        **declares(HTTPStatus.NOT_FOUND),
    },
)
async def stream_job(
    request: Request,
    context: ContextDep,
    caller: Reader,
    credentials: Credentials,
    job_id: JobPath,
    after_step: Annotated[
        Ordinal, Query(description="Steps beyond this one; a step beyond the record means its end.")
    ] = 0,
    after_event: Annotated[Ordinal, Query(description="States and events beyond this seq.")] = 0,
    fields: Fields = None,
    last_event_id: Annotated[
        str | None,
        Header(
            max_length=100,
            description="The `id` of the last message that arrived: the stream goes on after it, without a "
            "gap. It takes the place of after_step and after_event.",
        ),
    ] = None,
) -> Response:
    """Follow a job: what happened so far, then what happens, until it ends.

    Messages are `state` (StreamState: it entered a state), `event` (Event: anything else that /events lists),
    `metrics` (StreamMetrics: the next steps, at most 1 000, in the columns of /metrics) and, last of all,
    `end` (StreamEnd). States and events count by one `seq`. Every message has an `id` to come back with. A
    comment every 15 seconds keeps the connection open.

    Without Last-Event-ID the whole record is sent first, page by page as fast as it is taken. For a long job,
    plot `/metrics?max_points=` and listen after its `last_step`.

    A job that goes on from a checkpoint takes steps again: an `event` says so by `data.steps_repeated`, and
    `metrics` go on after that checkpoint. Let each `metrics` take the place of all steps from its first on,
    and drop those beyond `last_step` at `end`: what is left is the record.
    """
    columns = metric_columns(fields)
    start = await run_in_threadpool(_standing, context, job_id, caller.tenant)
    position = Position(
        min(after_step, start.current_step), min(after_event, start.last_event), start.last_event
    )
    if last_event_id:
        resumed = parse_token(job_id, last_event_id)
        if resumed is None or resumed[0].event > start.last_event:
            raise _wrong_id()
        position, ended = resumed
        if ended and start.state.is_terminal:
            return Response(status_code=HTTPStatus.NO_CONTENT)

    return EventStream(
        JobSource(context.feed, job_id, position, columns),
        context.watcher,
        version=start.version,
        allowed=partial(may_still_listen, request, credentials),
    )


def _standing(context: Context, job_id: str, tenant: str) -> Standing:
    with context.database.read() as session:
        return standing(session, job_id, tenant=tenant)


def _wrong_id() -> RequestValidationError:
    return wrong_header(
        "last-event-id",
        "is no id of this job's stream; send that of its last message, or none to begin anew",
    )
