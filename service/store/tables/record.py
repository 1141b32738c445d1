"""The step record: chunks of steps, their roll-ups for plots, and the series beside them."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    String,
    Table,
)

from halfstep.service.store.tables.types import Id, metadata

# Columnar chunks. They cannot overlap: append checks under the lock of the job that a batch begins at
# current_step + 1, and the primary key refuses the same first step twice.
metric_chunks = Table(
    "metric_chunks",
    metadata,
    Column("job_id", Id, nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    # The totals of job_stats as they were after last_step: truncation needs no pass over the whole record.
    Column("totals", LargeBinary, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    PrimaryKeyConstraint("job_id", "first_step"),
    CheckConstraint("first_step >= 1 AND last_step >= first_step", name="steps_in_order"),
)

# Rows of entries for plots, each of a level and a fixed number of steps, written when the last of these is
# and removed with it: a row that is there is complete and equals its steps.
metric_rollups = Table(
    "metric_rollups",
    metadata,
    Column("job_id", Id, nullable=False),
    Column("level", Integer, nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    PrimaryKeyConstraint("job_id", "level", "first_step"),
    CheckConstraint("level >= 1 AND first_step >= 1 AND last_step > first_step", name="steps_in_order"),
)

# Points of a series in order of their steps. Chunks of one do not overlap: whoever adds has the job locked.
series_chunks = Table(
    "series_chunks",
    metadata,
    Column("job_id", Id, nullable=False),
    Column(
        "name",
        String(200).with_variant(String(200, collation="C"), "postgresql"),
        nullable=False,
    ),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    PrimaryKeyConstraint("job_id", "name", "first_step"),
    CheckConstraint("first_step >= 0 AND last_step >= first_step", name="steps_in_order"),
)
