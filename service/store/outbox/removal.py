"""How long the outbox keeps its entries: some days, and longer where a consumer is behind, up to a limit.

How far entries have been removed is a cursor of its own, so that a reader whose cursor is older is told of
the gap. The events themselves stay with their jobs.
"""

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.upsert import insert_new
from halfstep.service.store.tables import outbox, outbox_cursors

_REMOVED = "removed"  # the cursor whose position tells how far


def removed_up_to(s: Session) -> int:
    """The position up to which entries have been removed; 0 where all are still there."""
    query = select(outbox_cursors.c.position).where(outbox_cursors.c.name == _REMOVED)
    return int(s.scalar(query) or 0)


def any_older(s: Session, *, days: float) -> bool:
    """Whether the oldest entry is older than `days`; a read, which `remove_old` is not."""
    at = s.scalar(select(outbox.c.at < db_now() - days * 86_400).order_by(outbox.c.position).limit(1))
    return bool(at)


def remove_old(s: Session, *, days: float, most_days: float, limit: int) -> int:
    """Remove at most `limit` entries older than `days`, the oldest first; returns how many there were.

    What a consumer has not handled stays, but none longer than `most_days`.
    """
    s.execute(insert_new(s, outbox_cursors, name=_REMOVED, position=0, fence=0))
    removed = s.scalar(
        select(outbox_cursors.c.position).where(outbox_cursors.c.name == _REMOVED).with_for_update()
    )
    slowest = s.scalar(select(func.min(outbox_cursors.c.position)).where(outbox_cursors.c.name != _REMOVED))
    oldest = s.execute(
        select(
            outbox.c.position,
            (outbox.c.at < db_now() - days * 86_400).label("old"),
            (outbox.c.at < db_now() - most_days * 86_400).label("too_old"),
        )
        .where(outbox.c.position > (removed or 0))
        .order_by(outbox.c.position)
        .limit(limit)
    )
    end = 0
    count = 0
    for row in oldest:
        handled = slowest is None or row.position <= slowest
        if not (row.too_old or (row.old and handled)):
            break
        end = row.position
        count += 1
    if count:
        s.execute(delete(outbox).where(outbox.c.position <= end))
        s.execute(update(outbox_cursors).where(outbox_cursors.c.name == _REMOVED).values(position=end))
    return count
