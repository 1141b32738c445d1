"""Bad input over HTTP: a 4xx problem with a pointer and the remedy, nothing stored, never a 500."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from halfstep.service.api import create_app
from halfstep.service.contract.precision import MixedPrecisionMode
from halfstep.service.settings import Settings
from halfstep.service.store.sql.database import Database

from .conftest import SPEC

SECRET = "s3cr3t"


def with_raw(path: str, raw: str) -> bytes:
    """A valid document with the raw JSON text `raw` at `path`."""
    document: dict[str, Any] = json.loads(json.dumps(SPEC))
    here = document
    *parents, last = path.strip("/").split("/")
    for part in parents:
        here = here.setdefault(part, {})
    here[last] = "@@"
    return json.dumps(document).replace('"@@"', raw).encode()


CASES = [
    ("unknown field", with_raw("/trainig", "{}"), "/trainig", "did you mean 'training'"),
    ("unknown nested field", with_raw("/training/epoch", "1"), "/training/epoch", "did you mean 'epochs'"),
    ("unknown component", with_raw("/model/name", '"mpl"'), "/model/name", "did you mean 'mlp'"),
    (
        "unknown optimizer",
        with_raw("/optimizer", '{"name": "adam"}'),
        "/optimizer/name",
        "did you mean 'adamw'",
    ),
    (
        "unknown parameter",
        with_raw("/model/params", '{"hiden": 1}'),
        "/model/params/hiden",
        "did you mean 'hidden'",
    ),
    (
        "wrong parameter",
        with_raw("/model/params", '{"hidden": "s3cr3t"}'),
        "/model/params/hidden",
        "type array",
    ),
    (
        "contradiction",
        with_raw("/precision/gradient_scaling", "false"),
        "/precision/gradient_scaling",
        "set both",
    ),
    (
        "refused cell",
        with_raw("/precision/mode", '"gradient_scaling"'),
        "/precision/precision_level",
        "'fp32'",
    ),
    ("NaN", with_raw("/precision/initial_scale", "NaN"), "/precision/initial_scale", "finite"),
    (
        "Infinity",
        with_raw("/optimizer", '{"name": "adamw", "params": {"lr": Infinity}}'),
        "/optimizer/params/lr",
        "finite",
    ),
    ("-Infinity", with_raw("/priority", "-Infinity"), "/priority", "finite"),
    ("1e400", with_raw("/training/time_limit_seconds", "1e400"), "/training/time_limit_seconds", "finite"),
    ("10^400", with_raw("/training/seed", "1" + "0" * 400), "/training/seed", "64 bits"),
    ("lone surrogate", with_raw("/name", r'"\ud800"'), "/name", "surrogate"),
    ("NUL", with_raw("/model/params", r'{"x": "s3cr3t\u0000"}'), "/model/params/x", "NUL"),
    (
        "seed beyond 63 bits",
        with_raw("/training/seed", str(2**63)),
        "/training/seed",
        "less than or equal to",
    ),
    ("not an object", b"[]", "", "JSON object"),
    (
        "repeated name",
        b'{"model": {"name": "mlp"}, "model": {}, "dataset": {"name": "digits"}}',
        "/model",
        "once",
    ),
]


def check_problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "instance", "code"} <= set(problem)
    assert problem["status"] == status
    assert SECRET not in answer.text
    assert answer.headers["x-request-id"]
    return problem


def post(client: TestClient, raw: bytes, **headers: str) -> Any:
    return client.post("/jobs", content=raw, headers={"content-type": "application/json", **headers})


@pytest.mark.parametrize(
    ("raw", "pointer", "remedy"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_wrong_document_is_422_with_a_pointer(
    client: TestClient, sent: list[str], raw: bytes, pointer: str, remedy: str, query: str
) -> None:
    answer = client.post(f"/jobs{query}", content=raw, headers={"content-type": "application/json"})
    errors = check_problem(answer, 422)["errors"]
    assert [error["pointer"] for error in errors] == [pointer]
    assert remedy in errors[0]["detail"]
    assert (client.get("/jobs").json()["items"], sent) == ([], [])


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "empty_body"),
        (b'{"name": "\xff"}', 400, "invalid_utf8"),
        (b"[" * 100_000, 400, "too_deep"),
        (with_raw("/training/seed", "9" * 5000), 400, "integer_too_long"),
        (with_raw("/name", '"' + "x" * 5_000_000 + '"'), 413, "body_too_large"),
    ],
)
def test_what_is_not_json_is_refused(
    client: TestClient, sent: list[str], raw: bytes, status: int, code: str
) -> None:
    assert check_problem(post(client, raw), status)["code"] == code
    assert (client.get("/jobs").json()["items"], sent) == ([], [])


def test_a_body_without_a_length_is_measured_as_it_comes(client: TestClient, settings: Settings) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"name": "'
        for _ in range(80):
            yield b"x" * 65536

    answer = client.post("/jobs", content=chunks(), headers={"content-type": "application/json"})
    assert check_problem(answer, 413)["code"] == "body_too_large"
    fits = json.dumps(SPEC).encode().ljust(settings.max_body_bytes)
    assert post(client, fits).status_code == 202
    assert post(client, fits + b" ").status_code == 413


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": ";"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_another_type_is_415(client: TestClient, headers: dict[str, str]) -> None:
    check_problem(client.post("/jobs", content=json.dumps(SPEC).encode(), headers=headers), 415)
    check_problem(client.post("/jobs", content=json.dumps(SPEC).encode()), 415)


@pytest.mark.parametrize("content_type", ["application/json; charset=UTF-8", "Application/JSON"])
def test_json_is_json_however_it_is_spelled(client: TestClient, content_type: str) -> None:
    answer = client.post("/jobs", content=json.dumps(SPEC).encode(), headers={"content-type": content_type})
    assert answer.status_code == 202


def test_a_mode_that_cannot_be_run_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    runnable = frozenset({MixedPrecisionMode.AUTOMATIC, MixedPrecisionMode.GRADIENT_SCALING})
    monkeypatch.setattr("halfstep.service.api.submitting.document.SUPPORTED_MODES", runnable)
    answer = post(client, with_raw("/precision/mode", '"adaptive"'))
    assert check_problem(answer, 422)["errors"] == [
        {
            "pointer": "/precision/mode",
            "detail": "'adaptive', 'manual', 'selective' cannot be run by this version; "
            "use one of 'automatic' and 'gradient_scaling'",
        }
    ]
    assert client.get("/jobs").json()["items"] == []


def test_unknown_paths_and_methods_are_problems_too(client: TestClient) -> None:
    assert check_problem(client.get("/nothing"), 404)["code"] == "no_such_path"
    assert check_problem(client.get("/jobs/"), 404)["code"] == "no_such_path"
    for later in ("stream", "checkpoints"):
        check_problem(client.get(f"/jobs/x/{later}"), 404)
    answer = client.put("/jobs", json=SPEC)
    assert check_problem(answer, 405)["code"] == "method_not_allowed"
    assert set(answer.headers["allow"].split(", ")) <= {"GET", "POST", "HEAD"}


def test_a_query_that_is_not_known_is_refused(client: TestClient) -> None:
    errors = check_problem(client.post("/jobs?dryrun=true", json=SPEC), 422)["errors"]
    assert errors == [
        {
            "in": "query",
            "parameter": "dryrun",
            "detail": "is no parameter of this path; did you mean 'dry_run'?",
        }
    ]
    assert client.get("/jobs").json()["items"] == []


def test_a_request_id_is_kept_when_it_is_sane(client: TestClient) -> None:
    assert client.get("/jobs", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for unfit in ("a b", "x" * 200, "", "<script>"):
        given = client.get("/jobs", headers={"x-request-id": unfit}).headers["x-request-id"]
        assert given != unfit
        assert len(given) == 32
    assert client.get("/nothing").headers["x-request-id"]


def test_a_defect_is_500_without_its_inside(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("halfstep.service.store.jobs.list_jobs", explode)
    with TestClient(create_app(settings, database), base_url="http://localhost", client=("::1", 1)) as client:
        assert check_problem(client.get("/jobs"), 500)["code"] == "internal_error"


def test_a_database_that_is_away_is_503(settings: Settings) -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    with TestClient(create_app(settings, away), base_url="http://localhost", client=("::1", 1)) as client:
        answer = client.get("/jobs")
        assert check_problem(answer, 503)["code"] == "store_unavailable"
        assert answer.headers["retry-after"]
        ready = client.get("/health/ready")
        parts = check_problem(ready, 503)["parts"]
        assert [name for name, part in parts.items() if part["ok"]] == []
        assert client.get("/health/live").json() == {"status": "ok"}
    away.dispose()


def test_readiness_tells_the_parts(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    degraded = client.get("/health/ready")
    assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
    assert {name: part["ok"] for name, part in degraded.json()["parts"].items()} == {
        "database": True,
        "schema": True,
        "broker": False,
    }
    monkeypatch.setattr("halfstep.service.queue.broker_reachable", lambda _settings: True)
    assert client.get("/health/ready").json()["status"] == "ready"


def test_readiness_asks_for_a_migration(settings: Settings, tmp_path: Any) -> None:
    empty = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    with TestClient(create_app(settings, empty), base_url="http://localhost", client=("::1", 1)) as client:
        problem = check_problem(client.get("/health/ready"), 503)
    assert problem["parts"]["database"]["ok"]
    assert "halfstep migrate" in problem["parts"]["schema"]["detail"]
    empty.dispose()
