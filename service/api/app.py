"""The application: its parts put together, and nothing that runs at import."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI

from halfstep.service.api.answers import openapi, problems
from halfstep.service.api.answers.methods import HeadAsGet
from halfstep.service.api.answers.paths import BelowPrefix
from halfstep.service.api.context import Context
from halfstep.service.api.following.changes import JobWatcher
from halfstep.service.api.following.feed import Feed
from halfstep.service.api.following.summaries import Summaries
from halfstep.service.api.following.tenant_events import versions
from halfstep.service.api.requests.known_keys import KnownKeys
from halfstep.service.api.requests.request_log import RequestIds
from halfstep.service.api.routes import components, docs, health, workers
from halfstep.service.api.routes import events as all_events
from halfstep.service.api.routes.jobs import checkpoints, control, jobs
from halfstep.service.api.routes.progress import events, metrics, series, stats, stream
from halfstep.service.api.submitting.intake import Intake
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database, connect

API_VERSION = "1.0"
"""Of the HTTP contract, which changes less often than the package."""

DESCRIPTION = """\
Training jobs in mixed precision: submit one, and follow every step's loss scale, overflow, NaN and underflow.

Times are RFC 3339 in UTC, sizes are bytes, ids are UUIDv7. Numbers that are not finite travel as the strings
`NaN`, `Infinity` and `-Infinity`. Errors are `application/problem+json`."""

TAGS = [
    {"name": "jobs", "description": "Submit, list, steer and delete jobs."},
    {"name": "progress", "description": "Summary, step record and events of a job."},
    {"name": "checkpoints", "description": "What a job has saved, and its weights."},
    {"name": "fleet", "description": "What can be named in a spec, and who runs it."},
    {"name": "health", "description": "For load balancers; needs no key."},
]


def create_app(settings: Settings, database: Database | None = None) -> FastAPI:
    """The API over `database`, or over the one that `settings` names. No connection is opened yet.

    A database made here is closed when the application ends; one that is passed in stays its owner's.
    """
    store = database if database is not None else connect(settings)

    watcher = JobWatcher(partial(versions, store))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            watcher.stop()
            if database is None:
                store.dispose()

    app = FastAPI(
        title="Halfstep",
        version=API_VERSION,
        summary="Mixed-precision training as a service",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        # Served by routes of our own, which ask for a key like every other.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.context = Context(
        settings=settings,
        database=store,
        known_keys=KnownKeys(store),
        watcher=watcher,
        feed=Feed.of(store),
        summaries=Summaries(store),
        intake=Intake(settings, store),
    )
    problems.install(app)
    for resource in (
        jobs,
        control,
        checkpoints,
        stats,
        metrics,
        series,
        events,
        stream,
        all_events,
        components,
        workers,
        health,
        docs,
    ):
        app.include_router(resource.router)
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestIds)
    if settings.root_path:
        app.add_middleware(BelowPrefix, prefix=settings.root_path)

    def openapi_document() -> dict[str, Any]:
        return openapi.document(app, prefix=settings.root_path)

    app.openapi = openapi_document  # type: ignore[method-assign]  # the framework's documented way to extend it
    return app
