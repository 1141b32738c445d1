"""The events of all jobs in one order: giving positions, reading by position, and cursors that are held.

A trigger puts each new event into a waiting list, in its writer's own transaction. `sequence` gives those
that are committed a position, one process at a time, so that whoever reads by position skips none: an event
that commits late gets a late position. Its functions are offered here.
"""

from halfstep.service.store.outbox.cursors import Held, advance, hold, let_go, position_of
from halfstep.service.store.outbox.entries import Entry, Page, newest_of, newest_position, read
from halfstep.service.store.outbox.removal import any_older, remove_old, removed_up_to
from halfstep.service.store.outbox.sequencing import any_waiting, sequence

__all__ = [
    "Entry",
    "Held",
    "Page",
    "advance",
    "any_older",
    "any_waiting",
    "hold",
    "let_go",
    "newest_of",
    "newest_position",
    "position_of",
    "read",
    "remove_old",
    "removed_up_to",
    "sequence",
]
