"""What every route needs of its process: settings, database, and what its requests share."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from halfstep.service.api.following.changes import JobWatcher
from halfstep.service.api.following.feed import Feed
from halfstep.service.api.following.summaries import Summaries
from halfstep.service.api.requests.known_keys import KnownKeys
from halfstep.service.api.submitting.intake import Intake
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database


@dataclass(frozen=True, slots=True)
class Context:
    """Made once by `create_app`, and kept in the application's state."""

    settings: Settings
    database: Database
    known_keys: KnownKeys
    watcher: JobWatcher
    feed: Feed
    summaries: Summaries
    intake: Intake

    def path(self, path: str) -> str:
        """A path of this API as a client writes it: below the prefix that a proxy serves it under."""
        return self.settings.root_path + path


def context_of(request: Request) -> Context:
    """The context of the application that serves `request`.

    For dependencies of routes: FastAPI walks through a dependency's own again wherever it is named.
    """
    return cast("Context", request.app.state.context)


async def of(request: Request) -> Context:
    """The same, for routes."""
    return context_of(request)


ContextDep = Annotated[Context, Depends(of)]
