"""JSON documents: bytes to values that every process can hold, and values to a model of this package.

The API and the command line read with these functions, so that a document which one takes the other takes
too. How a fault is told (a problem document, a line on a terminal) is the caller's.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Never, TypeVar

from pydantic import BaseModel

MAX_DEPTH = 32
MAX_DIGITS = 4300
"""Digits of an integer literal beyond which it is not read at all (Python's own limit)."""

_Model = TypeVar("_Model", bound=BaseModel)
Path = tuple[str | int, ...]

_INTEGERS = range(-(2**63), 2**64)
_EXACT = 2.0**53  # beyond it a double may be another integer than the one that was written
_MOST_REFERENCES = 32

# A string, closed or not, or a bracket. The closing quote is optional so that an unclosed string is one
# match: otherwise a document of escaped quotes would be scanned once per quote.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


class NotADocument(ValueError):
    """Bytes that are no JSON document.

    Attributes:
        code: a word for programs.
        detail: what is wrong, to be read after the document's name: "is not UTF-8: …".
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


class Repeated:
    """Stands where an object names the same member twice."""


def decoded(raw: bytes) -> str:
    """The text in `raw`, which is UTF-8; a byte order mark before it is passed over.

    Raises:
        NotADocument: it is in another encoding, or in none.
    """
    encoding = json.detect_encoding(raw)
    if encoding.startswith(("utf-16", "utf-32")):
        name = encoding[:6].upper()
        _refuse("invalid_utf8", f"is {name} and must be UTF-8; save or encode it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse("invalid_utf8", f"is not UTF-8: the byte at offset {error.start} starts no character")


def loads(raw: bytes) -> Any:
    """The JSON value in `raw`; a member that is named twice is `Repeated`.

    Raises:
        NotADocument: `raw` is not JSON in UTF-8, or deeper or longer than anything reads.
    """
    text = decoded(raw)
    if not text.strip():
        _refuse("empty_body", "is empty; send a JSON object")
    if _too_deep(text):
        _refuse("too_deep", f"is nested deeper than {MAX_DEPTH} levels; flatten it")
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        _refuse("invalid_json", f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}")


def unstorable(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Each place of a value that JSON can spell and the layers below cannot hold, and what is wrong there."""
    detail = _unstorable(value)
    if detail is not None:
        yield path, detail
    elif isinstance(value, dict):
        for name, item in value.items():
            if _unstorable_text(name) is None:
                yield from unstorable(item, (*path, name))
            else:  # such a name cannot be part of a pointer either
                yield path, f"has a member whose name {_unstorable_text(name)}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unstorable(item, (*path, index))


def canonical(value: Any) -> bytes:
    """The one spelling of all documents that are equal: by key order, spacing, and 3 for 3.0."""
    return json.dumps(_plain_numbers(value), sort_keys=True, separators=(",", ":")).encode("ascii")


def read(model: type[_Model], document: Mapping[str, Any]) -> _Model:
    """The `model` that `document` describes, under JSON's own types: no string is a number, 3.0 is a count.

    Raises:
        ValidationError: it does not fit the model.
    """
    fitting = with_integers(document, schema_of(model))
    return model.model_validate_json(json.dumps(fitting), strict=True)


def with_integers(value: Any, schema: Any) -> Any:
    """`value` with an integer wherever `schema` wants one and a number like 3.0 or 1e3 stands.

    To JSON Schema they are integers; to Python they are floats until they are made integers.
    """
    return _fitted(value, [schema], schema)


@cache
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of `model`, made once."""
    return model.model_json_schema()


def _refuse(code: str, detail: str) -> Never:
    raise NotADocument(code, detail)


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
        _refuse("integer_too_long", f"holds an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                members[name] = Repeated()
            seen.add(name)
    return members


def _unstorable(value: Any) -> str | None:
    match value:
        case str():
            return _unstorable_text(value)
        case float() if not math.isfinite(value):
            return "must be a finite number that fits a double; use null for no value"
        case int() if value not in _INTEGERS:
            return "must be an integer that fits 64 bits"
        case Repeated():
            return "appears more than once in its object; keep one"
        case _:
            return None


def _unstorable_text(text: str) -> str | None:
    if "\x00" in text:
        return "holds a NUL character; remove it"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is no character; remove it"
    return None


def _plain_numbers(value: Any) -> Any:
    match value:
        case dict():
            return {name: _plain_numbers(item) for name, item in value.items()}
        case list():
            return [_plain_numbers(item) for item in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def _fitted(value: Any, schemas: list[Any], root: Any) -> Any:
    """`value` under all of `schemas`, alternatives of one place in the document."""
    match value:
        case float() if value.is_integer() and abs(value) <= _EXACT:
            types = {kind for schema in _branches(schemas, root) for kind in _types(schema)}
            return int(value) if "integer" in types and "number" not in types else value
        case dict():
            branches = list(_branches(schemas, root))
            return {name: _fitted(item, _member(branches, name), root) for name, item in value.items()}
        case list():
            items = [schema["items"] for schema in _branches(schemas, root) if "items" in schema]
            return [_fitted(item, items, root) for item in value]
        case _:
            return value


def _member(branches: list[dict[str, Any]], name: str) -> list[Any]:
    found = []
    for schema in branches:
        properties = schema.get("properties", {})
        if name in properties:
            found.append(properties[name])
        elif "additionalProperties" in schema:
            found.append(schema["additionalProperties"])
    return found


def _types(schema: dict[str, Any]) -> list[Any]:
    kind = schema.get("type", [])
    return kind if isinstance(kind, list) else [kind]


def _branches(schemas: list[Any], root: Any, followed: int = 0) -> Iterator[dict[str, Any]]:
    """Each schema that may speak for the place, references followed and alternatives laid open."""
    for schema in schemas:
        if not isinstance(schema, dict):
            continue
        yield schema
        inner = [one for word in ("anyOf", "oneOf", "allOf") for one in schema.get(word, ())]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            inner.append(root.get("$defs", {}).get(reference.removeprefix("#/$defs/")))
        if inner and followed < _MOST_REFERENCES:  # a schema may refer to itself
            yield from _branches(inner, root, followed + 1)
