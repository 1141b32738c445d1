"""The frozen installation, unpacked, and its rows put into either database as 0.1 left them.

How it was made is in `making`, and what it answered in `exchanges`.
"""

import json
import sqlite3
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Double,
    LargeBinary,
    MetaData,
    Table,
    create_engine,
    insert,
)

import halfstep.migrations

DATA = Path(__file__).parent / "data"
REVISION = "0006"
"""The newest migration of 0.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """One copy of it.

    Attributes:
        folder: its data directory.
        database_url: of its rows, with the schema of 0.1.
        jobs: ids by name.
        keys: the secrets of its API keys, by name.
        made_at: seconds since the epoch; all that it holds is older.
    """

    folder: Path
    database_url: str
    jobs: dict[str, str]
    keys: dict[str, str]
    made_at: float


def unpack(folder: Path) -> Installation:
    """A copy of it in `folder`, on its SQLite file."""
    with tarfile.open(DATA / "installation.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    file = folder / "halfstep.db"
    return Installation(
        folder=folder,
        database_url=f"sqlite:///{file}",
        jobs=index["jobs"],
        keys=index["keys"],
        made_at=index["made_at"],
    )


def first_schema(database_url: str) -> None:
    """Give an empty PostgreSQL database the schema that 0.1 made."""
    config = Config()
    config.set_main_option("script_location", str(Path(halfstep.migrations.__file__).parent))
    engine = create_engine(database_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, REVISION)
    engine.dispose()


def copy_rows(file: Path, database_url: str) -> None:
    """Put every row of the SQLite file into a PostgreSQL database that has the same tables, without rows."""
    source = sqlite3.connect(file)
    source.row_factory = sqlite3.Row
    engine = create_engine(database_url)
    metadata = MetaData()
    metadata.reflect(engine)
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            if table.name != "alembic_version":
                _copy_table(source, connection, table)
    engine.dispose()
    source.close()


def _copy_table(source: sqlite3.Connection, connection: Connection, table: Table) -> None:
    # A retry's parent was there before it: rows come in the order in which they were written.
    rows = [
        {column.name: _value(row[column.name], column.type) for column in table.columns}
        for row in source.execute(f'SELECT * FROM "{table.name}" ORDER BY rowid')
    ]
    if rows:
        connection.execute(insert(table), rows)


def _value(stored: Any, kind: object) -> Any:
    """A value of SQLite, which knows no booleans and keeps NaN as text, as PostgreSQL's type wants it."""
    if stored is None:
        return None
    if isinstance(kind, Boolean):
        return bool(stored)
    if isinstance(kind, Double):
        return float(stored)
    if isinstance(kind, BigInteger):
        return int(stored)
    return bytes(stored) if isinstance(kind, LargeBinary) else stored
