"""What happened to a job, in order."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.views import event_view
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import ContextDep
from halfstep.service.api.requests.parameters import JobPath, KnownQuery, Ordinal
from halfstep.service.contract.answers import EventPage
from halfstep.service.store import events, jobs

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])


@router.get("/{job_id}/events", response_model=EventPage, responses=declares(HTTPStatus.NOT_FOUND))
def list_events(
    context: ContextDep,
    caller: Reader,
    job_id: JobPath,
    after: Annotated[Ordinal, Query(description="Events beyond this seq.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """States, precision changes, overflows, alerts, evaluations, checkpoints, and the worker's last words."""
    with context.database.read() as session:
        job = jobs.get(session, job_id, tenant=caller.tenant)
        found = events.read(session, job.id, after=after, limit=limit)
    items = [event_view(event) for event in found]
    return json_answer(EventPage(items=items, next_after=found[-1].seq if found else after))
