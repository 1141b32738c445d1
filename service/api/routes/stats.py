"""The summary of a job, and waiting for it to change."""

import asyncio
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from service.api.access import Reader
from service.api.context import Context, ContextDep
from service.api.door import Caller
from service.api.openapi import declares
from service.api.parameters import JobPath, KnownQuery, matches
from service.api.schemas import Stats
from service.api.views import stats_view
from service.api.watch import until_gone
from service.api.wire import json_bytes
from service.store import metrics

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])

_ETAG_HEADER = {
    "etag": {"description": "Changes with every change of the summary.", "schema": {"type": "string"}}
}


@router.get(
    "/{job_id}/stats",
    response_model=Stats,
    responses={
        200: {"description": "The summary.", "headers": _ETAG_HEADER},
        304: {
            "description": "Unchanged since the summary that If-None-Match names.",
            "headers": _ETAG_HEADER,
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
    version, is_terminal, answer = await run_in_threadpool(_summary, context, caller, job_id)
    if matches(if_none_match, _etag(version)) and wait_seconds > 0 and not is_terminal:
        gone = asyncio.ensure_future(until_gone(request.receive))
        try:
            with context.watcher.place():
                await context.watcher.wait(job_id, version, seconds=wait_seconds, gone=gone)
        finally:
            gone.cancel()
        version, is_terminal, answer = await run_in_threadpool(_summary, context, caller, job_id)
    headers = {"etag": _etag(version), "cache-control": "private, no-cache"}
    if matches(if_none_match, _etag(version)):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(answer, media_type="application/json", headers=headers)


def _summary(context: Context, caller: Caller, job_id: str) -> tuple[int, bool, bytes]:
    with context.database.read() as session:
        summary = metrics.summarise(session, job_id, tenant=caller.tenant)
    return summary.version, summary.state.is_terminal, json_bytes(stats_view(summary))


def _etag(version: int) -> str:
    return f'"{version}"'
