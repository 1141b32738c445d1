"""Jobs: submit, list, look at, delete. Control, progress and checkpoints have their own files."""

from http import HTTPStatus
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from halfstep.service.api.access import Reader, Submitter
from halfstep.service.api.answers.openapi import declares, json_body
from halfstep.service.api.answers.views import job_view, job_views
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import ContextDep, context_of
from halfstep.service.api.requests.body import JsonBody, read_json_body
from halfstep.service.api.requests.cursors import cursor_after, position_of
from halfstep.service.api.requests.parameters import PRINTABLE, IdempotencyKey, JobPath, KnownQuery
from halfstep.service.api.submitting.intake import Order
from halfstep.service.contract.answers import DryRun, Job, JobPage
from halfstep.service.contract.answers.examples import SUBMISSIONS
from halfstep.service.contract.states import JobState
from halfstep.service.files.storage import storage
from halfstep.service.store import jobs as store

router = APIRouter(prefix="/jobs", tags=["jobs"], dependencies=[KnownQuery])
_log = structlog.get_logger(__name__)

_Text = Annotated[str, Query(min_length=1, max_length=200, pattern=PRINTABLE)]
_Tag = Annotated[str, Query(min_length=3, max_length=201, pattern=r"^[^\x00-\x1f\x7f]+:[^\x00-\x1f\x7f]+$")]


async def _body(request: Request) -> JsonBody:
    return await read_json_body(request, limit=context_of(request).settings.max_body_bytes)


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    response_model=Job,
    openapi_extra=json_body("JobSpec", SUBMISSIONS),
    responses={
        200: {"model": DryRun, "description": "With dry_run: valid, and nothing stored."},
        202: {
            "description": "Stored and queued.",
            "headers": {"location": {"description": "The job's path.", "schema": {"type": "string"}}},
        },
        **declares(
            HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        ),
    },
)
async def submit_job(
    context: ContextDep,
    caller: Submitter,
    body: Annotated[JsonBody, Depends(_body)],  # after the caller: nobody else's is read
    dry_run: Annotated[bool, Query(description="Check everything, store nothing.")] = False,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a job.

    It is stored before the answer; a broker that is down delays its start and nothing else.
    """
    answer = await context.intake.take(
        Order(caller.tenant, caller.actor, body, dry_run=dry_run, idempotency_key=idempotency_key)
    )
    if answer.job_id is None:
        return Response(answer.body, media_type="application/json")
    return Response(
        answer.body,
        status_code=HTTPStatus.ACCEPTED,
        media_type="application/json",
        headers={"location": context.path(f"/jobs/{answer.job_id}")},
    )


def _splits(pair: str) -> list[tuple[str, str]]:
    """Each key and value that `pair` may mean: a key may have colons, and so may a value."""
    places = [place for place, character in enumerate(pair) if character == ":"]
    return [(pair[:place], pair[place + 1 :]) for place in places if 0 < place < len(pair) - 1]


@router.get("", response_model=JobPage, responses=declares())
def list_jobs(
    context: ContextDep,
    caller: Reader,
    state: Annotated[list[JobState], Query(default_factory=list, description="Any of these; repeatable.")],
    tag: Annotated[
        list[_Tag], Query(default_factory=list, description="`key:value`; repeatable, all must match.")
    ],
    name: Annotated[_Text | None, Query(description="Exactly this name.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[
        str | None, Query(max_length=200, description="`next_cursor` of the page before.")
    ] = None,
) -> Response:
    """Jobs of the caller's tenant, newest first."""
    before = None if cursor is None else position_of(cursor)
    tags = [_splits(pair) for pair in tag]
    with context.database.read() as session:
        # One more than asked for tells whether another page follows.
        found = store.list_jobs(
            session,
            tenant=caller.tenant,
            states=state,
            name=name,
            tags=tags,
            limit=limit + 1,
            before=before,
        )
        items = job_views(session, found[:limit])
    more = len(found) > limit
    return json_answer(JobPage(items=items, next_cursor=cursor_after(found[limit - 1]) if more else None))


@router.get("/{job_id}", response_model=Job, responses=declares(HTTPStatus.NOT_FOUND))
def get_job(context: ContextDep, caller: Reader, job_id: JobPath) -> Response:
    """One job, with its transitions and its summary."""
    with context.database.read() as session:
        view = job_view(session, store.get(session, job_id, tenant=caller.tenant))
    return json_answer(view)


@router.delete(
    "/{job_id}",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
    responses=declares(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
)
def delete_job(context: ContextDep, caller: Submitter, job_id: JobPath) -> Response:
    """Delete a terminal job with its record, events and checkpoints. Any other state is a conflict.

    It is gone at once; the space that a long record takes is given back little by little.
    """

    def delete(session: Session) -> store.Leftovers:
        return store.delete(session, job_id, tenant=caller.tenant)

    left = context.database.acting(caller.actor).retry(delete)
    failed = storage(context.settings).remove_job(job_id, left.removable, keep=left.shared)
    for path, error in failed.items():
        _log.error("path_not_removed", path=path, error=str(error))
    return Response(status_code=HTTPStatus.NO_CONTENT)
