"""The outbox: the events of all jobs in one order, what waits for its place in it, and who has read how far.

A trigger on `job_events` puts every new event into `outbox_waiting`, in the writer's own transaction and
whatever the writer's version is. Places are given to what is committed; `store.outbox` says how.
"""

from sqlalchemy import BigInteger, Column, Identity, Index, Integer, PrimaryKeyConstraint, Table, Text

from halfstep.service.store.tables.types import Id, Time, metadata

# SQLite counts by itself only in a column of this very type; AUTOINCREMENT uses no number twice.
_Counted = BigInteger().with_variant(Integer(), "sqlite")

outbox_waiting = Table(
    "outbox_waiting",
    metadata,
    # Drawn before the commit: says in what order to take those that can be seen, and no more than that.
    Column("id", _Counted, Identity(), primary_key=True),
    Column("job_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# An entry names the event; its text stays in job_events, and goes with the job when that is deleted.
outbox = Table(
    "outbox",
    metadata,
    # Given under a lock that lasts until the commit: whoever sees a position sees every lower one too.
    Column("position", _Counted, Identity(), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("job_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    Column("at", Time, nullable=False),  # when it got its position
    Index("outbox_by_tenant", "tenant", "position"),
    sqlite_autoincrement=True,
)

outbox_cursors = Table(
    "outbox_cursors",
    metadata,
    Column("name", Text, nullable=False),
    # Everything up to here is done with.
    Column("position", BigInteger, nullable=False),
    # Rises with every new holder; a write under an old one is refused.
    Column("fence", BigInteger, nullable=False),
    Column("holder", Text),
    Column("held_until", Time),
    PrimaryKeyConstraint("name"),
)
