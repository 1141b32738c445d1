"""The parent's side of a job's process: spawning, its pipes, its last words, and ending it.

A child is a session of its own, so that its whole group can be killed, and it dies with its parent:
the kernel sends it SIGKILL when the *thread* that created it ends, hence one spawning thread that
lives as long as the worker, and it exits on end of file of its input besides.
"""

import collections
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO

import structlog

from halfstep.worker.protocol import Message, Ready, decode, encode

log = structlog.get_logger(__name__)

LAST_WORDS_LINES = 40


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone; `returncode` is negative for a signal."""

    returncode: int


class ChildProcess:
    """One job's process. Messages and its exit arrive in `inbox`, in order."""

    def __init__(self, popen: "subprocess.Popen[bytes]", reports: IO[bytes]) -> None:
        self._popen = popen
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.ready: Future[Ready] = Future()
        self._last_words: collections.deque[str] = collections.deque(maxlen=LAST_WORDS_LINES)
        self._job_id: str | None = None
        if popen.stdin is None or popen.stdout is None:
            raise ValueError("the process needs pipes for its input and its output")
        self._orders, self._output = popen.stdin, popen.stdout
        self._order_lock = threading.Lock()
        readers = [
            threading.Thread(
                target=self._read_reports, args=(reports,), name=f"reports-{popen.pid}", daemon=True
            ),
            threading.Thread(target=self._read_output, name=f"output-{popen.pid}", daemon=True),
        ]
        for reader in readers:
            reader.start()
        threading.Thread(target=self._wait, args=(readers,), name=f"wait-{popen.pid}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process and group id."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """False once the process has been waited for."""
        return self._popen.poll() is None

    @property
    def last_words(self) -> str:
        """The last lines that the process printed, for the event that tells of its death."""
        return "\n".join(self._last_words)

    def order(self, message: Message) -> bool:
        """Send an order; False when the process no longer listens."""
        if hasattr(message, "job_id"):
            self._job_id = message.job_id
        with self._order_lock:
            try:
                self._orders.write(encode(message))
                self._orders.flush()
            except (BrokenPipeError, ValueError):
                return False
        return True

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def discard(self) -> None:
        """End a process that runs no job: it exits at end of file, and is killed if it does not."""
        with self._order_lock, contextlib.suppress(OSError):
            self._orders.close()
        try:
            self._popen.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            self._popen.wait()

    def _read_reports(self, reports: IO[bytes]) -> None:
        with reports:
            for line in reports:
                try:
                    message = decode(line)
                except (ValueError, KeyError, TypeError):
                    log.error("unreadable report from a job's process", line=line[:200])
                    continue
                if isinstance(message, Ready):
                    if not self.ready.done():
                        self.ready.set_result(message)
                else:
                    self.inbox.put(message)

    def _read_output(self) -> None:
        with self._output:
            for raw in self._output:
                line = raw.decode(errors="replace").rstrip()
                self._last_words.append(line)
                log.info(line, logger_name="job", job_id=self._job_id) if self._job_id else log.debug(line)

    def _wait(self, readers: list[threading.Thread]) -> None:
        returncode = self._popen.wait()
        # Stragglers of its group would hold the pipes open and the device busy.
        self.signal_group(signal.SIGKILL)
        for reader in readers:
            reader.join(timeout=5.0)
        with self._order_lock, contextlib.suppress(OSError):
            self._orders.close()
        if not self.ready.done():
            self.ready.set_exception(
                RuntimeError(f"the process ended with {returncode}: {self.last_words[-2000:]}")
            )
        self.inbox.put(Exited(returncode))


class Spawner:
    """The one thread that creates every child of this worker."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[Callable[[], ChildProcess], Future[ChildProcess]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._serve, name="spawner", daemon=True).start()

    def spawn(self, environment: Mapping[str, str], *, probe: bool = False) -> ChildProcess:
        """Start a process that imports torch and waits for an order.

        Args:
            environment: Variables over this process's own, such as the device it may see.
            probe: Let it report components and capability when ready (on a GPU this creates a context).
        """
        future: Future[ChildProcess] = Future()
        self._requests.put((lambda: _start(environment, probe=probe), future))
        return future.result()

    def _serve(self) -> None:
        while True:
            start, future = self._requests.get()
            try:
                future.set_result(start())
            except OSError as error:
                future.set_exception(error)


def _start(environment: Mapping[str, str], *, probe: bool) -> ChildProcess:
    read_end, write_end = os.pipe()
    command = [
        sys.executable,
        "-m",
        "halfstep.worker.job.child",
        f"--report-fd={write_end}",
        f"--parent={os.getpid()}",
    ]
    try:
        popen = subprocess.Popen(
            command + (["--probe"] if probe else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[write_end],
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
    except OSError:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return ChildProcess(popen, os.fdopen(read_end, "rb"))
