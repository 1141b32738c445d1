"""Everything that fails, as `application/problem+json` (RFC 9457).

    ProblemError              an answer with a status, raised by the API itself
    HalfstepError             the service's own tree, mapped to statuses here
    HTTPException             unknown route, wrong method (from the framework)
    RequestValidationError    a wrong path, query or header parameter
    any other Exception       500 without details; the log has them under the request id

The rejected input is never part of an answer.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ExceptionHandler

from halfstep.service.api.answers.methods import allowed_at
from halfstep.service.api.answers.paths import client_path
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.errors import (
    Conflict,
    FieldProblem,
    HalfstepError,
    InvalidRequest,
    NewerRecord,
    NotFound,
    StoreUnavailable,
)

PROBLEM_TYPE = "application/problem+json"
_log = structlog.get_logger(__name__)


class ProblemError(Exception):
    """A failed request, with everything its answer says."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        problems: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.problems = tuple(problems)
        self.headers = dict(headers or {})
        self.members = dict(members or {})


def problem_answer(
    path: str,
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
    members: Mapping[str, Any] | None = None,
) -> Response:
    """The problem document. `path` identifies the request; `errors` point at what is wrong in it."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "instance": path,
        "code": code,
    }
    if errors:
        document["errors"] = list(errors)
    document.update(members or {})
    return json_answer(document, status=int(status), headers=dict(headers or {}), media_type=PROBLEM_TYPE)


def unexpected_answer(path: str) -> Response:
    """The answer to a defect of ours: nothing of its inside leaves the process."""
    detail = "The server failed to answer. Its log has the cause under this answer's x-request-id."
    return problem_answer(path, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", detail)


def install(app: FastAPI) -> None:
    """Register the handlers on `app`."""
    for kind, handler in (
        (ProblemError, _raised),
        (HalfstepError, _service_error),
        (HTTPException, _framework_error),
        (RequestValidationError, _wrong_parameter),
    ):
        app.add_exception_handler(kind, cast("ExceptionHandler", handler))


async def _raised(request: Request, error: ProblemError) -> Response:
    return problem_answer(
        _path(request),
        error.status,
        error.code,
        error.detail,
        errors=_pointed(error.problems),
        headers=error.headers,
        members=error.members,
    )


_STATUSES: tuple[tuple[type[HalfstepError], HTTPStatus], ...] = (
    (InvalidRequest, HTTPStatus.UNPROCESSABLE_ENTITY),
    (NotFound, HTTPStatus.NOT_FOUND),
    (Conflict, HTTPStatus.CONFLICT),
    (NewerRecord, HTTPStatus.NOT_IMPLEMENTED),
    (StoreUnavailable, HTTPStatus.SERVICE_UNAVAILABLE),
)


async def _service_error(request: Request, error: HalfstepError) -> Response:
    path = _path(request)
    status = next((status for kind, status in _STATUSES if isinstance(error, kind)), None)
    if status is None:
        _log.error("request_failed", exc_info=error)
        return unexpected_answer(path)
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        _log.warning("store_unavailable", error=str(error))
        detail = "The database did not answer in time. Nothing was stored; try again."
        return problem_answer(path, status, error.code, detail, headers={"retry-after": "2"})
    problems = error.problems if isinstance(error, InvalidRequest) else ()
    return problem_answer(path, status, error.code, str(error), errors=_pointed(problems))


def _pointed(problems: Sequence[FieldProblem]) -> list[dict[str, str]]:
    return [{"pointer": problem.pointer, "detail": problem.detail} for problem in problems]


async def _framework_error(request: Request, error: HTTPException) -> Response:
    status = HTTPStatus(error.status_code)
    headers, path = dict(error.headers or {}), _path(request)
    if status is HTTPStatus.NOT_FOUND:
        listed = client_path(request.scope, "/openapi.json")
        return problem_answer(path, status, "no_such_path", f"No such path; {listed} lists them.")
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = allowed_at(request.app.routes, request.scope)
        detail = f"This path does not take {request.method}; it takes {allowed}."
        return problem_answer(path, status, "method_not_allowed", detail, headers={"allow": allowed})
    return problem_answer(path, status, status.name.lower(), status.description, headers=headers)


def _path(request: Request) -> str:
    return client_path(request.scope, request.url.path)


async def _wrong_parameter(request: Request, error: RequestValidationError) -> Response:
    errors = [
        {"in": str(found["loc"][0]), "parameter": str(found["loc"][1]), "detail": sentence(str(found["msg"]))}
        for found in error.errors()
    ]
    named = ", ".join(dict.fromkeys(entry["parameter"] for entry in errors))
    return problem_answer(
        _path(request),
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid_parameter",
        f"Wrong parameter: {named}.",
        errors=errors,
    )


def sentence(message: str) -> str:
    """A pydantic message in the service's own voice: what the value must be."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.replace("Input should be", "must be", 1)
