"""Reading a job's file: YAML or JSON into a plain document, with errors that name line and remedy.

What the document means is the service's to judge; here is only what would be lost or changed on the way.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.resolver import VersionedResolver

from halfstep.service.errors import HalfstepError

MOST_BYTES = 1_048_576


class UnreadableSpec(HalfstepError):
    """The job's file cannot be read, or is not one JSON object."""

    code = "unreadable_spec"


# The core schema, section 10.3.2 of the specification of YAML 1.2: a tag, the plain scalars that have it, and
# the characters that one begins with.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _CoreSchema(VersionedResolver):
    """YAML 1.2 and nothing besides: `on`, `1_000` and a date are text, `1e-3` is a number."""

    def __init__(self, version: Any = None, loader: Any = None, loadumper: Any = None) -> None:
        super().__init__(version, loader, loadumper)
        for tag, scalars, first in _CORE_SCHEMA:
            expression = re.compile(f"^(?:{scalars})$")
            self.add_version_implicit_resolver((1, 2), f"tag:yaml.org,2002:{tag}", expression, first)


def read_spec(source: str) -> dict[str, Any]:
    """The document in the file `source`, or on standard input for `-`.

    Raises:
        UnreadableSpec: It is absent, too large, not YAML or JSON, or not an object of JSON values.
    """
    text = _text(source)
    try:
        document = json.loads(text, object_pairs_hook=_unique) if source.endswith(".json") else _yaml(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UnreadableSpec(f"{source} cannot be read: {_one_line(error)}") from error
    if not isinstance(document, dict):
        raise UnreadableSpec(
            f"{source} holds no job: the top level must be a mapping with at least `model` and `dataset`"
        )
    _check_json(document, "", source)
    return document


def _yaml(text: str) -> Any:
    reader = YAML(typ="safe", pure=True)
    reader.Resolver = _CoreSchema
    return reader.load(text)


def _text(source: str) -> str:
    try:
        raw = sys.stdin.buffer.read(MOST_BYTES + 1) if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UnreadableSpec(f"{source} cannot be read ({error.strerror})") from error
    if len(raw) > MOST_BYTES:
        raise UnreadableSpec(f"{source} is larger than {MOST_BYTES} bytes, the most that a job may be")
    if (encoding := json.detect_encoding(raw)) not in ("utf-8", "utf-8-sig"):
        raise UnreadableSpec(f"{source} is not UTF-8 text but {encoding.upper()}: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableSpec(f"{source} is not UTF-8 text (byte {error.start})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(
            key for index, (key, _) in enumerate(pairs) if key in {before for before, _ in pairs[:index]}
        )
        raise ValueError(f"the key {twice!r} comes twice")
    return document


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        # The library goes on with a picture of the place, and with advice for its callers.
        told = str(error.problem).partition(" with value")[0]
        return f"{told}, at line {error.problem_mark.line + 1} column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


def _check_json(value: object, pointer: str, source: str, depth: int = 0) -> None:
    place = f"{source}, at {pointer or '/'}"
    if depth > 64:
        raise UnreadableSpec(f"{place}: nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UnreadableSpec(f"{place}: the key {key!r} is not text; put it in quotes")
            _check_json(inner, f"{pointer}/{key}", source, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(inner, f"{pointer}/{index}", source, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UnreadableSpec(
            f"{place}: {value} is not a finite number, and JSON has no other; give a finite one or null"
        )
    elif not isinstance(value, str | int | float | None):
        raise UnreadableSpec(f"{place}: a {type(value).__name__} is not a JSON value; put it in quotes")
