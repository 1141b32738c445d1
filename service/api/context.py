"""What every route needs of its process: settings, database, and the watcher that waits for changes."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from service.api.watch import StatsWatcher
from service.settings import Settings
from service.store.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    """Made once by `create_app`, and kept in the application's state."""

    settings: Settings
    database: Database
    watcher: StatsWatcher

    @property
    def live_seconds(self) -> float:
        """How long after its last heartbeat a worker still counts as live."""
        return 3 * self.settings.heartbeat_seconds


async def of(request: Request) -> Context:
    """The context of the application that serves `request`."""
    return cast("Context", request.app.state.context)


ContextDep = Annotated[Context, Depends(of)]
