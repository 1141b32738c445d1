"""A chunk of steps as bytes: the columns of METRIC_COLUMNS but `step`, which follows from its first step.

Pure functions, no SQL.
"""

from collections.abc import Sequence
from typing import Any

from halfstep.service.contract.metrics import COMPUTE_DTYPES, FLAG_COLUMNS, METRIC_COLUMNS
from halfstep.service.store.record.packing import Kind, pack, unpack

# A chunk ends where a multiple of this many steps does: short batches join until then, long ones are cut.
CHUNK_STEPS = 512

INTEGERS = frozenset({"epoch", "memory_allocated_bytes", "memory_reserved_bytes"})
FLAGS = frozenset(FLAG_COLUMNS)
DTYPE_CODES = {name: code for code, name in enumerate(COMPUTE_DTYPES)}
_STORED = METRIC_COLUMNS[1:]


def kind_of(name: str) -> Kind:
    """How a column is packed; `compute_dtype` is packed as its code."""
    if name in FLAGS:
        return "bit"
    return "integer" if name in INTEGERS or name == "compute_dtype" else "float"


_KINDS = tuple(kind_of(name) for name in _STORED)
_DTYPE = _STORED.index("compute_dtype")


def encode(columns: Sequence[Sequence[Any]]) -> bytes:
    """The payload of columns in the order of METRIC_COLUMNS, all of the same length, at least one row.

    Raises:
        OverflowError: an integer beyond 64 bits.
        KeyError: an unknown compute_dtype.
    """
    stored = list(columns[1:])
    stored[_DTYPE] = [DTYPE_CODES[value] for value in stored[_DTYPE]]
    return pack(len(columns[0]), zip(_KINDS, stored, strict=True))


def decode(payload: bytes, first_step: int, names: Sequence[str]) -> dict[str, list[Any]]:
    """The named columns of a payload, as Python values.

    Raises:
        ValueError: written by a newer version, or damaged.
    """
    wanted = set(names)
    count, columns = unpack(payload, [name in wanted for name in _STORED])
    found: dict[str, list[Any]] = {
        name: values for name, values in zip(_STORED, columns, strict=True) if values is not None
    }
    found["step"] = list(range(first_step, first_step + count))
    for name in FLAGS & wanted:
        found[name] = [value == 1 for value in found[name]]
    if "compute_dtype" in wanted:
        found["compute_dtype"] = [COMPUTE_DTYPES[code] for code in found["compute_dtype"]]
    return {name: found[name] for name in names}
