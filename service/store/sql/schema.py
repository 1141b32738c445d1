"""Bringing a database to this version's schema, and refusing to run on one that this version does not know.

The steps themselves are in `migrations/versions`. A revision `0008_since_0006` says that what knows 0006 runs
on it too: it only adds what those versions never name. The database thus tells an older version that it may
stay while a newer one takes over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from halfstep import migrations
from halfstep.service.errors import ConfigurationError
from halfstep.service.store.sql.database import Database, driver_url, make_engine

_ADVISORY_LOCK = 0x68616C6673746570  # "halfstep"
_PATIENCE_SECONDS = 300.0
_SINCE = "_since_"


def migrate(url: str) -> None:
    """Bring the database to the newest schema; does nothing where it is there already, or beyond.

    Any number of processes may call this at once: one works, the others wait for it. It is one transaction,
    so a failure leaves the schema as it was.

    Raises:
        ConfigurationError: it is a later version's, and this one cannot run on it.
    """
    parsed = driver_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database is not None:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(
        parsed,
        pool_size=1,
        statement_seconds=_PATIENCE_SECONDS,
        lock_seconds=_PATIENCE_SECONDS,
        idle_seconds=_PATIENCE_SECONDS,
    )
    try:
        with _alone(engine) as connection:
            if _is_later(MigrationContext.configure(connection).get_current_revision()):
                return
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def check_current(db: Database) -> None:
    """Make sure that the database has this version's schema, or a later one on which this version runs.

    Raises:
        ConfigurationError: it has not; says what to do.
        StoreUnavailable: the database did not answer.
    """
    wanted = ScriptDirectory.from_config(_config()).get_current_head()
    with db.read() as session:
        found = MigrationContext.configure(session.connection()).get_current_revision()
    if found == wanted or _is_later(found):
        return
    raise ConfigurationError(
        f"the database's schema is {found or 'empty'} and this version needs {wanted}; run `halfstep migrate`"
    )


def _is_later(found: str | None) -> bool:
    """Whether a later version made the schema `found`; a ConfigurationError if this one cannot use it."""
    known = {each.revision for each in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is None or found in known:
        return False
    since = found.partition(_SINCE)[2]
    if since in {revision.partition(_SINCE)[0] for revision in known}:
        return True
    raise ConfigurationError(
        f"the database's schema is {found}, made by a newer halfstep; run that one or restore a backup"
    )


def _config() -> Config:
    config = Config()
    location = str(Path(migrations.__file__).parent)
    config.set_main_option("script_location", location.replace("%", "%%"))
    return config


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    # SQLite: the write lock of the whole file. PostgreSQL: a lock that goes with the transaction.
    with engine.execution_options(halfstep_writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        yield connection
