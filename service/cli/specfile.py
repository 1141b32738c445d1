"""Reading a job's file: YAML or JSON into a plain document, with errors that name line and remedy.

What the document means is the service's to judge; here is only what would be lost or changed on the way.
"""

import json
import math
import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from halfstep.service.errors import HalfstepError

MOST_BYTES = 1_048_576


class UnreadableSpec(HalfstepError):
    """The job's file cannot be read, or is not one JSON object."""

    code = "unreadable_spec"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (YAML 1.1 wants `1.0e-3`), and a key may come once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_spec(source: str) -> dict[str, Any]:
    """The document in the file `source`, or on standard input for `-`.

    Raises:
        UnreadableSpec: It is absent, too large, not YAML or JSON, or not an object of JSON values.
    """
    text = _text(source)
    try:
        if source.endswith(".json"):
            document = json.loads(text, object_pairs_hook=_unique)
        else:
            document = yaml.load(text, Loader=_Loader)  # noqa: S506  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableSpec(f"{source} cannot be read: {_one_line(error)}") from error
    if not isinstance(document, dict):
        raise UnreadableSpec(
            f"{source} holds no job: the top level must be a mapping with at least `model` and `dataset`"
        )
    _check_json(document, "", source)
    return document


def _text(source: str) -> str:
    try:
        raw = sys.stdin.buffer.read(MOST_BYTES + 1) if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UnreadableSpec(f"{source} cannot be read ({error.strerror})") from error
    if len(raw) > MOST_BYTES:
        raise UnreadableSpec(f"{source} is larger than {MOST_BYTES} bytes, the most that a job may be")
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
