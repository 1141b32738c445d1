"""Whatever is sent, the answer is never a 500 and the answer to a bad body stores nothing."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from halfstep.service.api import create_app
from halfstep.service.contract.answers import examples
from halfstep.service.settings import Settings
from halfstep.service.store.fleet import components, workers
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.schema import migrate
from tests.databases import empty_database

from .catalogue import INFOS
from .conftest import CPU

FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["mlp", "digits", "automatic", "\ud800", "\x00", 2**63, 2**64, 10**400, -(2**63) - 1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FULL: dict[str, Any] = {
    **examples.SUBMISSIONS["mixed precision"]["value"],
    "loss": {"name": "cross_entropy", "params": {}},
    "scheduler": {"name": "step_lr", "params": {"step_size": 5}, "interval": "epoch"},
    "resources": {"device": "auto", "gpus": 1, "min_memory_bytes": 0},
    "priority": 0,
    "max_attempts": 3,
}


def places(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(document, dict | list):
        members: Any = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in members:
            yield from places(value, (*path, key))


def replaced(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    copy: Any = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One server for all examples of a test: what they store is theirs to look at."""
    directory = tmp_path_factory.mktemp("fuzz")
    with empty_database(request.param, directory) as url:
        migrate(url)
        database = Database(url)
        with database.begin() as session:
            components.publish(session, INFOS)
            workers.register(session, worker_id="w", name="w", pid=1, capability=CPU, versions={}, slots=1)
        here = Settings(data_dir=directory, database_url=url, broker_url="redis://127.0.0.1:1/0")
        app = create_app(here, database)
        with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
            yield client
        database.dispose()


def check(server: TestClient, raw: bytes) -> None:
    answer = server.post("/jobs", content=raw, headers={"content-type": "application/json"})
    if answer.status_code == 202:
        # What was taken in can be read back in every way.
        job = server.get(answer.headers["location"]).json()
        assert job["state"] == "queued"
        assert server.post(f"/jobs/{job['id']}/cancel").status_code == 200
        assert server.delete(f"/jobs/{job['id']}").status_code == 204
        return
    assert answer.status_code in {400, 413, 422}, (raw, answer.text)
    problem = answer.json()
    assert problem["status"] == answer.status_code
    if answer.status_code == 422:
        assert problem["errors"], raw
        assert all(error["pointer"] == "" or error["pointer"].startswith("/") for error in problem["errors"])
    assert server.get("/jobs?limit=1").json()["items"] == []


@FUZZ
@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes(server: TestClient, raw: bytes) -> None:
    check(server, raw)


@FUZZ
@given(document=JSON)
def test_arbitrary_json(server: TestClient, document: Any) -> None:
    check(server, json.dumps(document).encode())


@FUZZ
@given(data=st.data())
def test_a_valid_spec_with_one_value_replaced(server: TestClient, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(places(FULL), key=repr)))
    check(server, json.dumps(replaced(FULL, path, data.draw(JSON))).encode())


@FUZZ
@given(data=st.data())
def test_a_valid_spec_with_a_member_added(server: TestClient, data: st.DataObject) -> None:
    objects = [path for path in places(FULL) if isinstance(at(FULL, path), dict)]
    path = data.draw(st.sampled_from(sorted(objects, key=repr)))
    added = {**at(FULL, path), data.draw(st.text(max_size=8)): data.draw(JSON)}
    check(server, json.dumps(replaced(FULL, path, added)).encode())


@FUZZ
@given(data=st.data())
def test_a_valid_spec_with_damaged_bytes(server: TestClient, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(FULL).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check(server, bytes(raw))


@FUZZ
@given(
    path=st.sampled_from(["/jobs", "/jobs/x", "/jobs/x/stats", "/jobs/x/metrics", "/components", "/workers"]),
    query=st.text(max_size=60),
    headers=st.dictionaries(
        st.sampled_from(["accept", "if-none-match", "idempotency-key", "x-request-id", "content-length"]),
        st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=30),
        max_size=3,
    ),
)
def test_arbitrary_queries_and_headers(
    server: TestClient, path: str, query: str, headers: dict[str, str]
) -> None:
    raw = {name.encode("latin-1"): value.encode("latin-1") for name, value in headers.items()}
    answer = server.get(f"{path}?{quote(query, safe='=&%+:')}", headers=raw)
    assert answer.status_code in {200, 404, 406, 422}, answer.text


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        document = document[part]
    return document
