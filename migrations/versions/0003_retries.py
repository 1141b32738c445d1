"""Retries: which checkpoint a job went on from, and who else names a checkpoint's files."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and the index; service/store/tables/__init__.py explains them."""
    op.add_column("jobs", sa.Column("from_checkpoint", sa.BigInteger(), nullable=True))
    op.create_index("checkpoints_by_path", "checkpoints", ["path"])
