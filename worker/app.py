"""The Celery worker process: start-up, registration, the threads pool, drain on SIGTERM, a bounded end.

Imports no torch: what the device can do is learnt from a job's process.
`python -m halfstep.worker.app` starts it.
"""

import os
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import TimeoutError as FutureTimeoutError

import structlog
from celery import signals
from celery.exceptions import SecurityWarning
from pydantic import ValidationError
from sqlalchemy.orm import Session

from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.errors import ConfigurationError, HalfstepError, NotFound, StoreUnavailable
from halfstep.service.files.storage import storage
from halfstep.service.logs import configure
from halfstep.service.queue import QUEUE, make_celery
from halfstep.service.settings import Settings
from halfstep.service.store.fleet import components, workers
from halfstep.service.store.fleet.components import ComponentInfo
from halfstep.service.store.fleet.workers import Capability
from halfstep.service.store.sql import schema
from halfstep.service.store.sql.database import Database, connect
from halfstep.service.store.sql.ids import new_job_id
from halfstep.worker.host.devices import build_slots
from halfstep.worker.host.process import Spawner
from halfstep.worker.host.runner import Runner, register
from halfstep.worker.host.slots import READY_SECONDS, Slot
from halfstep.worker.protocol import Ready

log = structlog.get_logger(__name__)


def _learn(slot: Slot) -> Ready:
    """Let a first process import torch, look at its device, and tell."""
    # On a GPU the look creates a context, which must not wait beside the first job: that process goes.
    child = (
        slot.warm_up(probe=True) if slot.device == "cpu" else slot.spawner.spawn(slot.environment, probe=True)
    )
    try:
        return child.ready.result(timeout=READY_SECONDS)
    except FutureTimeoutError:
        raise ConfigurationError(f"the job's process did not start within {READY_SECONDS:.0f} s") from None
    except RuntimeError as error:
        raise ConfigurationError(f"the job's process cannot start: {error}") from error
    finally:
        if slot.device != "cpu":
            child.discard()


class _Registration:
    """This worker's row: written at start, beaten from a thread, removed at the end."""

    def __init__(self, settings: Settings, database: Database, ready: Ready, slots: int) -> None:
        if ready.capability is None:
            raise ConfigurationError("the job's process reported no capability")
        self.worker_id = new_job_id()
        fields = Capability.__dataclass_fields__
        self.capability = Capability(**{name: ready.capability[name] for name in fields})
        self.speeds: dict[str, dict[str, float]] = ready.capability["speed"]
        self._settings, self._database, self._ready, self._slots = settings, database, ready, slots
        self._over = threading.Event()

    def start(self, runner: Runner) -> None:
        self._write()
        threading.Thread(target=self._beat, args=(runner,), name="worker-beat", daemon=True).start()

    def stop(self) -> None:
        self._over.set()
        try:
            self._database.retry(lambda s: workers.remove(s, self.worker_id), seconds=2.0)
        except StoreUnavailable as error:
            log.warning("this worker's row stays until it is seen to be dead", error=str(error))

    def _write(self) -> None:
        infos = [ComponentInfo(**fields) for fields in self._ready.components]

        def write(session: Session) -> None:
            workers.register(
                session,
                worker_id=self.worker_id,
                name=self._settings.shown_worker_name,
                pid=os.getpid(),
                capability=self.capability,
                versions=self._ready.versions,
                slots=self._slots,
                speed=self.speeds,
            )
            components.publish(session, infos)

        self._database.retry(write, seconds=30.0)

    def _beat(self, runner: Runner) -> None:
        while not self._over.wait(self._settings.heartbeat_seconds):
            try:
                self._beat_once(runner)
            except StoreUnavailable as error:
                log.warning("worker heartbeat failed", error=str(error))

    def _beat_once(self, runner: Runner) -> None:
        def beat(session: Session) -> None:
            workers.beat(session, self.worker_id, busy=runner.busy, draining=runner.draining)

        try:
            self._database.retry(beat, seconds=self._settings.heartbeat_seconds)
        except NotFound:
            log.warning("this worker's row is gone; registering again")
            self._write()
        runner.look()


def _leave_logging_alone(**_: object) -> None:
    """Connected to Celery's signal, it means that logging is set up already."""


def serve(settings: Settings) -> None:
    """Run the worker until SIGTERM or SIGINT; returns when every process of its own is gone."""
    storage(settings)  # a URL that nothing serves is told before a job is claimed
    database = connect(settings).acting(Actor(ActorKind.WORKER, name=settings.shown_worker_name))
    schema.check_current(database)
    slots = build_slots(settings, Spawner())
    ready = _learn(slots[0])
    registration = _Registration(settings, database, ready, len(slots))
    runner = Runner(
        settings,
        database,
        worker_id=registration.worker_id,
        capability=registration.capability,
        speeds=registration.speeds,
        slots=slots,
    )
    for slot in slots:
        slot.warm_up()
    # Celery would set the root logger's level to its own, and warn root of pickles, which we do not accept.
    signals.setup_logging.connect(_leave_logging_alone, weak=False)
    warnings.filterwarnings("ignore", category=SecurityWarning)
    celery = make_celery(settings.celery_broker_url)
    register(celery, runner)
    registration.start(runner)
    stopping = threading.Event()

    def watch() -> None:
        # Celery sets a flag in its signal handler and looks at it between two polls of the broker, which may
        # be away; this thread does not depend on it.
        stopping.wait()
        log.info("stopping: running jobs take a checkpoint and go back to the queue")
        runner.drain()
        deadline = time.monotonic() + settings.drain_seconds + 3.0
        while time.monotonic() < deadline and runner.busy:
            time.sleep(0.05)
        registration.stop()
        runner.close()
        log.info("worker stopped")
        sys.stderr.flush()
        os._exit(0)

    watcher = threading.Thread(target=watch, name="watcher", daemon=True)
    watcher.start()
    controller = celery.Worker(
        pool="threads",
        concurrency=len(slots),
        queues=[QUEUE],
        hostname=f"{registration.worker_id}@{socket.gethostname()}",
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )

    # Sent from Celery's own signal handlers; a worker that waits for its broker sends it too.
    signals.worker_shutting_down.connect(lambda **_: stopping.set(), weak=False)
    log.info(
        "worker ready",
        device=registration.capability.device_name,
        type=registration.capability.device_type,
        slots=len(slots),
        torch=ready.versions.get("torch"),
    )
    runner.look()
    controller.start()
    stopping.set()
    watcher.join()


def main() -> None:
    """Entry point of `python -m halfstep.worker.app`."""
    try:
        settings = Settings()
    except (ValidationError, ValueError) as error:
        sys.exit(f"halfstep worker: {error}")
    configure(settings, "worker")
    try:
        serve(settings)
    except HalfstepError as error:
        sys.exit(f"halfstep worker: {error}")


if __name__ == "__main__":
    main()
