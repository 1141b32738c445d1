"""Add the roll-ups that plots of long jobs are made of; records of before have none and read as they did."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ID = sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql")


def upgrade() -> None:
    """Add the table; payloads are compressed already, so PostgreSQL need not try."""
    op.create_table(
        "metric_rollups",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            "level >= 1 AND first_step >= 1 AND last_step > first_step",
            name=op.f("metric_rollups_steps_in_order"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("metric_rollups_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "level", "first_step", name=op.f("metric_rollups_pkey")),
    )
    if op.get_bind().dialect.name == "postgresql":
        for table in ("metric_chunks", "metric_rollups"):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN payload SET STORAGE EXTERNAL")


def downgrade() -> None:
    """Drop the table; steps written since are in a form that older versions do not read."""
    op.drop_table("metric_rollups")
