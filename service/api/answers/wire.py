"""How values look on the wire: UTC times, non-finite numbers, JSON bytes.

Only the spelling of values lives here; which fields an answer has is in `views`.
"""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response


def timestamp(seconds: float | None) -> str | None:
    """Epoch seconds as RFC 3339 in UTC with microseconds, or None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def spell(number: float) -> float | str:
    """A number as JSON can carry it: NaN and the infinities become their names."""
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def spelled(value: Any) -> Any:
    """`value` with every non-finite float in it spelled out."""
    if isinstance(value, float):
        return spell(value)
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(item) for item in value]
    return value


def spelled_column(column: Sequence[Any]) -> Sequence[Any]:
    """One column of the step record; the usual one, all finite, is returned as it is."""
    try:
        if all(map(math.isfinite, column)):
            return column
    except TypeError:  # nulls or names among them
        pass
    return [spell(item) if isinstance(item, float) else item for item in column]


def json_bytes(value: Any) -> bytes:
    """`value` as compact JSON.

    ASCII only, so that a lone surrogate in some worker's last words can never fail the answer.
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:  # the rare answer that holds a NaN or an infinity
        text = json.dumps(spelled(value), allow_nan=False, separators=(",", ":"))
    return text.encode("ascii")


def json_answer(
    value: Any,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    """An answer whose bytes are ready: no response model is run over it."""
    return Response(json_bytes(value), status_code=status, headers=headers, media_type=media_type)
