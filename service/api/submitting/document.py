"""A JSON document to a JobSpec or a retry: what can be known from the document alone.

Everything wrong is reported at once, each with a pointer and the remedy. Component names and parameters are
checked in `catalogue`, against what workers published.
"""

import re
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from halfstep.service.api.requests.body import JsonBody
from halfstep.service.api.requests.pointers import locate, pointer, suggestion
from halfstep.service.contract.documents import read
from halfstep.service.contract.precision import SUPPORTED_MODES, MixedPrecisionMode
from halfstep.service.contract.spec import JobSpec, RetryRequest
from halfstep.service.errors import FieldProblem, InvalidRequest

_MOST_PROBLEMS = 50
_ABSENT = frozenset({"missing", "precision_contradiction"})
# Bounds of a float come without exponents: 2**-126 with forty digits.
_UNREADABLE = re.compile(r"\b(0\.0{5}\d+|\d{16,}(\.\d+)?)\b")
_SUBJECT = re.compile(
    r"^(Value error, |Assertion failed, )?((Input|String|Value|Number|List|Tuple|Dictionary) should )?"
)


def read_spec(body: JsonBody) -> JobSpec:
    """The JobSpec that `body` describes, under JSON's own types: no string is a number, 3.0 is a count.

    Raises:
        InvalidRequest: with a pointer and a remedy for each wrong place.
    """
    problems = _unsupported_mode(body.document)
    spec = None
    try:
        spec = read(JobSpec, body.document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:_MOST_PROBLEMS]
        problems += [_field_problem(JobSpec, body.document, **_known_parts(one)) for one in found]
    if spec is None or problems:
        raise InvalidRequest("The job's specification is not valid.", problems)
    return spec


def read_retry(body: JsonBody) -> RetryRequest:
    """What `body` asks of a retry.

    Raises:
        InvalidRequest: as `read_spec`.
    """
    try:
        return read(RetryRequest, body.document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:_MOST_PROBLEMS]
        problems = [_field_problem(RetryRequest, body.document, **_known_parts(one)) for one in found]
        raise InvalidRequest("The body does not say where to retry from.", problems) from error


def _unsupported_mode(document: dict[str, Any]) -> list[FieldProblem]:
    precision = document.get("precision")
    mode = precision.get("mode") if isinstance(precision, dict) else None
    later = {known.value for known in MixedPrecisionMode if known not in SUPPORTED_MODES}
    if not isinstance(mode, str) or mode not in later:
        return []
    supported = " and ".join(sorted(f"'{known.value}'" for known in SUPPORTED_MODES))
    others = ", ".join(sorted(f"'{name}'" for name in later))
    detail = f"{others} cannot be run by this version; use one of {supported}"
    return [FieldProblem("/precision/mode", detail)]


def _known_parts(found: Any) -> dict[str, Any]:
    return {"kind": found["type"], "loc": found["loc"], "message": found["msg"]}


def _field_problem(
    model: type[BaseModel], document: dict[str, Any], kind: str, loc: Sequence[str | int], message: str
) -> FieldProblem:
    path = locate(document, loc, missing=kind in _ABSENT)
    if kind == "missing":
        return FieldProblem(pointer(*path), "is required")
    if kind == "extra_forbidden":
        known = set(_fields_at(model, path[:-1]))
        return FieldProblem(pointer(*path), f"is no field of this object; {suggestion(str(path[-1]), known)}")
    detail = _SUBJECT.sub(lambda match: "must " if match[2] else "", message, count=1)
    detail = _UNREADABLE.sub(lambda match: f"{float(match[0]):g}", detail)
    if "[key]" in loc:
        detail = f"its name {detail}"
    return FieldProblem(pointer(*path), detail)


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Sequence[str]:
    """Names of the fields of the block at `path`; empty where a block holds no fixed fields."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = _block(field.annotation) if field is not None else None
        if inner is None:
            return ()
        model = inner
    return tuple(model.model_fields)


def _block(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_block, typing.get_args(annotation))), None)
