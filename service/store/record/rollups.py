"""What a plot needs of many steps: entries with first, last, least and greatest of each column, and counts.

Pure functions, no SQL. Level 1 has an entry for 32 steps, each higher level one for 4 of the level below. A
row holds ENTRIES entries of one level and exists only once its steps are complete, so it never changes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halfstep.service.contract.metrics import COMPUTE_DTYPES, METRIC_COLUMNS
from halfstep.service.store.record.chunks import DTYPE_CODES, FLAGS, INTEGERS
from halfstep.service.store.record.packing import Kind, pack, unpack

ENTRIES = 64
FAN = 4
_LOWEST_STEPS = 32

Series = dict[str, list[Any]]


def entry_steps(level: int) -> int:
    """Steps of one entry; level 0 is the steps themselves."""
    return _LOWEST_STEPS * FAN ** (level - 1) if level else 1


def row_steps(level: int) -> int:
    """Steps of one row."""
    return ENTRIES * entry_steps(level)


def series_of(name: str) -> tuple[str, ...]:
    """The series that an entry keeps of a column; the one of its own name is the last value, or the count."""
    if name in FLAGS:
        return (name,)
    if name == "compute_dtype":
        return (name, f"{name}_first")
    return (name, f"{name}_first", f"{name}_min", f"{name}_max")


_COLUMNS = METRIC_COLUMNS[1:]
_STORED: tuple[tuple[str, str, Kind], ...] = tuple(
    (name, each, "integer" if name in INTEGERS or name in FLAGS or name == "compute_dtype" else "float")
    for name in _COLUMNS
    for each in series_of(name)
)


def as_entries(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Steps as entries of level 0: every value is its own first, last, least and greatest."""
    return {each: column for name, column in columns.items() if name != "step" for each in series_of(name)}


def fold(entries: Mapping[str, Sequence[Any]], bounds: Sequence[tuple[int, int]]) -> Series:
    """One entry for each `(begin, end)` of the entries, which are in order of their steps."""
    folded: Series = {}
    for name, values in entries.items():
        if name in FLAGS:
            counted = any(values)
            folded[name] = [sum(values[i:j]) for i, j in bounds] if counted else [0] * len(bounds)
        elif name.endswith("_first"):
            folded[name] = [values[i] for i, _ in bounds]
        elif name.endswith("_min"):
            folded[name] = _extremes(min, values, bounds)
        elif name.endswith("_max"):
            folded[name] = _extremes(max, values, bounds)
        else:
            folded[name] = [values[j - 1] for _, j in bounds]
    return folded


def every(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds that cut `count` entries, a multiple of `size`, into groups of `size`."""
    return [(begin, begin + size) for begin in range(0, count, size)]


def encode(entries: Mapping[str, Sequence[Any]]) -> bytes:
    """The payload of a row of entries, with every series of every column."""
    return pack(len(entries["epoch"]), _packed(entries))


def decode(payload: bytes, names: Sequence[str]) -> Series:
    """The series of the named columns.

    Raises:
        ValueError: written by a newer version, or damaged.
    """
    wanted = set(names)
    _, columns = unpack(payload, [name in wanted for name, _, _ in _STORED])
    found = {}
    for (name, each, _), values in zip(_STORED, columns, strict=True):
        if values is not None:
            found[each] = [COMPUTE_DTYPES[code] for code in values] if name == "compute_dtype" else values
    return found


def _packed(entries: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Kind, Sequence[Any]]]:
    for name, each, kind in _STORED:
        values = entries[each]
        yield kind, [DTYPE_CODES[value] for value in values] if name == "compute_dtype" else values


def _extremes(extreme: Any, values: Sequence[float], bounds: Sequence[tuple[int, int]]) -> list[float]:
    # A sum is NaN where a value is (or where infinities of both signs are): the usual column has neither.
    if not math.isnan(sum(values)):
        return [extreme(values[i:j]) for i, j in bounds]
    return [
        extreme([value for value in values[i:j] if value == value] or values[i:j])  # noqa: PLR0124  # NaN alone differs from itself
        for i, j in bounds
    ]
