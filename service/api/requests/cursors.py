"""The cursor of a page of jobs: where the next page begins, as text that a client hands back unread."""

import base64
import binascii
import json

from halfstep.service.api.requests.parameters import wrong_query
from halfstep.service.store.job_rows import Job, known_shape


def cursor_after(job: Job) -> str:
    """The cursor of the page that follows this job."""
    position = json.dumps([job.created_at, job.id], separators=(",", ":")).encode("ascii")
    return base64.urlsafe_b64encode(position).rstrip(b"=").decode("ascii")


def position_of(cursor: str) -> tuple[float, str]:
    """`(created_at, id)` of the last job of the page before.

    Raises:
        RequestValidationError: it is no cursor that a page gave.
    """
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        created_at, job_id = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        created_at = float(created_at)
        if isinstance(job_id, str) and 0 < created_at < 1e11:
            return created_at, known_shape(job_id)
    except (ValueError, TypeError, binascii.Error):
        pass
    raise wrong_query("cursor", "is no cursor of this API; use `next_cursor` of the page before")
