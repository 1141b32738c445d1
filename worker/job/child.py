"""The job's own process, before torch: dies with its parent, reads orders, writes reports.

It dies with its parent twice over: the kernel kills it when the thread that created it ends, and end of file
on the order pipe ends it too. Both hold before anything slow is imported, so that a worker killed at any
moment leaves nobody behind. What the process does with its order is in `job`.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Literal

from halfstep.worker.protocol import Message, Progress, RunOrder, StopOrder, decode, encode

PR_SET_PDEATHSIG = 1
PROGRESS_SECONDS = 0.2
ORPHANED = 75
OOM_SCORE = 500  # of 1000; its worker keeps 0


class Control:
    """The order pipe's reader: the run order once, then stop requests; end of file ends the process.

    Attributes:
        asked: the newest request to stop; None: go on.
    """

    def __init__(self, orders: IO[bytes]) -> None:
        self._orders = orders
        self._order: RunOrder | None = None
        self.asked: Literal["cancel", "pause", "drain"] | None = None
        self._ordered = threading.Event()
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def wait(self) -> RunOrder:
        """The run order, when it comes."""
        self._ordered.wait()
        if self._order is None:
            raise RuntimeError("no order arrived")
        return self._order

    def _read(self) -> None:
        for line in self._orders:
            message = decode(line)
            if isinstance(message, RunOrder):
                self._order = message
                self._ordered.set()
            elif isinstance(message, StopOrder):
                self.asked = message.why
        # The parent is gone or no longer wants this process: whatever it wrote from here on would be refused.
        os._exit(ORPHANED)


class Reports:
    """The report pipe, written by the training thread and the reporter alike."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()
        self._last_progress = 0.0

    def send(self, message: Message) -> None:
        """Write one message."""
        with self._lock:
            self._file.write(encode(message))

    def progress(self, step: int, step_seconds: float) -> None:
        """Tell that steps happen, at most a few times a second."""
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self.send(Progress(step=step, step_seconds=step_seconds))


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def _be_chosen_before_the_worker() -> None:
    """Where memory runs out the kernel ends the job that took it, not the worker that would tell of it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")


def main() -> None:
    """Entry point of `python -m halfstep.worker.job.child`; started by the worker, not by hand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--probe", action="store_true")
    arguments = parser.parse_args()
    _die_with_parent(arguments.parent)
    _be_chosen_before_the_worker()
    # A model that reads standard input must find it empty, not eat our orders.
    orders = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted, not a path
        os.dup2(nothing.fileno(), 0)
    control, reports = Control(orders), Reports(arguments.report_fd)
    from halfstep.worker.job import execution  # noqa: PLC0415 - torch takes seconds to import, and all the above must hold by then

    prepared = execution.prepare(probe=arguments.probe)
    reports.send(prepared.ready)
    reports.send(execution.run(prepared, control.wait(), lambda: control.asked, reports.progress))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries may still hold the interpreter; all that matters is written.
    os._exit(0)


if __name__ == "__main__":
    main()
