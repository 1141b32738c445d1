"""`python -m halfstep.service.api`: serve the API until SIGTERM or SIGINT, then end with status 0."""

import gc
import signal
import socket
import sys
import time
from types import FrameType
from typing import Never

import structlog
import uvicorn

from halfstep.service import logs
from halfstep.service.api.app import create_app
from halfstep.service.api.context import Context
from halfstep.service.errors import ConfigurationError, StoreUnavailable
from halfstep.service.files.storage import storage
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database, connect
from halfstep.service.store.sql.schema import check_current
from halfstep.service.store.tenants import keys

DATABASE_WAIT_SECONDS = 30.0
GRACE_SECONDS = 20
# Requests come in on the event loop while a thread talks to the database: the loop waits this long at most
# for its turn, instead of Python's 5 ms.
SWITCH_SECONDS = 0.0005

_log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn, but requests that wait for a change are answered before the process ends."""

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wake who waits, then let the connections finish."""
        self._context.watcher.stop()
        await super().shutdown(sockets)


def main() -> int:
    """Run the server; 0 after a clean stop, 2 where the configuration forbids to start."""
    # Ending by a signal is the normal end, before serving too. While uvicorn serves it has handlers of its
    # own; it raises the signal again once it has stopped.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        settings = Settings()
    except ValueError as error:
        sys.stderr.write(f"halfstep api: {error}\n")
        return 2
    logs.configure(settings, "api")
    database = connect(settings)
    try:
        storage(settings)  # a URL that nothing serves is told now
        _when_reachable(database)
        check_current(database)
        refuse_keyless(settings, database)
        app = create_app(settings, database)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            # Who a client is, and by which scheme it came, is believed from a proxy on this machine only.
            forwarded_allow_ips="127.0.0.1,::1",
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = _Server(config, app.state.context)
        # What is there by now stays: without this every full collection walks it all, and nobody is answered
        # for a tenth of a second, every few seconds under load.
        gc.collect()
        gc.freeze()
        server.run()
    except (ConfigurationError, StoreUnavailable) as error:
        _log.error("start_refused", reason=str(error))
        return 2
    finally:
        database.dispose()
    return 0


def refuse_keyless(settings: Settings, database: Database) -> None:
    """Refuse to listen beyond this machine while anybody could use the server.

    Raises:
        ConfigurationError: the host is not loopback and no key is active.
    """
    if settings.loopback_only:
        return
    with database.read() as session:
        if keys.any_active(session):
            return
    raise ConfigurationError(
        f"HALFSTEP_HOST={settings.host} is reachable from other machines and no API key is active: make one "
        "with `halfstep keys create`, or set HALFSTEP_HOST=127.0.0.1"
    )


def _end(_signal: int, _frame: FrameType | None) -> Never:
    raise SystemExit(0)


def _when_reachable(database: Database) -> None:
    """Wait for a database that is starting beside this process."""
    deadline = time.monotonic() + DATABASE_WAIT_SECONDS
    while True:
        try:
            database.ping()
        except StoreUnavailable as error:
            if time.monotonic() > deadline:
                raise
            _log.warning("database_unreachable", error=str(error))
            time.sleep(1.0)
        else:
            return


if __name__ == "__main__":
    sys.exit(main())
