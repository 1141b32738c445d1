"""Create the tables of jobs, their record, workers, components and keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql")
_STATES = (
    "state IN ('cancelled', 'cancelling', 'failed', 'paused', 'pausing', 'queued', 'running', 'starting', "
    "'succeeded')"
)


def upgrade() -> None:
    """Create everything; the comments that explain it are in service/store/tables/__init__.py."""
    op.create_table(
        "api_keys",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        sa.UniqueConstraint("secret_sha256", name=op.f("api_keys_secret_sha256_key")),
    )
    op.create_table(
        "components",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("help", sa.Text(), nullable=False),
        sa.Column("schema", sa.Text(), nullable=False),
        sa.Column("extra", sa.Text(), nullable=False),
        sa.Column("published_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "kind IN ('dataset', 'loss', 'model', 'optimizer', 'scheduler')",
            name=op.f("components_kind_known"),
        ),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("components_pkey")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("parent_id", _ID, nullable=True),
        sa.Column("precedence", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("needs_bf16", sa.Boolean(), nullable=False),
        sa.Column("min_memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("requested", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("queued_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("publishes", sa.Integer(), nullable=False),
        sa.Column("publish_due", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "(state IN ('cancelled', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
            name=op.f("jobs_finished_when_terminal"),
        ),
        sa.CheckConstraint(
            "(state IN ('cancelling', 'pausing', 'running', 'starting')) = (lease_until IS NOT NULL)",
            name=op.f("jobs_lease_while_held"),
        ),
        sa.CheckConstraint("device IN ('auto', 'cpu', 'cuda')", name=op.f("jobs_device_known")),
        sa.CheckConstraint(
            "requested IS NULL OR requested IN ('cancel', 'pause')", name=op.f("jobs_requested_known")
        ),
        sa.CheckConstraint(
            "state <> 'failed' OR status_reason IS NOT NULL", name=op.f("jobs_failure_has_reason")
        ),
        sa.CheckConstraint(_STATES, name=op.f("jobs_state_known")),
        sa.CheckConstraint("(lease_until IS NULL) = (worker_id IS NULL)", name=op.f("jobs_lease_has_worker")),
        sa.CheckConstraint("attempt BETWEEN 1 AND max_attempts", name=op.f("jobs_attempt_in_range")),
        sa.CheckConstraint(
            "requested IS NULL OR lease_until IS NOT NULL", name=op.f("jobs_requested_while_held")
        ),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["jobs.id"], name=op.f("jobs_parent_id_fkey"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
    )
    op.create_index("jobs_by_parent", "jobs", ["parent_id"], unique=False)
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "created_at", "id"], unique=False)
    op.create_index("jobs_by_tenant_state", "jobs", ["tenant", "state", "created_at", "id"], unique=False)
    op.create_index(
        "jobs_leased",
        "jobs",
        ["lease_until"],
        unique=False,
        sqlite_where=sa.text("lease_until IS NOT NULL"),
        postgresql_where=sa.text("lease_until IS NOT NULL"),
    )
    op.create_index(
        "jobs_queued",
        "jobs",
        ["precedence", "created_at", "id"],
        unique=False,
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("device_type", sa.Text(), nullable=False),
        sa.Column("bf16", sa.Boolean(), nullable=False),
        sa.Column("fp16", sa.Boolean(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("device_name", sa.Text(), nullable=False),
        sa.Column("device_count", sa.Integer(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("busy", sa.Integer(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.Column("stopped_at", sa.Double(), nullable=True),
        sa.CheckConstraint("device_type IN ('cpu', 'cuda')", name=op.f("workers_device_type_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
    )
    op.create_index("workers_by_last_seen", "workers", ["last_seen"], unique=False)
    op.create_table(
        "checkpoints",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("checkpoints_sha256_is_hex")),
        sa.CheckConstraint("step >= 0", name=op.f("checkpoints_step_not_negative")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("checkpoints_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("checkpoints_pkey")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
            name=op.f("idempotency_keys_job_id_fkey"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("idempotency_keys_pkey")),
    )
    op.create_index("idempotency_keys_by_job", "idempotency_keys", ["job_id"], unique=False)
    op.create_table(
        "job_events",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("job_events_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("job_events_pkey")),
    )
    op.create_table(
        "job_stats",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("last_event", sa.BigInteger(), nullable=False),
        sa.Column("last_transition", sa.Integer(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("precision_level", sa.Text(), nullable=False),
        sa.Column("overflow_threshold", sa.Double(), nullable=False),
        sa.Column("current_step", sa.BigInteger(), nullable=False),
        sa.Column("total_steps", sa.BigInteger(), nullable=True),
        sa.Column("batch_fence", sa.BigInteger(), nullable=True),
        sa.Column("batch_first_step", sa.BigInteger(), nullable=True),
        sa.Column("overflow_count", sa.BigInteger(), nullable=False),
        sa.Column("underflow_count", sa.BigInteger(), nullable=False),
        sa.Column("nan_count", sa.BigInteger(), nullable=False),
        sa.Column("skipped_steps", sa.BigInteger(), nullable=False),
        sa.Column("scale_sum", sa.Double(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=True),
        sa.Column("epoch_loss_sum", sa.Double(), nullable=False),
        sa.Column("epoch_losses", sa.BigInteger(), nullable=False),
        sa.Column("last_overflow_step", sa.BigInteger(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("underflow_estimate", sa.Double(), nullable=True),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("memory_usage", sa.Double(), nullable=True),
        sa.Column("memory_allocated_bytes", sa.BigInteger(), nullable=True),
        sa.Column("memory_reserved_bytes", sa.BigInteger(), nullable=True),
        sa.Column("compute_dtype", sa.Text(), nullable=True),
        sa.Column("current_scale", sa.Double(), nullable=True),
        sa.Column("memory_peak_bytes", sa.BigInteger(), nullable=True),
        sa.Column("steps_per_second", sa.Double(), nullable=True),
        sa.Column("samples_per_second", sa.Double(), nullable=True),
        sa.Column("step_time_ms_p50", sa.Double(), nullable=True),
        sa.Column("step_time_ms_p95", sa.Double(), nullable=True),
        sa.Column("step_time_ms_max", sa.Double(), nullable=True),
        sa.Column("host_syncs_per_step", sa.Double(), nullable=True),
        sa.Column("overflow_budget_exceeded", sa.Boolean(), nullable=False),
        sa.Column("last_overflow", sa.Text(), nullable=True),
        sa.Column("evaluation", sa.Text(), nullable=True),
        sa.Column("last_step_at", sa.Double(), nullable=True),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.CheckConstraint("current_step >= 0", name=op.f("job_stats_current_step_not_negative")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("job_stats_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("job_stats_pkey")),
    )
    op.create_table(
        "job_tags",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("job_tags_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "key", name=op.f("job_tags_pkey")),
    )
    op.create_index("job_tags_by_value", "job_tags", ["key", "value", "job_id"], unique=False)
    op.create_table(
        "job_transitions",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.CheckConstraint(_STATES, name=op.f("job_transitions_state_known")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("job_transitions_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("job_transitions_pkey")),
    )
    op.create_table(
        "metric_chunks",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("totals", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            "first_step >= 1 AND last_step >= first_step", name=op.f("metric_chunks_steps_in_order")
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("metric_chunks_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "first_step", name=op.f("metric_chunks_pkey")),
    )


def downgrade() -> None:
    """Drop everything, data included."""
    for table in (
        "metric_chunks",
        "job_transitions",
        "job_tags",
        "job_stats",
        "job_events",
        "idempotency_keys",
        "checkpoints",
        "workers",
        "jobs",
        "components",
        "api_keys",
    ):
        op.drop_table(table)
