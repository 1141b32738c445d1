"""The dispatcher's loop: every duty in turn, again and again."""

import math
import threading
import time
from collections.abc import Callable
from functools import partial

import structlog

from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.dispatch.leases import take_back
from halfstep.service.dispatch.no_worker import fail_without_worker
from halfstep.service.dispatch.retention import remove_old
from halfstep.service.dispatch.rounds import Round
from halfstep.service.dispatch.sequencing import give_positions
from halfstep.service.dispatch.sweeping import sweep
from halfstep.service.dispatch.wake_ups import send_again
from halfstep.service.errors import StoreUnavailable
from halfstep.service.files.storage import storage
from halfstep.service.queue import enqueue
from halfstep.service.settings import Settings
from halfstep.service.store.sql import schema
from halfstep.service.store.sql.database import Database, connect

log = structlog.get_logger(__name__)

DISPATCHER = Actor(ActorKind.DISPATCHER)
DUTIES: tuple[Callable[[Round], None], ...] = (
    take_back,
    fail_without_worker,
    send_again,
    give_positions,
    remove_old,
    sweep,
)


def one_round(settings: Settings, database: Database, *, up_seconds: float = math.inf) -> None:
    """Everything the dispatcher does, once; `up_seconds` says for how long this process has been up.

    Raises:
        StoreUnavailable: The database is away; the next round tries again.
    """
    now = Round(settings, database.acting(DISPATCHER), up_seconds, partial(enqueue, settings))
    for duty in DUTIES:
        duty(now)


def run(settings: Settings, stop: threading.Event) -> None:
    """Rounds every `dispatch_seconds` until `stop` is set."""
    storage(settings)  # a URL that nothing serves is told now
    database = connect(settings)
    schema.check_current(database)
    log.info("dispatcher ready", every_seconds=settings.dispatch_seconds)
    away = False
    began = time.monotonic()
    while not stop.is_set():
        try:
            one_round(settings, database, up_seconds=time.monotonic() - began)
        except StoreUnavailable as error:
            if not away:
                log.warning("database away", error=str(error))
            away = True
        else:
            if away:
                log.info("database back")
            away = False
        stop.wait(settings.dispatch_seconds)
    database.dispose()
