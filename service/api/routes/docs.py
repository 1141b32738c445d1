"""The OpenAPI document and a page that shows it. Neither loads anything from elsewhere."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.docs_page import render
from halfstep.service.api.answers.wire import json_answer

router = APIRouter(include_in_schema=False)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@router.get("/openapi.json")
async def get_openapi_document(request: Request, _caller: Reader) -> Response:
    """The OpenAPI document."""
    return json_answer(await run_in_threadpool(request.app.openapi))


@router.get("/docs")
async def get_docs(request: Request, _caller: Reader) -> Response:
    """The same for people."""
    document = await run_in_threadpool(request.app.openapi)
    return HTMLResponse(render(document), headers={"content-security-policy": _POLICY})
