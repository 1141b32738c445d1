"""Keys, scopes, tenants, and a server without keys."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from halfstep.service.api import create_app
from halfstep.service.api.__main__ import refuse_keyless
from halfstep.service.api.requests.known_keys import KEEP_SECONDS, Caller, KnownKeys
from halfstep.service.errors import ConfigurationError
from halfstep.service.settings import Settings
from halfstep.service.store.fleet import components
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tenants import keys

from .catalogue import INFOS
from .conftest import SPEC

NewKey = Callable[..., dict[str, str]]
PATHS = (
    ("POST", "/jobs"),
    ("GET", "/jobs"),
    ("GET", "/jobs/{id}"),
    ("GET", "/jobs/{id}/stats"),
    ("GET", "/jobs/{id}/series"),
    ("GET", "/jobs/{id}/series/held_out/loss"),
    ("GET", "/jobs/{id}/metrics"),
    ("GET", "/jobs/{id}/events"),
    ("GET", "/events"),
    ("GET", "/jobs/{id}/checkpoints"),
    ("GET", "/jobs/{id}/checkpoints/1/model"),
    ("POST", "/jobs/{id}/cancel"),
    ("GET", "/jobs/{id}/stream"),  # after the cancellation: of a job that has ended, the stream ends
    ("POST", "/jobs/{id}/pause"),
    ("POST", "/jobs/{id}/resume"),
    ("POST", "/jobs/{id}/retry"),
    ("DELETE", "/jobs/{id}"),
    ("GET", "/components"),
    ("GET", "/workers"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
)
NOBODY = "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50"


@pytest.fixture
def new_key(database: Database) -> NewKey:
    def make(
        tenant: str = "acme", scopes: tuple[str, ...] = ("read", "submit"), **more: float
    ) -> dict[str, str]:
        with database.begin() as session:
            _, secret = keys.create(
                session, tenant=tenant, name="k", scopes=scopes, expires_at=more.get("expires_at")
            )
        return {"authorization": f"Bearer {secret}"}

    return make


@pytest.fixture
def anywhere(settings: Settings, database: Database, sent: list[str]) -> Iterator[TestClient]:
    """A client on another machine."""
    with database.begin() as session:
        components.publish(session, INFOS)
    app = create_app(settings, database)
    with TestClient(app, base_url="http://halfstep.example", client=("10.1.2.3", 40000)) as client:
        yield client


def test_every_path_is_covered_here(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    routed = {
        (
            method.upper(),
            path.replace("{job_id}", "{id}").replace("{step}", "1").replace("{name}", "held_out/loss"),
        )
        for path, methods in document["paths"].items()
        for method in methods
        if method != "head"  # the same function as GET; its answer has no body to look at
    }
    assert routed == set(PATHS) - {("GET", "/openapi.json"), ("GET", "/docs")} | {
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
    }


def test_without_a_key_this_machine_is_served(client: TestClient) -> None:
    assert client.get("/jobs").status_code == 200
    for name in ("localhost", "127.0.0.1:8000", "[::1]:8000", "127.8.9.1"):
        assert client.get("/jobs", headers={"host": name}).status_code == 200, name


def test_without_a_key_no_other_machine_is_served(anywhere: TestClient) -> None:
    for method, path in PATHS:
        answer = anywhere.request(method, path.format(id=NOBODY), headers={"host": "localhost"})
        assert (answer.status_code, answer.json()["code"]) == (403, "loopback_only"), path
    assert anywhere.get("/health/live").status_code == 200


@pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1.attacker.example", "10.0.0.1"])
def test_a_page_that_points_its_own_name_here_gets_nothing(client: TestClient, host: str) -> None:
    answer = client.get("/jobs", headers={"host": host})
    assert (answer.status_code, answer.json()["code"]) == (403, "loopback_only")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer",
        "Bearer nonsense",
        "Bearer tk_" + "x" * 43,
        "Basic dXNlcjpwYXNz",
        "tk_" + "x" * 43,
        "Bearer \u00e9",
        "Bearer " + "tk_" * 5000,
    ],
)
def test_with_a_key_configured_every_path_asks_for_one(
    client: TestClient, new_key: NewKey, authorization: str | None
) -> None:
    new_key()
    headers = {} if authorization is None else {b"authorization": authorization.encode("latin-1")}
    for method, path in PATHS:
        answer = client.request(method, path.format(id=NOBODY), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), path
        assert answer.headers["www-authenticate"].startswith("Bearer")
        if authorization is not None and len(authorization) > 10:
            assert authorization not in answer.text
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 200


@pytest.fixture
def later(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for what is remembered of keys, and for nothing else."""
    known_keys: KnownKeys = client.app.state.context.known_keys  # type: ignore[attr-defined]  # TestClient's app is any ASGI callable
    now = time.monotonic()
    monkeypatch.setattr(known_keys, "_clock", lambda: now)

    def pass_seconds(seconds: float) -> None:
        nonlocal now
        now += seconds

    return pass_seconds


def test_a_revoked_or_expired_key_is_worth_nothing_and_opens_nothing(
    client: TestClient, new_key: NewKey, database: Database, later: Callable[[float], None]
) -> None:
    expired = new_key(expires_at=time.time() - 60)
    assert client.get("/jobs", headers=expired).status_code == 401
    assert client.get("/jobs").status_code == 401, "the last key has expired: the server stays locked"
    valid = new_key()
    assert client.get("/jobs", headers=valid).status_code == 200
    with database.begin() as session:
        for key in keys.list_keys(session):
            keys.revoke(session, key.id)
    later(KEEP_SECONDS)
    assert client.get("/jobs", headers=valid).status_code == 401
    assert client.get("/jobs").status_code == 401


def test_what_is_known_of_keys_holds_for_a_second_and_no_longer(
    client: TestClient, new_key: NewKey, database: Database, later: Callable[[float], None]
) -> None:
    assert KEEP_SECONDS <= 1
    assert client.get("/jobs").status_code == 200
    guess = {"authorization": "Bearer tk_" + "x" * 43}
    assert client.get("/jobs", headers=guess).status_code == 401
    with database.begin() as session:
        keys.import_secret(session, "tk_" + "x" * 43, tenant="t", name="k", scopes=("read",))
    assert client.get("/jobs", headers=guess).status_code == 200, "a new key is good at once"
    later(0.99)
    assert client.get("/jobs").status_code == 200, "a server that was open just now"
    later(0.02)
    assert client.get("/jobs").status_code == 401
    assert client.get("/jobs", headers=guess).status_code == 200
    with database.begin() as session:
        keys.revoke(session, keys.list_keys(session)[0].id)
    later(1.01)
    assert client.get("/jobs", headers=guess).status_code == 401
    assert client.get("/jobs", headers=guess).status_code == 401


def test_requests_that_come_together_ask_for_what_they_share_once(
    database: Database, new_key: NewKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    authenticate, list_keys = keys.authenticate, keys.list_keys

    def counted(session: Session, secret: str) -> keys.ApiKey | None:
        asked.append(secret)
        return authenticate(session, secret)

    def counted_list(session: Session) -> list[keys.ApiKey]:
        asked.append("any?")
        return list_keys(session)

    monkeypatch.setattr(keys, "authenticate", counted)
    monkeypatch.setattr(keys, "list_keys", counted_list)

    async def together(known_keys: KnownKeys, *secrets: str | None) -> list[object]:
        return await asyncio.gather(
            *(known_keys.keyless() if secret is None else known_keys.caller(secret) for secret in secrets)
        )

    now = 0.0
    known_keys = KnownKeys(database, clock=lambda: now)
    assert asyncio.run(together(known_keys, None, None, None)) == [True] * 3
    assert asked == ["any?"]
    mine, theirs = (new_key(tenant)["authorization"].removeprefix("Bearer ") for tenant in ("a", "b"))
    for _ in range(2):
        asked.clear()
        now += KEEP_SECONDS
        found = asyncio.run(together(known_keys, mine, theirs, "tk_none", mine, None, theirs, mine))
        tenants = [one.tenant if isinstance(one, Caller) else one for one in found]
        assert tenants == ["a", "b", None, "a", False, "b", "a"]
        assert sorted(asked) == sorted([mine, theirs, "tk_none", "any?"])


def test_scopes_limit_a_key(anywhere: TestClient, new_key: NewKey) -> None:
    reader, submitter, admin = (
        new_key(scopes=("read",)),
        new_key(scopes=("submit",)),
        new_key(scopes=("admin",)),
    )
    job_id = anywhere.post("/jobs", json=SPEC, headers=submitter).json()["id"]
    for method, path in PATHS:
        need = "read" if method == "GET" else "submit"
        refused = submitter if need == "read" else reader
        answer = anywhere.request(method, path.format(id=job_id), headers=refused, json={})
        assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing"), path
        assert f"'{need}'" in answer.json()["detail"]
        allowed = anywhere.request(method, path.format(id=job_id), headers=admin, json=SPEC)
        assert allowed.status_code not in {401, 403}, path


def test_a_body_is_not_read_before_its_key(anywhere: TestClient, new_key: NewKey) -> None:
    reader = new_key(scopes=("read",))
    answer = anywhere.post("/jobs", content=b"{", headers=reader | {"content-type": "application/json"})
    assert answer.status_code == 403


def test_tenants_do_not_see_each_other(anywhere: TestClient, new_key: NewKey) -> None:
    mine, theirs = new_key(tenant="acme"), new_key(tenant="rival", scopes=("read", "submit", "admin"))
    headers = {"idempotency-key": "same"}
    job = anywhere.post("/jobs", json=SPEC, headers=mine | headers).json()
    assert anywhere.get("/jobs", headers=theirs).json()["items"] == []
    # What one tenant was just answered is not there for another.
    assert anywhere.get(f"/jobs/{job['id']}/stats", headers=mine).status_code == 200
    for method, path in PATHS:
        if "{id}" in path:
            stranger = anywhere.request(method, path.format(id=job["id"]), headers=theirs)
            absent = anywhere.request(method, path.format(id=NOBODY), headers=theirs)
            assert (stranger.status_code, absent.status_code) == (404, 404), path
            assert stranger.text.replace(job["id"], "") == absent.text.replace(NOBODY, "")
    other = anywhere.post("/jobs", json={**SPEC, "name": "theirs"}, headers=theirs | headers)
    assert other.status_code == 202
    assert other.json()["id"] != job["id"]
    assert anywhere.get(f"/jobs/{job['id']}", headers=mine).json()["state"] == "queued"
    waited = anywhere.get(
        f"/jobs/{job['id']}/stats?wait_seconds=1", headers=theirs | {"if-none-match": '"1"'}
    )
    assert waited.status_code == 404


def test_no_port_is_opened_to_others_without_an_active_key(
    settings: Settings, database: Database, new_key: NewKey
) -> None:
    for loopback in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        refuse_keyless(settings.model_copy(update={"host": loopback}), database)
    beyond = Settings(data_dir=settings.data_dir, host="0.0.0.0", database_url=settings.database_url)
    new_key(expires_at=time.time() - 60)
    with pytest.raises(ConfigurationError, match="halfstep keys create"):
        refuse_keyless(beyond, database)
    new_key()
    refuse_keyless(beyond, database)
