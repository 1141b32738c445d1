"""The tables: columns, keys, checks and indexes, equal to what `migrations/` builds.

A comment stands where a constraint keeps an invariant. No statements here.
"""

import json
import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from halfstep.service.contract.states import LEASED, TERMINAL, JobState, RequestedAction

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


def _one_of(column: str, values: Iterable[StrEnum | str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in sorted(values))})"


# Ids are UUIDv7 text. PostgreSQL compares them byte by byte, as SQLite does.
_Id = String(36).with_variant(String(36, collation="C"), "postgresql")
_Time = Double  # seconds since the epoch, from db_now()

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("status_reason", JsonText),
    Column("spec", JsonText, nullable=False),
    Column("tags", JsonText, nullable=False),
    Column("parent_id", _Id, ForeignKey("jobs.id", ondelete="SET NULL")),
    # The step of the parent's checkpoint that a retry goes on from; NULL: from the start, or no retry.
    Column("from_checkpoint", BigInteger),
    # The lower goes first: -priority, so that one ascending index is the order of claims.
    Column("precedence", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    # What a worker must offer, derived from the spec at submission.
    Column("device", Text, nullable=False),
    Column("needs_bf16", Boolean, nullable=False),
    Column("min_memory_bytes", BigInteger, nullable=False),
    # The lease. `fence` rises by one with every claim and never falls; a write under an old one is refused.
    Column("fence", BigInteger, nullable=False),
    Column("lease_until", _Time),
    Column("worker_id", Text),
    Column("worker", Text),
    Column("requested", Text),
    Column("created_at", _Time, nullable=False),
    Column("queued_at", _Time, nullable=False),
    Column("started_at", _Time),
    Column("finished_at", _Time),
    # Wake-ups sent for this stay in the queue, and when the next one is due.
    Column("publishes", Integer, nullable=False),
    Column("publish_due", _Time, nullable=False),
    CheckConstraint(_one_of("state", JobState), name="state_known"),
    CheckConstraint(f"requested IS NULL OR {_one_of('requested', RequestedAction)}", name="requested_known"),
    CheckConstraint("device IN ('auto', 'cpu', 'cuda')", name="device_known"),
    CheckConstraint("attempt BETWEEN 1 AND max_attempts", name="attempt_in_range"),
    # A lease exists exactly while a worker holds the job.
    CheckConstraint(f"({_one_of('state', LEASED)}) = (lease_until IS NOT NULL)", name="lease_while_held"),
    CheckConstraint("(lease_until IS NULL) = (worker_id IS NULL)", name="lease_has_worker"),
    CheckConstraint("requested IS NULL OR lease_until IS NOT NULL", name="requested_while_held"),
    CheckConstraint(
        f"({_one_of('state', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished_when_terminal"
    ),
    CheckConstraint("state <> 'failed' OR status_reason IS NOT NULL", name="failure_has_reason"),
    Index("jobs_by_tenant", "tenant", "created_at", "id"),
    Index("jobs_by_tenant_state", "tenant", "state", "created_at", "id"),
    Index("jobs_by_parent", "parent_id"),
    Index(
        "jobs_finished",
        "finished_at",
        sqlite_where=text("finished_at IS NOT NULL"),
        postgresql_where=text("finished_at IS NOT NULL"),
    ),
    Index(
        "jobs_queued",
        "precedence",
        "created_at",
        "id",
        sqlite_where=text("state = 'queued'"),
        postgresql_where=text("state = 'queued'"),
    ),
    Index(
        "jobs_leased",
        "lease_until",
        sqlite_where=text("lease_until IS NOT NULL"),
        postgresql_where=text("lease_until IS NOT NULL"),
    ),
)

job_tags = Table(
    "job_tags",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),
    PrimaryKeyConstraint("job_id", "key"),
    Index("job_tags_by_value", "key", "value", "job_id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("body_hash", Text, nullable=False),
    # Deferred: the key is taken first, the job is inserted only by the one who got it.
    Column(
        "job_id",
        _Id,
        ForeignKey("jobs.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        nullable=False,
    ),
    Column("created_at", _Time, nullable=False),
    PrimaryKeyConstraint("tenant", "key"),
    Index("idempotency_keys_by_job", "job_id"),
)

job_transitions = Table(
    "job_transitions",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("at", _Time, nullable=False),
    Column("reason", Text),
    PrimaryKeyConstraint("job_id", "seq"),
    CheckConstraint(_one_of("state", JobState), name="state_known"),
)

# Events, chunks and roll-ups grow with a job's length. They refer to no row of jobs, which would take them
# along in one statement: `deletions` tells what is left of jobs that are gone, and it is swept in small ones.
job_events = Table(
    "job_events",
    metadata,
    Column("job_id", _Id, nullable=False),
    # From 1, without gaps: drawn from job_stats.last_event under that row's lock.
    Column("seq", BigInteger, nullable=False),
    Column("at", _Time, nullable=False),
    Column("type", Text, nullable=False),
    Column("level", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JsonText),
    PrimaryKeyConstraint("job_id", "seq"),
)

# One row a job, updated with every batch of steps: a summary costs one row however long the job is.
job_stats = Table(
    "job_stats",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("version", BigInteger, nullable=False),  # rises with every change of the job or its record
    Column("last_event", BigInteger, nullable=False),
    Column("last_transition", Integer, nullable=False),
    Column("mode", Text, nullable=False),
    Column("precision_level", Text, nullable=False),
    Column("overflow_threshold", Double, nullable=False),
    # The stored steps are exactly 1..current_step.
    Column("current_step", BigInteger, nullable=False),
    Column("total_steps", BigInteger),
    # The newest batch, so that its repeat is recognised.
    Column("batch_fence", BigInteger),
    Column("batch_first_step", BigInteger),
    # Running totals over the steps 1..current_step; `epoch_*` over those of the newest epoch.
    Column("overflow_count", BigInteger, nullable=False),
    Column("underflow_count", BigInteger, nullable=False),
    Column("nan_count", BigInteger, nullable=False),
    Column("skipped_steps", BigInteger, nullable=False),
    Column("scale_sum", ExactDouble, nullable=False),
    Column("epoch", BigInteger),
    Column("epoch_loss_sum", ExactDouble, nullable=False),
    Column("epoch_losses", BigInteger, nullable=False),
    Column("last_overflow_step", BigInteger),
    # The newest step.
    Column("loss", ExactDouble),
    Column("underflow_estimate", ExactDouble),
    Column("grad_norm", ExactDouble),
    Column("learning_rate", ExactDouble),
    Column("memory_usage", ExactDouble),
    Column("memory_allocated_bytes", BigInteger),
    Column("memory_reserved_bytes", BigInteger),
    Column("compute_dtype", Text),
    # What the worker knows beyond the steps.
    Column("current_scale", ExactDouble),
    Column("memory_peak_bytes", BigInteger),
    Column("steps_per_second", ExactDouble),
    Column("samples_per_second", ExactDouble),
    Column("step_time_ms_p50", ExactDouble),
    Column("step_time_ms_p95", ExactDouble),
    Column("step_time_ms_max", ExactDouble),
    Column("host_syncs_per_step", ExactDouble),
    Column("overflow_budget_exceeded", Boolean, nullable=False),
    Column("last_overflow", JsonText),
    Column("evaluation", JsonText),
    Column("last_step_at", _Time),
    Column("updated_at", _Time, nullable=False),
    CheckConstraint("current_step >= 0", name="current_step_not_negative"),
)

# Columnar chunks. They cannot overlap: append checks under the lock of the job that a batch begins at
# current_step + 1, and the primary key refuses the same first step twice.
metric_chunks = Table(
    "metric_chunks",
    metadata,
    Column("job_id", _Id, nullable=False),
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
    Column("job_id", _Id, nullable=False),
    Column("level", Integer, nullable=False),
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    PrimaryKeyConstraint("job_id", "level", "first_step"),
    CheckConstraint("level >= 1 AND first_step >= 1 AND last_step > first_step", name="steps_in_order"),
)

# Written in the transaction that removes the job, and removed with the last of what the job left.
deletions = Table(
    "deletions",
    metadata,
    Column("job_id", _Id, primary_key=True),
    Column("deleted_at", _Time, nullable=False),
    Column("files", JsonText, nullable=False),  # {removable: [path], shared: [path]}
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),  # of the weights; what a client downloads
    Column("manifest_sha256", Text),  # of the manifest, which has the hash of every file
    Column("metrics", JsonText),
    Column("created_at", _Time, nullable=False),
    PrimaryKeyConstraint("job_id", "step"),
    CheckConstraint("step >= 0", name="step_not_negative"),
    CheckConstraint("length(sha256) = 64", name="sha256_is_hex"),
    # Retries name the files of the job that they go on from: who drops a reference asks for the others.
    Index("checkpoints_by_path", "path"),
)

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
    Column("started_at", _Time, nullable=False),
    Column("last_seen", _Time, nullable=False),
    Column("stopped_at", _Time),
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
    Column("published_at", _Time, nullable=False),
    PrimaryKeyConstraint("kind", "name"),
    CheckConstraint("kind IN ('dataset', 'loss', 'model', 'optimizer', 'scheduler')", name="kind_known"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),  # the first characters, to tell keys apart in a list
    Column("secret_sha256", String(64), nullable=False),  # the secret itself is never stored
    Column("scopes", JsonText, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time),
    Column("revoked_at", _Time),
    UniqueConstraint("secret_sha256"),
)
