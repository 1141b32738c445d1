"""Who is calling, and what the call's key allows.

With a key configured every request but `/health/…` needs one. Without, the server answers this machine alone,
as tenant `default` with all scopes. What the database said of a key holds for a second (`known_keys`): that
much later a revoked key, or the first one ever made, takes effect.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from halfstep.service.api.answers.problems import ProblemError
from halfstep.service.api.context import Context, context_of
from halfstep.service.api.requests.known_keys import Caller
from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.errors import StoreUnavailable
from halfstep.service.network import is_loopback

Scope = Literal["read", "submit", "admin"]
NOBODY_IN_PARTICULAR = Caller(
    "default", frozenset({"read", "submit", "admin"}), Actor(ActorKind.LOCAL, tenant="default")
)
"""Who calls while no key is configured."""

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="A key of `halfstep keys create`: `Authorization: Bearer tk_…`. "
    "Not needed while none is configured.",
)


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def identify(request: Request, credentials: Credentials) -> Caller:
    """The caller behind `request`.

    Raises:
        ProblemError: 401 without a valid key where one is needed; 403 for strangers where none is.
    """
    context = context_of(request)
    if credentials is None:
        if "authorization" in request.headers:
            raise _unauthorized("The authorization header is not of the form: Bearer tk_…")
        return await _without_key(request, context)
    caller = await context.known_keys.caller(credentials.credentials)
    if caller is None:
        raise _unauthorized(
            "This key is unknown, expired or revoked; `halfstep keys list` shows the valid ones."
        )
    return caller


async def may_still_listen(request: Request, credentials: Credentials) -> bool:
    """Whether the caller of a request that goes on is still let in; yes while the database is away."""
    try:
        await identify(request, credentials)
    except ProblemError:
        return False
    except StoreUnavailable:
        return True
    return True


def requires(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    """A dependency that lets only keys with `scope` (or `admin`) through."""

    async def allowed(caller: Annotated[Caller, Depends(identify)]) -> Caller:
        if scope not in caller.scopes and "admin" not in caller.scopes:
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                "scope_missing",
                f"This key lacks the scope '{scope}'; make one with `halfstep keys create --scope {scope}`.",
                headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
            )
        return caller

    return allowed


Reader = Annotated[Caller, Depends(requires("read"))]
Submitter = Annotated[Caller, Depends(requires("submit"))]


async def _without_key(request: Request, context: Context) -> Caller:
    # Also where every key is revoked or expired: losing the last one must not open the server.
    if not await context.known_keys.keyless():
        raise _unauthorized("This server needs a key: send the header authorization: Bearer tk_…")
    # A page in a local browser can reach a loopback port under a name that its own DNS points here
    # (rebinding): such a request carries that name, and gets nothing.
    peer_is_local = request.client is None or is_loopback(request.client.host)
    name_is_local = is_loopback(request.url.hostname or "")
    if not (peer_is_local and name_is_local):
        raise ProblemError(
            HTTPStatus.FORBIDDEN,
            "loopback_only",
            "No key is configured, so this server answers its own machine only, at localhost or 127.0.0.1. "
            "Make a key with `halfstep keys create`.",
        )
    return NOBODY_IN_PARTICULAR


def _unauthorized(detail: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.UNAUTHORIZED,
        "unauthorized",
        detail,
        headers={"www-authenticate": 'Bearer realm="halfstep"'},
    )
