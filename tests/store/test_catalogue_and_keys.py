"""The published components and the API keys."""

import hashlib
import time

import pytest
from sqlalchemy import select

from halfstep.service.errors import InvalidRequest, NotFound
from halfstep.service.store.fleet import components
from halfstep.service.store.fleet.components import ComponentInfo
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import api_keys
from halfstep.service.store.tenants import keys

MLP = ComponentInfo("model", "mlp", "Layers of units.", {"type": "object"}, {})
DIGITS = ComponentInfo("dataset", "digits", "Real digits.", {"type": "object"}, {"task": "classification"})


def test_components_are_published_again_without_duplicates(database: Database) -> None:
    newer = ComponentInfo("model", "mlp", "Wider layers.", {"type": "object", "required": ["hidden"]}, {})
    with database.begin() as s:
        components.publish(s, [MLP, DIGITS])
        components.publish(s, [newer])
    with database.read() as s:
        assert components.list_components(s) == [DIGITS, newer]
        assert components.list_components(s, kind="dataset") == [DIGITS]
        assert components.catalogue(s) == {("dataset", "digits"): DIGITS, ("model", "mlp"): newer}


def test_a_key_is_shown_once_and_authenticates(database: Database) -> None:
    with database.begin() as s:
        assert not keys.any_active(s)
        key, secret = keys.create(s, tenant="acme", name="ci", scopes=["submit", "read"], expires_at=None)
    assert secret.startswith("tk_")
    assert (key.tenant, key.name, key.scopes, key.prefix) == ("acme", "ci", ("read", "submit"), secret[:9])
    with database.read() as s:
        assert keys.authenticate(s, secret) == key
        assert keys.any_active(s)
        assert keys.list_keys(s, "acme") == keys.list_keys(s) == [key]
        assert keys.list_keys(s, "zeta") == []
        stored = s.execute(select(api_keys)).one()
    assert secret not in repr(stored)
    assert stored.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()


@pytest.mark.parametrize(
    "secret", ["", "tk_", "tk_short", "tk_" + "a" * 43, "x" * 46, "tk_" + "\x00" * 40, "tk_é" * 20]
)
def test_a_wrong_secret_authenticates_nobody(database: Database, secret: str) -> None:
    with database.begin() as s:
        keys.create(s, tenant="acme", name="ci", scopes=["read"], expires_at=None)
        assert keys.authenticate(s, secret) is None


def test_expired_and_revoked_keys_authenticate_nobody(database: Database) -> None:
    now = time.time()
    with database.begin() as s:
        old, old_secret = keys.create(s, tenant="a", name="old", scopes=["read"], expires_at=now - 60)
        _, new_secret = keys.create(s, tenant="a", name="new", scopes=["read"], expires_at=now + 3600)
        key, secret = keys.create(s, tenant="a", name="gone", scopes=["read"], expires_at=None)
        revoked = keys.revoke(s, key.id)
        assert revoked.revoked_at is not None
        assert keys.revoke(s, key.id) == revoked
        assert keys.authenticate(s, secret) is None
        assert keys.authenticate(s, old_secret) is None
        assert keys.authenticate(s, new_secret) is not None
        with pytest.raises(NotFound):
            keys.revoke(s, old.id[:-1])
        assert [listed.name for listed in keys.list_keys(s)] == ["old", "new", "gone"]


def test_a_bootstrap_secret_is_stored_once_and_stays_revoked(database: Database) -> None:
    secret = "tk_" + "b" * 40
    with database.begin() as s:
        first = keys.import_secret(s, secret, tenant="acme", name="bootstrap", scopes=["admin"])
        again = keys.import_secret(s, secret, tenant="acme", name="bootstrap", scopes=["admin"])
        assert first == again == keys.authenticate(s, secret)
        keys.revoke(s, first.id)
        keys.import_secret(s, secret, tenant="acme", name="bootstrap", scopes=["admin"])
        assert keys.authenticate(s, secret) is None
        assert not keys.any_active(s)


@pytest.mark.parametrize(
    ("secret", "scopes", "problem"),
    [
        ("password", ["read"], "32 or more"),
        ("tk_" + "b" * 40, [], "no scope given; choose from read, submit, admin"),
        ("tk_" + "b" * 40, ["read", "root"], "unknown scope 'root'"),
    ],
)
def test_a_malformed_key_is_refused(database: Database, secret: str, scopes: list[str], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem), database.begin() as s:
        keys.import_secret(s, secret, tenant="acme", name="x", scopes=scopes)
    with database.read() as s:
        assert keys.list_keys(s) == []
