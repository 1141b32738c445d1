"""One job's process from order to exit: stop requests, the grace after them, the stall clock, the deadman.

Everything that concerns the process arrives in one inbox and is answered by one loop, so that no two
threads decide at once. Writes nothing to SQL: how it ended is returned.
"""

import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from halfstep.worker.host.lease import LeaseKeeper
from halfstep.worker.host.process import ChildProcess, Exited
from halfstep.worker.protocol import Done, Progress, StopOrder

log = structlog.get_logger(__name__)

Why = Literal["cancel", "pause", "drain"]
KILL_AFTER_TERM_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """Another attempt owns the job; into the inbox."""

    why: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A client's request, or the worker's own drain; into the inbox."""

    why: Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Graces:
    """Seconds that a process has to stop by itself, by what it was asked, before it is ended."""

    cancel: float = 10.0
    pause: float = 300.0
    drain: float = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a job's process ended."""

    done: Done | None  # what it said itself, if it could
    returncode: int
    killed_for: Literal["cancel", "pause", "drain", "lost", "stalled"] | None
    last_step: int
    last_words: str


class _Supervision:
    def __init__(
        self,
        child: ChildProcess,
        keeper: LeaseKeeper,
        graces: Graces,
        stall_seconds: float,
        on_first_step: Callable[[], object],
    ) -> None:
        self._on_first_step = on_first_step
        self._child, self._keeper, self._graces, self._stall_seconds = child, keeper, graces, stall_seconds
        self._asked: Why | None = None
        self._asked_until = float("inf")
        self._killed_for: Literal["cancel", "pause", "drain", "lost", "stalled"] | None = None
        self._kill_at = float("inf")
        self._done: Done | None = None
        self._step = 0
        self._progressed, self._step_seconds = time.monotonic(), 0.0

    def run(self) -> Ending:
        while True:
            try:
                item = self._child.inbox.get(
                    timeout=max(0.0, min(self._next_deadline() - time.monotonic(), 60.0))
                )
            except queue.Empty:
                self._on_deadline(time.monotonic())
                continue
            if isinstance(item, Exited):
                return Ending(
                    done=self._done,
                    returncode=item.returncode,
                    killed_for=self._killed_for,
                    last_step=self._step,
                    last_words=self._child.last_words,
                )
            self._on_item(item)
            self._on_deadline(time.monotonic())

    def _stall_deadline(self) -> float:
        return self._progressed + max(self._stall_seconds, 20 * self._step_seconds)

    def _next_deadline(self) -> float:
        if self._killed_for is not None:
            return self._kill_at
        return min(self._keeper.deadline, self._asked_until, self._stall_deadline())

    def _on_item(self, item: object) -> None:
        match item:
            case Progress():
                if self._step == 0 and item.step > 0:
                    self._on_first_step()
                self._progressed, self._step, self._step_seconds = (
                    time.monotonic(),
                    item.step,
                    item.step_seconds,
                )
            case Done():
                self._done = item
                self._progressed = time.monotonic()
            case LeaseLost():
                log.warning("lease lost; the job's process is ended", why=item.why)
                self._kill("lost")
            case StopRequested():
                self._ask(item.why)
            case _:
                log.error("unknown item in a job's inbox", item=repr(item))

    def _ask(self, why: Why) -> None:
        # A cancel overrides a pause or a drain, never the other way round.
        if self._asked in ("cancel", why):
            return
        self._asked = why
        grace: float = getattr(self._graces, why)
        self._asked_until = time.monotonic() + grace
        if not self._child.order(StopOrder(why=why)):
            log.info("the job's process had already ended", asked=why)

    def _on_deadline(self, now: float) -> None:
        if self._killed_for is not None:
            if now >= self._kill_at:
                self._child.signal_group(signal.SIGKILL)
                self._kill_at = now + KILL_AFTER_TERM_SECONDS
            return
        if now >= self._keeper.deadline:
            log.warning("the lease could not be renewed in time; the job's process is ended")
            self._kill("lost")
        elif now >= self._asked_until and self._asked is not None:
            self._kill(self._asked)
        elif now >= self._stall_deadline():
            self._kill("stalled")

    def _kill(self, why: Literal["cancel", "pause", "drain", "lost", "stalled"]) -> None:
        if self._killed_for is not None:
            return
        self._killed_for = why
        # A lost lease leaves no time to be polite: the new owner may be writing already.
        self._child.signal_group(signal.SIGKILL if why == "lost" else signal.SIGTERM)
        self._kill_at = time.monotonic() + KILL_AFTER_TERM_SECONDS


def supervise(
    child: ChildProcess,
    keeper: LeaseKeeper,
    *,
    graces: Graces,
    stall_seconds: float,
    on_first_step: Callable[[], object],
) -> Ending:
    """Watch one job's process until it is gone.

    Args:
        child: Its inbox also takes `StopRequested` and `LeaseLost` from other threads.
        keeper: Its deadline is the deadman's.
        graces: Time to stop by itself after each kind of request.
        stall_seconds: Without progress for this long, or for 20 of its steps, it is stalled.
        on_first_step: Called once, when the first finished step is reported.
    """
    return _Supervision(child, keeper, graces, stall_seconds, on_first_step).run()
