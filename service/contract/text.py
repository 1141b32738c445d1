"""Text that people write and others read, such as names: what cannot be seen in it is refused, or escaped.

A control character moves a terminal's cursor, a bidirectional one turns what follows around, and an invisible
one makes two names look alike. Joiners (U+200C, U+200D) stay: scripts and emoji are written with them.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo

_SEEN_BY_NOBODY = (
    r"\x00-\x1f\x7f-\x9f"  # C0 and C1 controls
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u3164\uffa0"  # drawn as nothing, wherever they stand
    r"\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"  # zero width, line ends, bidirectional controls
    r"\ufeff\ufff9-\ufffb"  # byte order mark, annotations
)
_TAGS = r"\U000e0000-\U000e007f"  # beyond what a JSON Schema's expressions spell alike everywhere
_UNSEEN = re.compile(f"[{_SEEN_BY_NOBODY}{_TAGS}]")
_ESCAPED = re.compile(rf"(?![\n\t])[{_SEEN_BY_NOBODY}{_TAGS}]")

READABLE = rf"^[^\s{_SEEN_BY_NOBODY}]([^{_SEEN_BY_NOBODY}]*[^\s{_SEEN_BY_NOBODY}])?$"
"""A regular expression for `readable` text, for a JSON Schema: nothing unseen, no blank at either end."""


def fault(text: str) -> str | None:
    """What is wrong with `text` as a name, and the remedy; None where nothing is."""
    unseen = _UNSEEN.search(text)
    if unseen is not None:
        return (
            f"holds U+{ord(unseen[0]):04X}, a character that cannot be seen or that changes how others are "
            "shown; remove it"
        )
    if text and not text.strip():
        return "is blank; it needs a character that can be seen"
    if text != text.strip():
        return "begins or ends with a blank; remove it"
    return None


def readable(text: str, info: ValidationInfo) -> str:
    """A validator of pydantic's: `text` as it is, refused where it has a `fault`.

    Under the context `{"stored": True}` everything passes: what an earlier version took stays loadable.
    """
    wrong = None if (info.context or {}).get("stored") else fault(text)
    if wrong is not None:
        raise ValueError(wrong)
    return text


def shown(text: str) -> str:
    """`text` with every unseen character but line feeds and tabs as a backslash escape, for a terminal."""
    return _ESCAPED.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


IDEMPOTENCY_KEY = r"^[\x21-\x7e]{1,255}$"
"""A regular expression for what `Idempotency-Key` may say: a header takes no more."""

ReadableText = Annotated[
    str,
    StringConstraints(min_length=1),
    AfterValidator(readable),
    Field(json_schema_extra={"pattern": READABLE}),
]
"""Text of at least one character without anything unseen; a longest length is the field's own."""
