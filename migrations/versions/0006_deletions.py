"""A deleted job no longer takes its whole record along in one statement: that is swept in small steps."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_ID = sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql")
_UNBOUND = ("job_events", "metric_chunks", "metric_rollups")


def upgrade() -> None:
    """Unbind what grows with a job's length from the job's row; SQLite copies these tables to do so."""
    op.create_table(
        "deletions",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=False),
        sa.Column("files", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("deletions_pkey")),
    )
    op.create_index(
        "jobs_finished",
        "jobs",
        ["finished_at"],
        sqlite_where=sa.text("finished_at IS NOT NULL"),
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    if op.get_bind().dialect.name == "postgresql":
        for table in _UNBOUND:
            op.drop_constraint(op.f(f"{table}_job_id_fkey"), table, type_="foreignkey")
        return
    for unbound in _unbound_tables():
        with op.batch_alter_table(unbound.name, copy_from=unbound, recreate="always"):
            pass


def _unbound_tables() -> list[sa.Table]:
    metadata = sa.MetaData()
    return [
        sa.Table(
            "job_events",
            metadata,
            sa.Column("job_id", _ID, nullable=False),
            sa.Column("seq", sa.BigInteger(), nullable=False),
            sa.Column("at", sa.Double(), nullable=False),
            sa.Column("type", sa.Text(), nullable=False),
            sa.Column("level", sa.Text(), nullable=False),
            sa.Column("message", sa.Text(), nullable=False),
            sa.Column("data", sa.Text(), nullable=True),
            sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("job_events_pkey")),
        ),
        sa.Table(
            "metric_chunks",
            metadata,
            sa.Column("job_id", _ID, nullable=False),
            sa.Column("first_step", sa.BigInteger(), nullable=False),
            sa.Column("last_step", sa.BigInteger(), nullable=False),
            sa.Column("totals", sa.LargeBinary(), nullable=False),
            sa.Column("payload", sa.LargeBinary(), nullable=False),
            sa.PrimaryKeyConstraint("job_id", "first_step", name=op.f("metric_chunks_pkey")),
            sa.CheckConstraint(
                "first_step >= 1 AND last_step >= first_step", name=op.f("metric_chunks_steps_in_order")
            ),
        ),
        sa.Table(
            "metric_rollups",
            metadata,
            sa.Column("job_id", _ID, nullable=False),
            sa.Column("level", sa.Integer(), nullable=False),
            sa.Column("first_step", sa.BigInteger(), nullable=False),
            sa.Column("last_step", sa.BigInteger(), nullable=False),
            sa.Column("payload", sa.LargeBinary(), nullable=False),
            sa.PrimaryKeyConstraint("job_id", "level", "first_step", name=op.f("metric_rollups_pkey")),
            sa.CheckConstraint(
                "level >= 1 AND first_step >= 1 AND last_step > first_step",
                name=op.f("metric_rollups_steps_in_order"),
            ),
        ),
    ]


def downgrade() -> None:
    """Remove what no job owns, and bind the rest again."""
    op.drop_table("deletions")
    op.drop_index("jobs_finished", "jobs")
    for table in _UNBOUND:
        rows = sa.table(table, sa.column("job_id"))
        op.execute(
            rows.delete().where(rows.c.job_id.not_in(sa.select(sa.table("jobs", sa.column("id")).c.id)))
        )
        with op.batch_alter_table(table) as batch:
            batch.create_foreign_key(
                op.f(f"{table}_job_id_fkey"), "jobs", ["job_id"], ["id"], ondelete="CASCADE"
            )
