"""`halfstep health PART`: whether a part does its work, for container health checks. Exit code 0 or 1.

It asks for what the part is there for, not whether a process exists: the API answers, the worker's row
is fresh, no queued job waits for the dispatcher.
"""

from enum import StrEnum
from typing import Annotated

import httpx
import typer

from halfstep.service.errors import HalfstepError
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.fleet import workers
from halfstep.service.store.sql.database import Database, connect

OVERDUE_SECONDS = 60.0  # the dispatcher's rounds are a second apart
API_TIMEOUT_SECONDS = 3.0


class Unhealthy(HalfstepError):
    """A part does not do its work."""

    code = "unhealthy"


class PartName(StrEnum):
    """What can be asked about."""

    API = "api"
    WORKER = "worker"
    DISPATCH = "dispatch"


def register(app: typer.Typer) -> None:
    """Add the command to the tree."""
    app.command()(health)


def health(
    part: Annotated[PartName, typer.Argument(help="Which part, with this machine's settings.")],
) -> None:
    """Say whether the API, this machine's worker or the dispatcher does its work."""
    settings = Settings()
    if part is PartName.API:
        _api(settings)
        return
    database = connect(settings)
    try:
        if part is PartName.WORKER:
            _worker(settings, database)
        else:
            _dispatch(database)
    finally:
        database.dispose()


def _api(settings: Settings) -> None:
    host = settings.host if settings.loopback_only else "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/health/live"
    try:
        httpx.get(url, timeout=API_TIMEOUT_SECONDS, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise Unhealthy(f"{url}: {error}") from error


def _worker(settings: Settings, database: Database) -> None:
    name = settings.shown_worker_name
    with database.read() as session:
        live = workers.list_workers(session, live_seconds=3 * settings.heartbeat_seconds)
    if name not in {each.name for each in live}:
        raise Unhealthy(f"the worker {name} has not been seen for {3 * settings.heartbeat_seconds:g} s")


def _dispatch(database: Database) -> None:
    with database.read() as session:
        waiting = jobs.unclaimed(session, older_than=OVERDUE_SECONDS, limit=1)
    if waiting:
        raise Unhealthy(f"job {waiting[0]} has been waiting to be sent for more than {OVERDUE_SECONDS:g} s")
