"""The published contract: valid, held by a snapshot, true of the answers, and free of torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from pydantic import BaseModel, TypeAdapter
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from starlette.testclient import TestClient

from halfstep.service.api import create_app
from halfstep.service.api.export import render
from halfstep.service.contract import answers
from halfstep.service.contract.answers import examples
from halfstep.service.contract.spec import JobSpec, RetryRequest
from halfstep.service.contract.states import JobState
from halfstep.service.settings import Settings

from .conftest import Trainer
from .test_stream import parsed

SNAPSHOT = Path(__file__).parents[2] / "docs" / "openapi.json"
REGENERATE = "python -m halfstep.service.api.export docs/openapi.json"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(render())
    return parsed


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_the_document_is_the_committed_one() -> None:
    assert SNAPSHOT.read_text(encoding="utf-8") == render(), (
        f"The HTTP contract has changed. If that is meant, run `{REGENERATE}` and commit the difference."
    )


def test_the_server_serves_that_document(client: TestClient, document: dict[str, Any]) -> None:
    assert client.get("/openapi.json").json() == document


def test_every_operation_declares_its_failures_and_has_an_example(document: dict[str, Any]) -> None:
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for path, method, operation in operations:
        name = f"{method} {path}"
        needed = {"422", "500"} if path.startswith("/health") else {"401", "403", "422", "500", "503"}
        needed |= {"404"} if "{job_id}" in path else set()
        needed |= {"400", "413", "415"} if (method, path) == ("post", "/jobs") else set()
        steers = path.endswith(("/cancel", "/pause", "/resume", "/retry"))
        needed |= {"409"} if method == "delete" or steers else set()
        assert needed <= set(operation["responses"]), name
        assert operation["summary"], name
        assert operation["description"], name
        assert operation["operationId"].isidentifier(), name
        for status, response in operation["responses"].items():
            assert "x-request-id" in response["headers"], (name, status)
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (name, status)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (answers.Job, examples.JOB),
        (answers.Stats, examples.STATS),
        (answers.MetricsPage, examples.METRICS),
        (answers.EventPage, examples.EVENTS),
        (answers.Checkpoint, examples.CHECKPOINT),
        (answers.StreamState, examples.STREAM_STATE),
        (answers.StreamMetrics, examples.STREAM_METRICS),
        (answers.StreamEnd, examples.STREAM_END),
        (answers.Component, examples.COMPONENT),
        (answers.Worker, examples.WORKER),
        (answers.Problem, examples.PROBLEM),
        (answers.DryRun, examples.RESOLVED),
        *((RetryRequest, example["value"]) for example in examples.RETRIES.values()),
        *((JobSpec, example["value"]) for example in examples.SUBMISSIONS.values()),
    ],
)
def test_every_example_is_of_its_schema(model: type[BaseModel], example: dict[str, Any]) -> None:
    TypeAdapter(model).validate_json(json.dumps(example))
    if not issubclass(model, JobSpec | RetryRequest):
        assert set(example) == {field.alias or name for name, field in model.model_fields.items()}


def check(document: dict[str, Any], name: str, answer: Any) -> None:
    """`answer` is of the schema `name`, with no field beyond it."""
    resource = DRAFT202012.create_resource(document)
    registry = Registry().with_resource("urn:api", resource)
    schema = {"$ref": f"urn:api#/components/schemas/{name}"}
    Draft202012Validator(schema, registry=registry).validate(answer)
    assert set(answer) <= set(document["components"]["schemas"][name]["properties"]), name


def test_real_answers_are_of_their_schemas(
    client: TestClient, submit: Callable[..., str], trainer: Trainer, document: dict[str, Any]
) -> None:
    job_id = submit(tags={"a": "b"})
    fence = trainer.claim(job_id)
    trainer.steps(job_id, fence, 1, 3, loss=float("nan"), overflow=True)
    trainer.checkpoint(job_id, fence, 3)
    trainer.end(
        job_id,
        fence,
        JobState.FAILED,
        code="non_finite_loss",
        message="The loss is NaN.",
        detail="step 3",
    )
    for path, name in (
        (f"/jobs/{job_id}", "Job"),
        (f"/jobs/{job_id}/stats", "Stats"),
        (f"/jobs/{job_id}/metrics", "MetricsPage"),
        (f"/jobs/{job_id}/metrics?max_points=1", "MetricsPage"),
        (f"/jobs/{job_id}/events", "EventPage"),
        (f"/jobs/{job_id}/checkpoints", "CheckpointList"),
        ("/jobs", "JobPage"),
        ("/components", "ComponentList"),
        ("/workers", "WorkerList"),
        ("/health/live", "Alive"),
        ("/health/ready", "Readiness"),
        ("/nothing", "Problem"),
        ("/jobs?limit=0", "Problem"),
    ):
        check(document, name, client.get(path).json())
    messages = parsed(client.get(f"/jobs/{job_id}/stream").text)
    names = {"state": "StreamState", "event": "Event", "metrics": "StreamMetrics", "end": "StreamEnd"}
    assert {message.kind for message in messages} == set(names)
    for message in messages:
        check(document, names[message.kind], message.data)
        assert set(message.data) == set(document["components"]["schemas"][names[message.kind]]["properties"])
    assert {message.kind for message in parsed(examples.STREAM)} == {"state", "metrics", "end"}
    dry = client.post("/jobs?dry_run=true", json=examples.SUBMISSIONS["smallest"]["value"]).json()
    check(document, "DryRun", dry)
    # What the service resolves is itself a spec.
    assert client.post("/jobs?dry_run=true", json=dry["resolved"]).json()["resolved"] == dry["resolved"]


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for word in ("<script", "<link", "<img", "http://", "https://", "src=", "@import", "url("):
        assert word not in page.text, word
    for path in ("/jobs/{job_id}/stats", "/jobs/{job_id}/stream", "/components"):
        assert path in page.text


def test_importing_the_api_leaves_torch_out() -> None:
    program = (
        "import sys, halfstep.service.api, halfstep.service.api.__main__\n"
        "print([name for name in ('torch', 'numpy', 'worker') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


def test_making_the_application_opens_nothing(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"database_url": "postgresql+psycopg://nobody@127.0.0.1:1/none"})
    nowhere.__dict__.pop("sql_url", None)
    assert create_app(nowhere).openapi()
