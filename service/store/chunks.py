"""The bytes of a chunk of steps: one array a column, each in the narrowest form that keeps every bit.

Pure functions, no SQL. Layout, little-endian: version (1 byte), rows (uint32), then for each column of
METRIC_COLUMNS but `step` (which follows from the chunk's first step): form (1 byte), base (int64), length
(uint32), data. Floats are a constant, float32 where all values survive it, or float64; integers are `base`
plus unsigned offsets of 0, 1, 2, 4 or 8 bytes.
"""

import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from service.contract.metrics import COMPUTE_DTYPES, FLAG_COLUMNS, METRIC_COLUMNS

VERSION = 1
_HEAD = struct.Struct("<BI")
_COLUMN = struct.Struct("<cqI")
_SWAPPED = sys.byteorder == "big"

_INTEGERS = frozenset({"epoch", "memory_allocated_bytes", "memory_reserved_bytes"})
_FLAGS = frozenset(FLAG_COLUMNS)
_DTYPE_CODES = {name: code for code, name in enumerate(COMPUTE_DTYPES)}
_CONSTANT = b"k"
# The smallest array type that holds an offset: (largest offset, type code).
_WIDTHS = ((0xFF, "B"), (0xFFFF, "H"), (0xFFFF_FFFF, "I"), (0xFFFF_FFFF_FFFF_FFFF, "Q"))


def encode(columns: Sequence[Sequence[Any]]) -> bytes:
    """The payload of columns in the order of METRIC_COLUMNS, all of the same length, at least one row.

    Raises:
        OverflowError: an integer beyond 64 bits.
        KeyError: an unknown compute_dtype.
    """
    parts = [_HEAD.pack(VERSION, len(columns[0]))]
    for name, column in zip(METRIC_COLUMNS[1:], columns[1:], strict=True):
        if name in _INTEGERS or name in _FLAGS:
            parts += _integers(column)
        elif name == "compute_dtype":
            parts += _integers([_DTYPE_CODES[value] for value in column])
        else:
            parts += _floats(column)
    return b"".join(parts)


def decode(payload: bytes, first_step: int, names: Sequence[str]) -> dict[str, list[Any]]:
    """The named columns of a payload, as Python values.

    Raises:
        ValueError: written by a newer version, or damaged.
    """
    version, count = _HEAD.unpack_from(payload)
    if version != VERSION:
        raise ValueError(f"a chunk of version {version}; this program reads version {VERSION}")
    wanted = set(names)
    found: dict[str, list[Any]] = {}
    if "step" in wanted:
        found["step"] = list(range(first_step, first_step + count))
    offset = _HEAD.size
    for name in METRIC_COLUMNS[1:]:
        form, base, length = _COLUMN.unpack_from(payload, offset)
        offset += _COLUMN.size
        if name in wanted:
            values = _column(form, base, payload[offset : offset + length], count)
            found[name] = _PYTHON[name](values) if name in _PYTHON else values
            if len(values) != count:
                raise ValueError(f"a damaged chunk: {len(values)} values of {name} for {count} steps")
        offset += length
    return {name: found[name] for name in names}


def _floats(column: Sequence[float]) -> tuple[bytes, bytes]:
    doubles = array("d", column)
    exact = doubles.tobytes()
    if exact == exact[:8] * len(column):
        doubles, form = doubles[:1], _CONSTANT
    elif array("d", narrow := array("f", column)).tobytes() == exact:
        return _part(b"f", 0, narrow)
    else:
        form = b"d"
    return _part(form, 0, doubles)


def _integers(column: Sequence[int]) -> tuple[bytes, bytes]:
    base, top = min(column), max(column)
    if base == top:
        return _COLUMN.pack(_CONSTANT, base, 0), b""
    code = next(code for largest, code in _WIDTHS if top - base <= largest)
    return _part(code.encode(), base, array(code, [value - base for value in column]))


def _part(form: bytes, base: int, values: "array[Any]") -> tuple[bytes, bytes]:
    if _SWAPPED:
        values.byteswap()
    data = values.tobytes()
    return _COLUMN.pack(form, base, len(data)), data


def _column(form: bytes, base: int, data: bytes, count: int) -> list[Any]:
    if form == _CONSTANT and not data:
        return [base] * count
    values: array[Any] = array("d" if form == _CONSTANT else form.decode())
    values.frombytes(data)
    if _SWAPPED:
        values.byteswap()
    if form == _CONSTANT:
        return values.tolist() * count
    if form in b"fd":
        return values.tolist()
    return [base + value for value in values]


_PYTHON: dict[str, Callable[[list[Any]], list[Any]]] = {
    **dict.fromkeys(FLAG_COLUMNS, lambda values: [value == 1 for value in values]),
    "compute_dtype": lambda values: [COMPUTE_DTYPES[value] for value in values],
}
