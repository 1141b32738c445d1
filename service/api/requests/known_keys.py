"""What the database says of keys, remembered for a moment: most keys that come were looked up just now.

Only good news is remembered: a new key is good at once, and a guess costs its own query.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from halfstep.service.api.shared_visits import SharedVisits
from halfstep.service.contract.events import Actor, ActorKind
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tenants import keys

KEEP_SECONDS = 1.0
MOST_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant that a request belongs to, its scopes, and who acts in it."""

    tenant: str
    scopes: frozenset[str]
    actor: Actor


class KnownKeys:
    """The keys of one database; lives on one event loop.

    Args:
        database: Where the keys are.
        keep_seconds: How long a key that was valid counts as valid, and a server without keys as open.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        database: Database,
        *,
        keep_seconds: float = KEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._keep_seconds, self._clock = database, keep_seconds, clock
        self._known: dict[bytes, tuple[float, Caller]] = {}
        self._open_until = float("-inf")
        # Requests under way together find together that what was known is too old: one query is for them all.
        self._keys: SharedVisits[str, Caller | None] = SharedVisits(self._look_up)
        self._openings: SharedVisits[None, bool] = SharedVisits(self._look_whether_open)

    async def caller(self, secret: str) -> Caller | None:
        """The caller with this secret; None for a key that is unknown, expired or revoked.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        return self._known_caller(secret) or await self._keys.ask(secret)

    async def keyless(self) -> bool:
        """Whether there is no key at all, not even a revoked one.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        return self._known_open() or await self._openings.ask(None)

    def _known_caller(self, secret: str) -> Caller | None:
        until, caller = self._known.get(_digest(secret), (float("-inf"), None))
        return caller if self._clock() < until else None

    def _known_open(self) -> bool:
        return self._clock() < self._open_until

    def _look_up(self, secrets: Sequence[str]) -> list[Caller | None]:
        with self._database.read() as session:
            callers = {
                secret: self._known_caller(secret) or self._ask(session, secret)
                for secret in dict.fromkeys(secrets)
            }
        return [callers[secret] for secret in secrets]

    def _ask(self, session: Session, secret: str) -> Caller | None:
        asked = self._clock()
        key = keys.authenticate(session, secret)
        if key is None:
            return None
        caller = Caller(
            key.tenant,
            frozenset(key.scopes),
            Actor(ActorKind.KEY, id=key.id, name=key.name, tenant=key.tenant),
        )
        if len(self._known) >= MOST_KEPT:
            self._known.clear()
        self._known[_digest(secret)] = (asked + self._keep_seconds, caller)
        return caller

    def _look_whether_open(self, requests: Sequence[None]) -> list[bool]:
        keyless = self._known_open()
        if not keyless:
            asked = self._clock()
            with self._database.read() as session:
                keyless = not keys.list_keys(session)
            self._open_until = asked + self._keep_seconds if keyless else float("-inf")
        return [keyless] * len(requests)


def _digest(secret: str) -> bytes:
    # Secrets are not kept, not even for a second.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
