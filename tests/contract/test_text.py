"""Text that people read: what is refused, what is escaped, and that what was stored stays loadable."""

import re
import sys
import unicodedata
from typing import Any

import pytest
from pydantic import ValidationError

from halfstep.service.contract.spec import JobSpec
from halfstep.service.contract.text import READABLE, fault, shown

SPEC = {"model": {"name": "mlp"}, "dataset": {"name": "digits"}}
JOINERS = {"\u200c", "\u200d"}
EVERYTHING = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
# What Unicode itself calls a control, a line or paragraph separator, or turns text around.
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
DANGEROUS = [
    each
    for each in EVERYTHING
    if unicodedata.category(each) in {"Cc", "Zl", "Zp"} or unicodedata.bidirectional(each) in TURNING
]


@pytest.mark.parametrize("character", DANGEROUS, ids=lambda each: f"U+{ord(each):04X}")
def test_what_moves_a_terminal_or_turns_text_is_refused_and_escaped(character: str) -> None:
    told = fault(f"a{character}b")
    assert told is not None
    assert f"U+{ord(character):04X}" in told
    assert not re.match(READABLE, f"a{character}b")
    if character not in "\n\t":
        assert character not in shown(f"a{character}b")


def test_format_characters_are_refused_but_joiners_and_those_of_scripts() -> None:
    taken = {each for each in EVERYTHING if unicodedata.category(each) == "Cf" and fault(f"a{each}b") is None}
    assert taken >= JOINERS
    drawn = {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN", "SHORTHAND", "MUSICAL"}  # these take part in a drawing
    assert {each for each in taken - JOINERS if unicodedata.name(each).split()[0] not in drawn} == set()


@pytest.mark.parametrize(
    "text", ["job", "a b", "naïve Ωμέγα 日本語", "👩\u200d💻", "नमस्\u200dते", "a/b:c", "x" * 200]
)
def test_what_people_write_passes_and_is_shown_as_it_is(text: str) -> None:
    assert fault(text) is None
    assert re.match(READABLE, text)
    assert shown(text) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (" ", "is blank"),
        ("\u3000\u00a0", "is blank"),
        (" a", "begins or ends"),
        ("a\u2003", "begins or ends"),
    ],
)
def test_blanks_at_the_ends_are_refused(text: str, told: str) -> None:
    assert str(fault(text)).startswith(told)


@pytest.mark.parametrize("text", ["row\u009b2J\u0085\u202ename", " name", "\ufeffname"])
@pytest.mark.parametrize("place", ["name", "tag key", "tag value"])
def test_a_spec_is_refused_when_new_and_loads_when_stored(text: str, place: str) -> None:
    documents: dict[str, dict[str, Any]] = {
        "name": {**SPEC, "name": text},
        "tag key": {**SPEC, "tags": {text: "v"}},
        "tag value": {**SPEC, "tags": {"k": text}},
    }
    document = documents[place]
    with pytest.raises(ValidationError, match=r"U\+|blank"):
        JobSpec.model_validate(document)
    stored = JobSpec.stored(document)
    assert (stored.name, stored.tags) == (document.get("name", "job"), document.get("tags", {}))


def test_line_ends_and_tabs_are_shown_as_they_are() -> None:
    assert shown("a\n\tb\x1b[31m\x9b") == "a\n\tb\\x1b[31m\\x9b"
