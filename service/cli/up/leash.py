"""Runs a command that the kernel ends when our parent dies: `leash.py SIGNAL PARENT COMMAND…`.

Started as a plain file by `python -I -S`, so that it costs milliseconds; standard library only. The
parent-death signal survives exec, so no process of ours stays between the supervisor and the part.
Linux only: elsewhere the command runs unleashed.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def _main(signal_number: int, parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the signal was armed
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606  # the supervisor's own command line


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
