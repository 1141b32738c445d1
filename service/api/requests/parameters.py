"""Path, query and header parameters that several routes share, and the refusal of unknown ones."""

from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError

from halfstep.service.api.requests.pointers import suggestion
from halfstep.service.contract import columns as table
from halfstep.service.contract.text import IDEMPOTENCY_KEY

# A step or a sequence number: any integer that every layer below can hold.
Ordinal = Annotated[int, Query(ge=0, le=2**53)]
Fields = Annotated[
    str | None,
    Query(
        max_length=1000,
        description="Columns of the step record, separated by commas; `step` is always there.",
    ),
]
JobPath = Annotated[str, Path(description="The job's id.", json_schema_extra={"format": "uuid"})]

StepPath = Annotated[int, Path(ge=1, le=2**53, description="The checkpoint's step.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=IDEMPOTENCY_KEY,
        description="The same key and body give the same job; another body is refused.",
    ),
]

PRINTABLE = r"^[^\x00-\x1f\x7f]+$"


async def refuse_unknown_query(request: Request) -> None:
    """Refuse a query parameter that the route does not know: ignored, it would falsify the answer."""
    dependant = getattr(request.scope.get("route"), "dependant", None)
    if dependant is None:
        return
    known = {field.alias for field in dependant.query_params}
    problems: list[dict[str, Any]] = [
        {"loc": ("query", name), "msg": f"is no parameter of this path; {suggestion(name, known)}"}
        for name in dict.fromkeys(request.query_params)
        if name not in known
    ]
    if problems:
        raise RequestValidationError(problems)


KnownQuery = Depends(refuse_unknown_query)


def metric_columns(fields: str | None) -> list[str] | None:
    """The columns that `fields` names, in the record's order; None for all.

    Raises:
        RequestValidationError: a name that is no column's, or none at all.
    """
    if fields is None:
        return None
    known = table.RECORD.names
    named = [name.strip() for name in fields.split(",") if name.strip()]
    for name in named:
        if name not in known:
            raise wrong_query("fields", f"names no column; {suggestion(name, known)}")
    if not named:
        raise wrong_query("fields", f"names no column; known: {', '.join(known)}")
    return [name for name in known if name == "step" or name in named]


def wrong_header(name: str, detail: str) -> RequestValidationError:
    """The refusal of a header that is well formed and wrong all the same."""
    return RequestValidationError([{"loc": ("header", name), "msg": detail}])


def wrong_query(parameter: str, detail: str) -> RequestValidationError:
    """The refusal of a query parameter that is well formed and wrong all the same."""
    return RequestValidationError([{"loc": ("query", parameter), "msg": detail}])
