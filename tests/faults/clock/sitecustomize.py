"""A host whose clock is wrong: Python imports this at start where its folder is on the path.

HALFSTEP_TEST_CLOCK_SHIFT says by how many seconds. The monotonic clock is right, as it is on such hosts.
"""

import os
import time

_shift = float(os.environ.get("HALFSTEP_TEST_CLOCK_SHIFT", "0"))
_time, _time_ns = time.time, time.time_ns


def _shifted() -> float:
    return _time() + _shift


def _shifted_ns() -> int:
    return _time_ns() + int(_shift * 1e9)


time.time, time.time_ns = _shifted, _shifted_ns
