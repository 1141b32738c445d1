"""Bytes to a document: each gate closes on what it should, and on nothing else."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.requests.body import parse
from halfstep.service.contract.documents import MAX_DEPTH, MAX_DIGITS
from halfstep.service.errors import InvalidRequest


def nested(depth: int) -> bytes:
    """An object whose containers are `depth` deep in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "empty_body"),
        (b" \n", "empty_body"),
        (b"{", "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1} x', "invalid_json"),
        (b'{"a": "\x01"}', "invalid_json"),
        (b"\xef\xbb\xbf", "empty_body"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "invalid_json"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),
        (nested(MAX_DEPTH + 1), "too_deep"),
        (b"[" * 500_000, "too_deep"),
        (b'{"a":' * 100_000, "too_deep"),
        (b'{"a": ' + b"9" * (MAX_DIGITS + 1) + b"}", "integer_too_long"),
        (b'{"a": -' + b"9" * 1_000_000 + b"}", "integer_too_long"),
    ],
)
def test_what_is_not_json_is_400(raw: bytes, code: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        (b'{"a": NaN}', "/a"),
        (b'{"a": [1, Infinity]}', "/a/1"),
        (b'{"a": {"b": -Infinity}}', "/a/b"),
        (b'{"a": 1e400}', "/a"),
        (b'{"a": -1e400}', "/a"),
        (b'{"a": 1' + b"0" * 400 + b"}", "/a"),
        (b'{"a": 18446744073709551616}', "/a"),
        (rb'{"a": "\ud800"}', "/a"),
        (rb'{"a": "\udfff x"}', "/a"),
        (rb'{"a": "x\u0000y"}', "/a"),
        (rb'{"a/b~c": {"": NaN}}', "/a~1b~0c/"),
        (rb'{"a": {"\ud800": 1}}', "/a"),
        (rb'{"a": {"\u0000": 1}}', "/a"),
        (b'{"a": 1, "a": 1}', "/a"),
        (b"[]", ""),
        (b'"text"', ""),
        (b"3", ""),
        (b"null", ""),
    ],
)
def test_what_cannot_be_stored_is_422_with_a_pointer(raw: bytes, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(raw)
    assert [problem.pointer for problem in caught.value.problems] == [pointer]


def test_every_bad_value_is_reported_but_not_without_end() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(b'{"a": NaN, "b": [Infinity, "\\u0000"]}')
    assert [problem.pointer for problem in caught.value.problems] == ["/a", "/b/0", "/b/1"]
    with pytest.raises(InvalidRequest) as caught:
        parse(b'{"a": [' + b"NaN," * 5000 + b"1]}")
    assert len(caught.value.problems) == 20


def test_the_deepest_allowed_document_passes() -> None:
    assert parse(nested(MAX_DEPTH))
    # Brackets inside strings are text, escaped quotes included.
    text = json.dumps({"a": '["' * 100 + "\\" + "{" * 100})
    assert parse(text.encode()) == json.loads(text)


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize("raw", [b'{"a": "' + b'\\"' * 500_000, b'"' * 1_000_000, b'[{"a":"\\\\' * 100_000])
def test_hostile_text_is_scanned_in_linear_time(raw: bytes) -> None:
    started = time.process_time()
    with pytest.raises((ProblemError, InvalidRequest)):
        parse(b"[" * 40 + raw)
    with pytest.raises((ProblemError, InvalidRequest)):
        parse(b"[[]" * 20 + raw)
    assert time.process_time() - started < 3


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_document_or_a_refusal(raw: bytes) -> None:
    try:
        document = parse(raw)
    except (ProblemError, InvalidRequest):
        return
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@given(st.text(alphabet='[]{}",\\:1', max_size=200))
def test_depth_agrees_with_the_parser(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        return
    if isinstance(expected, dict):
        if len(json.dumps(expected, separators=(",", ":"))) < len("".join(text.split())):
            return  # an escape, or a name that appears twice
        assert parse(text.encode()) == expected
