"""Who trains: the workers, their devices, and whether they are free."""

from fastapi import APIRouter
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.views import worker_view
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import ContextDep
from halfstep.service.api.requests.parameters import KnownQuery
from halfstep.service.contract.answers import WorkerList
from halfstep.service.store.fleet import workers

router = APIRouter(prefix="/workers", tags=["fleet"], dependencies=[KnownQuery])


@router.get("", response_model=WorkerList, responses=declares())
def list_workers(context: ContextDep, _caller: Reader) -> Response:
    """The workers that are alive: seen within three heartbeats."""
    with context.database.read() as session:
        found = workers.list_workers(session, live_seconds=context.settings.live_seconds)
    return json_answer(WorkerList(items=[worker_view(worker) for worker in found]))
