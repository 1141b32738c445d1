"""The step record of a job: every optimizer step once, as JSON columns, CSV or NDJSON."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.formats import CSV, JSON, NDJSON, OFFERED, csv_rows, ndjson_rows, negotiated
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.wire import json_answer, spelled_column
from halfstep.service.api.context import ContextDep
from halfstep.service.api.requests.parameters import (
    Fields,
    JobPath,
    KnownQuery,
    Ordinal,
    metric_columns,
    wrong_query,
)
from halfstep.service.contract.answers import MetricsPage
from halfstep.service.contract.answers.examples import METRICS_CSV, METRICS_NDJSON
from halfstep.service.store import jobs, record

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])


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
        **declares(HTTPStatus.NOT_FOUND, HTTPStatus.NOT_ACCEPTABLE, HTTPStatus.NOT_IMPLEMENTED),
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
    media_type = negotiated(accept)
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
            page = record.read(
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
            page = record.downsample(
                session, job.id, from_step=first, to_step=to_step, max_points=max_points, fields=columns
            )
            bucket_steps = page.bucket_steps
    if media_type != JSON:
        headers = {"x-last-step": str(page.last_step), "x-next-after-step": str(page.next_after_step)}
        rows = csv_rows(page.columns) if media_type == CSV else ndjson_rows(page.columns)
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
