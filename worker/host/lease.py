"""The lease on a running job: renewed by heartbeat, and the job stopped when it cannot be.

A heartbeat brings back what a client asked for, and so does a look at the job's row between two heartbeats: a
read of one row every second, so that a cancel or a pause need not wait for the next renewal. A worker that
could not renew by the lease's deadline ends its job by itself: the database may already have given it to
another. Knows no process and no torch.
"""

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.orm import Session

from halfstep.service.contract.states import RequestedAction
from halfstep.service.errors import StaleFence, StoreUnavailable
from halfstep.service.store import jobs
from halfstep.service.store.sql.database import Database

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0


class LeaseKeeper:
    """Heartbeats for one claimed job, from construction until `release`."""

    def __init__(
        self,
        database: Database,
        *,
        job_id: str,
        fence: int,
        worker_id: str,
        lease_seconds: float,
        heartbeat_seconds: float,
        on_request: Callable[[RequestedAction], None],
        on_lost: Callable[[str], None],
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._database = database
        self._job_id, self._fence, self._worker_id = job_id, fence, worker_id
        self._lease, self._beat, self._look_every = lease_seconds, heartbeat_seconds, look_seconds
        self._on_request, self._on_lost = on_request, on_lost
        self._over = threading.Event()
        self._told: RequestedAction | None = None
        # Counted from before the claim or renewal was sent: never later than the database's own count.
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{job_id[-6:]}", daemon=True)
        self._thread.start()

    @property
    def deadline(self) -> float:
        """When, on the monotonic clock, the job must be dead unless a renewal succeeds first.

        Earlier than the lease's end by what killing a process may take. Whoever supervises the process
        watches it, so that a heartbeat that hangs in a black-holed connection cannot keep the job alive.
        """
        return self._renewed + self._lease - min(5.0, 0.2 * self._lease)

    def release(self) -> None:
        """Stop the heartbeats; the job's state is written."""
        self._over.set()
        self._thread.join(timeout=self._beat + 1.0)

    def _keep(self) -> None:
        beat_at = time.monotonic() + self._beat
        while not self._over.wait(max(0.0, min(self._look_every, beat_at - time.monotonic()))):
            beats = time.monotonic() >= beat_at
            if beats:
                beat_at = time.monotonic() + self._beat
            try:
                if beats:
                    self._beat_once()
                else:
                    self._look()
            except StaleFence:
                if not self._over.is_set():
                    self._on_lost("another attempt owns the job")
                return

    def _beat_once(self) -> None:
        sent = time.monotonic()
        try:
            asked = self._database.retry(self._renew, seconds=self._beat)
        except StoreUnavailable as error:
            held = time.monotonic() - self._renewed
            log.warning(
                "heartbeat failed",
                job_id=self._job_id,
                seconds_since_renewal=round(held, 1),
                error=str(error),
            )
            return
        self._renewed = sent
        self._tell(asked)

    def _look(self) -> None:
        try:
            with self._database.read() as session:
                asked = jobs.requested(session, self._job_id, self._fence, worker_id=self._worker_id)
        except StoreUnavailable:  # the next heartbeat waits for it, and says so
            return
        self._tell(asked)

    def _tell(self, asked: RequestedAction | None) -> None:
        if asked is not None and asked is not self._told:
            self._told = asked
            self._on_request(asked)

    def _renew(self, session: Session) -> RequestedAction | None:
        return jobs.renew(
            session, self._job_id, self._fence, lease_seconds=self._lease, worker_id=self._worker_id
        )
