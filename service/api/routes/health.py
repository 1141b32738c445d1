"""Liveness and readiness, for load balancers and container runtimes. These need no key."""

from http import HTTPStatus

from fastapi import APIRouter
from starlette.responses import Response

from halfstep.service import queue
from halfstep.service.api.answers.openapi import problem_response
from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import Context, ContextDep
from halfstep.service.api.requests.parameters import KnownQuery
from halfstep.service.contract.answers import Alive, Part, Readiness
from halfstep.service.errors import ConfigurationError, StoreUnavailable
from halfstep.service.store.sql.schema import check_current

router = APIRouter(prefix="/health", tags=["health"], dependencies=[KnownQuery])

_DEFECT = problem_response("A defect.")


@router.get(
    "/live", response_model=Alive, responses={422: problem_response("Unknown parameter."), 500: _DEFECT}
)
async def get_liveness() -> Response:
    """Whether the process answers. It asks nothing else."""
    return json_answer(Alive(status="ok"))


@router.get(
    "/ready",
    response_model=Readiness,
    responses={
        422: problem_response("Unknown parameter."),
        500: _DEFECT,
        503: problem_response("The database or its schema is not there; `parts` says which."),
    },
)
def get_readiness(context: ContextDep) -> Response:
    """Whether requests can be served, and which part is missing.

    The database decides. Without the broker jobs are taken in all the same, and start once it
    is back.
    """
    parts = {"database": None, "schema": _schema_fault(context), "broker": _broker_fault(context)}
    if parts["schema"] == _UNREACHABLE:
        parts["database"] = _UNREACHABLE
    told = {name: Part(ok=fault is None, detail=fault) for name, fault in parts.items()}
    if parts["database"] or parts["schema"]:
        raise ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "not_ready",
            "Not ready: " + ", ".join(name for name, fault in parts.items() if fault) + ".",
            headers={"retry-after": "2"},
            members={"parts": {name: part.document() for name, part in told.items()}},
        )
    return json_answer(Readiness(status="degraded" if parts["broker"] else "ready", parts=told))


_UNREACHABLE = "the database does not answer"


def _schema_fault(context: Context) -> str | None:
    try:
        check_current(context.database)
    except StoreUnavailable:
        return _UNREACHABLE
    except ConfigurationError as error:
        return str(error)
    return None


def _broker_fault(context: Context) -> str | None:
    if queue.broker_reachable(context.settings):
        return None
    return "the broker does not answer; jobs are stored and start once it is back"
