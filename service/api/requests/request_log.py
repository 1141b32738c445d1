"""Every answer's `x-request-id`, one log line per request, and the last resort for defects."""

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfstep.service.api.answers.paths import client_path
from halfstep.service.api.answers.problems import unexpected_answer

HEADER = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_log = structlog.get_logger(__name__)


class RequestIds:
    """Middleware around the whole application, so that errors carry the id too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        offered = Headers(scope=scope).get(HEADER, "")
        request_id = offered if _SANE.fullmatch(offered) else uuid.uuid4().hex
        started = time.perf_counter()
        status = 0

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, identified)
            except Exception as error:
                _log.exception("request_failed", method=scope["method"], path=scope["path"], exc_info=error)
                if status:  # half an answer is out: only closing the connection tells the client
                    raise
                await unexpected_answer(client_path(scope, scope["path"]))(scope, receive, identified)
            finally:
                took = round((time.perf_counter() - started) * 1000, 2)
                # Clients poll: what only read something, and got it, would drown the rest.
                quiet = scope["method"] == "GET" and 200 <= status < 400
                line = _log.debug if quiet else _log.info
                line("request", method=scope["method"], path=scope["path"], status=int(status), took_ms=took)
