"""A power cut without one: loaded into a job's process, it loses what was never fsynced, then kills it.

The kernel keeps what a killed process has written, so a kill alone cannot tell a checkpoint that was synced
from one that was not. Armed by a file `power-loss` among the fault points; one cut for each file.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from halfstep.service.faultpoints import HITS, VARIABLE, reach
from halfstep.worker.job import reporting

# A file is known by its inode and when it was last written: the inode of a removed file is soon another's.
Known = tuple[int, int]
_synced: set[Known] = set()
_placed: dict[Known, Path] = {}  # files that this process renamed to where they are
_plain_fsync, _plain_replace, _plain_reach = os.fsync, os.replace, reach


def _fsync(descriptor: Any) -> None:
    _plain_fsync(descriptor)
    _synced.add(_known(os.fstat(descriptor)))


def _replace(source: Any, target: Any, **where: Any) -> None:
    _plain_replace(source, target, **where)
    _placed[_known(Path(target).stat())] = Path(target)


def _known(found: os.stat_result) -> Known:
    return found.st_ino, found.st_mtime_ns


def _reach(name: str) -> None:
    _plain_reach(name)
    if name != "checkpoint.after_reference" or VARIABLE not in os.environ:
        return
    points = Path(os.environ[VARIABLE])
    try:
        (points / "power-loss").unlink()
    except FileNotFoundError:
        return
    with (points / HITS).open("a", encoding="ascii") as hits:
        hit = {"point": "power-loss", "action": "kill", "pid": os.getpid(), "at": time.time()}
        hits.write(json.dumps(hit) + "\n")
    for known, path in _placed.items():
        if known not in _synced and path.exists():
            os.truncate(path, 0)
    os.kill(os.getpid(), signal.SIGKILL)


for _module, _name, _stand_in in (
    (os, "fsync", _fsync),
    (os, "replace", _replace),
    (reporting, "reach", _reach),
):
    setattr(_module, _name, _stand_in)
