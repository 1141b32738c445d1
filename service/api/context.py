"""What every route needs of its process: settings, database, and what its requests share."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from service.api.door import Door
from service.api.feed import Feed
from service.api.intake import Intake
from service.api.summaries import Summaries
from service.api.watch import JobWatcher
from service.settings import Settings
from service.store.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    """Made once by `create_app`, and kept in the application's state."""

    settings: Settings
    database: Database
    door: Door
    watcher: JobWatcher
    feed: Feed
    summaries: Summaries
    intake: Intake


async def of(request: Request) -> Context:
    """The context of the application that serves `request`."""
    return cast("Context", request.app.state.context)


ContextDep = Annotated[Context, Depends(of)]
