"""Columns of numbers as bytes: each in the narrowest form that keeps every bit, then all of them compressed.

Pure functions, no SQL; which columns there are is for `chunks` and `rollups` to say. Layout, little-endian:
version (1 byte), rows (uint32), then a zlib stream of, for each column, form (1 byte), base (int64), length
(uint32), data. Floats are a constant, float32 where all values survive it, or float64; integers are `base`
plus unsigned offsets of 0, 1, 2, 4 or 8 bytes. Data is stored plane by plane: the first byte of every value,
then the second, so that equal sign and exponent bytes lie side by side.
"""

import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

VERSION = 2
_UNCOMPRESSED = 1  # as the first version wrote it: neither compressed nor in planes
_HEAD = struct.Struct("<BI")
_COLUMN = struct.Struct("<cqI")
_SWAPPED = sys.byteorder == "big"

Kind = Literal["float", "integer", "bit"]

_CONSTANT = b"k"
# The smallest array type that holds an offset: (largest offset, type code).
_WIDTHS = ((0xFF, "B"), (0xFFFF, "H"), (0xFFFF_FFFF, "I"), (0xFFFF_FFFF_FFFF_FFFF, "Q"))


def pack(count: int, columns: Iterable[tuple[Kind, Sequence[Any]]]) -> bytes:
    """The bytes of columns of `count` values each, at least one.

    Raises:
        OverflowError: an integer beyond 64 bits.
    """
    parts: list[bytes] = []
    for kind, column in columns:
        parts += _PACKERS[kind](column)
    # Planes hold runs, hardly longer repeats: looking for runs alone is as small and twice as fast.
    squeeze = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return _HEAD.pack(VERSION, count) + squeeze.compress(b"".join(parts)) + squeeze.flush()


def unpack(payload: bytes, wanted: Sequence[bool]) -> tuple[int, list[list[Any] | None]]:
    """The number of rows, and each column as Python numbers, None where it is not `wanted`.

    Raises:
        ValueError: written by a newer version, or damaged.
    """
    try:
        version, count = _HEAD.unpack_from(payload)
        if version not in {VERSION, _UNCOMPRESSED}:
            raise ValueError(f"a record of version {version}; this program reads up to version {VERSION}")
        body = payload[_HEAD.size :] if version == _UNCOMPRESSED else zlib.decompress(payload[_HEAD.size :])
        return count, list(_columns(body, count, wanted, planes=version != _UNCOMPRESSED))
    except (zlib.error, struct.error) as error:
        raise ValueError(f"a damaged record: {error}") from error


def _columns(body: bytes, count: int, wanted: Sequence[bool], *, planes: bool) -> Iterator[list[Any] | None]:
    offset = 0
    for want in wanted:
        form, base, length = _COLUMN.unpack_from(body, offset)
        offset += _COLUMN.size
        values = None
        if want:
            values = _values(form, base, body[offset : offset + length], count, planes=planes)
            if len(values) != count:
                raise ValueError(f"a damaged record: {len(values)} values for {count} rows")
        offset += length
        yield values


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
