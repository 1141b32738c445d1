"""The OpenAPI document: what the framework finds in the routes, and what it cannot know.

It cannot know the request bodies of POST /jobs and of a retry, which are read by hand, the messages of a
stream, and the problem document of every error.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from halfstep.service.api.answers.problems import PROBLEM_TYPE
from halfstep.service.contract.answers import Event, Problem, StreamEnd, StreamMetrics, StreamState
from halfstep.service.contract.spec import JobSpec, RetryRequest

_REF = "#/components/schemas/{model}"
_PROBLEM = {"schema": {"$ref": _REF.format(model="Problem")}}

# What is answered and stands in no route's response model.
_ANSWERS = (Problem, Event, StreamState, StreamMetrics, StreamEnd)

_MEANINGS = {
    HTTPStatus.BAD_REQUEST: "The body is not JSON.",
    HTTPStatus.UNAUTHORIZED: "No valid key.",
    HTTPStatus.FORBIDDEN: "The key lacks the scope, or a server without keys was asked from another machine.",
    HTTPStatus.NOT_FOUND: "Absent, or another tenant's.",
    HTTPStatus.NOT_ACCEPTABLE: "None of the accepted types is offered.",
    HTTPStatus.CONFLICT: "The job's state forbids it.",
    HTTPStatus.GONE: "What the cursor leads to is no longer kept.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too large.",
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: "The range begins beyond the end.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not sent as application/json.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "A wrong value, with its place and the remedy.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "A defect; the log has it under the answer's x-request-id.",
    HTTPStatus.NOT_IMPLEMENTED: "A later version of the service stored it; upgrade this one.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The database does not answer, or too many wait; see retry-after.",
}

REQUEST_ID = {
    "description": "The request's own when it is sane, else a new one.",
    "schema": {"type": "string"},
}


def declares(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail so, besides what every route with a caller can."""
    always = (
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
    return {int(status): problem_response(_MEANINGS[status]) for status in sorted({*always, *statuses})}


def problem_response(description: str) -> dict[str, Any]:
    """A response whose body is the problem document."""
    return {"description": description, "content": {PROBLEM_TYPE: _PROBLEM}}


def json_body(model: str, examples: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a JSON body by hand."""
    content = {"schema": {"$ref": _REF.format(model=model)}, "examples": dict(examples)}
    return {"requestBody": {"required": required, "content": {"application/json": content}}}


def document(app: FastAPI, *, prefix: str = "") -> dict[str, Any]:
    """The document, built once and kept by `app`; `prefix`: the path that a proxy serves it under."""
    if app.openapi_schema is None:
        built = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
            servers=[{"url": prefix}] if prefix else None,
        )
        _, added = models_json_schema(
            [
                (JobSpec, "validation"),
                (RetryRequest, "validation"),
                *((model, "serialization") for model in _ANSWERS),
            ],
            ref_template=_REF,
        )
        schemas = built.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in added["$defs"].items():
            schemas[name] = schema
        # The framework's own error models describe answers that this service never gives.
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        built["components"]["schemas"] = dict(sorted(schemas.items()))
        _name_request_id(built)
        app.openapi_schema = built
    return app.openapi_schema


def _name_request_id(built: dict[str, Any]) -> None:
    for methods in built["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                response.setdefault("headers", {})["x-request-id"] = REQUEST_ID
