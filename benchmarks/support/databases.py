"""Empty databases for benchmarks, gone afterwards."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import make_url

LOCAL_SERVER = "postgresql://postgres@127.0.0.1:5432/postgres"


@contextmanager
def new_database(kind: str, directory: Path, server: str) -> Iterator[str]:
    """The URL of an empty database: a file in `directory`, or one more on the PostgreSQL at `server`."""
    name = f"halfstep_bench_{uuid.uuid4().hex[:12]}"
    if kind == "sqlite":
        path = directory / f"{name}.db"
        yield f"sqlite:///{path}"
        for each in directory.glob(f"{name}.db*"):
            each.unlink()
        return
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield make_url(server).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
