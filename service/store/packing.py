"""Columns of numbers as bytes: each in the narrowest form that keeps every bit, then all of them compressed.

Pure functions, no SQL; which columns there are is for the callers to say. Layout, little-endian: version
(1 byte), rows (uint32), then a zlib stream of, for each column, form (1 byte), base (int64), length (uint32),
data. Floats are a constant, float32 where all values survive it, or float64; integers are `base` plus
unsigned offsets of 0, 1, 2, 4 or 8 bytes. Data is stored plane by plane: the first byte of every value, then
the second, so that equal sign and exponent bytes lie side by side.

In version 2 the columns are known by their places. In version 3 each one is preceded by its name (a byte with
the length, UTF-8) and by a byte that is 1 where values are null: then a byte for each row follows, 1 for a
value.
"""

import struct
import sys
import zlib
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from halfstep.service.errors import NewerRecord

VERSION = 3
_PLACED = 2
_UNCOMPRESSED = 1  # as the first version wrote it: neither compressed nor in planes
_HEAD = struct.Struct("<BI")
_COLUMN = struct.Struct("<cqI")
_SWAPPED = sys.byteorder == "big"

Kind = Literal["float", "integer", "bit"]

_CONSTANT = b"k"
# The smallest array type that holds an offset: (largest offset, type code).
_WIDTHS = ((0xFF, "B"), (0xFFFF, "H"), (0xFFFF_FFFF, "I"), (0xFFFF_FFFF_FFFF_FFFF, "Q"))


def pack(count: int, columns: Iterable[tuple[Kind, Sequence[Any]]]) -> bytes:
    """The bytes of columns of `count` values each, at least one, to be read by their places: version 2.

    Raises:
        OverflowError: an integer beyond 64 bits.
        TypeError: a value is None.
    """
    parts: list[bytes] = []
    for kind, column in columns:
        parts += _PACKERS[kind](column)
    return _HEAD.pack(_PLACED, count) + _squeezed(parts)


def pack_named(count: int, columns: Mapping[str, tuple[Kind, Sequence[Any]]]) -> bytes:
    """The bytes of columns that keep their names, and may have None among their values: version 3.

    Raises:
        OverflowError: an integer beyond 64 bits.
    """
    parts: list[bytes] = []
    for name, (kind, column) in columns.items():
        label = name.encode()
        parts.append(bytes((len(label),)) + label)
        if None in column:
            parts.append(b"\x01" + bytes(value is not None for value in column))
            parts += _PACKERS[kind](_filled(column))
        else:
            parts.append(b"\x00")
            parts += _PACKERS[kind](column)
    return _HEAD.pack(VERSION, count) + _squeezed(parts)


def unpack(
    payload: bytes, places: Sequence[str], wanted: Container[str] | None = None
) -> tuple[int, dict[str, list[Any]]]:
    """The number of rows, and the wanted columns that are there, as Python numbers by their names.

    Args:
        payload: of any version up to this one.
        places: the names of the columns where the payload has none, in their order.
        wanted: names, None for all; those that the payload lacks are not in the answer.

    Raises:
        NewerRecord: written by a later version.
        ValueError: damaged.
    """
    try:
        version, count = _HEAD.unpack_from(payload)
        if version > VERSION:
            raise NewerRecord(
                f"it is of version {version}, and this program reads up to version {VERSION}; upgrade it "
                "(the API, or whatever reads here) to the version that wrote it"
            )
        body = payload[_HEAD.size :] if version == _UNCOMPRESSED else zlib.decompress(payload[_HEAD.size :])
        if version == VERSION:
            return count, dict(_named(body, count, wanted))
        return count, dict(_placed(body, count, places, wanted, planes=version != _UNCOMPRESSED))
    except (zlib.error, struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"a damaged record: {error}") from error


def _squeezed(parts: Iterable[bytes]) -> bytes:
    # Planes hold runs, hardly longer repeats: looking for runs alone is as small and twice as fast.
    squeeze = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return squeeze.compress(b"".join(parts)) + squeeze.flush()


def _filled(column: Sequence[Any]) -> list[Any]:
    """Each None as the value before it, which costs the least; before the first value, as that."""
    held = next((value for value in column if value is not None), 0)
    filled = []
    for value in column:
        held = held if value is None else value
        filled.append(held)
    return filled


def _placed(
    body: bytes, count: int, names: Sequence[str], wanted: Container[str] | None, *, planes: bool
) -> Iterator[tuple[str, list[Any]]]:
    offset = 0
    for name in names:
        values, offset = _column(body, offset, count, want=wanted is None or name in wanted, planes=planes)
        if values is not None:
            yield name, values


def _named(body: bytes, count: int, wanted: Container[str] | None) -> Iterator[tuple[str, list[Any]]]:
    offset = 0
    while offset < len(body):
        begin = offset + 1
        offset = begin + body[offset]
        name = body[begin:offset].decode()
        has_nulls = body[offset] == 1
        offset += 1
        present = body[offset : offset + count] if has_nulls else b""
        offset += len(present)
        values, offset = _column(body, offset, count, want=wanted is None or name in wanted, planes=True)
        if values is None:
            continue
        if has_nulls:
            values = [value if there else None for value, there in zip(values, present, strict=True)]
        yield name, values


def _column(
    body: bytes, offset: int, count: int, *, want: bool, planes: bool
) -> tuple[list[Any] | None, int]:
    """The values of the column at `offset`, None where they are not wanted, and where the next one is."""
    form, base, length = _COLUMN.unpack_from(body, offset)
    offset += _COLUMN.size
    if not want:
        return None, offset + length
    values = _values(form, base, body[offset : offset + length], count, planes=planes)
    if len(values) != count:
        raise ValueError(f"a damaged record: {len(values)} values for {count} rows")
    return values, offset + length


def _values(form: bytes, base: int, data: bytes, count: int, *, planes: bool) -> list[Any]:
    if form == _CONSTANT:
        return ([base] if not data else list(struct.unpack("<d", data))) * count
    values: array[Any] = array(form.decode())
    width = values.itemsize
    if planes and width > 1:
        rows = len(data) // width
        whole = bytearray(len(data))
        for plane in range(width):
            whole[plane::width] = data[plane * rows : (plane + 1) * rows]
        data = bytes(whole)
    values.frombytes(data)
    if _SWAPPED:
        values.byteswap()
    if form in b"fd" or not base:
        return values.tolist()
    return [base + value for value in values]


def _floats(column: Sequence[float]) -> tuple[bytes, bytes]:
    doubles = array("d", column)
    exact = doubles.tobytes()
    if exact == exact[:8] * len(column):
        data = struct.pack("<d", doubles[0])
        return _COLUMN.pack(_CONSTANT, 0, len(data)), data
    narrow = array("f", column)
    return _part(narrow if array("d", narrow).tobytes() == exact else doubles, 0)


def _integers(column: Sequence[int]) -> tuple[bytes, bytes]:
    base, top = min(column), max(column)
    if not -(2**63) <= base < 2**63:
        raise OverflowError(f"{base} is beyond 64 bits")
    if base == top:
        return _COLUMN.pack(_CONSTANT, base, 0), b""
    code = next((code for largest, code in _WIDTHS if top - base <= largest), "Q")
    return _part(array(code, [value - base for value in column]), base)


def _bits(column: Sequence[bool]) -> tuple[bytes, bytes]:
    data = bytes(column)
    if not any(data) or all(data):
        return _COLUMN.pack(_CONSTANT, data[0], 0), b""
    return _COLUMN.pack(b"B", 0, len(data)), data


def _part(values: "array[Any]", base: int) -> tuple[bytes, bytes]:
    if _SWAPPED:
        values.byteswap()
    data, width = values.tobytes(), values.itemsize
    if width > 1:
        data = b"".join(data[plane::width] for plane in range(width))
    return _COLUMN.pack(values.typecode.encode(), base, len(data)), data


_PACKERS = {"float": _floats, "integer": _integers, "bit": _bits}
