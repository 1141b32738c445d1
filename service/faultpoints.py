"""Named places at which a test may end or disturb this process, to prove that nothing is lost there.

Off, which is always in production, a place costs one call of an empty function. HALFSTEP_FAULT_POINTS names a
directory that a test fills: a file named like a point says what happens when a process next comes by, and
goes away once it has happened. Standard library only; every room may call `reach`.
"""

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "HALFSTEP_FAULT_POINTS"
HITS = "hits.jsonl"
_LOCK = ".lock"
_ERRORS = {"no-space": errno.ENOSPC, "io-error": errno.EIO}


def _off(_name: str) -> None:
    """Nothing is armed."""


def _armed(directory: Path) -> Callable[[str], None]:
    def reach(name: str) -> None:
        if not (directory / name).exists():
            return
        action = _take(directory, name)
        if action is not None:
            _do(name, action)

    return reach


def _take(directory: Path, name: str) -> str | None:
    """What is to happen now. Several processes may come by at once; each count is taken by one of them."""
    with (directory / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = directory / name
        try:
            plan: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        action: str = plan["action"]
        if plan["skip"] > 0:
            plan["skip"] -= 1
            path.write_text(json.dumps(plan), encoding="ascii")
            return None
        plan["times"] -= 1
        if plan["times"] > 0:
            path.write_text(json.dumps(plan), encoding="ascii")
        else:
            path.unlink()
        hit = {"point": name, "action": action, "pid": os.getpid(), "at": time.time()}
        with (directory / HITS).open("a", encoding="ascii") as hits:
            hits.write(json.dumps(hit) + "\n")
        return action


def _do(name: str, action: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            while True:
                time.sleep(3600.0)
        case "no-memory":
            raise MemoryError(f"armed at {name}")
        case "no-space" | "io-error":
            number = _ERRORS[action]
            raise OSError(number, os.strerror(number))
        case _:
            raise ValueError(f"unknown action {action!r} at {name}")


_directory = os.environ.get(VARIABLE)
reach: Callable[[str], None] = _armed(Path(_directory)) if _directory else _off
"""Tells that this process has come to the place `name`."""
