"""The engine: how both databases are opened, how a transaction begins, and which failures pass by themselves.

The rest of the store sees a `Session`; nothing outside this file knows a driver.
"""

import copy
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, TypeVar, cast

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from halfstep.service.contract.events import Actor
from halfstep.service.errors import StoreUnavailable
from halfstep.service.settings import Settings

T = TypeVar("T")
Dialect = Literal["sqlite", "postgresql"]

_WRITES = "halfstep_writes"
_ACTOR = "halfstep_actor"

# Serialization, deadlock, lock timeout, statement timeout, idle-in-transaction timeout, read-only (a standby
# after a failover), out of connections or memory; the classes 08 and 57P are lost and refused connections.
# 53100 is a full disk, as SQLITE_FULL below: an operator can free it while the record is buffered.
_TRANSIENT_SQLSTATES = frozenset(
    {"40001", "40P01", "55P03", "57014", "25P03", "25006", "53100", "53200", "53300"}
)
_TRANSIENT_CLASSES = ("08", "57P")
_TRANSIENT_SQLITE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)


class Database:
    """One database and its pool of connections; safe to share between threads, not across a fork.

    Args:
        url: `sqlite:////path` or `postgresql://…`; the PostgreSQL driver is psycopg.
        pool_size: connections kept; as many again may be opened for a burst.
        statement_seconds: longest time for one statement on PostgreSQL.
        lock_seconds: longest wait for a lock, on either database.
        idle_seconds: longest pause inside a transaction on PostgreSQL, which then ends it. A process that is
            frozen there, or whose host is gone, keeps what it has locked for as long: at most a lease.

    Attributes:
        actor: who acts in the write transactions; None: nobody said so.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        statement_seconds: float = 10.0,
        lock_seconds: float = 3.0,
        idle_seconds: float = 10.0,
    ) -> None:
        self.url = driver_url(url)
        self.dialect = cast("Dialect", self.url.get_backend_name())
        self._engine = make_engine(
            self.url,
            pool_size=pool_size,
            statement_seconds=statement_seconds,
            lock_seconds=lock_seconds,
            idle_seconds=idle_seconds,
        )
        self._reads = self._engine.execution_options(postgresql_readonly=True)
        self._writes = self._engine.execution_options(**{_WRITES: True})
        self.actor: Actor | None = None

    def acting(self, actor: Actor) -> Self:
        """The same database, and the same connections, for what `actor` does; the edge says it once."""
        other = copy.copy(self)
        other.actor = actor
        return other

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only transaction; a write in it is an error.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        with _unavailable_when_transient(), Session(self._reads, autoflush=False) as session:
            yield session

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """A write transaction: committed when the block ends, rolled back when it raises.

        Raises:
            StoreUnavailable: a transient failure; whether a commit that was under way took place is unknown.
        """
        with (
            _unavailable_when_transient(),
            Session(self._writes, autoflush=False, info={_ACTOR: self.actor}) as session,
            session.begin(),
        ):
            yield session

    def retry(self, fn: Callable[[Session], T], *, seconds: float = 5.0) -> T:
        """Run `fn` in a write transaction, the whole of it again after a transient failure.

        `fn` may run again even after a commit whose answer was lost: it must recognise its own work.

        Raises:
            StoreUnavailable: it still failed after `seconds`.
        """
        deadline = time.monotonic() + seconds
        pause = 0.02
        while True:
            try:
                with self.begin() as session:
                    return fn(session)
            except StoreUnavailable:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # spreads retries; no secret depends on it
            pause = min(pause * 2, 0.5)

    def ping(self) -> None:
        """One round trip.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def dispose(self) -> None:
        """Close every connection of the pool."""
        self._engine.dispose()


def connect(settings: Settings) -> Database:
    """The installation's database. No connection is opened yet."""
    # What a frozen process, or one whose host is gone, has locked must be free when its lease ends.
    return Database(settings.sql_url, idle_seconds=min(10.0, settings.lease_seconds))


def actor_of(s: Session) -> Actor | None:
    """Who acts in this transaction; None where nobody said so."""
    actor: Actor | None = s.info.get(_ACTOR)
    return actor


def driver_url(url: str | URL) -> URL:
    """The URL with the driver this store uses.

    Raises:
        ValueError: neither SQLite nor PostgreSQL.
    """
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed.set(drivername="sqlite+pysqlite")
    raise ValueError(f"{parsed.drivername} is not a SQLite file or PostgreSQL")


def make_engine(
    url: URL, *, pool_size: int, statement_seconds: float, lock_seconds: float, idle_seconds: float
) -> Engine:
    """An engine with this store's pragmas and timeouts. Connections open when they are first used."""
    if url.get_backend_name() == "sqlite":
        engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=lock_seconds + 2,
            connect_args={"timeout": lock_seconds, "isolation_level": None},
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    milliseconds = {
        "statement_timeout": statement_seconds,
        "lock_timeout": lock_seconds,
        "idle_in_transaction_session_timeout": idle_seconds,
    }
    return create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=lock_seconds + 2,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 3,
            # A server that vanished without a word is noticed in seconds, not after TCP's quarter of an hour.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": int(statement_seconds * 1000) + 2000,
            "target_session_attrs": "read-write",
            "application_name": "halfstep",
            "options": " ".join(f"-c {name}={int(seconds * 1000)}" for name, seconds in milliseconds.items()),
        },
    )


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    cursor = connection.cursor()
    try:
        # The mode is a property of the file; changing it needs the file alone, so only ever once.
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that turns into a writer cannot wait for its lock: it fails at once when
    # another wrote meanwhile. So writers take the lock first, and readers are kept from writing.
    if connection.get_execution_options().get(_WRITES):
        connection.exec_driver_sql("PRAGMA query_only = OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("PRAGMA query_only = ON")
        connection.exec_driver_sql("BEGIN")


@contextmanager
def _unavailable_when_transient() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise StoreUnavailable("every database connection is busy; try again shortly") from error
    except DBAPIError as error:
        if is_transient(error):
            raise StoreUnavailable(f"the database did not answer: {_first_line(error.orig)}") from error
        raise


def is_transient(error: DBAPIError) -> bool:
    """True where the same transaction may succeed later."""
    if error.connection_invalidated:
        return True
    cause: Any = error.orig
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in _TRANSIENT_SQLITE
    if isinstance(cause, psycopg.Error):
        state = cause.sqlstate
        if state is None:
            # No answer from a server at all: refused, reset, timed out, or a server that is not the primary.
            return isinstance(cause, psycopg.OperationalError)
        return state in _TRANSIENT_SQLSTATES or state.startswith(_TRANSIENT_CLASSES)
    return False


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
