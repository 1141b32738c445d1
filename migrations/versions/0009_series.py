"""Add series: figures of a job that are not there every step, such as those of its held-out split."""

import sqlalchemy as sa
from alembic import op

revision = "0009_since_0006"
down_revision = "0008_since_0006"
branch_labels = None
depends_on = None

_ID = sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql")
_NAME = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")


def upgrade() -> None:
    """Add the table; what older versions told of evaluations is read from the events."""
    op.create_table(
        "series_chunks",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "name", "first_step", name=op.f("series_chunks_pkey")),
        sa.CheckConstraint(
            "first_step >= 0 AND last_step >= first_step", name=op.f("series_chunks_steps_in_order")
        ),
    )


def downgrade() -> None:
    """Remove the table, and what is in it."""
    op.drop_table("series_chunks")
