"""Jobs and what belongs to one: tags, keys of repeats, transitions, events, its summary, its checkpoints."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)

from halfstep.service.contract.states import LEASED, TERMINAL, JobState, RequestedAction
from halfstep.service.store.tables.types import ExactDouble, Id, JsonText, Time, metadata, one_of

jobs = Table(
    "jobs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("status_reason", JsonText),
    Column("spec", JsonText, nullable=False),
    Column("tags", JsonText, nullable=False),
    Column("parent_id", Id, ForeignKey("jobs.id", ondelete="SET NULL")),
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
    Column("lease_until", Time),
    Column("worker_id", Text),
    Column("worker", Text),
    Column("requested", Text),
    Column("created_at", Time, nullable=False),
    Column("queued_at", Time, nullable=False),
    Column("started_at", Time),
    Column("finished_at", Time),
    # Wake-ups sent for this stay in the queue, and when the next one is due.
    Column("publishes", Integer, nullable=False),
    Column("publish_due", Time, nullable=False),
    # Who submitted it; NULL: an earlier version took it in.
    Column("submitted_by", JsonText),
    CheckConstraint(one_of("state", JobState), name="state_known"),
    CheckConstraint(f"requested IS NULL OR {one_of('requested', RequestedAction)}", name="requested_known"),
    CheckConstraint("device IN ('auto', 'cpu', 'cuda')", name="device_known"),
    CheckConstraint("attempt BETWEEN 1 AND max_attempts", name="attempt_in_range"),
    # A lease exists exactly while a worker holds the job.
    CheckConstraint(f"({one_of('state', LEASED)}) = (lease_until IS NOT NULL)", name="lease_while_held"),
    CheckConstraint("(lease_until IS NULL) = (worker_id IS NULL)", name="lease_has_worker"),
    CheckConstraint("requested IS NULL OR lease_until IS NOT NULL", name="requested_while_held"),
    CheckConstraint(
        f"({one_of('state', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished_when_terminal"
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
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
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
        Id,
        ForeignKey("jobs.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        nullable=False,
    ),
    Column("created_at", Time, nullable=False),
    PrimaryKeyConstraint("tenant", "key"),
    Index("idempotency_keys_by_job", "job_id"),
)

job_transitions = Table(
    "job_transitions",
    metadata,
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("at", Time, nullable=False),
    Column("reason", Text),
    PrimaryKeyConstraint("job_id", "seq"),
    CheckConstraint(one_of("state", JobState), name="state_known"),
)

# Events, chunks and roll-ups grow with a job's length. They refer to no row of jobs, which would take them
# along in one statement: `deletions` tells what is left of jobs that are gone, and it is swept in small ones.
job_events = Table(
    "job_events",
    metadata,
    Column("job_id", Id, nullable=False),
    # From 1, without gaps: drawn from job_stats.last_event under that row's lock.
    Column("seq", BigInteger, nullable=False),
    Column("at", Time, nullable=False),
    Column("type", Text, nullable=False),
    Column("level", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JsonText),
    Column("actor", JsonText),  # who did it; NULL: an earlier version wrote it
    PrimaryKeyConstraint("job_id", "seq"),
)

# One row a job, updated with every batch of steps: a summary costs one row however long the job is.
job_stats = Table(
    "job_stats",
    metadata,
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
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
    Column("last_step_at", Time),
    Column("updated_at", Time, nullable=False),
    CheckConstraint("current_step >= 0", name="current_step_not_negative"),
)

# Written in the transaction that removes the job, and removed with the last of what the job left.
deletions = Table(
    "deletions",
    metadata,
    Column("job_id", Id, primary_key=True),
    Column("deleted_at", Time, nullable=False),
    Column("files", JsonText, nullable=False),  # {removable: [path], shared: [path]}
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),  # of the weights; what a client downloads
    Column("manifest_sha256", Text),  # of the manifest, which has the hash of every file
    Column("metrics", JsonText),
    Column("created_at", Time, nullable=False),
    PrimaryKeyConstraint("job_id", "step"),
    CheckConstraint("step >= 0", name="step_not_negative"),
    CheckConstraint("length(sha256) = 64", name="sha256_is_hex"),
    # Retries name the files of the job that they go on from: who drops a reference asks for the others.
    Index("checkpoints_by_path", "path"),
)
