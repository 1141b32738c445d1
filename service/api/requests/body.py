"""Bytes of a request body to a JSON document that every layer below can hold.

A body passes four gates: its size and type (413, 415), being JSON at all (400), and holding only values that
JSON, SQL and a worker agree on (422 with pointers). What a document *means* is checked in `validation`.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from typing import Any, Never

from fastapi import Request
from starlette.requests import ClientDisconnect

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.requests.pointers import pointer
from halfstep.service.errors import FieldProblem, InvalidRequest

MAX_DEPTH = 32
MAX_DIGITS = 4300
"""Digits of an integer literal beyond which it is not read at all (Python's own limit)."""

_MOST_PROBLEMS = 20
_DRAIN_BYTES = 16 * 1024 * 1024
_DRAIN_SECONDS = 5.0
_INTEGERS = range(-(2**63), 2**64)

# A string, closed or not, or a bracket. The closing quote is optional so that an unclosed string is one
# match: otherwise a body of escaped quotes would be scanned once per quote.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class JsonBody:
    """A body that passed the gates.

    Attributes:
        raw: the bytes as they came.
        document: what they say; always an object.
        digest: sha256 of the document in canonical form, whatever its spacing and key order were.
    """

    raw: bytes
    document: dict[str, Any]
    digest: str


async def read_json_body(request: Request, *, limit: int) -> JsonBody:
    """Read and check the body of `request`, at most `limit` bytes of it.

    Raises:
        ProblemError: 413, 415 or 400.
        InvalidRequest: JSON, but with values that cannot be stored; with a pointer to each.
    """
    _require_json(request)
    raw = await _read(request, limit)
    document = parse(raw)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")
    return JsonBody(raw=raw, document=document, digest=hashlib.sha256(canonical).hexdigest())


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises as `read_json_body` does."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _not_json(
            "invalid_utf8", f"The body is not UTF-8: the byte at offset {error.start} starts no character."
        )
    if not text.strip():
        _not_json("empty_body", "The body is empty; send a JSON object.")
    if _too_deep(text):
        _not_json("too_deep", f"The body is nested deeper than {MAX_DEPTH} levels; flatten it.")
    try:
        document = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        _not_json(
            "invalid_json", f"The body is not JSON: {error.msg} at line {error.lineno} column {error.colno}."
        )
    problems = []
    for problem in _screen(document, ()):
        problems.append(problem)
        if len(problems) == _MOST_PROBLEMS:
            break
    if problems:
        raise InvalidRequest("The body holds values that cannot be stored.", problems)
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.", [FieldProblem("", "must be a JSON object")])
    return document


def _require_json(request: Request) -> None:
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    charset = message.get_param("charset", "utf-8")
    is_json = message.get_content_type() == "application/json" and "content-type" in request.headers
    if not is_json or not isinstance(charset, str) or charset.lower() not in {"utf-8", "utf8"}:
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "Send the body as JSON in UTF-8, with the header content-type: application/json.",
            headers={"accept": "application/json"},
        )
    if request.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_content_encoding",
            "Send the body as it is, without a content-encoding.",
            headers={"accept-encoding": "identity"},
        )


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body_too_large",
        f"The body is larger than {limit} bytes, which is the most.",
    )
    if declared.isdecimal() and int(declared[:20]) > limit and "expect" in request.headers:
        raise too_large  # the client waits for a word before it sends anything
    kept = bytearray()
    received = 0
    try:
        async with asyncio.timeout(None) as patience:
            async for chunk in request.stream():
                received += len(chunk)
                if received <= limit:
                    kept += chunk
                    continue
                # A client that is still sending would see a reset connection instead of the answer: take
                # in the rest of an oversized body, within bounds, and keep none of it.
                kept.clear()
                if patience.when() is None:
                    patience.reschedule(asyncio.get_running_loop().time() + _DRAIN_SECONDS)
                if received > _DRAIN_BYTES:
                    raise too_large
    except TimeoutError:
        raise too_large from None
    except ClientDisconnect:
        _not_json("body_cut_off", "The connection closed before the whole body was sent.")
    if received > limit:
        raise too_large
    return bytes(kept)


def _not_json(code: str, detail: str) -> Never:
    raise ProblemError(HTTPStatus.BAD_REQUEST, code, detail)


def _too_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif first != '"':
            depth -= 1
    return False


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        _not_json("integer_too_long", f"The body holds an integer of more than {MAX_DIGITS} digits.")
    return int(digits)


class _Repeated:
    """Stands where an object names the same member twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                members[name] = _Repeated()
            seen.add(name)
    return members


def _screen(value: Any, path: tuple[str | int, ...]) -> Iterator[FieldProblem]:
    """Each value that JSON can spell and the layers below cannot hold."""
    detail = _unstorable(value)
    if detail is not None:
        yield FieldProblem(pointer(*path), detail)
    elif isinstance(value, dict):
        for name, item in value.items():
            if _unstorable_text(name) is None:
                yield from _screen(item, (*path, name))
            else:  # such a name cannot be part of a pointer either
                yield FieldProblem(pointer(*path), f"has a member whose name {_unstorable_text(name)}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _screen(item, (*path, index))


def _unstorable(value: Any) -> str | None:
    match value:
        case str():
            return _unstorable_text(value)
        case float() if not math.isfinite(value):
            return "must be a finite number that fits a double; use null for no value"
        case int() if value not in _INTEGERS:
            return "must be an integer that fits 64 bits"
        case _Repeated():
            return "appears more than once in its object; keep one"
        case _:
            return None


def _unstorable_text(text: str) -> str | None:
    if "\x00" in text:
        return "holds a NUL character; remove it"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is no character; remove it"
    return None
