"""What all tables share: the metadata, and column types that mean the same on SQLite and PostgreSQL."""

import json
import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import Double, MetaData, String, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s",
    }
)


class JsonText(TypeDecorator[Any]):
    """A JSON document as ASCII text: the same bytes in both databases, NaN and Infinity included."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002  # the base class's signature
        """Python value → text; None stays NULL."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002  # as above
        """Text → Python value."""
        return None if value is None else json.loads(value)


class _AsItIs(Double[float]):
    """A double that SQLAlchemy hands to the driver unconverted."""

    def bind_processor(self, dialect: Dialect) -> None:  # noqa: ARG002  # the base class's signature
        """No conversion."""
        return

    def result_processor(self, dialect: Dialect, coltype: object) -> None:  # noqa: ARG002  # as above
        """No conversion."""
        return


class ExactDouble(TypeDecorator[float]):
    """A double that keeps NaN. SQLite stores NaN as NULL, so there it is the text 'NaN'."""

    impl = Double
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Unconverted on SQLite: the text must reach it as text."""
        return dialect.type_descriptor(_AsItIs() if dialect.name == "sqlite" else Double())

    def process_bind_param(self, value: float | None, dialect: Dialect) -> Any:
        """NaN → 'NaN' on SQLite; everything else as it is."""
        if value is not None and dialect.name == "sqlite" and math.isnan(value):
            return "NaN"
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:  # noqa: ARG002  # as above
        """Back to a float."""
        return None if value is None else float(value)


def one_of(column: str, values: Iterable[StrEnum | str]) -> str:
    """The SQL condition that `column` holds one of these values."""
    return f"{column} IN ({', '.join(repr(str(value)) for value in sorted(values))})"


# Ids are UUIDv7 text. PostgreSQL compares them byte by byte, as SQLite does.
Id = String(36).with_variant(String(36, collation="C"), "postgresql")
Time = Double  # seconds since the epoch, from db_now()
