"""The summary of a job, and waiting for it to change."""

import asyncio
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.conditional import ETAG_HEADER, etag_of, matches
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.context import ContextDep
from halfstep.service.api.following.changes import until_gone
from halfstep.service.api.requests.parameters import JobPath, KnownQuery
from halfstep.service.contract.answers import Stats

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])


@router.get(
    "/{job_id}/stats",
    response_model=Stats,
    responses={
        200: {"description": "The summary.", "headers": ETAG_HEADER},
        304: {
            "description": "Unchanged since the summary that If-None-Match names.",
            "headers": ETAG_HEADER,
        },
        **declares(HTTPStatus.NOT_FOUND),
    },
)
async def get_stats(
    request: Request,
    context: ContextDep,
    caller: Reader,
    job_id: JobPath,
    wait_seconds: Annotated[
        float,
        Query(
            ge=0,
            le=30,
            allow_inf_nan=False,
            description="With If-None-Match: answer when the summary changes, or with 304 after so long. A "
            "terminal job never changes and is answered at once.",
        ),
    ] = 0.0,
    if_none_match: Annotated[str | None, Header(description="The etag of the summary at hand.")] = None,
) -> Response:
    """The summary of a job, as cheap for a long job as for a short one."""
    summary = await context.summaries.of(job_id, tenant=caller.tenant)
    if wait_seconds > 0 and matches(if_none_match, etag_of(summary.version)) and not summary.is_terminal:
        gone = asyncio.ensure_future(until_gone(request.receive))
        try:
            with context.watcher.place():
                await context.watcher.wait(job_id, summary.version, seconds=wait_seconds, gone=gone)
        finally:
            gone.cancel()
        summary = await context.summaries.of(job_id, tenant=caller.tenant)
    headers = {"etag": etag_of(summary.version), "cache-control": "private, no-cache"}
    if matches(if_none_match, etag_of(summary.version)):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(summary.body, media_type="application/json", headers=headers)
