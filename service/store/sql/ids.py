"""Identifiers that sort by time."""

import os
import threading
import time
import uuid

_id_lock = threading.Lock()
_last_id = 0


def new_job_id() -> str:
    """A UUIDv7 (RFC 9562): by time, and rising within this process even inside one millisecond."""
    global _last_id  # noqa: PLW0603  # the order of ids within a process is process-wide state
    fresh = (time.time_ns() // 1_000_000) << 74 | int.from_bytes(os.urandom(10)) >> 6
    with _id_lock:
        # 48 bits of milliseconds over 74 random ones; inside a millisecond the sequence counts on.
        _last_id = max(fresh, _last_id + 1)
        value = _last_id
    high, low = value >> 62, value & ((1 << 62) - 1)
    milliseconds, random_12 = high >> 12, high & 0xFFF
    return str(uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | random_12 << 64 | 0b10 << 62 | low))
