"""The series of a job: figures that are not there every step, such as those of its held-out split."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from starlette.responses import Response

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.conditional import ETAG_HEADER, etag_of, matches
from halfstep.service.api.answers.formats import CSV, JSON, NDJSON, OFFERED, csv_rows, ndjson_rows, negotiated
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.wire import json_answer, spelled_column
from halfstep.service.api.context import ContextDep
from halfstep.service.api.requests.parameters import JobPath, KnownQuery, Ordinal, wrong_query
from halfstep.service.contract.answers import Series, SeriesList, SeriesPage
from halfstep.service.store import jobs, record, series

router = APIRouter(prefix="/jobs", tags=["progress"], dependencies=[KnownQuery])

_UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "Unchanged since the answer that If-None-Match names.", "headers": ETAG_HEADER}
}
_IfNoneMatch = Annotated[str | None, Header(description="The etag of the answer at hand.")]


@router.get(
    "/{job_id}/series",
    response_model=SeriesList,
    responses={
        200: {"description": "The series.", "headers": ETAG_HEADER},
        **_UNCHANGED,
        **declares(HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED),
    },
)
def list_series(
    context: ContextDep, caller: Reader, job_id: JobPath, if_none_match: _IfNoneMatch = None
) -> Response:
    """The names of a job's series, with what there is of each."""
    with context.database.read() as session:
        job = jobs.get(session, job_id, tenant=caller.tenant)
        etag = etag_of(record.versions(session, [job.id])[job.id])
        headers = {"etag": etag, "cache-control": "private, no-cache"}
        if matches(if_none_match, etag):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        found = series.listing(session, job.id)
    items = [
        Series(
            name=each.name,
            count=each.count,
            first_step=each.first_step,
            last_step=each.last_step,
            last_value=each.last_value,
        )
        for each in found
    ]
    return json_answer(SeriesList(items=items), headers=headers)


@router.get(
    "/{job_id}/series/{name:path}",
    response_model=SeriesPage,
    responses={
        200: {
            "description": "Points in order. CSV and NDJSON carry the same rows.",
            "content": {CSV: {"schema": {"type": "string"}}, NDJSON: {"schema": {"type": "string"}}},
            "headers": ETAG_HEADER,
        },
        **_UNCHANGED,
        **declares(HTTPStatus.NOT_FOUND, HTTPStatus.NOT_ACCEPTABLE, HTTPStatus.NOT_IMPLEMENTED),
    },
)
def get_series(
    context: ContextDep,
    caller: Reader,
    job_id: JobPath,
    name: Annotated[
        str,
        Path(
            max_length=series.MAX_NAME,
            pattern=f"^{series.NAME.pattern}$",
            description="Words with slashes between them, as in `held_out/loss`.",
        ),
    ],
    from_step: Annotated[Ordinal | None, Query(description="From this step on.")] = None,
    to_step: Annotated[Ordinal | None, Query(description="Up to this step.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    max_points: Annotated[
        int | None,
        Query(
            ge=1,
            le=10_000,
            description="For a plot: at most this many rows, each a bucket of points. Beside the last value "
            "stand `value_first`, `value_min` and `value_max`.",
        ),
    ] = None,
    accept: Annotated[str | None, Header(description=f"One of {', '.join(OFFERED)}.")] = None,
    if_none_match: _IfNoneMatch = None,
) -> Response:
    """The points of a series."""
    media_type = negotiated(accept)
    if from_step is not None and to_step is not None and from_step > to_step:
        raise wrong_query("to_step", "must not be below from_step")
    with context.database.read() as session:
        job = jobs.get(session, job_id, tenant=caller.tenant)
        version = etag_of(record.versions(session, [job.id])[job.id])
        etag = version if media_type == JSON else f'{version[:-1]}-{media_type.rpartition("/")[2]}"'
        headers = {"etag": etag, "cache-control": "private, no-cache", "vary": "accept"}
        if matches(if_none_match, etag):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        page = series.read(
            session, job.id, name, from_step=from_step, to_step=to_step, limit=limit, max_points=max_points
        )
    if media_type != JSON:
        if page.next_from_step is not None:
            headers["x-next-from-step"] = str(page.next_from_step)
        rows = csv_rows(page.columns) if media_type == CSV else ndjson_rows(page.columns)
        return Response(b"".join(rows), media_type=media_type, headers=headers)
    return json_answer(
        {
            "name": name,
            "count": page.count,
            "columns": {each: spelled_column(column) for each, column in page.columns.items()},
            "next_from_step": page.next_from_step,
            "bucket_points": page.bucket_points,
        },
        headers=headers,
    )
