"""What a spec can name."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.views import component_view
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import ContextDep
from halfstep.service.api.requests.parameters import KnownQuery
from halfstep.service.contract.answers import ComponentList
from halfstep.service.contract.components import ComponentKind
from halfstep.service.store.fleet import components

router = APIRouter(prefix="/components", tags=["fleet"], dependencies=[KnownQuery])


@router.get("", response_model=ComponentList, responses=declares())
def list_components(
    context: ContextDep,
    _caller: Reader,
    kind: Annotated[
        ComponentKind | None,
        Query(description="Only this kind."),
    ] = None,
) -> Response:
    """Models, datasets, losses, optimizers and schedulers, each with the schema of its parameters.

    Workers publish them when they start; without one there are none.
    """
    with context.database.read() as session:
        found = components.list_components(session, kind=kind)
    return json_answer(ComponentList(items=[component_view(component) for component in found]))
