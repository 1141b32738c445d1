"""A power cut without one: loaded into a job's process, it loses what was never fsynced, then kills it.

The kernel keeps what a killed process has written, so a kill alone cannot tell a checkpoint that was synced
from one that was not. Armed by a file `power-loss` among the fault points; one cut for each file.
"""

import os
import signal
from pathlib import Path
from typing import Any

from service.faultpoints import VARIABLE
from worker import reporting

_synced: set[int] = set()
_placed: dict[int, Path] = {}  # files that this process renamed to where they are, by inode
_plain_fsync, _plain_replace, _plain_reach = os.fsync, os.replace, reporting.reach


def _fsync(descriptor: Any) -> None:
    _plain_fsync(descriptor)
    _synced.add(os.fstat(descriptor).st_ino)


def _replace(source: Any, target: Any, **where: Any) -> None:
    _plain_replace(source, target, **where)
    _placed[Path(target).stat().st_ino] = Path(target)


def _reach(name: str) -> None:
    _plain_reach(name)
    if name != "checkpoint.after_reference" or VARIABLE not in os.environ:
        return
    try:
        (Path(os.environ[VARIABLE]) / "power-loss").unlink()
    except FileNotFoundError:
        return
    for inode, path in _placed.items():
        if inode not in _synced and path.exists():
            os.truncate(path, 0)
    os.kill(os.getpid(), signal.SIGKILL)


os.fsync = _fsync
os.replace = _replace
reporting.reach = _reach
