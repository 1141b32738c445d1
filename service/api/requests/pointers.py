"""JSON pointers (RFC 6901) into the caller's document, and the names closest to a wrong one."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

_FEW = 12


def pointer(*path: str | int) -> str:
    """The pointer to `path`; the empty path is the whole document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def locate(document: Any, loc: Sequence[str | int], *, missing: bool = False) -> tuple[str | int, ...]:
    """The part of a pydantic location that is a path in `document`.

    A location also carries union tags and markers such as `[key]`, which no document holds: they are left
    out.
    With `missing`, the last part is a member that ought to be there and is kept.
    """
    path: list[str | int] = []
    here = document
    for index, part in enumerate(loc):
        inside_object = isinstance(here, dict) and part in here
        inside_array = isinstance(here, list) and isinstance(part, int) and 0 <= part < len(here)
        if inside_object or inside_array:
            here = here[part]
            path.append(part)
        elif missing and index == len(loc) - 1:
            path.append(part)
    return tuple(path)


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """What to write instead of `wrong`, as the end of a sentence. `wrong` itself is not repeated."""
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    if not names:
        return "nothing is allowed here"
    listed = ", ".join(f"'{name}'" for name in names[:_FEW])
    return f"known: {listed}" + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
