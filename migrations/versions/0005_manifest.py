"""Checkpoints: the hash of the manifest, so that no byte of one can change unnoticed."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; checkpoints of before have none."""
    op.add_column("checkpoints", sa.Column("manifest_sha256", sa.Text(), nullable=True))
