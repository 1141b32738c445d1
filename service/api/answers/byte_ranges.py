"""Byte ranges of a download (RFC 9110, section 14): one range is served, anything else gives the whole.

Pure functions over header values.
"""

import re
from dataclasses import dataclass

_ONE = re.compile(r"bytes=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `end`, both included, of `size`."""

    start: int
    end: int
    size: int

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return self.end - self.start + 1

    @property
    def content_range(self) -> str:
        """The header of a 206."""
        return f"bytes {self.start}-{self.end}/{self.size}"


class Unsatisfiable(Exception):
    """The range begins beyond the end."""


def requested(header: str | None, if_range: str | None, *, etag: str, size: int) -> Part | None:
    """The part that a request asks for; None: the whole.

    A header that is malformed or names several ranges is ignored, as is one whose `If-Range` names another
    version: each gives the whole, which every client must understand.

    Raises:
        Unsatisfiable: nothing of the range is there.
    """
    if header is None or (if_range is not None and if_range.strip() != etag):
        return None
    found = _ONE.fullmatch(header.strip())
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:  # the last so many bytes
        if int(last) == 0 or size == 0:
            raise Unsatisfiable
        return Part(max(0, size - int(last)), size - 1, size)
    start, end = int(first), int(last) if last else size - 1
    if last and end < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return Part(start, min(end, size - 1), size)
