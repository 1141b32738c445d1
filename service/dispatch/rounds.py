"""What a duty is given: the round that it is part of."""

from collections.abc import Callable
from dataclasses import dataclass

from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database

BATCH = 100  # rows that a duty looks at in one round, where it has no limit of its own


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the dispatcher.

    Attributes:
        settings: Of this process.
        database: Where the jobs are.
        up_seconds: For how long this process has been up.
        send: Sends the wake-ups of these jobs; False where the broker took none.
    """

    settings: Settings
    database: Database
    up_seconds: float
    send: Callable[..., bool]
