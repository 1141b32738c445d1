"""The step record of a job: every optimizer step once, as JSON columns, CSV or NDJSON."""

from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.context import ContextDep
from halfstep.service.api.examples import METRICS_CSV, METRICS_NDJSON
from halfstep.service.api.openapi import declares
from halfstep.service.api.parameters import Fields, JobPath, KnownQuery, Ordinal, metric_columns, wrong_query
from halfstep.service.api.problems import ProblemError
from halfstep.service.api.schemas import MetricsPage
from halfstep.service.api.wire import json_answer, json_bytes, spelled_column
from halfstep.service.store import jobs, metrics

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])

JSON, CSV, NDJSON = "application/json", "text/csv", "application/x-ndjson"
OFFERED = (JSON, CSV, NDJSON)


@router.get(
    "/{job_id}/metrics",
    response_model=MetricsPage,
    responses={
        200: {
            "description": "Steps in order. CSV and NDJSON carry the same rows.",
            "content": {
                CSV: {"schema": {"type": "string"}, "example": METRICS_CSV},
                NDJSON: {"schema": {"type": "string"}, "example": METRICS_NDJSON},
            },
        },
        **declares(HTTPStatus.NOT_FOUND, HTTPStatus.NOT_ACCEPTABLE),
    },
)
def get_metrics(
    context: ContextDep,
    caller: Reader,
    job_id: JobPath,
    after_step: Annotated[
        Ordinal | None, Query(description="Steps beyond this one: to poll forward.")
    ] = None,
    from_step: Annotated[Ordinal | None, Query(description="From this step on.")] = None,
    to_step: Annotated[Ordinal | None, Query(description="Up to this step.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    fields: Fields = None,
    max_points: Annotated[
        int | None,
        Query(
            ge=1,
            le=10_000,
            description="For a plot: at most so many rows, each a bucket of steps. Beside a field's value at "
            "the bucket's last step stand `<field>_first`, `_min` and `_max`; a flag is counted.",
        ),
    ] = None,
    accept: Annotated[str | None, Header(description=f"One of {', '.join(OFFERED)}.")] = None,
) -> Response:
    """The step record of a job."""
    media_type = _negotiate(accept)
    columns = metric_columns(fields)
    if after_step is not None and (from_step is not None or to_step is not None):
        raise wrong_query(
            "after_step", "cannot be combined with from_step or to_step; use one way or the other"
        )
    if from_step is not None and to_step is not None and from_step > to_step:
        raise wrong_query("to_step", "must not be below from_step")
    bucket_steps = None
    with context.database.read() as session:
        job = jobs.get(session, job_id, tenant=caller.tenant)
        if max_points is None:
            page = metrics.read(
                session,
                job.id,
                after_step=after_step,
                from_step=from_step,
                to_step=to_step,
                limit=limit,
                fields=columns,
            )
        else:
            first = from_step if after_step is None else after_step + 1
            page = metrics.downsample(
                session, job.id, from_step=first, to_step=to_step, max_points=max_points, fields=columns
            )
            bucket_steps = page.bucket_steps
    if media_type != JSON:
        headers = {"x-last-step": str(page.last_step), "x-next-after-step": str(page.next_after_step)}
        rows = _csv(page.columns) if media_type == CSV else _ndjson(page.columns)
        return Response(b"".join(rows), media_type=media_type, headers=headers)
    return json_answer(
        {
            "job_id": job.id,
            "state": job.state,
            "is_terminal": job.state.is_terminal,
            "attempt": job.attempt,
            "count": page.count,
            "columns": {name: spelled_column(column) for name, column in page.columns.items()},
            "next_after_step": page.next_after_step,
            "last_step": page.last_step,
            "downsampled": bucket_steps is not None,
            "bucket_steps": bucket_steps,
        }
    )


def _negotiate(accept: str | None) -> str:
    """The offered media type that `accept` prefers (RFC 9110, 12.5.1)."""
    if accept is None or not accept.strip():
        return JSON
    weights: dict[str, float] = {}
    for offered in OFFERED:
        best = (-1, 0.0)
        for entry in accept.split(","):
            pattern, *parameters = (part.strip().lower() for part in entry.split(";"))
            specificity = _specificity(pattern, offered)
            if specificity > best[0]:
                best = (specificity, _quality(parameters))
        weights[offered] = best[1]
    chosen = max(OFFERED, key=lambda offered: weights[offered])
    if weights[chosen] <= 0:
        raise ProblemError(
            HTTPStatus.NOT_ACCEPTABLE, "not_acceptable", f"This record is offered as {', '.join(OFFERED)}."
        )
    return chosen


def _specificity(pattern: str, offered: str) -> int:
    if pattern == offered:
        return 2
    if pattern == offered.split("/", maxsplit=1)[0] + "/*":
        return 1
    return 0 if pattern == "*/*" else -1


def _quality(parameters: Iterable[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def _csv(columns: dict[str, list[Any]]) -> Iterator[bytes]:
    yield (",".join(columns) + "\r\n").encode()
    for row in zip(*map(spelled_column, columns.values()), strict=True):
        yield (",".join(map(_cell, row)) + "\r\n").encode()


def _cell(value: Any) -> str:
    """A value as CSV; no column holds a text with commas or quotes."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else repr(value)


def _ndjson(columns: dict[str, list[Any]]) -> Iterator[bytes]:
    for row in zip(*columns.values(), strict=True):
        yield json_bytes(dict(zip(columns, row, strict=True))) + b"\n"
