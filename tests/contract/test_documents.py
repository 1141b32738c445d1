"""JSON documents: every spelling of a document means the same, and what is none is refused in plain words."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from halfstep.service.contract.documents import (
    NotADocument,
    canonical,
    loads,
    read,
    schema_of,
    unstorable,
    with_integers,
)
from halfstep.service.contract.spec import JobSpec, RetryRequest

MINIMAL: dict[str, Any] = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}}
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def integer_places(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """Where the schema of `model` wants an integer, and never a number with a fraction."""
    root = schema_of(model)
    found: list[tuple[str, ...]] = []

    def look(schema: dict[str, Any], path: tuple[str, ...]) -> None:
        if "$ref" in schema:
            schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        choices = schema.get("anyOf", [schema])
        if any(choice.get("type") == "integer" for choice in choices):
            found.append(path)
        for choice in choices:
            if "$ref" in choice and choice is not schema:
                look(choice, path)
        for name, inner in schema.get("properties", {}).items():
            look(inner, (*path, name))

    look(root, ())
    return found


def document_with(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    inner: Any = value
    for name in reversed(path):
        inner = {name: inner}
    return inner if isinstance(inner, dict) else {}


PLACES = [(JobSpec, path) for path in integer_places(JobSpec)] + [
    (RetryRequest, path) for path in integer_places(RetryRequest)
]


def test_the_places_of_integers_are_found() -> None:
    assert {("priority",), ("training", "max_steps"), ("precision", "scale_window")} <= {
        path for _, path in PLACES
    }
    assert (RetryRequest, ("from_checkpoint",)) in PLACES


@pytest.mark.parametrize(("model", "path"), PLACES, ids=lambda value: str(getattr(value, "__name__", value)))
@pytest.mark.parametrize("spelling", ["2.0", "2e0", "20e-1", "0.2E1"])
def test_an_integer_may_be_written_with_a_fraction_of_zero(
    model: type[BaseModel], path: tuple[str, ...], spelling: str
) -> None:
    start = MINIMAL if model is JobSpec else {}
    if path[-1] == "gpus":
        spelling = spelling.replace("2", "1", 1) if spelling in ("2.0", "2e0") else "1.0"
    document = {**start, **document_with(path, json.loads(spelling))}
    found: Any = read(model, document)
    for name in path:
        found = getattr(found, name)
    assert isinstance(found, int)
    assert found == json.loads(spelling)


@pytest.mark.parametrize(("model", "path"), PLACES, ids=lambda value: str(getattr(value, "__name__", value)))
@pytest.mark.parametrize("value", [2.5, "2", True, 2.0**60])
def test_what_is_no_integer_is_refused_as_before(
    model: type[BaseModel], path: tuple[str, ...], value: Any
) -> None:
    start = MINIMAL if model is JobSpec else {}
    with pytest.raises(ValidationError):
        read(model, {**start, **document_with(path, value)})


def test_a_number_that_may_have_a_fraction_stays_what_it_is() -> None:
    spec = read(JobSpec, {**MINIMAL, "precision": {"initial_scale": 1024.0}, "model": {
        "name": "mlp", "params": {"dropout": 1.0}}})  # fmt: skip
    assert (repr(spec.precision.initial_scale), repr(spec.model.params["dropout"])) == ("1024.0", "1.0")


@pytest.mark.parametrize(
    ("schema", "value", "fitting"),
    [
        ({"type": "integer"}, 3.0, "3"),
        ({"type": ["integer", "null"]}, 3.0, "3"),
        ({"type": ["integer", "number"]}, 3.0, "3.0"),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, 3.0, "3.0"),
        ({"type": "array", "items": {"type": "integer"}}, [3.0, 1e3, 2.5], "[3, 1000, 2.5]"),
        ({"additionalProperties": {"type": "integer"}}, {"a": 3.0}, "{'a': 3}"),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}}]}, {"a": 3.0}, "{'a': 3}"),
        ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}, 3.0, "3"),
        ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, 3.0, "3.0"),
        (True, 3.0, "3.0"),
        ({}, {"a": [3.0]}, "{'a': [3.0]}"),
    ],
)
def test_any_schema_says_where_integers_are(schema: Any, value: Any, fitting: str) -> None:
    assert repr(with_integers(value, schema)) == fitting


def test_equal_documents_have_one_canonical_form() -> None:
    first = loads(b'{"a": 3, "b": [1000.0, -0.0, 0.5]}')
    assert canonical(loads(b'\xef\xbb\xbf{"b":[1e3,0,5e-1],\n"a":3.0}')) == canonical(first)
    assert canonical({"a": 3.5}) != canonical({"a": 3})
    assert canonical({"a": True}) != canonical({"a": 1})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_the_canonical_form_of_a_document_without_fractions_is_its_sorted_spelling(value: Any) -> None:
    """So earlier versions, which knew no other form, made the same."""
    assert canonical(value) == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_a_byte_order_mark_is_passed_over() -> None:
    assert loads(b"\xef\xbb\xbf" + json.dumps(MINIMAL).encode()) == MINIMAL


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_encoding_is_named(encoding: str) -> None:
    with pytest.raises(NotADocument) as caught:
        loads(json.dumps(MINIMAL).encode(encoding))
    assert caught.value.code == "invalid_utf8"
    assert caught.value.detail == f"is {encoding[:6].upper()} and must be UTF-8; save or encode it as UTF-8"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"a": 1, "a": 1}', ("a",)),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', ("a", "b")),
        ('{"a": [{}, {"b": 1, "b": 3}]}', ("a", 1, "b")),
        ('{"": 1, "": 2}', ("",)),
        (r'{"a": 1, "\u0061": 2}', ("a",)),
    ],
)
def test_a_member_named_twice_is_told_with_its_place(text: str, path: tuple[str | int, ...]) -> None:
    assert list(unstorable(loads(text.encode()))) == [
        (path, "appears more than once in its object; keep one")
    ]


def test_the_examples_are_documents(pytestconfig: pytest.Config) -> None:
    files = sorted(Path(pytestconfig.rootpath, "docs").glob("*.json"))
    assert files
    for file in files:
        assert isinstance(loads(file.read_bytes()), dict)
