"""Databases for tests: each run makes its own and drops it; both kinds carry the migrated schema.

`database_url` and `database` run a test once on SQLite and once on PostgreSQL. The server is
HALFSTEP_TEST_POSTGRES_URL, else the local one; where none answers, the test is skipped with the reason,
or fails where CI=true says that one must be there.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from halfstep.service.store.tables import metadata

LOCAL_SERVER = "postgresql://postgres@127.0.0.1:5432/postgres"
KINDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.postgres))


def _connect(url: str) -> "psycopg.Connection[tuple[object, ...]]":
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True, connect_timeout=3)


@contextmanager
def postgres_database() -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database, dropped afterwards."""
    server = os.environ.get("HALFSTEP_TEST_POSTGRES_URL") or LOCAL_SERVER
    try:
        connection = _connect(server)
    except psycopg.OperationalError as error:
        reason = f"no PostgreSQL: {str(error).strip()}; set HALFSTEP_TEST_POSTGRES_URL"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    name = f"halfstep_test_{uuid.uuid4().hex[:12]}"
    with connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            url = make_url(server).set(drivername="postgresql+psycopg", database=name)
            yield url.render_as_string(hide_password=False)
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def empty_database(kind: str, directory: Path) -> Iterator[str]:
    """The URL of a new database of this kind, without any table."""
    if kind == "sqlite":
        yield f"sqlite:///{directory / f'{uuid.uuid4().hex[:12]}.db'}"
    else:
        with postgres_database() as url:
            yield url


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def _migrated_postgres() -> Iterator[str]:
    with postgres_database() as url:
        migrate(url)
        yield url


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a migrated database without rows, of each kind in turn."""
    if request.param == "sqlite":
        path = tmp_path / "halfstep.db"
        shutil.copy(request.getfixturevalue("_migrated_file"), path)
        return f"sqlite:///{path}"
    url: str = request.getfixturevalue("_migrated_postgres")
    with _connect(url) as connection:
        tables = sql.SQL(", ").join(sql.Identifier(table.name) for table in metadata.sorted_tables)
        connection.execute(sql.SQL("TRUNCATE {}").format(tables))
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open `Database` on `database_url`."""
    opened = Database(database_url)
    yield opened
    opened.dispose()
