"""The step record as most would store it, a row per step: executemany on SQLite, COPY on PostgreSQL.

The fastest honest form of each: the driver without SQLAlchemy, one transaction a batch, durable commits.
"""

import math
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psycopg

from halfstep.service.contract.metrics import FLAG_COLUMNS, METRIC_COLUMNS, StepMetrics

_TYPES = {
    **dict.fromkeys(METRIC_COLUMNS, "DOUBLE PRECISION"),
    **dict.fromkeys(("step", "epoch", "memory_allocated_bytes", "memory_reserved_bytes"), "BIGINT"),
    **dict.fromkeys(FLAG_COLUMNS, "BOOLEAN"),
    "compute_dtype": "SMALLINT",
}
_CREATE = (
    "CREATE TABLE step_rows (job INTEGER NOT NULL, "
    + ", ".join(f"{name} {_TYPES[name]}" for name in METRIC_COLUMNS)
    + ", PRIMARY KEY (job, step))"
)
_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
_PAGE = "SELECT * FROM step_rows WHERE job = 1 AND step > {0} ORDER BY step LIMIT 1000"


def _plot_query(width: int) -> str:
    numbers = [n for n in METRIC_COLUMNS if n not in FLAG_COLUMNS and n not in {"step", "compute_dtype"}]
    extremes = [f"min({name}), max({name})" for name in numbers]
    counts = [f"sum(CASE WHEN {name} THEN 1 ELSE 0 END)" for name in FLAG_COLUMNS]
    return (
        f"SELECT (step - 1) / {width}, min(step), max(step), {', '.join(extremes + counts)} FROM step_rows "
        f"WHERE job = 1 GROUP BY (step - 1) / {width} ORDER BY 1"
    )


class Rows(Protocol):
    """One database of rows."""

    def append(self, rows: Sequence[StepMetrics]) -> None:
        """One batch, committed."""

    def page(self, after: int) -> list[tuple[Any, ...]]:
        """1 000 steps."""

    def plot(self, steps: int) -> list[tuple[Any, ...]]:
        """Minimum, maximum and counts of 500 buckets; first and last of each would cost a join more."""

    def bytes(self) -> int:
        """What the rows and their index take."""

    def close(self) -> None:
        """Release it."""


class SqliteRows:
    """`executemany`, WAL, synchronous FULL."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(_CREATE)
        marks = ", ".join("?" * (len(METRIC_COLUMNS) + 1))
        self._insert = f"INSERT INTO step_rows VALUES ({marks})"

    def append(self, rows: Sequence[StepMetrics]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(self._insert, _coded(rows))
        self._connection.execute("COMMIT")

    def page(self, after: int) -> list[tuple[Any, ...]]:
        return self._connection.execute(_PAGE.format(after)).fetchall()

    def plot(self, steps: int) -> list[tuple[Any, ...]]:
        return self._connection.execute(_plot_query(math.ceil(steps / 500))).fetchall()

    def bytes(self) -> int:
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return self._path.stat().st_size

    def close(self) -> None:
        self._connection.close()


class PostgresRows:
    """`COPY … FROM STDIN`."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url)
        self._connection.execute(_CREATE)
        self._connection.commit()

    def append(self, rows: Sequence[StepMetrics]) -> None:
        with self._connection.cursor() as cursor, cursor.copy("COPY step_rows FROM STDIN") as copy:
            for row in _coded(rows):
                copy.write_row(row)
        self._connection.commit()

    def page(self, after: int) -> list[tuple[Any, ...]]:
        return self._query(_PAGE.format(after))

    def plot(self, steps: int) -> list[tuple[Any, ...]]:
        return self._query(_plot_query(math.ceil(steps / 500)))

    def bytes(self) -> int:
        return int(self._query("SELECT pg_total_relation_size('step_rows')")[0][0])

    def close(self) -> None:
        self._connection.close()

    def _query(self, statement: str) -> list[tuple[Any, ...]]:
        found = self._connection.execute(statement).fetchall()
        self._connection.commit()
        return list(found)


def _coded(rows: Iterable[StepMetrics]) -> Iterable[tuple[Any, ...]]:
    return [(1, *row[:-1], _CODES[row.compute_dtype]) for row in rows]
