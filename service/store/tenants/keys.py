"""API keys: made once, shown once, stored as a hash; each belongs to a tenant.

A secret is 256 random bits, so a plain SHA-256 is enough: there is nothing to guess.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from halfstep.service.errors import FieldProblem, InvalidRequest, NotFound
from halfstep.service.store.job_rows import AnyRow
from halfstep.service.store.sql.clock import db_now
from halfstep.service.store.sql.ids import new_job_id
from halfstep.service.store.sql.tenancy import of_tenant
from halfstep.service.store.sql.upsert import insert_new
from halfstep.service.store.tables import api_keys

SCOPES = ("read", "submit", "admin")
_SECRET = re.compile(r"tk_[A-Za-z0-9_\-]{32,200}")
_PREFIX_CHARACTERS = 9


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. Times are seconds since the epoch by the database's clock."""

    id: str
    tenant: str
    name: str
    prefix: str  # the secret's first characters
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


def create(
    s: Session, *, tenant: str, name: str, scopes: Iterable[str], expires_at: float | None
) -> tuple[ApiKey, str]:
    """Make a key; returns it and its secret, which nothing can show again.

    Raises:
        InvalidRequest: an unknown scope, or none.
    """
    secret = f"tk_{secrets.token_urlsafe(32)}"
    return import_secret(s, secret, tenant=tenant, name=name, scopes=scopes, expires_at=expires_at), secret


def import_secret(
    s: Session, secret: str, *, tenant: str, name: str, scopes: Iterable[str], expires_at: float | None = None
) -> ApiKey:
    """Store a key whose secret was made elsewhere; one that is there already stays as it is, even revoked.

    Raises:
        InvalidRequest: not shaped as a key, an unknown scope, or none.
    """
    if _SECRET.fullmatch(secret) is None:
        raise InvalidRequest(
            "a key is tk_ and 32 or more of letters, digits, - and _; make one by `halfstep keys create`"
        )
    wanted = set(scopes)
    unknown = sorted(wanted - set(SCOPES))
    if unknown or not wanted:
        problem = f"unknown scope {unknown[0]!r}" if unknown else "no scope given"
        detail = f"{problem}; choose from {', '.join(SCOPES)}"
        raise InvalidRequest(detail, [FieldProblem("/scopes", detail)])
    digest = _digest(secret)
    s.execute(
        insert_new(
            s,
            api_keys,
            id=new_job_id(),
            tenant=tenant,
            name=name,
            prefix=secret[:_PREFIX_CHARACTERS],
            secret_sha256=digest,
            scopes=[scope for scope in SCOPES if scope in wanted],
            created_at=db_now(),
            expires_at=expires_at,
        )
    )
    return _key_from(s.execute(select(api_keys).where(api_keys.c.secret_sha256 == digest)).one())


def authenticate(s: Session, secret: str) -> ApiKey | None:
    """The key with this secret; None where there is none, or it is expired or revoked."""
    if _SECRET.fullmatch(secret) is None:
        return None
    digest = _digest(secret)
    row = s.execute(select(api_keys).where(api_keys.c.secret_sha256 == digest, _active())).one_or_none()
    if row is None or not hmac.compare_digest(row.secret_sha256, digest):
        return None
    return _key_from(row)


def any_active(s: Session) -> bool:
    """Whether any key could authenticate now."""
    return s.scalar(select(func.count()).select_from(api_keys).where(_active())) != 0


def list_keys(s: Session, tenant: str | None = None) -> list[ApiKey]:
    """The keys, oldest first, revoked and expired ones too."""
    query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
    query = of_tenant(query, api_keys.c.tenant, tenant)
    return [_key_from(row) for row in s.execute(query)]


def revoke(s: Session, key_id: str) -> ApiKey:
    """Make a key useless from now on; repeating it keeps the first time.

    Raises:
        NotFound: there is no key with this id.
    """
    row = s.execute(
        update(api_keys)
        .where(api_keys.c.id == key_id)
        .values(revoked_at=func.coalesce(api_keys.c.revoked_at, db_now()))
        .returning(*api_keys.c)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {key_id}; `halfstep keys list` shows them")
    return _key_from(row)


def _active() -> ColumnElement[bool]:
    return and_(
        api_keys.c.revoked_at.is_(None),
        or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > db_now()),
    )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key_from(row: AnyRow) -> ApiKey:
    return ApiKey(
        row.id,
        row.tenant,
        row.name,
        row.prefix,
        tuple(row.scopes),
        row.created_at,
        row.expires_at,
        row.revoked_at,
    )
