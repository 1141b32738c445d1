"""The media types of the step record: which one a client prefers, and the record's rows in it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.answers.wire import json_bytes, spelled_column

JSON, CSV, NDJSON = "application/json", "text/csv", "application/x-ndjson"
EVENT_STREAM = "text/event-stream"
OFFERED = (JSON, CSV, NDJSON)


def negotiated(accept: str | None, choices: Sequence[str] = OFFERED) -> str:
    """The one of `choices`, the first of which is the default, that `accept` prefers (RFC 9110, 12.5.1).

    Raises:
        ProblemError: 406, where it takes none of them.
    """
    if accept is None or not accept.strip():
        return choices[0]
    weights: dict[str, float] = {}
    for offered in choices:
        best = (-1, 0.0)
        for entry in accept.split(","):
            pattern, *parameters = (part.strip().lower() for part in entry.split(";"))
            specificity = _specificity(pattern, offered)
            if specificity > best[0]:
                best = (specificity, _quality(parameters))
        weights[offered] = best[1]
    chosen = max(choices, key=lambda offered: weights[offered])
    if weights[chosen] <= 0:
        raise ProblemError(
            HTTPStatus.NOT_ACCEPTABLE, "not_acceptable", f"This record is offered as {', '.join(choices)}."
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


def csv_rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[bytes]:
    """The rows of these columns as CSV (RFC 4180), the line of names first."""
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


def ndjson_rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[bytes]:
    """The rows of these columns as JSON objects, one a line."""
    for row in zip(*columns.values(), strict=True):
        yield json_bytes(dict(zip(columns, row, strict=True))) + b"\n"
