"""Runs the parts of `halfstep up` as child processes: starts, restarts and stops them, and merges their logs.

Each part is a session of its own, so that Ctrl-C reaches the supervisor alone and parts stop in order;
each is on a leash, so that none outlives a supervisor that is killed. Knows nothing of what the parts do.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.service.cli.up.merged_log import LineReader, MergedLog
from halfstep.service.errors import HalfstepError

LEASH = Path(__file__).with_name("leash.py")
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
SETTLED_SECONDS = 60.0  # a part that ran this long starts again without delay
TRIAL_SECONDS = 10.0  # an error exit this soon after the very first start is a failed start
READY_SECONDS = 10.0
LEAST_STOP_SECONDS = 0.3
# A closing terminal and its shell both send SIGHUP: the same request within this time is not a second one.
REPEAT_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StartFailed(HalfstepError):
    """A part could not be started, or ended with an error at once."""

    code = "start_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process to keep alive.

    Attributes:
        name: In the log.
        command: Absolute program and arguments.
        stop_seconds: Between SIGTERM and SIGKILL.
        orphan_signal: What it gets when the supervisor dies: SIGKILL where that loses nothing.
        muted: Lines that contain one of these are not shown.
        ready: Asked until it is true before later parts start; None: they need not wait.
    """

    name: str
    command: tuple[str, ...]
    stop_seconds: float
    orphan_signal: signal.Signals = signal.SIGKILL
    muted: tuple[str, ...] = ()
    ready: Callable[[], Awaitable[bool]] | None = None


class Supervisor:
    """Keeps `parts` running from `run` until `stop` is called or a signal comes.

    Stopping takes at most `stop_seconds`, give or take the kills; a part has its own limit within that.
    """

    def __init__(
        self, parts: Sequence[Part], *, environment: Mapping[str, str], log: MergedLog, stop_seconds: float
    ) -> None:
        self._parts = tuple(parts)
        self._environment = dict(environment)
        self._log = log
        self._stop_seconds = stop_seconds
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._asked_at = 0.0
        self._failure: StartFailed | None = None

    async def run(self, *, started: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Start the parts in order, keep them, and stop them in reverse order.

        Args:
            started: Runs beside them from then on; cancelled at the stop.

        Raises:
            StartFailed: A part ended with an error right after its first start; all are stopped by then.
        """
        loop = asyncio.get_running_loop()
        # `nohup halfstep up` outlives its terminal. SIGINT always counts: a script's `&` ignores it unasked.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [each for each in STOP_SIGNALS if not (nohup and each is signal.SIGHUP)]
        for each in handled:
            loop.add_signal_handler(each, self.stop)
        keepers: list[asyncio.Task[None]] = []
        beside: asyncio.Task[None] | None = None
        try:
            for part in self._parts:
                keepers.append(asyncio.create_task(self._keep(part)))
                await self._until_ready(part)
                if self._stopping.is_set():
                    break
            if started is not None:
                beside = asyncio.create_task(started())
            await self._stopping.wait()
        finally:
            self._stopping.set()
            if beside is not None:
                beside.cancel()
            deadline = time.monotonic() + self._stop_seconds
            for part in reversed(self._parts):
                await self._end(
                    part, min(part.stop_seconds, max(deadline - time.monotonic(), LEAST_STOP_SECONDS))
                )
            await asyncio.gather(*keepers)
            for each in handled:
                loop.remove_signal_handler(each)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begin to stop; called again later, kill what is left."""
        now = time.monotonic()
        if not self._stopping.is_set():
            self._asked_at = now
        elif now - self._asked_at > REPEAT_SECONDS:
            self._hurry.set()
        self._stopping.set()

    async def _keep(self, part: Part) -> None:
        pause = FIRST_PAUSE_SECONDS
        first = True
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                code = await self._once(part)
            except OSError as error:  # no process or no memory to be had
                self._log.say(f"{part.name} could not be started: {error}")
                code = 1
            lasted = time.monotonic() - began
            if self._stopping.is_set():
                return
            if first and code > 0 and lasted < TRIAL_SECONDS:
                self._failure = StartFailed(
                    f"{part.name} could not start ({_ending(code)}); its last lines say why"
                )
                self._stopping.set()
                return
            first = False
            if lasted > SETTLED_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            self._log.say(f"{part.name} ended ({_ending(code)}); starting it again in {pause:g} s")
            await _either(self._stopping, pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _once(self, part: Part) -> int:
        """One life of a part; its return code, negative for a signal."""
        loop = asyncio.get_running_loop()
        output, theirs = os.pipe()
        reader = LineReader(output, part.name, self._log, muted=part.muted)
        # Popen runs in this thread, the one that lives as long as the supervisor: the leash ends with it.
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(LEASH), str(int(part.orphan_signal)), str(os.getpid())),
                *part.command,
                stdin=asyncio.subprocess.DEVNULL, stdout=theirs, stderr=theirs,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs)
        self._running[part.name] = process
        # Our own pipe, not asyncio's: a grandchild that keeps it open must not keep us from seeing the end.
        loop.add_reader(output, lambda: reader.read() or loop.remove_reader(output))
        if self._stopping.is_set():  # while it was being made: it has nothing yet that could be lost
            _signal(process, signal.SIGKILL)
        code = await process.wait()
        loop.remove_reader(output)
        reader.drain()
        return code

    async def _until_ready(self, part: Part) -> None:
        if part.ready is None:
            return
        deadline = time.monotonic() + READY_SECONDS
        while not self._stopping.is_set() and not await part.ready():
            if time.monotonic() > deadline:
                self._failure = StartFailed(
                    f"{part.name} did not answer within {READY_SECONDS:g} s of its start"
                )
                self._stopping.set()
            await _either(self._stopping, 0.02)

    async def _end(self, part: Part, seconds: float) -> None:
        process = self._running.get(part.name)
        if process is None or process.returncode is not None:
            return
        if not self._hurry.is_set():
            self._log.say(f"stopping {part.name}")
            _signal(process, signal.SIGTERM)
            ended = asyncio.create_task(process.wait())
            hurry = asyncio.create_task(self._hurry.wait())
            await asyncio.wait({ended, hurry}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if ended.done():
                return
            self._log.say(f"{part.name} did not stop within {seconds:.1f} s; killing it")
        # The whole group: what the part has started in its own session goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


async def _either(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
