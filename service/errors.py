"""Errors of the service side.

HalfstepError
├── InvalidRequest        the caller's document is wrong: 422, with pointers
├── NotFound              absent, or another tenant's: 404
├── Conflict              the object's state forbids it: 409
├── NewerRecord           stored by a later version: 501, upgrade this one
├── StaleFence            a newer attempt owns the job: stop at once, write nothing
├── ConfigurationError    settings that cannot work together: refused at start
└── StoreUnavailable      the database did not answer in time: 503 with Retry-After
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One wrong place in a document: a JSON pointer and a sentence that names the remedy."""

    pointer: str
    detail: str


class HalfstepError(Exception):
    """Base of every error that this service raises on purpose."""

    code = "error"


class InvalidRequest(HalfstepError):
    """The request's document is malformed or contradicts itself."""

    code = "invalid_request"

    def __init__(
        self, detail: str, problems: Sequence[FieldProblem] = (), *, code: str | None = None
    ) -> None:
        super().__init__(detail)
        self.problems = tuple(problems)
        if code is not None:
            self.code = code


class NotFound(HalfstepError):
    """There is no such object, or it belongs to another tenant."""

    code = "not_found"


class Conflict(HalfstepError):
    """The object's present state forbids the request."""

    code = "conflict"

    def __init__(self, detail: str, *, code: str | None = None) -> None:
        super().__init__(detail)
        if code is not None:
            self.code = code


class NewerRecord(HalfstepError):
    """Something stored is of a later version than this program can read; it is left as it is."""

    code = "record_newer"


class StaleFence(HalfstepError):
    """The job's fence has moved on: another attempt owns it, and nothing was written."""

    code = "stale_fence"


class ConfigurationError(HalfstepError):
    """Settings that are missing or cannot work together; names the setting and the remedy."""

    code = "configuration"


class StoreUnavailable(HalfstepError):
    """The database did not answer, even after retries."""

    code = "store_unavailable"
