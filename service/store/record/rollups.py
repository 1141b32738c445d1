"""What a plot needs of many steps: entries with first, last, least and greatest of each column, and counts.

Pure functions, no SQL. Level 1 has an entry for 32 steps, each higher level one for 4 of the level below. A
row holds ENTRIES entries of one level and exists only once its steps are complete, so it never changes. What
an entry keeps of a column, and how entries become one, is in the table of columns.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halfstep.service.contract import columns as table
from halfstep.service.store.packing import Kind, pack, pack_named, unpack
from halfstep.service.store.record import chunks

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


def series_of(name: str) -> Iterable[str]:
    """The series that an entry keeps of a column; the one of its own name is the last value, or the count."""
    return table.RECORD.by_name[name].folds


# The series of payloads that do not name theirs, by place. It never changes: no fold of these columns does.
LAYOUT = tuple(each for name in chunks.LAYOUT for each in series_of(name))
_LAYOUT_KEYS = frozenset(LAYOUT)


def as_entries(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Steps as entries of level 0: every value is its own first, last, least and greatest."""
    return {each: column for name, column in columns.items() if name != "step" for each in series_of(name)}


def fold(entries: Mapping[str, Sequence[Any]], bounds: Sequence[tuple[int, int]]) -> Series:
    """One entry for each `(begin, end)` of the entries, which are in order of their steps.

    Null where there is nothing but nulls to count or compare, and where the first or last step has one.
    """
    folded: Series = {}
    for name, values in entries.items():
        how = table.RECORD.folds[name]
        if how == "count":
            folded[name] = _counts(values, bounds)
        elif how == "first":
            folded[name] = [values[i] for i, _ in bounds]
        elif how == "min":
            folded[name] = _extremes(min, values, bounds)
        elif how == "max":
            folded[name] = _extremes(max, values, bounds)
        else:
            folded[name] = [values[j - 1] for _, j in bounds]
    return folded


def every(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds that cut `count` entries, a multiple of `size`, into groups of `size`."""
    return [(begin, begin + size) for begin in range(0, count, size)]


def encode(entries: Mapping[str, Sequence[Any]]) -> bytes:
    """The payload of a row of entries, with every series of every column."""
    count = len(entries["epoch"])
    if entries.keys() == _LAYOUT_KEYS:
        try:
            return pack(count, [_coded(each, entries[each]) for each in LAYOUT])
        except TypeError:  # a null among the values
            pass
    there = {each: values for each, values in entries.items() if not all(value is None for value in values)}
    if len(there) < len(entries):
        return encode(there)
    return pack_named(count, {each: _coded(each, values) for each, values in there.items()})


def decode(payload: bytes, names: Iterable[str]) -> Series:
    """The series of the named columns; null where the payload has none of such a column.

    Raises:
        NewerRecord: written by a later version.
        ValueError: damaged.
    """
    wanted = {each: name for name in names if name != "step" for each in series_of(name)}
    count, found = unpack(payload, LAYOUT, wanted)
    return {
        each: _values(name, found[each]) if each in found else [None] * count for each, name in wanted.items()
    }


def _values(name: str, numbers: list[Any]) -> list[Any]:
    return chunks.values(name, numbers) if table.RECORD.by_name[name].type == "choice" else numbers


def _coded(each: str, values: Sequence[Any]) -> tuple[Kind, Sequence[Any]]:
    column = table.RECORD.of_series[each]
    if column.type == "choice":
        return "integer", chunks.codes(column, values)
    return "float" if column.type == "number" else "integer", values


def _counts(values: Sequence[Any], bounds: Sequence[tuple[int, int]]) -> list[Any]:
    try:
        if not sum(values):
            return [0] * len(bounds)
        return [sum(values[i:j]) for i, j in bounds]
    except TypeError:  # nulls
        parts = [[value for value in values[i:j] if value is not None] for i, j in bounds]
        return [sum(part) if part else None for part in parts]


def _extremes(extreme: Any, values: Sequence[Any], bounds: Sequence[tuple[int, int]]) -> list[Any]:
    # A sum is NaN where a value is (or where infinities of both signs are): the usual column has neither.
    try:
        if not math.isnan(sum(values)):
            return [extreme(values[i:j]) for i, j in bounds]
    except TypeError:  # nulls
        parts = [[value for value in values[i:j] if value is not None] for i, j in bounds]
        return [extreme(_numbers(part)) if part else None for part in parts]
    return [extreme(_numbers(values[i:j])) for i, j in bounds]


def _numbers(values: Sequence[float]) -> Sequence[float]:
    """Those that are not NaN, or all where there are no others."""
    return [value for value in values if value == value] or values  # noqa: PLR0124  # NaN alone differs from itself
