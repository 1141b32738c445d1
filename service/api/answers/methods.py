"""Which methods a path takes: what `Allow` names, and HEAD wherever GET is."""

from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


class _HeadersSent(BaseException):
    """The answer to a HEAD has all that it needs: what would make its body stops."""


class HeadAsGet:
    """Middleware that answers HEAD like GET, without the body, wherever no route takes HEAD itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        taken = methods_at(scope["app"].routes, scope)
        if "HEAD" in taken or "GET" not in taken:
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            await send({"type": "http.response.body", "body": b""})
            # A stream would go on for as long as its job does, and nobody reads it.
            raise _HeadersSent

        try:
            await self._app({**scope, "method": "GET"}, receive, without_body)
        except* _HeadersSent:
            pass


def methods_at(routes: Sequence[BaseRoute], scope: Scope) -> set[str]:
    """The methods that some route takes for the path of `scope`; empty where there is no such path."""
    asked = {name: scope.get(name, "") for name in ("type", "path", "root_path")}
    return {
        method
        for method in _METHODS
        if any(route.matches({**asked, "method": method})[0] is Match.FULL for route in routes)
    }


def allowed_at(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """The value of `Allow` for the path of `scope`: every method, HEAD too, in alphabetical order."""
    taken = methods_at(routes, scope)
    return ", ".join(sorted(taken | {"HEAD"} if "GET" in taken else taken))
