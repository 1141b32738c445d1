"""Paths as the client writes them, where a proxy serves this API below a prefix of its own."""

from starlette.types import ASGIApp, Receive, Scope, Send


class BelowPrefix:
    """Middleware that tells the application under which prefix it is served: routes match without it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self._app({**scope, "root_path": self._prefix}, receive, send)


def client_path(scope: Scope, path: str) -> str:
    """`path` below the prefix `HALFSTEP_ROOT_PATH`, which a proxy may have taken away or left where it is."""
    prefix = str(scope.get("root_path", ""))
    return path if not prefix or path == prefix or path.startswith(f"{prefix}/") else prefix + path
