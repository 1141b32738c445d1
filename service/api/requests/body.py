"""Bytes of a request body to a JSON document that every layer below can hold.

A body passes four gates: its size and type (413, 415), being JSON at all (400), and holding only values that
JSON, SQL and a worker agree on (422 with pointers). What a document *means* is checked in `submitting`.
"""

import asyncio
import hashlib
import itertools
import json
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from typing import Any, Never

from fastapi import Request
from starlette.requests import ClientDisconnect

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.requests.pointers import pointer
from halfstep.service.contract import documents
from halfstep.service.errors import FieldProblem, InvalidRequest

_MOST_PROBLEMS = 20
_DRAIN_BYTES = 16 * 1024 * 1024
_DRAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class JsonBody:
    """A body that passed the gates.

    Attributes:
        document: what it says; always an object.
        digest: sha256 of the document in canonical form: the same for all documents that are equal.
        earlier_digest: the one under which earlier versions stored it, which told 3.0 from 3.
    """

    document: dict[str, Any]
    digest: str
    earlier_digest: str


async def read_json_body(request: Request, *, limit: int) -> JsonBody:
    """Read and check the body of `request`, at most `limit` bytes of it.

    Raises:
        ProblemError: 413, 415 or 400.
        InvalidRequest: JSON, but with values that cannot be stored; with a pointer to each.
    """
    _require_json(request)
    raw = await _read(request, limit)
    document = parse(raw)
    spelt = json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")
    return JsonBody(
        document=document,
        digest=hashlib.sha256(documents.canonical(document)).hexdigest(),
        earlier_digest=hashlib.sha256(spelt).hexdigest(),
    )


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises as `read_json_body` does."""
    try:
        document = documents.loads(raw)
    except documents.NotADocument as error:
        _not_json(error.code, f"The body {error.detail}.")
    found = itertools.islice(documents.unstorable(document), _MOST_PROBLEMS)
    problems = [FieldProblem(pointer(*path), detail) for path, detail in found]
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
