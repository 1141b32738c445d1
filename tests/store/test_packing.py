"""Chunks as bytes: every value back bit for bit and with its type, and no damage read as numbers."""

import math
import struct
from typing import Any

import pytest

from halfstep.service.contract.metrics import FLAG_COLUMNS, METRIC_COLUMNS, StepMetrics
from halfstep.service.errors import NewerRecord
from halfstep.service.store import packing
from halfstep.service.store.record import chunks
from tests.store.making import steps

ODD_NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0001))[0]


def back(kind: packing.Kind, column: list[Any]) -> list[Any]:
    count, columns = packing.unpack(packing.pack(len(column), [(kind, column)]), ["it"])
    named, same = packing.unpack(packing.pack_named(len(column), {"it": (kind, column)}), [])
    assert count == named == len(column)
    assert bytes(str(columns), "ascii") == bytes(str(same), "ascii")
    return columns["it"]


def bits(column: list[float]) -> bytes:
    return struct.pack(f"<{len(column)}d", *column)


@pytest.mark.parametrize(
    "column",
    [
        [0.0, -0.0, 0.0],  # equal, and yet not the same
        [-0.0, -0.0],
        [math.nan, math.nan],
        [math.nan, ODD_NAN],
        [1.5, 2.5],  # float32 holds them
        [1.5, 0.1],  # and not these
        [1e300, 1.0],
        [5e-324, 1.0],
        [math.inf, -math.inf],
    ],
)
def test_floats_come_back_bit_for_bit(column: list[float]) -> None:
    assert bits(back("float", column)) == bits(column)


@pytest.mark.parametrize("span", [1, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("base", [0, 7, -(2**62)])
def test_integers_come_back_however_far_apart(base: int, span: int) -> None:
    column = [min(base + span, 2**63 - 1), base, base + span // 2]
    assert back("integer", column) == column


@pytest.mark.parametrize("column", [[2**63], [-(2**63) - 1, 0], [0, 2**64]])
def test_an_integer_beyond_64_bits_is_refused(column: list[int]) -> None:
    with pytest.raises(OverflowError):
        packing.pack(len(column), [("integer", column)])


@pytest.mark.parametrize("column", [[True, False], [False, True], [True, True], [False, False]])
def test_flags_come_back_as_booleans(column: list[bool]) -> None:
    rows = [
        StepMetrics(**{**row._asdict(), **dict.fromkeys(FLAG_COLUMNS, flag)})
        for row, flag in zip(steps(5, 6), column, strict=True)
    ]
    payload = chunks.encode(dict(zip(METRIC_COLUMNS, zip(*rows, strict=True), strict=True)))
    found = chunks.decode(payload, 5, METRIC_COLUMNS)
    for name in FLAG_COLUMNS:
        assert [(type(value), value) for value in found[name]] == [(bool, value) for value in column]
    assert found["step"] == [5, 6]


def test_bytes_of_a_later_version_are_refused_and_say_so() -> None:
    payload = packing.pack(2, [("float", [1.0, 2.0])])
    with pytest.raises(NewerRecord, match=r"version 4, and this program reads up to version 3; upgrade"):
        packing.unpack(b"\x04" + payload[1:], ["it"])


def test_damage_is_never_read_as_numbers() -> None:
    column = [float(n) for n in range(50)]
    payload = packing.pack(50, [("float", column)])
    damaged = [payload[:length] for length in range(len(payload))]
    damaged.append(payload[:1] + struct.pack("<I", 51) + payload[5:])  # a row more than there are
    damaged.append(payload[:5] + b"\xff" + payload[6:])
    damaged.append(b"\x01" + struct.pack("<I", 1) + b"k\x00")  # of the first version, and too short
    for each in damaged:
        with pytest.raises(ValueError, match="damaged"):
            packing.unpack(each, ["it"])
