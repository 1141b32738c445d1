"""Workers, and the components that they offer."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from halfstep.service.store.tables.types import JsonText, Time, metadata

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("device_type", Text, nullable=False),
    Column("bf16", Boolean, nullable=False),
    Column("fp16", Boolean, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("device_name", Text, nullable=False),
    Column("device_count", Integer, nullable=False),
    Column("versions", JsonText, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("busy", Integer, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("started_at", Time, nullable=False),
    Column("last_seen", Time, nullable=False),
    Column("stopped_at", Time),
    Column("speed", JsonText),  # measured by the worker, by data type
    CheckConstraint("device_type IN ('cpu', 'cuda')", name="device_type_known"),
    Index("workers_by_last_seen", "last_seen"),
)

components = Table(
    "components",
    metadata,
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("help", Text, nullable=False),
    Column("schema", JsonText, nullable=False),
    Column("extra", JsonText, nullable=False),
    Column("published_at", Time, nullable=False),
    PrimaryKeyConstraint("kind", "name"),
    CheckConstraint("kind IN ('dataset', 'loss', 'model', 'optimizer', 'scheduler')", name="kind_known"),
)
