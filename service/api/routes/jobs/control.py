"""What steers a job that is there: cancel, pause, resume, retry. Each may be asked again."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from halfstep.service.api.access import Submitter
from halfstep.service.api.answers.openapi import declares, json_body
from halfstep.service.api.answers.views import job_view
from halfstep.service.api.answers.wire import json_answer, json_bytes
from halfstep.service.api.context import Context, ContextDep
from halfstep.service.api.requests.body import read_json_body
from halfstep.service.api.requests.known_keys import Caller
from halfstep.service.api.requests.parameters import IdempotencyKey, JobPath, KnownQuery
from halfstep.service.api.submitting.document import read_retry
from halfstep.service.contract.answers import Job
from halfstep.service.contract.answers.examples import RETRIES
from halfstep.service.contract.spec import RetryRequest
from halfstep.service.contract.states import JobState
from halfstep.service.queue import wake_worker
from halfstep.service.store import jobs as store
from halfstep.service.store.jobs import retries
from halfstep.service.store.sql.ids import new_job_id

router = APIRouter(prefix="/jobs/{job_id}", tags=["jobs"], dependencies=[KnownQuery])

_CONFLICTS = declares(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)


@router.post("/cancel", response_model=Job, responses=_CONFLICTS)
def cancel_job(context: ContextDep, caller: Submitter, job_id: JobPath) -> Response:
    """Cancel a job; asking again changes nothing.

    A queued job is cancelled at once. One that a worker holds stops at its next step; if it ends before, it
    keeps its real outcome. A job that has succeeded or failed is a conflict.
    """
    return json_answer(_ask(context, caller, lambda s: store.request_cancel(s, job_id, tenant=caller.tenant)))


@router.post("/pause", response_model=Job, responses=_CONFLICTS)
def pause_job(context: ContextDep, caller: Submitter, job_id: JobPath) -> Response:
    """Pause a job; asking again changes nothing.

    A queued job is paused at once. A running one takes a checkpoint at its next step and gives up its device.
    One that is starting keeps its state, and pauses as soon as it runs. No attempt is charged. A job that has
    ended or is being cancelled is a conflict.
    """
    return json_answer(_ask(context, caller, lambda s: store.request_pause(s, job_id, tenant=caller.tenant)))


@router.post("/resume", response_model=Job, responses=_CONFLICTS)
def resume_job(context: ContextDep, caller: Submitter, job_id: JobPath) -> Response:
    """Send a paused job back to the queue, to go on from its checkpoint; asking again changes nothing.

    No attempt is charged. A job whose pause is not over yet, and one that has ended or is being cancelled, is
    a conflict.
    """
    answer = _ask(context, caller, lambda s: store.request_resume(s, job_id, tenant=caller.tenant))
    if answer.state == JobState.QUEUED:
        wake_worker(context.settings, job_id)
    return json_answer(answer)


async def _wanted(request: Request, context: ContextDep, _caller: Submitter) -> RetryRequest:
    """The optional body."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return RetryRequest()
    return read_retry(await read_json_body(request, limit=context.settings.max_body_bytes))


@router.post(
    "/retry",
    status_code=HTTPStatus.ACCEPTED,
    response_model=Job,
    openapi_extra=json_body("RetryRequest", RETRIES, required=False),
    responses={
        202: {
            "description": "Stored and queued: the new job.",
            "headers": {"location": {"description": "The new job's path.", "schema": {"type": "string"}}},
        },
        **declares(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.NOT_FOUND,
            HTTPStatus.CONFLICT,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        ),
    },
)
def retry_job(
    context: ContextDep,
    caller: Submitter,
    job_id: JobPath,
    wanted: Annotated[RetryRequest, Depends(_wanted)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Make a new job like one that has ended, from the start or from one of its checkpoints.

    The new job has the old one as its `parent_id`, the same specification, and all its attempts. From a
    checkpoint it takes over the record up to that step. While such a retry has not ended, asking again gives
    that one; with an Idempotency-Key, the key decides.
    """
    new_id = new_job_id()  # drawn once: a repeat after a commit whose answer was lost creates nothing

    def retry(session: Session) -> tuple[str, bytes, bool]:
        job, created = retries.retry(
            session,
            job_id,
            tenant=caller.tenant,
            new_id=new_id,
            from_checkpoint=wanted.from_checkpoint,
            idempotency_key=idempotency_key,
        )
        return job.id, json_bytes(job_view(session, job)), created

    stored_id, answer, created = context.database.acting(caller.actor).retry(retry)
    if created or stored_id == new_id:
        wake_worker(context.settings, stored_id)
    return Response(
        answer,
        status_code=HTTPStatus.ACCEPTED,
        media_type="application/json",
        headers={"location": context.path(f"/jobs/{stored_id}")},
    )


def _ask(context: Context, caller: Caller, what: Callable[[Session], store.Job]) -> Job:
    return context.database.acting(caller.actor).retry(lambda session: job_view(session, what(session)))
