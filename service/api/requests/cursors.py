"""Cursors of pages of jobs and of events: where the next page begins, in text handed back unread."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from typing import Any

from fastapi.exceptions import RequestValidationError

from halfstep.service.api.requests.parameters import wrong_query
from halfstep.service.store.job_rows import Job, known_shape


def cursor_after(job: Job) -> str:
    """The cursor of the page that follows this job."""
    return _written([job.created_at, job.id])


def position_of(cursor: str) -> tuple[float, str]:
    """`(created_at, id)` of the last job of the page before.

    Raises:
        RequestValidationError: it is no cursor that a page gave.
    """
    try:
        created_at, job_id = _read(cursor)
        created_at = float(created_at)
        if isinstance(job_id, str) and 0 < created_at < 1e11:
            return created_at, known_shape(job_id)
    except (ValueError, TypeError, binascii.Error):
        pass
    raise wrong_query("cursor", "is no cursor of this API; use `next_cursor` of the page before")


LATEST = "latest"
"""In place of a cursor of events: from now on."""


def events_cursor(tenant: str, position: int) -> str:
    """The cursor of what follows on a position in the events of the tenant's jobs."""
    return _written([position, _mark(tenant)])


def events_position(tenant: str, cursor: str, wrong: Callable[[str], RequestValidationError]) -> int:
    """The position that the cursor names; `wrong` makes the error that says where it stood.

    Raises:
        RequestValidationError: it is no cursor that a page of events gave, or another tenant's.
    """
    try:
        position, mark = _read(cursor)
        if type(position) is int and 0 <= position <= 2**53 and isinstance(mark, str):
            if mark == _mark(tenant):
                return position
            raise wrong("is a cursor of another tenant's events; use none to begin with the oldest event")
    except (ValueError, TypeError, binascii.Error):
        pass
    raise wrong("is no cursor of this path; use `next_after` of the page before, or none to begin anew")


def _mark(tenant: str) -> str:
    # Not the name: a cursor that lies about in some log tells nobody whose it is.
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _written(position: list[Any]) -> str:
    document = json.dumps(position, separators=(",", ":")).encode("ascii")
    return base64.urlsafe_b64encode(document).rstrip(b"=").decode("ascii")


def _read(cursor: str) -> Any:
    padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
    return json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
