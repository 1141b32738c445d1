"""Add what a worker measured of its device's speed in each precision."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Workers registered by an earlier version have measured nothing: NULL."""
    op.add_column("workers", sa.Column("speed", sa.Text(), nullable=True))


def downgrade() -> None:
    """Forget it; a worker measures again when it starts."""
    op.drop_column("workers", "speed")
