"""Add the outbox, which has the events of all jobs in one order, and who did what.

Events reach it by a trigger, so that those which an older worker or API writes are in it too. What happened
before is not: the outbox begins here.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008_since_0006"
down_revision = "0006"
branch_labels = None
depends_on = None

_ID = sa.String(length=36).with_variant(sa.String(length=36, collation="C"), "postgresql")
_COUNTED = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_TRIGGER = {
    "sqlite": (
        """
        CREATE TRIGGER job_events_to_outbox AFTER INSERT ON job_events
        BEGIN
            INSERT INTO outbox_waiting (job_id, seq) VALUES (NEW.job_id, NEW.seq);
        END
        """,
    ),
    "postgresql": (
        """
        CREATE FUNCTION job_events_to_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO outbox_waiting (job_id, seq) SELECT job_id, seq FROM new_events ORDER BY job_id, seq;
            RETURN NULL;
        END
        $$
        """,
        """
        CREATE TRIGGER job_events_to_outbox AFTER INSERT ON job_events
        REFERENCING NEW TABLE AS new_events
        FOR EACH STATEMENT EXECUTE FUNCTION job_events_to_outbox()
        """,
    ),
}


def upgrade() -> None:
    """Add the columns, the tables and the trigger; what copies `job_events` later must make it anew."""
    op.add_column("jobs", sa.Column("submitted_by", sa.Text(), nullable=True))
    op.add_column("job_events", sa.Column("actor", sa.Text(), nullable=True))
    op.create_table(
        "outbox_waiting",
        sa.Column("id", _COUNTED, sa.Identity(), nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("outbox_waiting_pkey")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "outbox",
        sa.Column("position", _COUNTED, sa.Identity(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("outbox_pkey")),
        sqlite_autoincrement=True,
    )
    op.create_index("outbox_by_tenant", "outbox", ["tenant", "position"])
    op.create_table(
        "outbox_cursors",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=True),
        sa.Column("held_until", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("outbox_cursors_pkey")),
    )
    for statement in _TRIGGER[op.get_bind().dialect.name]:
        op.execute(sa.text(statement))


def downgrade() -> None:
    """Forget the order over all jobs and who did what; the events themselves stay."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER job_events_to_outbox ON job_events")
        op.execute("DROP FUNCTION job_events_to_outbox()")
    else:
        op.execute("DROP TRIGGER job_events_to_outbox")
    for table in ("outbox_cursors", "outbox", "outbox_waiting"):
        op.drop_table(table)
    op.drop_column("job_events", "actor")
    op.drop_column("jobs", "submitted_by")
