"""The database's clock, the only clock that leases and order are judged by.

Nothing here reads the time of the calling host.
"""

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class db_now(FunctionElement[float]):  # noqa: N801  # used like the SQL function it is
    """Seconds since the epoch, as a double, when the statement is executed.

    On PostgreSQL it moves inside a transaction. On SQLite it is the host's clock, in milliseconds.
    """

    type = Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite(_element: db_now, _compiler: SQLCompiler, **_options: object) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42; the Julian day is not.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql(_element: db_now, _compiler: SQLCompiler, **_options: object) -> str:
    return "EXTRACT(EPOCH FROM clock_timestamp())::double precision"
