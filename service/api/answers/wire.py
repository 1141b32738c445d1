"""How answers look on the wire: non-finite numbers, JSON bytes.

Only the spelling of values lives here; which fields an answer has is in `contract.answers`.
"""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from halfstep.service.contract.answers import Answer
from halfstep.service.contract.answers.values import rfc3339


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
    if isinstance(value, Answer):
        return spelled(value.members())
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
    """An answer, or plain values, as compact JSON.

    ASCII only, so that a lone surrogate in some worker's last words can never fail the answer.
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"), default=_plain)
    except ValueError:  # the rare answer that holds a NaN or an infinity
        text = json.dumps(spelled(value), allow_nan=False, separators=(",", ":"), default=_plain)
    return text.encode("ascii")


def _plain(value: Any) -> Any:
    # One level at a time: the model's own dump looks at every value of a spec, and takes three times as long.
    if isinstance(value, Answer):
        return value.members()
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, datetime):
        return rfc3339(value)
    raise TypeError(f"{type(value).__name__} is no value of an answer")


def json_answer(
    value: Any,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    """An answer whose bytes are ready: no response model is run over it."""
    return Response(json_bytes(value), status_code=status, headers=headers, media_type=media_type)
