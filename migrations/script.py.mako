"""${message}."""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
# Where older versions run on this schema too, because it only adds what they never name, the revision says
# since which: "0008_since_0006". Without that they refuse to start once this is applied.
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
