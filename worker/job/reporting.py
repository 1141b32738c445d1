"""From the training loop to SQL: a bounded queue, one thread, batched and fenced writes.

All that waits when the thread comes by goes into one transaction, so that commits become fewer as they become
slower. The loop never waits for the database until the bound is reached; then it does, so that nothing is
dropped. It waits for as long as the lease is renewed: whoever supervises this process ends it when the lease
cannot be. What goes wrong here is raised in the loop at its next report.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from halfstep.service.contract.metrics import Evaluation, LiveStats, StepMetrics
from halfstep.service.errors import StoreUnavailable
from halfstep.service.faultpoints import reach
from halfstep.service.files.remote import Mirror
from halfstep.service.store import events, jobs, record
from halfstep.service.store.sql.database import Database
from halfstep.worker.training.checkpoints import writing
from halfstep.worker.training.checkpoints.writing import CheckpointInfo, CheckpointRef
from halfstep.worker.training.errors import TrainingFailure

log = structlog.get_logger(__name__)

Write = Callable[[Session], object]


@dataclass(frozen=True, slots=True)
class _Batch:
    rows: Sequence[StepMetrics]
    live: LiveStats
    arrived: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class _Entry:
    write: Write
    then: Callable[[], object] | None = None  # after the commit
    alone: bool = False  # no rows may come before it in its transaction


@dataclass(frozen=True, slots=True)
class _Transaction:
    rows: Sequence[StepMetrics]
    live: LiveStats | None  # of the last rows
    entries: Sequence[_Entry]


@dataclass(frozen=True, slots=True)
class _Outage:
    error: str  # the first one met
    seconds: float


MAX_BUFFERED_ROWS = 200_000  # about 90 MB; at 500 steps a second, 400 s of a database that is away
MAX_BATCH_ROWS = 8_192
MAX_ENTRIES = 64  # in a transaction, beside rows: nobody else writes to SQLite meanwhile
RETRY_SECONDS = 1.0

FIRST_FENCE = 1  # of a job's first claim: nobody has written anything of its record before


class Reporter:
    """The training loop's observer whose words end in the store, under the job's fence.

    Args:
        database: where the record is.
        job_id: the job's.
        fence: this attempt's.
        on_progress: called with the newest step and a step's usual seconds as steps are reported, and again
            while the loop waits for a database that is away: that is no stall.
        path_of: how the record names a file.
        mirror: the remote store that keeps the checkpoints; None: the disk does.
        max_rows: the bound of the buffer.
    """

    def __init__(
        self,
        database: Database,
        job_id: str,
        fence: int,
        *,
        on_progress: Callable[[int, float], None],
        path_of: Callable[[Path], str] = str,
        mirror: Mirror | None = None,
        max_rows: int = MAX_BUFFERED_ROWS,
    ) -> None:
        self._database, self._job_id, self._fence = database, job_id, fence
        self._on_progress, self._path_of, self._max_rows = on_progress, path_of, max_rows
        self._mirror = mirror
        self._changed = threading.Condition()
        self._queue: deque[_Batch | _Entry] = deque()
        self._rows = 0
        self._writing_since: float | None = None  # when the first row of the batch under way arrived
        self._progress = (0, 0.0)
        self._waits_since: float | None = None  # the loop, on the monotonic clock
        self._waited = 0.0  # by the loop, in waits that ended since the newest commit
        self._busy = self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="reporter", daemon=True)
        self._thread.start()

    def opened(self, *, total_steps: int | None) -> None:
        """The data are open and training begins: the job is running."""
        job, fence = self._job_id, self._fence

        def write(session: Session) -> None:
            jobs.mark_running(session, job, fence)
            record.opened(session, job, fence, total_steps=total_steps)
            reach("opened.before_commit")

        self._put(write, alone=True)
        self._on_progress(*self._progress)

    def resumed(self, step: int) -> None:
        """Training goes on after `step`: what the record holds beyond it is removed before this returns."""
        job, fence = self._job_id, self._fence

        def write(session: Session) -> None:
            removed = record.truncate_after(session, job, fence, step)
            reach("resume.before_commit")
            if step or removed:
                message = f"resumed after step {step}" if step else "started again from the beginning"
                data = {"step": step, "steps_repeated": removed}
                events.append(
                    session, job, type="worker", level="info", message=message, data=data, fence=fence
                )

        self._put(write, alone=True)
        if step or self._fence > FIRST_FENCE:  # a first attempt finds nothing to remove, and need not wait
            self._drain()
            reach("resume.after_commit")

    def steps(self, rows: Sequence[StepMetrics], live: LiveStats) -> None:
        """Finished steps, contiguous and in order; waits only when the buffer is full."""
        if not rows:
            return
        with self._changed:
            self._raise_failure()
            if self._is_full(len(rows)):
                self._wait_for_room(len(rows))
            self._queue.append(_Batch(rows, live, time.time()))
            self._rows += len(rows)
            self._progress = (rows[-1].step, live.step_time_ms_p50 / 1e3)
            self._changed.notify_all()
        self._on_progress(*self._progress)

    def event(self, type: str, level: str, message: str, data: Mapping[str, Any] | None = None) -> None:  # noqa: A002 - the wire's name
        """Something a person should see in the job's events; a notice is told once in a job's life."""
        job, fence, kept = self._job_id, self._fence, dict(data or {})
        same = _same_notice(type, message, kept)

        def write(session: Session) -> None:
            # The API warned of it when the job was submitted, or an earlier attempt told of the same step.
            if same is not None and events.is_told(session, job, type=type, same=same):
                return
            events.append(session, job, type=type, level=level, message=message, data=kept, fence=fence)

        self._put(write)
        if type == "precision" and "from" in kept:  # it takes effect next, and a resumed run goes by it
            self._drain()

    def evaluated(self, evaluation: Evaluation) -> None:
        """One pass over the held-out split."""
        self._put(lambda s: record.evaluated(s, self._job_id, self._fence, evaluation))

    def checkpointed(self, info: CheckpointInfo) -> None:
        """A checkpoint is safely on disk: refer to it. Queued behind the rows that led to it."""
        job, fence = self._job_id, self._fence

        reach("checkpoint.before_reference")

        def write(session: Session) -> None:
            jobs.record_checkpoint(
                session,
                job,
                fence,
                step=info.step,
                path=self._path_of(info.path),
                bytes=info.bytes,
                sha256=info.sha256,
                manifest_sha256=info.manifest_sha256,
                metrics=dict(info.metrics),
            )
            message = f"checkpoint after step {info.step}, {info.bytes} bytes"
            data = {"step": info.step, "bytes": info.bytes, "sha256": info.sha256}
            events.append(
                session, job, type="checkpoint", level="info", message=message, data=data, fence=fence
            )

        self._put(write, then=lambda: reach("checkpoint.after_reference"))

    def superseded(self, checkpoints: Sequence[CheckpointRef]) -> None:
        """Drop these references, then the files that no other job refers to.

        Queued behind the reference that takes their place.
        """
        job, fence = self._job_id, self._fence
        removable: list[CheckpointRef] = []

        def write(session: Session) -> None:
            removable[:] = [
                each for each in checkpoints if jobs.drop_checkpoint(session, job, fence, each.step)
            ]

        def remove_files() -> None:
            reach("checkpoint.before_removal")
            try:
                writing.remove(removable, self._mirror)
            except TrainingFailure as error:  # costs space, not the job
                log.warning("an old checkpoint stays where it is", error=error.message)

        self._put(write, then=remove_files)

    def close(self) -> None:
        """Wait until everything is stored, then end the thread. Raises what the thread met."""
        self._drain()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _put(self, write: Write, then: Callable[[], object] | None = None, *, alone: bool = False) -> None:
        with self._changed:
            self._raise_failure()
            self._queue.append(_Entry(write, then, alone))
            self._changed.notify_all()

    def _is_full(self, more: int) -> bool:
        return self._rows > 0 and self._rows + more > self._max_rows

    def _wait_for_room(self, more: int) -> None:
        since = self._held_since()
        log.warning(
            "the step record's buffer is full; training waits for the database",
            rows=self._rows,
            since=None if since is None else datetime.fromtimestamp(since, UTC).isoformat(),
        )
        began = time.monotonic()
        with self._waiting():
            while self._is_full(more):
                self._changed.wait()
                self._raise_failure()
        log.info(
            "the step record has room again; training goes on", seconds=round(time.monotonic() - began, 1)
        )

    def _held_since(self) -> float | None:
        """When the oldest row that is not stored arrived."""
        if self._writing_since is not None:
            return self._writing_since
        return next((entry.arrived for entry in self._queue if isinstance(entry, _Batch)), None)

    def _drain(self) -> None:
        with self._changed, self._waiting():
            while (self._queue or self._busy) and self._failure is None:
                self._changed.wait()
            self._raise_failure()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - self._waits_since
            self._waits_since = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                transaction = self._next()
                self._busy = True
            try:
                outage = self._store(transaction)
                if transaction.rows:
                    reach("report.after_commit")
                for entry in transaction.entries:
                    if entry.then is not None:
                        entry.then()
            except BaseException as error:  # noqa: BLE001 - raised again in the training loop
                with self._changed:
                    self._failure = error
                    self._queue.clear()
                    self._rows, self._busy = 0, False
                    self._changed.notify_all()
                return
            with self._changed:
                if outage is not None:
                    self._tell_of(outage)
                self._waited = 0.0
                if self._waits_since is not None:
                    self._waits_since = time.monotonic()
                self._busy = False
                self._rows -= len(transaction.rows)
                self._writing_since = None
                self._changed.notify_all()

    def _next(self) -> _Transaction:
        """What waits, up to limits: a job that reports often must not pay for a commit each time."""
        rows: list[StepMetrics] = []
        live: LiveStats | None = None
        entries: list[_Entry] = []
        while self._queue and len(entries) < MAX_ENTRIES:
            waiting = self._queue[0]
            if isinstance(waiting, _Batch):
                if rows and len(rows) + len(waiting.rows) > MAX_BATCH_ROWS:
                    break
                if not rows:
                    self._writing_since = waiting.arrived
                rows.extend(waiting.rows)
                live = waiting.live
            elif waiting.alone and (rows or entries):
                break
            else:
                entries.append(waiting)
            self._queue.popleft()
            if entries and entries[-1].alone:
                break
        return _Transaction(rows, live, entries)

    def _write(self, session: Session, transaction: _Transaction) -> None:
        """Rows first: the store knows them, and so the whole transaction, again should it be sent again."""
        if transaction.live is not None:
            if not record.append(session, self._job_id, self._fence, transaction.rows, transaction.live):
                return  # committed before, and the answer was lost
            reach("report.before_commit")
        for entry in transaction.entries:
            entry.write(session)

    def _store(self, transaction: _Transaction) -> _Outage | None:
        """Write until it succeeds; the outage that was waited for, if there was one."""
        began = time.monotonic()
        error: str | None = None
        while True:
            try:
                self._database.retry(lambda session: self._write(session, transaction))
            except StoreUnavailable as unavailable:
                if error is None:
                    error = str(unavailable)
                    log.warning("the database takes no writes; the step record is buffered", error=error)
                with self._changed:
                    waits, progress = self._waits_since is not None, self._progress
                if waits:
                    self._on_progress(*progress)
                time.sleep(RETRY_SECONDS)
            else:
                return None if error is None else _Outage(error, time.monotonic() - began)

    def _tell_of(self, outage: _Outage) -> None:
        """Put its event first in the queue: written as everything is, so another outage does not lose it."""
        waited = self._waited
        if self._waits_since is not None:
            waited += time.monotonic() - self._waits_since
        seconds, waited = round(outage.seconds, 1), round(waited, 1)
        log.info("the database takes writes again", seconds=seconds, waited_seconds=waited, rows=self._rows)
        message = (
            f"the database took no writes for {seconds} s ({outage.error}), and the job waited for {waited} "
            "s of them; nothing of the record was lost"
        )
        data = {
            "code": "database_away",
            "seconds": seconds,
            "waited_seconds": waited,
            "rows_buffered": self._rows,
            "error": outage.error,
        }
        job, fence = self._job_id, self._fence
        self._queue.appendleft(
            _Entry(
                lambda s: events.append(
                    s, job, type="alert", level="warning", message=message, data=data, fence=fence
                )
            )
        )


def _same_notice(kind: str, message: str, data: Mapping[str, Any]) -> str | dict[str, Any] | None:
    """What makes another event of this kind the same notice; None where each one is news.

    A warning and a change of precision are what they say. A step is taken again by a resumed attempt, which
    may find other words for what went wrong in it; after a rollback it has other batches, and is another one.
    """
    if kind in {"warning", "precision"}:
        return message
    if kind == "checkpoint" or not data.keys() >= {"code", "step"}:
        return None
    return {name: data[name] for name in ("code", "step", "batch") if name in data}
