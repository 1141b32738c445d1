"""Cursors of those who act on every event: how far each has come, and which process may go on for it.

A consumer handles events first and stores its cursor afterwards, so that a death between the two repeats
events and skips none. One process at a time holds a cursor, for as long as it renews it; a successor raises
the fence, and what the one before still writes is refused.
"""

from dataclasses import dataclass

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from halfstep.service.errors import StaleFence
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.upsert import insert_new
from halfstep.service.store.tables import outbox_cursors


@dataclass(frozen=True, slots=True)
class Held:
    """A cursor that the caller holds: everything up to `position` is handled."""

    name: str
    position: int
    fence: int


def position_of(s: Session, name: str) -> int:
    """How far the cursor `name` has come; 0 where there is none yet. A read, which `hold` is not."""
    return int(s.scalar(select(outbox_cursors.c.position).where(outbox_cursors.c.name == name)) or 0)


def hold(s: Session, name: str, *, holder: str, seconds: float) -> Held | None:
    """Take the cursor `name` for `seconds`, or renew it; None while another process holds it.

    A cursor that is not there yet begins before the first event. The holder is named by an id that no other
    process has, and keeps its fence when it renews.
    """
    s.execute(insert_new(s, outbox_cursors, name=name, position=0, fence=0))
    row = s.execute(
        select(outbox_cursors.c.holder, outbox_cursors.c.held_until >= db_now())
        .where(outbox_cursors.c.name == name)
        .with_for_update(key_share=True)
    ).one()
    renews = row.holder == holder and row[1]
    taken = s.execute(
        update(outbox_cursors)
        .where(
            outbox_cursors.c.name == name,
            or_(
                outbox_cursors.c.holder.is_(None),
                outbox_cursors.c.holder == holder,
                outbox_cursors.c.held_until < db_now(),
            ),
        )
        .values(
            holder=holder,
            held_until=db_now() + seconds,
            fence=outbox_cursors.c.fence + (0 if renews else 1),
        )
        .returning(outbox_cursors.c.position, outbox_cursors.c.fence)
    ).one_or_none()
    return None if taken is None else Held(name, taken.position, taken.fence)


def advance(s: Session, held: Held, position: int) -> Held:
    """Store that everything up to `position` is handled. A repeat changes nothing.

    Raises:
        StaleFence: another process has taken the cursor over.
    """
    row = s.execute(
        update(outbox_cursors)
        .where(
            outbox_cursors.c.name == held.name,
            outbox_cursors.c.fence == held.fence,
            outbox_cursors.c.position <= position,
        )
        .values(position=position)
        .returning(outbox_cursors.c.position)
    ).one_or_none()
    if row is None:
        raise StaleFence(f"the cursor {held.name} is no longer held under fence {held.fence}")
    return Held(held.name, row.position, held.fence)


def let_go(s: Session, held: Held) -> None:
    """Give the cursor to whoever asks next; does nothing where it is no longer held."""
    s.execute(
        update(outbox_cursors)
        .where(outbox_cursors.c.name == held.name, outbox_cursors.c.fence == held.fence)
        .values(holder=None, held_until=None)
    )
