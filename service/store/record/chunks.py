"""A chunk of steps as bytes: the columns of the record but `step`, which follows from its first step.

Pure functions, no SQL. A chunk whose columns are those of LAYOUT, without a null, is written so that versions
which know no others can read it; any other one names its columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halfstep.service.contract import columns as table
from halfstep.service.store.packing import Kind, pack, pack_named, unpack

# A chunk ends where a multiple of this many steps does: short batches join until then, long ones are cut.
CHUNK_STEPS = 512

# The columns of payloads that do not name theirs, by place. It never changes.
LAYOUT = (
    *("epoch", "loss", "scale", "overflow", "nan", "underflow", "skipped", "has_inf", "has_nan"),
    *("underflow_estimate", "grad_norm", "learning_rate", "memory_usage", "memory_allocated_bytes"),
    *("memory_reserved_bytes", "step_time_ms", "compute_dtype"),
)
_LAYOUT_KEYS = frozenset(LAYOUT)
_KINDS: dict[table.ColumnType, Kind] = {
    "number": "float",
    "integer": "integer",
    "flag": "bit",
    "choice": "integer",
}
_TRUTH = {0: False, 1: True}


def encode(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """The payload of columns, `step` among them, all of the same length, at least one row.

    Raises:
        OverflowError: an integer beyond 64 bits.
        KeyError: a value that is none of its column's choices.
    """
    count = len(columns["step"])
    if columns.keys() - {"step"} == _LAYOUT_KEYS:
        try:
            return pack(count, [_coded(name, columns[name]) for name in LAYOUT])
        except TypeError:  # a null among the values
            pass
    there = {
        name: values
        for name, values in columns.items()
        if name != "step" and not all(value is None for value in values)
    }
    if len(there) < len(columns) - 1:
        return encode({"step": columns["step"], **there})
    return pack_named(count, {name: _coded(name, values) for name, values in there.items()})


def decode(payload: bytes, first_step: int, names: Iterable[str]) -> dict[str, list[Any]]:
    """The named columns of a payload, as Python values; null where the payload has no such column.

    Raises:
        NewerRecord: written by a later version.
        ValueError: damaged.
    """
    count, found = unpack(payload, LAYOUT, frozenset(names))
    found["step"] = list(range(first_step, first_step + count))
    return {name: values(name, found[name]) if name in found else [None] * count for name in names}


def decode_all(payload: bytes, first_step: int) -> dict[str, list[Any]]:
    """Every column that a payload has, also those that this version does not know, which it keeps as numbers.

    Raises:
        NewerRecord: written by a later version.
        ValueError: damaged.
    """
    count, found = unpack(payload, LAYOUT)
    steps = list(range(first_step, first_step + count))
    return {"step": steps, **{name: values(name, numbers) for name, numbers in found.items()}}


def joined(first: Mapping[str, Sequence[Any]], then: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Steps followed by steps; a column that one of the two lacks is null there."""
    lacking = [None] * len(first["step"]), [None] * len(then["step"])
    return {
        name: [*first.get(name, lacking[0]), *then.get(name, lacking[1])]
        for name in dict.fromkeys((*first, *then))
    }


def values(name: str, numbers: list[Any]) -> list[Any]:
    """Stored numbers as the values of their column; what has no meaning in this version is null."""
    column = table.RECORD.by_name.get(name)
    if column is None or column.type in {"number", "integer"}:
        return numbers
    meanings: dict[int, Any] = _TRUTH if column.type == "flag" else dict(enumerate(column.choices))
    return list(map(meanings.get, numbers))


def codes(column: table.Column, chosen: Sequence[Any]) -> list[Any]:
    """The stored codes of a choice's values."""
    known: dict[Any, Any] = {choice: code for code, choice in enumerate(column.choices)}
    known[None] = None
    return [known[value] for value in chosen]


def _coded(name: str, column_values: Sequence[Any]) -> tuple[Kind, Sequence[Any]]:
    column = table.RECORD.by_name.get(name)
    if column is None:  # read from a chunk of a version that knows it, and kept
        is_float = any(isinstance(value, float) for value in column_values)
        return "float" if is_float else "integer", column_values
    if column.type == "choice":
        return "integer", codes(column, column_values)
    return _KINDS[column.type], column_values
