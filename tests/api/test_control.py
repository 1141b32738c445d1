"""Pause, resume and retry over HTTP: the Job, asked again the same, and the reason where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from halfstep.service.contract.states import JobState
from halfstep.service.store.sql.database import Database
from halfstep.service.store.sql.ids import new_job_id
from halfstep.service.store.tenants import keys

from .conftest import SPEC, Trainer

Submit = Callable[..., str]
FAILURE = {"code": "data_error", "message": "It broke.", "detail": ""}


def post(client: TestClient, job_id: str, verb: str, status: int = 200, **options: Any) -> dict[str, Any]:
    answer = client.post(f"/jobs/{job_id}/{verb}", **options)
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    return document


def failed_job(submit: Submit, trainer: Trainer) -> str:
    job_id = submit(tags={"a": "b"})
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 9)
    trainer.checkpoint(job_id, fence, 6)
    trainer.end(job_id, fence, JobState.FAILED, **FAILURE)
    return job_id


def test_a_queued_job_pauses_at_once_and_resumes(client: TestClient, submit: Submit, sent: list[str]) -> None:
    job_id = submit()
    assert post(client, job_id, "pause")["state"] == "paused"
    assert post(client, job_id, "pause") == client.get(f"/jobs/{job_id}").json()
    sent.clear()
    resumed = post(client, job_id, "resume")
    assert (resumed["state"], resumed["attempt"]) == ("queued", 1)
    assert sent == [job_id]
    assert post(client, job_id, "resume") == resumed


def test_a_running_job_is_asked_to_pause(client: TestClient, submit: Submit, trainer: Trainer) -> None:
    job_id = submit()
    fence = trainer.claim(job_id)
    assert post(client, job_id, "resume")["state"] == "running"
    assert post(client, job_id, "pause")["state"] == "pausing"
    assert post(client, job_id, "pause")["state"] == "pausing"
    problem = post(client, job_id, "resume", 409)
    assert (problem["code"], "once its state is paused" in problem["detail"]) == ("conflict", True)
    trainer.end(job_id, fence, JobState.PAUSED)
    assert post(client, job_id, "resume")["state"] == "queued"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_what_has_ended_is_a_conflict(client: TestClient, submit: Submit, verb: str) -> None:
    job_id = submit()
    client.post(f"/jobs/{job_id}/cancel")
    assert "already cancelled" in post(client, job_id, verb, 409)["detail"]


@pytest.mark.parametrize("verb", ["pause", "resume", "retry"])
def test_another_tenants_job_and_no_job_are_not_found(
    client: TestClient, submit: Submit, database: Database, verb: str
) -> None:
    job_id = submit()
    with database.begin() as session:
        _, secret = keys.create(session, tenant="zeta", name="k", scopes=("admin",), expires_at=None)
    headers = {"authorization": f"Bearer {secret}"}
    for wanted in (job_id, new_job_id(), "nothing"):
        assert post(client, wanted, verb, 404, headers=headers)["code"] == "not_found"
        assert client.get(f"/jobs/{wanted}/checkpoints", headers=headers).status_code == 404
        assert client.get(f"/jobs/{wanted}/checkpoints/1/model", headers=headers).status_code == 404


@pytest.mark.parametrize("verb", ["pause", "resume", "retry"])
def test_a_key_that_only_reads_steers_nothing(
    client: TestClient, submit: Submit, database: Database, verb: str
) -> None:
    job_id = submit()
    with database.begin() as session:
        _, secret = keys.create(session, tenant="default", name="k", scopes=("read",), expires_at=None)
    headers = {"authorization": f"Bearer {secret}"}
    assert post(client, job_id, verb, 403, headers=headers)["code"] == "scope_missing"
    assert client.get(f"/jobs/{job_id}/checkpoints", headers=headers).json() == {"items": []}


def test_a_retry_is_a_new_job(client: TestClient, submit: Submit, trainer: Trainer, sent: list[str]) -> None:
    job_id = failed_job(submit, trainer)
    sent.clear()
    answer = client.post(f"/jobs/{job_id}/retry")
    child = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/jobs/{child['id']}")
    assert (child["state"], child["parent_id"], child["from_checkpoint"]) == ("queued", job_id, None)
    parent = client.get(f"/jobs/{job_id}").json()
    assert child["spec"] == parent["spec"]
    assert child["tags"] == {"a": "b"}
    assert child["stats"]["current_step"] == 0
    assert sent == [child["id"]]
    assert parent["state"] == "failed"
    for body in ({}, {"from_checkpoint": None}):
        assert post(client, job_id, "retry", 202, json=body) == child
    assert sent == [child["id"]]


def test_a_retry_from_a_checkpoint_outlives_its_parent(
    client: TestClient, submit: Submit, trainer: Trainer, tmp_path: Path
) -> None:
    job_id = failed_job(submit, trainer)
    child = post(client, job_id, "retry", 202, json={"from_checkpoint": 6})
    assert (child["parent_id"], child["from_checkpoint"], child["stats"]["current_step"]) == (job_id, 6, 6)
    kept = client.get(f"/jobs/{job_id}/checkpoints").json()
    assert client.get(f"/jobs/{child['id']}/checkpoints").json() == kept
    (tmp_path / "jobs" / job_id / "log.txt").write_text("of the parent alone")
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    left = [path.relative_to(tmp_path / "jobs" / job_id) for path in (tmp_path / "jobs" / job_id).rglob("*")]
    assert sorted(map(str, left)) == [
        "checkpoints",
        "checkpoints/fence-000001-step-0000000006",
        "checkpoints/fence-000001-step-0000000006/model.safetensors",
    ]
    assert client.get(f"/jobs/{child['id']}").json()["parent_id"] is None
    assert client.get(f"/jobs/{child['id']}/checkpoints/6/model").content == b"weights"
    client.post(f"/jobs/{child['id']}/cancel")
    assert client.delete(f"/jobs/{child['id']}").status_code == 204
    assert list(tmp_path.glob("jobs/*")) == []
    assert tmp_path.is_dir()


def test_a_retry_of_what_has_not_ended_is_a_conflict(client: TestClient, submit: Submit) -> None:
    assert "cancel it first" in post(client, submit(), "retry", 409)["detail"]


def test_a_retry_with_a_key(client: TestClient, submit: Submit, trainer: Trainer) -> None:
    job_id = failed_job(submit, trainer)
    first = post(client, job_id, "retry", 202, headers={"idempotency-key": "1"})
    assert post(client, job_id, "retry", 202, headers={"idempotency-key": "2"})["id"] != first["id"]
    assert post(client, job_id, "retry", 202, headers={"idempotency-key": "1"})["id"] == first["id"]
    reused = client.post("/jobs", json=SPEC, headers={"idempotency-key": "1"})
    assert (reused.status_code, reused.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"from_checkpoint": 7}, "/from_checkpoint", "those of the steps 6"),
        ({"from_checkpoint": 0}, "/from_checkpoint", "greater than or equal to 1"),
        ({"from_checkpoint": "6"}, "/from_checkpoint", "integer"),
        ({"from_checkpoint": 6.5}, "/from_checkpoint", "integer"),
        ({"from_checkpoint": True}, "/from_checkpoint", "integer"),
        ({"from_step": 6}, "/from_step", "'from_checkpoint'"),
        ([6], "", "object"),
    ],
)
def test_a_wrong_body_is_refused_with_its_place(
    client: TestClient, submit: Submit, trainer: Trainer, body: Any, pointer: str, says: str
) -> None:
    job_id = failed_job(submit, trainer)
    [error] = post(client, job_id, "retry", 422, json=body)["errors"]
    assert error["pointer"] == pointer
    assert says in error["detail"]
    assert len(client.get("/jobs").json()["items"]) == 1


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"x" * 2_000_000, "application/json", 413),
    ],
)
def test_what_is_no_json_is_refused(
    client: TestClient, submit: Submit, trainer: Trainer, content: bytes, kind: str, status: int
) -> None:
    job_id = failed_job(submit, trainer)
    post(client, job_id, "retry", status, content=content, headers={"content-type": kind})
