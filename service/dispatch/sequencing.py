"""The duty that gives committed events their place in the outbox, so that readers and consumers see them."""

import time

from halfstep.service.dispatch.rounds import Round
from halfstep.service.store import outbox

SECONDS = 0.5  # of a round: leases and queue must not wait for a flood of events


def give_positions(now: Round) -> None:
    """Give every event that waits its position, in short transactions, as far as a round's time allows."""
    end = time.monotonic() + SECONDS
    with now.database.read() as session:
        if not outbox.any_waiting(session):
            return
    while now.database.retry(outbox.sequence) and time.monotonic() < end:
        pass
