"""The service's commands: `up` runs all of it on this machine; the others become one part.

Parts are started by module name, so that the worker's libraries stay out of this process.
"""

import asyncio
import errno
import importlib.util
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import httpx
import typer

from halfstep.service.cli.up import broker
from halfstep.service.cli.up.instance import held
from halfstep.service.cli.up.merged_log import MergedLog
from halfstep.service.cli.up.supervisor import Part, Supervisor
from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.errors import ConfigurationError
from halfstep.service.files.storage import storage
from halfstep.service.settings import Settings
from halfstep.service.store.jobs.upkeep import give_back_held
from halfstep.service.store.sql.database import connect
from halfstep.service.store.sql.schema import check_current
from halfstep.service.store.sql.schema import migrate as migrate_database
from halfstep.service.store.tenants.keys import SCOPES, import_secret

# The worker has HALFSTEP_DRAIN_SECONDS and a little more, the others what is left of the whole: with the
# default everything is gone within 30 s.
WORKER_EXTRA_SECONDS = 1.5
WHOLE_EXTRA_SECONDS = 4.5
STOP_SECONDS = 5.0
DataDir = Annotated[
    Path | None,
    typer.Option(help="Database, broker socket, checkpoints. [env: HALFSTEP_DATA_DIR]", show_default=False),
]
Host = Annotated[
    str | None, typer.Option(help="Address of the API. [env: HALFSTEP_HOST]", show_default=False)
]
Port = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, help="Port of the API; 0: a free one. [env: HALFSTEP_PORT]", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the tree."""
    for command in (up, api, worker, dispatch, migrate, restored, openapi):
        app.command()(command)


def up(data_dir: DataDir = None, host: Host = None, port: Port = None) -> None:
    """Run everything on this machine: API, dispatcher, worker and, without HALFSTEP_BROKER_URL, a broker."""
    for name, value in (("DATA_DIR", data_dir), ("HOST", host), ("PORT", port)):
        if value is not None:
            os.environ[f"HALFSTEP_{name}"] = str(value)
    settings = Settings()
    if importlib.util.find_spec("torch") is None:
        raise ConfigurationError(
            "`halfstep up` runs a worker too, which needs torch; pip install 'halfstep[all]'"
        )
    storage(settings)
    with held(settings.data_dir):
        port_number = _free_port(settings)
        parts = _parts(settings)
        _migrate(settings)
        environment = {
            **os.environ,
            "HALFSTEP_PORT": str(port_number),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
        }
        asyncio.run(_supervise(settings, parts, environment, port_number))


def api() -> None:
    """Serve the HTTP API. Run `halfstep migrate` first."""
    _become("halfstep.service.api")


def worker() -> None:
    """Run jobs on this machine's device. Run `halfstep migrate` first."""
    _become("halfstep.worker.app")


def dispatch() -> None:
    """Send queued jobs to workers and requeue those of lost ones. Run `halfstep migrate` first."""
    _become("halfstep.service.dispatch")


def migrate() -> None:
    """Bring the database to this version's schema, and store HALFSTEP_BOOTSTRAP_KEY if one is given."""
    _migrate(Settings())


def restored() -> None:
    """After a backup was restored: queue again, uncharged, what workers held when the copy was taken."""
    database = connect(Settings()).acting(Actor(ActorKind.COMMAND_LINE))
    try:
        check_current(database)
        given_back = 0
        while some := database.retry(give_back_held):
            given_back += len(some)
    finally:
        database.dispose()
    print(f"{given_back} jobs that were held go on")


def openapi() -> None:
    """Print the API's OpenAPI document."""
    # Only this command needs FastAPI in the process; the API itself is a process of its own.
    from halfstep.service.api.export import render  # noqa: PLC0415 - only this command needs it

    sys.stdout.write(render())


def _migrate(settings: Settings) -> None:
    if not settings.database_url:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    migrate_database(settings.sql_url)
    if settings.bootstrap_key:
        database = connect(settings)
        try:
            database.retry(
                lambda session: import_secret(
                    session, settings.bootstrap_key, tenant="default", name="bootstrap", scopes=SCOPES
                )
            )
        finally:
            database.dispose()


def _become(module: str) -> NoReturn:
    storage(Settings())  # a wrong setting is told here, not as a traceback of the part
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module])  # noqa: S606  # a module name of our own


def _parts(settings: Settings) -> list[Part]:
    def module(name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", name)

    parts = [
        Part(name="api", command=module("halfstep.service.api"), stop_seconds=STOP_SECONDS),
        Part(name="dispatch", command=module("halfstep.service.dispatch"), stop_seconds=STOP_SECONDS),
        # Left alone, a worker drains by itself: its jobs get their last checkpoint.
        Part(
            name="worker",
            command=module("halfstep.worker.app"),
            stop_seconds=settings.drain_seconds + WORKER_EXTRA_SECONDS,
            orphan_signal=signal.SIGTERM,
        ),
    ]
    if not settings.broker_url:
        path = settings.broker_socket
        embedded = Part(
            name="broker",
            command=broker.command(path),
            stop_seconds=STOP_SECONDS,
            muted=broker.MUTED,
            ready=partial(broker.answers, path),
        )
        parts.insert(0, embedded)
    return parts


def _free_port(settings: Settings) -> int:
    """The API's port, bound for a moment to be sure of it.

    Raises:
        ConfigurationError: It is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = (
                f"port {settings.port} of {settings.host} is in use; set HALFSTEP_PORT (or --port) to another"
            )
        else:
            message = (
                f"the API cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
                "check HALFSTEP_HOST and HALFSTEP_PORT"
            )
        raise ConfigurationError(message) from error


async def _supervise(settings: Settings, parts: list[Part], environment: dict[str, str], port: int) -> None:
    log = MergedLog(as_json=settings.log_format == "json")
    supervisor = Supervisor(
        parts, environment=environment, log=log, stop_seconds=settings.drain_seconds + WHOLE_EXTRA_SECONDS
    )
    log.on_broken = supervisor.stop  # nobody reads any more: as when a terminal is closed
    log.say(f"data in {settings.data_dir}")
    began = time.monotonic()
    await supervisor.run(started=partial(_announce, settings, port, log, began))
    log.say("stopped")


async def _announce(settings: Settings, port: int, log: MergedLog, began: float) -> None:
    """Say when the API answers, and where."""
    # An API on every address answers on loopback too.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  # no bind
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
        while True:
            try:
                if (await client.get(f"{url}/health/ready")).is_success:
                    break
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)
    log.say(f"ready after {time.monotonic() - began:.1f} s: {url} ({url}/docs; Ctrl-C stops it)")
