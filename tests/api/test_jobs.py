"""Submitting, listing, cancelling and deleting jobs."""

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from halfstep.service import queue
from halfstep.service.contract.states import JobState
from halfstep.service.errors import StoreUnavailable
from halfstep.service.settings import Settings
from halfstep.service.store import jobs
from halfstep.service.store.fleet import workers
from halfstep.service.store.sql.database import Database
from halfstep.service.store.tables import idempotency_keys

from .conftest import CPU, SPEC, Trainer

Submit = Callable[..., str]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")

JOB_FIELDS = {
    "id", "name", "state", "is_terminal", "status_reason", "spec", "attempt", "max_attempts",
    "priority", "tags", "parent_id", "from_checkpoint", "worker", "created_at", "started_at",
    "finished_at", "transitions", "stats",
}  # fmt: skip


def test_a_submitted_job_is_stored_and_a_worker_is_woken(client: TestClient, sent: list[str]) -> None:
    answer = client.post("/jobs", json={**SPEC, "name": "first", "tags": {"team": "vision"}, "priority": 3})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert uuid.UUID(job["id"]).version == 7
    assert sent == [job["id"]]
    assert set(job) == JOB_FIELDS
    assert (job["name"], job["state"], job["is_terminal"], job["attempt"]) == ("first", "queued", False, 1)
    assert (job["tags"], job["priority"], job["worker"], job["started_at"]) == (
        {"team": "vision"},
        3,
        None,
        None,
    )
    assert TIME.fullmatch(job["created_at"])
    assert [(entry["state"], bool(TIME.fullmatch(entry["at"]))) for entry in job["transitions"]] == [
        ("queued", True)
    ]
    assert job["stats"]["current_step"] == 0
    assert client.get(answer.headers["location"]).json() == job


@pytest.mark.parametrize("key", [None, "k"])
def test_what_is_answered_is_what_is_read_afterwards(client: TestClient, key: str | None) -> None:
    spec = {
        **SPEC,
        "name": "n\u00e9",
        "tags": {"team": "vision", "a": "b"},
        "precision": {"precision_level": "bf16", "initial_scale": 3.5},
        "priority": -2,
    }
    headers = {} if key is None else {"idempotency-key": key}
    answer = client.post("/jobs", json=spec, headers=headers)
    assert answer.status_code == 202
    assert client.get(answer.headers["location"]).content == answer.content
    if key is not None:
        assert client.post("/jobs", json=spec, headers=headers).content == answer.content


def test_defaults_are_filled_into_what_is_stored(client: TestClient) -> None:
    spec = client.post("/jobs", json=SPEC).json()["spec"]
    assert spec["loss"] == {"name": "cross_entropy", "params": {}}
    assert spec["training"]["epochs"] == 1
    assert spec["optimizer"] == {"name": "adamw", "params": {"lr": 0.001}}
    assert spec["precision"]["initial_scale"] == 65536.0


def test_a_broker_that_is_down_does_not_fail_a_submission(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_settings: Settings, _job_id: str) -> bool:
        raise RuntimeError("boom")

    for broken in (explode, lambda _settings, _job_id: False):
        monkeypatch.setattr(queue, "enqueue", broken)
        answer = client.post("/jobs", json=SPEC)
        assert answer.status_code == 202
        assert client.get(answer.headers["location"]).json()["state"] == "queued"


def test_the_job_is_committed_before_the_queue_hears_of_it(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[JobState] = []

    def enqueue(_settings: Settings, job_id: str) -> bool:
        with database.read() as session:
            seen.append(jobs.get(session, job_id, tenant=None).state)
        return True

    monkeypatch.setattr(queue, "enqueue", enqueue)
    assert client.post("/jobs", json=SPEC).status_code == 202
    assert seen == [JobState.QUEUED]


def test_dry_run_stores_nothing(client: TestClient, sent: list[str]) -> None:
    answer = client.post("/jobs?dry_run=true", json=SPEC)
    assert answer.status_code == 200
    verdict = answer.json()
    assert set(verdict) == {"valid", "warnings", "resolved", "capable_workers"}
    assert (verdict["valid"], verdict["capable_workers"]) == (True, 1)
    assert verdict["resolved"]["loss"]["name"] == "cross_entropy"
    assert any("'mixed' is bfloat16 on a CPU" in warning for warning in verdict["warnings"])
    assert client.get("/jobs").json()["items"] == []
    assert sent == []


def test_warnings_become_events_of_the_job(client: TestClient, submit: Submit) -> None:
    job_id = submit(precision={"precision_level": "fp16", "initial_scale": 3.0})
    events = client.get(f"/jobs/{job_id}/events").json()["items"]
    warnings = [event["message"] for event in events if event["type"] == "warning"]
    assert any("FP16 on a CPU is slow" in warning for warning in warnings)
    assert any("not a power of two" in warning for warning in warnings)


def test_without_a_catalogue_names_are_accepted_with_a_warning(bare_client: TestClient) -> None:
    document = {"model": {"name": "anything"}, "dataset": {"name": "at_all", "params": {"x": 1}}}
    verdict = bare_client.post("/jobs?dry_run=true", json=document).json()
    assert verdict["capable_workers"] == 0
    assert any("no worker has published its components" in warning for warning in verdict["warnings"])
    assert any("no live worker can run this job now" in warning for warning in verdict["warnings"])
    assert bare_client.post("/jobs", json=document).status_code == 202


def test_a_precision_that_no_device_has_is_refused(client: TestClient, database: Database) -> None:
    old = workers.Capability(
        "cpu", bf16=False, fp16=True, memory_bytes=2**30, device_name="old", device_count=1
    )
    bf16 = {**SPEC, "precision": {"precision_level": "bf16"}}
    with database.begin() as session:
        workers.register(session, worker_id="w2", name="host-2", pid=8, capability=old, versions={}, slots=1)
    verdict = client.post("/jobs?dry_run=true", json=bf16).json()
    assert verdict["capable_workers"] == 1
    assert any("has no native BF16" in warning and "(on old)" in warning for warning in verdict["warnings"])
    with database.begin() as session:
        workers.remove(session, "w1")
    answer = client.post("/jobs", json=bf16)
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/precision/precision_level"]


def test_one_idempotency_key_is_one_job(client: TestClient, sent: list[str]) -> None:
    headers = {"idempotency-key": "k-1"}
    first = client.post("/jobs", json=SPEC, headers=headers)
    again = client.post("/jobs", content=b'{"dataset":{"name":"digits"},\n"model":{"name":"mlp"}}', headers={
        **headers, "content-type": "application/json",
    })  # fmt: skip
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert sent == [first.json()["id"]]
    other = client.post("/jobs", json={**SPEC, "name": "other"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(client.get("/jobs").json()["items"]) == 1


def test_equal_bodies_are_one_body_to_an_idempotency_key(client: TestClient) -> None:
    headers = {"idempotency-key": "k-2", "content-type": "application/json"}
    ids = set()
    for steps, mark in (("1000", ""), ("1e3", ""), ("1000.0", "\ufeff")):
        text = json.dumps({**SPEC, "training": {"max_steps": "?"}}).replace('"?"', steps)
        answer = client.post("/jobs", content=(mark + text).encode(), headers=headers)
        assert answer.status_code == 202
        assert answer.json()["spec"]["training"]["max_steps"] == 1000
        ids.add(answer.json()["id"])
    assert len(ids) == 1


def test_a_key_stored_by_an_earlier_version_is_honoured(client: TestClient, database: Database) -> None:
    """It hashed the document as it was spelt: 2.0 and 2 were two."""
    body = {**SPEC, "precision": {"initial_scale": 65536.0}}
    headers = {"idempotency-key": "k-3"}
    first = client.post("/jobs", json=body, headers=headers).json()
    spelt = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    with database.begin() as session:
        session.execute(update(idempotency_keys).values(body_hash=hashlib.sha256(spelt).hexdigest()))
    assert client.post("/jobs", json=body, headers=headers).json()["id"] == first["id"]
    body["precision"]["initial_scale"] = 32768.0
    other = client.post("/jobs", json=body, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_parameters_are_integers_where_their_schema_says_so(client: TestClient) -> None:
    body = {**SPEC, "model": {"name": "mlp", "params": {"hidden": [64.0, 1e1]}}}
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 202
    assert repr(answer.json()["spec"]["model"]["params"]["hidden"]) == "[64, 10]"


def test_an_idempotency_key_at_once_from_many_is_one_job(client: TestClient, sent: list[str]) -> None:
    barrier = threading.Barrier(20)
    answers: list[tuple[int, str]] = []

    def post() -> None:
        barrier.wait()
        answer = client.post("/jobs", json=SPEC, headers={"idempotency-key": "race"})
        answers.append((answer.status_code, answer.json().get("id", answer.text)))

    threads = [threading.Thread(target=post) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert len(set(answers)) == 1
    assert answers[0][0] == 202
    assert len(client.get("/jobs").json()["items"]) == 1
    assert len(sent) == 1


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "k"}])
def test_a_commit_whose_answer_was_lost_makes_one_job(
    client: TestClient, sent: list[str], monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    begin = Database.begin
    lost: list[bool] = []

    @contextmanager
    def lossy(database: Database) -> Iterator[Session]:
        with begin(database) as session:
            yield session
        if not lost:
            lost.append(True)
            raise StoreUnavailable("the connection broke after the commit")

    monkeypatch.setattr(Database, "begin", lossy)
    answer = client.post("/jobs", json={**SPEC, "precision": {"precision_level": "fp16"}}, headers=headers)
    assert (answer.status_code, lost) == (202, [True])
    assert [job["id"] for job in client.get("/jobs").json()["items"]] == [answer.json()["id"]] == sent
    events = client.get(f"/jobs/{answer.json()['id']}/events").json()["items"]
    assert [event["type"] for event in events] == ["state", "warning"]


@pytest.mark.parametrize("key", ["a b", "x" * 256, "caf\u00e9"])
def test_an_unfit_idempotency_key_is_refused(client: TestClient, key: str) -> None:
    answer = client.post("/jobs", json=SPEC, headers={b"idempotency-key": key.encode("latin-1")})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == "idempotency-key"


def test_jobs_are_listed_newest_first_by_pages(client: TestClient, submit: Submit) -> None:
    ids = [submit(name=f"job-{number}") for number in range(5)]
    first = client.get("/jobs?limit=2").json()
    second = client.get("/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    # What arrives meanwhile does not move the pages.
    submit(name="late")
    third = client.get("/jobs", params={"limit": 2, "cursor": second["next_cursor"]}).json()
    assert [job["id"] for page in (first, second, third) for job in page["items"]] == ids[::-1]
    assert third["next_cursor"] is None
    assert set(first["items"][0]) == JOB_FIELDS


def test_jobs_are_filtered(client: TestClient, submit: Submit) -> None:
    vision = submit(name="a", tags={"team": "vision", "run": "x:y"})
    text = submit(name="b", tags={"team": "text"})
    client.post(f"/jobs/{text}/cancel")

    def ids(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/jobs?{query}").json()["items"]]

    assert ids("name=a") == [vision]
    assert ids("state=cancelled") == [text]
    assert ids("state=cancelled&state=queued") == [text, vision]
    assert ids("tag=team:vision") == [vision]
    assert ids("tag=run:x:y&tag=team:vision") == [vision]
    assert ids("tag=run:x:y&tag=team:text") == []
    colons = submit(name="c", tags={"a:b": "c:d", "e": "::"})
    assert ids("tag=a:b:c:d") == ids("tag=e:::") == [colons]
    assert ids("tag=a:b:c") == ids("tag=a:b:c:d&tag=run:x:y") == []
    assert ids("state=running") == []


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=1e400", "limit"),
        ("state=done", "state"),
        ("tag=vision", "tag"),
        ("tag=:x", "tag"),
        ("name=", "name"),
        ("name=a%00b", "name"),
        ("tag=a:%00", "tag"),
        ("cursor=!", "cursor"),
        ("cursor=e30", "cursor"),
        ("cursor=WzFlNDAwLCJ4Il0", "cursor"),
        ("cursor=%ff", "cursor"),
        ("states=running", "states"),
    ],
)
def test_a_wrong_query_parameter_is_named(client: TestClient, query: str, parameter: str) -> None:
    answer = client.get(f"/jobs?{query}")
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert [(error["in"], error["parameter"]) for error in answer.json()["errors"]] == [("query", parameter)]


@pytest.mark.parametrize(
    "job_id",
    [
        "nothing",
        "01935b2e-7a6c-7c1e-9b1a-5f0c2d3e4f50",
        "%00",
        "01935B2E-7A6C-7C1E-9B1A-5F0C2D3E4F50",
        "x" * 300,
    ],
)
def test_what_is_absent_is_404_on_every_path(client: TestClient, job_id: str) -> None:
    for method, suffix in (
        ("GET", ""),
        ("GET", "/stats"),
        ("GET", "/metrics"),
        ("GET", "/events"),
        ("POST", "/cancel"),
        ("DELETE", ""),
    ):
        answer = client.request(method, f"/jobs/{job_id}{suffix}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, suffix)


def test_a_queued_job_is_cancelled_at_once_and_again(client: TestClient, submit: Submit) -> None:
    job_id = submit()
    for _ in range(2):
        answer = client.post(f"/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert answer.json()["status_reason"]["code"] == "cancelled_by_user"
    assert [entry["state"] for entry in answer.json()["transitions"]] == ["queued", "cancelled"]


def test_a_running_job_is_asked_to_stop(client: TestClient, submit: Submit, trainer: Trainer) -> None:
    job_id = submit()
    fence = trainer.claim(job_id)
    for _ in range(2):
        assert client.post(f"/jobs/{job_id}/cancel").json()["state"] == "cancelling"
    # It ended before the request reached it: the real outcome stays, and a later cancel is a conflict.
    trainer.end(job_id, fence)
    answer = client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert client.get(f"/jobs/{job_id}").json()["state"] == "succeeded"


def test_only_a_terminal_job_is_deleted(
    client: TestClient, submit: Submit, trainer: Trainer, database: Database, settings: Settings
) -> None:
    job_id = submit()
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 3)
    assert client.delete(f"/jobs/{job_id}").status_code == 409
    inside = settings.data_dir / "jobs" / job_id / "1"
    inside.mkdir(parents=True)
    (inside / "weights").write_bytes(b"x")
    outside = settings.data_dir.parent / f"outside-{job_id}"
    outside.mkdir()
    for step, place in ((1, inside), (2, outside), (3, Path("never/made"))):
        with database.begin() as session:
            jobs.record_checkpoint(
                session, job_id, fence, step=step, path=str(place), bytes=1, sha256="0" * 64, metrics={}
            )
    trainer.end(job_id, fence)
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert not inside.parent.exists()
    assert outside.exists(), "nothing beyond the data directory is removed, whatever a record says"
    for path in ("", "/stats", "/metrics", "/events"):
        assert client.get(f"/jobs/{job_id}{path}").status_code == 404
    assert client.delete(f"/jobs/{job_id}").status_code == 404


def test_the_fleet_is_shown(client: TestClient, trainer: Trainer, submit: Submit, database: Database) -> None:
    worker = client.get("/workers").json()["items"][0]
    assert (worker["name"], worker["state"], worker["slots"]) == ("host-1", "free", 1)
    assert worker["capability"] == {
        "device_type": CPU.device_type,
        "device_name": "cpu",
        "device_count": 1,
        "bf16": True,
        "fp16": True,
        "memory_bytes": CPU.memory_bytes,
        "speed": None,
    }
    assert TIME.fullmatch(worker["last_seen"])
    with database.begin() as session:
        workers.beat(session, "w1", busy=1, draining=False)
    assert client.get("/workers").json()["items"][0]["state"] == "busy"
    with database.begin() as session:
        workers.beat(session, "w1", busy=0, draining=True)
    assert client.get("/workers").json()["items"][0]["state"] == "draining"


def test_components_are_listed_with_their_schema(client: TestClient) -> None:
    items: list[dict[str, Any]] = client.get("/components").json()["items"]
    assert {(item["kind"], item["name"]) for item in items} >= {("model", "mlp"), ("loss", "mse")}
    assert all(set(item) == {"kind", "name", "help", "schema", "extra"} for item in items)
    only = client.get("/components?kind=dataset").json()["items"]
    assert [item["name"] for item in only] == ["digits", "house_prices"]
    assert only[0]["extra"] == {"task": "classification"}
    assert client.get("/components?kind=datasets").status_code == 422
