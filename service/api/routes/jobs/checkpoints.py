"""What a job has saved: its checkpoints, and the weights of each as safetensors."""

import hashlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header
from sqlalchemy.orm import Session
from starlette.responses import Response, StreamingResponse

from halfstep.service.api.access import Reader
from halfstep.service.api.answers.byte_ranges import Unsatisfiable, requested
from halfstep.service.api.answers.conditional import matches
from halfstep.service.api.answers.openapi import declares
from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.answers.views import checkpoint_view
from halfstep.service.api.answers.wire import json_answer
from halfstep.service.api.context import Context, ContextDep
from halfstep.service.api.requests.known_keys import Caller
from halfstep.service.api.requests.parameters import JobPath, KnownQuery, StepPath
from halfstep.service.contract.answers import CheckpointList
from halfstep.service.errors import NotFound, StoreUnavailable
from halfstep.service.files.remote import MirrorFailed
from halfstep.service.files.storage import MODEL_FILE, FileAbsent, StoredFile, storage
from halfstep.service.store import jobs as store

router = APIRouter(prefix="/jobs/{job_id}/checkpoints", tags=["checkpoints"], dependencies=[KnownQuery])
_log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/octet-stream"

_WHOLE = {
    name: {"description": what, "schema": {"type": kind}}
    for name, what, kind in (
        ("etag", "The weights' sha256.", "string"),
        ("content-length", "Bytes of this answer.", "integer"),
        ("accept-ranges", "`bytes`", "string"),
    )
}
_RANGE = {"content-range": {"description": "Which bytes, of how many.", "schema": {"type": "string"}}}
_BYTES = {"schema": {"type": "string", "format": "binary"}}


@router.get("", response_model=CheckpointList, responses=declares(HTTPStatus.NOT_FOUND))
def list_checkpoints(context: ContextDep, caller: Reader, job_id: JobPath) -> Response:
    """What the job has saved, newest first. A cancelled or failed job keeps its checkpoints."""
    with context.database.read() as session:
        kept = _checkpoints(session, job_id, caller)
    return json_answer(CheckpointList(items=[checkpoint_view(one) for one in kept]))


def _model_responses(*, body: bool) -> dict[int | str, dict[str, Any]]:
    content = {"content": {MEDIA_TYPE: _BYTES}} if body else {}
    partial: dict[int | str, dict[str, Any]] = {
        206: {"description": "The range asked for.", "headers": _WHOLE | _RANGE, **content}
    }
    return {
        200: {"description": "The weights, in the safetensors format.", "headers": _WHOLE, **content},
        **(partial if body else {}),
        304: {"description": "The caller has these weights.", "headers": {"etag": _WHOLE["etag"]}},
        **declares(HTTPStatus.NOT_FOUND, *([HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE] if body else [])),
    }


Range = Annotated[str | None, Header(description="One range of bytes: `bytes=0-1023`.")]
IfRange = Annotated[str | None, Header(description="The etag that the range is of; another gives the whole.")]
IfNoneMatch = Annotated[str | None, Header(description="An etag; where it is the present one: 304.")]


@router.get("/{step}/model", response_class=Response, responses=_model_responses(body=True))
def download_model(
    context: ContextDep,
    caller: Reader,
    job_id: JobPath,
    step: StepPath,
    range: Range = None,  # noqa: A002  # the header's name
    if_range: IfRange = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The weights of a checkpoint, in the safetensors format; the etag is their sha256.

    A download that was cut off goes on with `Range` and `If-Range`. A whole download whose bytes are not
    those that were saved is cut off before its end.
    """
    kept = _checkpoint(context, caller, job_id, step)
    etag = f'"{kept.sha256}"'
    if matches(if_none_match, etag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"etag": etag})
    file = _open(context, kept)
    try:
        part = requested(range, if_range, etag=etag, size=file.size)
    except Unsatisfiable:
        file.close()
        raise ProblemError(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            "range_not_satisfiable",
            f"The file has {file.size} bytes; ask for a range within them.",
            headers={"content-range": f"bytes */{file.size}", "accept-ranges": "bytes"},
        ) from None
    headers = _headers(job_id, kept, file.size)
    if part is None:
        return StreamingResponse(_verified(file, kept, job_id), media_type=MEDIA_TYPE, headers=headers)
    headers |= {"content-length": str(part.length), "content-range": part.content_range}
    return StreamingResponse(
        file.read(part.start, part.length),
        status_code=HTTPStatus.PARTIAL_CONTENT,
        media_type=MEDIA_TYPE,
        headers=headers,
    )


@router.head("/{step}/model", response_class=Response, responses=_model_responses(body=False))
def describe_model(
    context: ContextDep,
    caller: Reader,
    job_id: JobPath,
    step: StepPath,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The size and sha256 of the weights of a checkpoint, without them."""
    kept = _checkpoint(context, caller, job_id, step)
    etag = f'"{kept.sha256}"'
    if matches(if_none_match, etag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"etag": etag})
    file = _open(context, kept)
    file.close()
    return Response(media_type=MEDIA_TYPE, headers=_headers(job_id, kept, file.size))


def _checkpoints(session: Session, job_id: str, caller: Caller) -> list[store.Checkpoint]:
    return store.checkpoints(session, store.get(session, job_id, tenant=caller.tenant).id)


def _checkpoint(context: Context, caller: Caller, job_id: str, step: int) -> store.Checkpoint:
    with context.database.read() as session:
        kept = _checkpoints(session, job_id, caller)
    for one in kept:
        if one.step == step:
            return one
    raise NotFound(f"the job has no checkpoint of step {step}; /jobs/{job_id}/checkpoints lists those it has")


def _open(context: Context, kept: store.Checkpoint) -> StoredFile:
    try:
        return storage(context.settings).open(kept.path, MODEL_FILE)
    except FileAbsent as error:
        _log.warning("checkpoint_absent", error=str(error))
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "checkpoint_absent",
            f"The files of the checkpoint of step {kept.step} are not where this server looks for them. "
            "They may have been removed; or workers keep them elsewhere, and the operator must let both "
            "share one HALFSTEP_DATA_DIR or one HALFSTEP_CHECKPOINT_URL.",
        ) from error
    except MirrorFailed as error:
        _log.warning("checkpoint_store_unavailable", error=error.message)
        raise ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            StoreUnavailable.code,
            "The store that keeps the checkpoints did not answer as it should; try again.",
            headers={"retry-after": "2"},
        ) from error


def _headers(job_id: str, kept: store.Checkpoint, size: int) -> dict[str, str]:
    return {
        "etag": f'"{kept.sha256}"',
        "content-length": str(size),
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
        "content-disposition": f'attachment; filename="{job_id}-step-{kept.step}.safetensors"',
    }


def _verified(file: StoredFile, kept: store.Checkpoint, job_id: str) -> Iterator[bytes]:
    """The whole file, its last piece held back until the bytes are known to be those that were saved."""
    digest = hashlib.sha256()
    held = b""
    for piece in file.read(0, file.size):
        if held:
            yield held
        digest.update(piece)
        held = piece
    if digest.hexdigest() != kept.sha256:
        _log.error("checkpoint_damaged", job_id=job_id, step=kept.step)
        raise OSError(f"the weights of step {kept.step} are not those that were saved")
    yield held
