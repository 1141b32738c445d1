"""INSERT … ON CONFLICT for both databases, whose dialects spell it alike but apart."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Insert,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

NewRow: TypeAlias = Mapping[str, Any]


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


def insert_new_rows(s: Session, table: Table, rows: Sequence[NewRow]) -> set[tuple[Any, ...]]:
    """Insert the rows whose key is not there yet, in their order; returns the keys inserted.

    The rows have the same columns; their numbers are finite.
    """
    if s.get_bind().dialect.name == "postgresql":
        return _insert_documents(s, {table: rows}, of="")
    statement = _insert(s, table).on_conflict_do_nothing().returning(*table.primary_key)
    return {tuple(row) for row in s.execute(statement, rows)}


def insert_rows(s: Session, table: Table, rows: Sequence[NewRow]) -> None:
    """Insert rows that are new, in their order; a key that is there already is an error.

    The rows have the same columns; their numbers are finite.
    """
    if len(rows) > 1 and s.get_bind().dialect.name == "postgresql":
        s.execute(_all_from_document(table, tuple(rows[0])), {table.name: _document(s, table, rows)})
    elif rows:
        s.execute(insert(table), list(rows))


@cache
def _all_from_document(table: Table, names: tuple[str, ...]) -> Insert:
    return insert(table).from_select(names, _rows_of(table, names))


def insert_families(
    s: Session, table: Table, rows: Sequence[NewRow], kin: Mapping[Table, Sequence[NewRow]], *, of: str
) -> set[str]:
    """The same with each row's kin: the rows of other tables whose column `of` is the row's key."""
    if s.get_bind().dialect.name == "postgresql":
        given = {other: theirs for other, theirs in kin.items() if theirs}
        return {key for (key,) in _insert_documents(s, {table: rows, **given}, of=of)}
    inserted = {key for (key,) in insert_new_rows(s, table, rows)}
    for other, theirs in kin.items():
        new = [row for row in theirs if row[of] in inserted]
        if new:
            # Many rows go into one statement only where it returns something.
            s.execute(insert(other).returning(other.c[of]), new)
    return inserted


def _insert_documents(s: Session, rows: Mapping[Table, Sequence[NewRow]], *, of: str) -> set[tuple[Any, ...]]:
    # One document a table: the statement does not depend on the number of rows, so it is composed, sent and
    # planned once for each connection. With a value list a table it costs several times as much.
    statement = _from_documents(tuple((table, tuple(theirs[0])) for table, theirs in rows.items()), of)
    documents = {table.name: _document(s, table, theirs) for table, theirs in rows.items()}
    return {tuple(row) for row in s.execute(statement, documents)}


@cache
def _from_documents(columns: tuple[tuple[Table, tuple[str, ...]], ...], of: str) -> Select[*tuple[Any, ...]]:
    (table, names), *kin = columns
    inserted = (
        postgresql.insert(table)
        .from_select(names, _rows_of(table, names))
        .on_conflict_do_nothing()
        .returning(*table.primary_key)
        .cte("inserted")
    )
    keys = select(*inserted.c)
    inserts = [
        insert(other).from_select(theirs, _rows_of(other, theirs).where(column(of).in_(keys)))
        for other, theirs in kin
    ]
    return keys.add_cte(*(one.cte(f"of_{one.table.name}") for one in inserts))


def _rows_of(table: Table, names: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """The rows of the document that is bound under the table's name."""
    shape: ColumnElement[Any] = literal_column(f"NULL::{table.name}")
    document = cast(bindparam(table.name, type_=Text), postgresql.JSON)
    columns: list[ColumnElement[Any]] = [column(name) for name in names]
    return select(*columns).select_from(func.json_populate_recordset(shape, document))


def _document(s: Session, table: Table, rows: Sequence[NewRow]) -> str:
    dialect = s.get_bind().dialect
    processors = {
        name: process
        for name in rows[0]
        if (process := table.c[name].type.dialect_impl(dialect).bind_processor(dialect)) is not None
    }
    return json.dumps(
        [{**row, **{name: process(row[name]) for name, process in processors.items()}} for row in rows]
    )
