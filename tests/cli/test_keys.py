"""`halfstep keys` and `halfstep migrate`, on a database of their own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfstep.service.store.sql.database import Database
from halfstep.service.store.tenants import keys
from tests.cli.conftest import Run


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfstep: Run) -> Iterator[Database]:
    monkeypatch.chdir(tmp_path)  # no `.env` of the checkout
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path / "data"))
    assert halfstep("migrate").code == 0
    opened = Database(f"sqlite:///{tmp_path}/data/halfstep.db")
    yield opened
    opened.dispose()


def authenticate(database: Database, secret: str) -> keys.ApiKey | None:
    with database.read() as session:
        return keys.authenticate(session, secret)


def test_the_secret_is_shown_once_and_works_until_it_is_revoked(database: Database, halfstep: Run) -> None:
    made = halfstep("keys", "create", "ci", "--tenant", "vision", "--scope", "read")
    assert made.code == 0
    assert re.fullmatch(r"tk_\S+\n", made.out)
    secret = made.out.strip()
    key = authenticate(database, secret)
    assert key is not None
    assert (key.tenant, key.name, key.scopes) == ("vision", "ci", ("read",))
    listed = halfstep("keys", "list")
    assert "ci" in listed.out
    assert "active" in listed.out
    assert secret not in listed.out + halfstep("keys", "list", "--json").out
    assert halfstep("keys", "revoke", key.id[:30]).code == 0
    assert authenticate(database, secret) is None
    assert "revoked" in halfstep("keys", "list").out


def test_the_default_scopes_do_not_administer(database: Database, halfstep: Run) -> None:
    made = json.loads(halfstep("keys", "create", "x", "--json").out)
    assert (made["scopes"], made["tenant"], made["expires_at"]) == (["read", "submit"], "default", None)
    key = authenticate(database, made["secret"])
    assert key is not None
    assert key.id == made["id"]


def test_a_key_may_expire(database: Database, halfstep: Run) -> None:
    made = json.loads(halfstep("keys", "create", "x", "--expires-days", "2", "--json").out)
    key = authenticate(database, made["secret"])
    assert key is not None
    assert key.expires_at is not None
    assert key.expires_at - key.created_at == pytest.approx(2 * 86400, abs=60)
    assert halfstep("keys", "create", "x", "--expires-days", "-1").code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("create", "x", "--scope", "root"), "read, submit, admin"),
        (("revoke", "nothing"), "no key with an id that starts with 'nothing'"),
    ],
)
def test_mistakes_are_named(database: Database, halfstep: Run, arguments: tuple[str, ...], says: str) -> None:
    ran = halfstep("keys", *arguments)
    assert ran.code == 1
    assert says in ran.err


def test_an_ambiguous_beginning_revokes_nothing(database: Database, halfstep: Run) -> None:
    made = [json.loads(halfstep("keys", "create", name, "--json").out) for name in ("a", "b")]
    assert "2 keys" in halfstep("keys", "revoke", made[0]["id"][:4]).err
    assert all(authenticate(database, each["secret"]) for each in made)


def test_without_a_database_the_next_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfstep: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path / "absent"))
    ran = halfstep("keys", "list")
    assert ran.code == 1
    assert "halfstep migrate" in ran.err
    (tmp_path / "absent").mkdir()
    assert "halfstep migrate" in halfstep("keys", "list").err


def test_migrate_stores_the_first_key_from_a_file_and_a_revoked_one_stays_revoked(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halfstep: Run
) -> None:
    secret = "tk_" + "b2" * 32
    (tmp_path / "key").write_text(secret + "\n")
    monkeypatch.setenv("HALFSTEP_BOOTSTRAP_KEY_FILE", str(tmp_path / "key"))
    for _ in range(2):
        assert halfstep("migrate").code == 0
    key = authenticate(database, secret)
    assert key is not None
    assert key.scopes == ("read", "submit", "admin")
    assert len(json.loads(halfstep("keys", "list", "--json").out)["items"]) == 1
    halfstep("keys", "revoke", key.id)
    halfstep("migrate")
    assert authenticate(database, secret) is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HALFSTEP_PORT", "seventy", "HALFSTEP_PORT: "),
        ("HALFSTEP_DATABASE_URL", "mysql://x/y", "HALFSTEP_DATABASE_URL: "),
        ("HALFSTEP_HEARTBEAT_SECONDS", "50", "HALFSTEP_LEASE_SECONDS=60"),
        ("HALFSTEP_BOOTSTRAP_KEY_FILE", "/absent/key", "HALFSTEP_BOOTSTRAP_KEY_FILE names /absent/key"),
    ],
)
def test_wrong_settings_are_one_line_that_names_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, halfstep: Run, name: str, value: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALFSTEP_DATA_DIR", str(tmp_path))
    monkeypatch.setenv(name, value)
    for command in ("migrate", "api", "up"):
        ran = halfstep(command)
        assert ran.code == 1
        assert says in ran.err
        assert len(ran.err.splitlines()) == 1
        assert str(tmp_path) not in ran.err
