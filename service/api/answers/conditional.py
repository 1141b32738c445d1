"""Conditional answers: the ETag of a summary, and whether a client has that one already."""

import re

_ETAG = re.compile(r'(?:W/)?("[^"]*")')

ETAG_HEADER = {
    "etag": {"description": "Changes with every change of the summary.", "schema": {"type": "string"}}
}
"""How OpenAPI describes the header."""


def etag_of(version: int) -> str:
    """The ETag of a summary at that version of its job."""
    return f'"{version}"'


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether `if_none_match` names `etag`, by weak comparison (RFC 9110)."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or etag in _ETAG.findall(if_none_match)
