"""INSERT … ON CONFLICT for both databases, whose dialects spell it alike but apart."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Insert, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session


def _insert(s: Session, table: Table) -> postgresql.Insert | sqlite.Insert:
    if s.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def upsert(s: Session, table: Table, rows: Sequence[dict[str, Any]]) -> Insert:
    """Insert rows by the table's primary key; where the key is there, replace every other given column."""
    statement = _insert(s, table).values(list(rows))
    key = [column.name for column in table.primary_key]
    return statement.on_conflict_do_update(
        index_elements=key,
        set_={name: statement.excluded[name] for name in rows[0] if name not in key},
    )


def insert_new(s: Session, table: Table, **values: Any) -> Insert:
    """Insert a row unless its key is there; the RETURNING of the caller says which."""
    return _insert(s, table).values(**values).on_conflict_do_nothing()


def insert_new_rows(s: Session, table: Table) -> Insert:
    """The same for many: executed with a list of rows, its RETURNING gives those that were inserted."""
    return _insert(s, table).on_conflict_do_nothing()
