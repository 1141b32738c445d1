"""The summary, the step record and the events of a job."""

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from halfstep.service.contract.metrics import METRIC_COLUMNS, Evaluation
from halfstep.service.contract.states import JobState
from halfstep.service.store import events, jobs, record
from halfstep.service.store.sql.database import Database

from .conftest import Trainer

Submit = Callable[..., str]

STATS_FIELDS = {
    "job_id", "state", "is_terminal", "attempt", "current_step", "total_steps", "epoch", "progress",
    "eta_seconds", "loss", "average_loss", "current_scale", "average_scale", "overflow_count",
    "underflow_count", "nan_count", "skipped_steps", "overflow_rate", "overflow_budget_exceeded",
    "underflow_estimate", "grad_norm", "learning_rate", "memory_usage", "memory_allocated_bytes",
    "memory_reserved_bytes", "memory_peak_bytes", "precision", "evaluation", "last_overflow",
    "performance_metrics", "last_step_at", "updated_at",
}  # fmt: skip


@pytest.fixture
def running(submit: Submit, trainer: Trainer) -> tuple[str, int]:
    """A job under way, with its fence."""
    job_id = submit()
    return job_id, trainer.claim(job_id)


def test_the_summary_has_every_field_from_the_start(client: TestClient, submit: Submit) -> None:
    stats = client.get(f"/jobs/{submit()}/stats").json()
    assert set(stats) == STATS_FIELDS
    assert (stats["state"], stats["current_step"], stats["loss"], stats["progress"]) == (
        "queued",
        0,
        None,
        None,
    )
    assert set(stats["precision"]) == {"mode", "precision_level", "compute_dtype"}
    assert set(stats["performance_metrics"]) == {
        "steps_per_second",
        "samples_per_second",
        "step_time_ms",
        "host_syncs_per_step",
    }


def test_the_summary_follows_the_steps(
    client: TestClient, running: tuple[str, int], trainer: Trainer, database: Database
) -> None:
    job_id, fence = running
    with database.begin() as session:
        record.opened(session, job_id, fence, total_steps=8)
    trainer.steps(job_id, fence, 1, 4)
    with database.begin() as session:
        found = Evaluation(step=4, split="test", loss=math.inf, metrics={"accuracy": 0.5}, seconds=0.1)
        record.evaluated(session, job_id, fence, found)
    stats = client.get(f"/jobs/{job_id}/stats").json()
    assert (stats["state"], stats["current_step"], stats["total_steps"], stats["progress"]) == (
        "running",
        4,
        8,
        0.5,
    )
    assert (stats["loss"], stats["current_scale"], stats["average_scale"]) == (0.25, 2.0, 4.0)
    assert stats["performance_metrics"]["step_time_ms"] == {"p50": 1.0, "p95": 2.0, "max": 3.0}
    assert stats["precision"]["compute_dtype"] == "float16"
    assert stats["evaluation"]["loss"] == "Infinity"
    assert client.get(f"/jobs/{job_id}").json()["stats"] == stats


def test_numbers_that_are_not_finite_are_spelled_out(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 1, loss=math.nan, grad_norm=math.inf, underflow_estimate=-math.inf)
    stats = client.get(f"/jobs/{job_id}/stats").json()
    assert (stats["loss"], stats["grad_norm"], stats["underflow_estimate"]) == (
        "NaN",
        "Infinity",
        "-Infinity",
    )
    columns = client.get(f"/jobs/{job_id}/metrics").json()["columns"]
    assert (columns["loss"], columns["grad_norm"]) == (["NaN"], ["Infinity"])


def test_no_kind_of_change_is_answered_with_304(
    client: TestClient, submit: Submit, trainer: Trainer, database: Database
) -> None:
    job_id = submit()
    etag = client.get(f"/jobs/{job_id}/stats").headers["etag"]

    def changed() -> dict[str, Any]:
        nonlocal etag
        fresh = client.get(f"/jobs/{job_id}/stats", headers={"if-none-match": etag})
        assert fresh.status_code == 200
        etag = fresh.headers["etag"]
        assert client.get(f"/jobs/{job_id}/stats", headers={"if-none-match": etag}).status_code == 304
        stats: dict[str, Any] = fresh.json()
        assert client.get(f"/jobs/{job_id}").json()["stats"] == stats
        return stats

    fence = trainer.claim(job_id)
    assert changed()["state"] == "running"
    with database.begin() as session:
        record.opened(session, job_id, fence, total_steps=8)
    assert changed()["total_steps"] == 8
    trainer.steps(job_id, fence, 1, 4)
    assert changed()["current_step"] == 4
    with database.begin() as session:
        found = Evaluation(step=4, split="test", loss=0.5, metrics={}, seconds=0.1)
        record.evaluated(session, job_id, fence, found)
    assert changed()["evaluation"]["loss"] == 0.5
    with database.begin() as session:
        events.append(session, job_id, type="alert", level="warning", message="Look.")
    changed()
    with database.begin() as session:
        record.truncate_after(session, job_id, fence, 2)
    assert changed()["current_step"] == 2
    with database.begin() as session:
        jobs.release(session, job_id, fence, charge_attempt=True, why="lost")
    assert changed()["attempt"] == 2
    fence = trainer.claim(job_id)
    assert changed()["state"] == "running"
    client.post(f"/jobs/{job_id}/cancel")
    assert changed()["state"] == "cancelling"
    trainer.end(job_id, fence, JobState.CANCELLED)
    assert changed()["is_terminal"]
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert client.get(f"/jobs/{job_id}/stats", headers={"if-none-match": etag}).status_code == 404


def test_the_etag_changes_with_the_summary(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    first = client.get(f"/jobs/{job_id}/stats")
    etag = first.headers["etag"]
    for header in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        same = client.get(f"/jobs/{job_id}/stats", headers={"if-none-match": header})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert client.get(f"/jobs/{job_id}/stats", headers={"if-none-match": '"x"'}).status_code == 200
    trainer.steps(job_id, fence, 1, 1)
    changed = client.get(f"/jobs/{job_id}/stats", headers={"if-none-match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag
    trainer.end(job_id, fence)
    assert client.get(f"/jobs/{job_id}/stats").headers["etag"] != changed.headers["etag"]


def test_every_step_is_in_the_record_once(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 7)
    trainer.steps(job_id, fence, 8, 10, overflow=True)
    page = client.get(f"/jobs/{job_id}/metrics").json()
    assert set(page) == {
        "job_id", "state", "is_terminal", "attempt", "count", "columns", "next_after_step", "last_step",
        "downsampled", "bucket_steps",
    }  # fmt: skip
    assert tuple(page["columns"]) == METRIC_COLUMNS
    assert page["columns"]["step"] == list(range(1, 11))
    assert page["columns"]["overflow"] == [False] * 7 + [True] * 3
    assert page["columns"]["loss"] == [1.0 / step for step in range(1, 11)]
    assert (page["count"], page["last_step"], page["next_after_step"], page["downsampled"]) == (
        10,
        10,
        10,
        False,
    )
    assert (page["state"], page["attempt"], page["bucket_steps"]) == ("running", 1, None)


def test_the_record_is_polled_forward(client: TestClient, running: tuple[str, int], trainer: Trainer) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 5)
    seen: list[int] = []
    after = 0
    for _ in range(4):
        page = client.get(f"/jobs/{job_id}/metrics?after_step={after}&limit=2&fields=step").json()
        seen += page["columns"]["step"]
        after = page["next_after_step"]
    assert seen == [1, 2, 3, 4, 5]
    assert after == 5
    ranged = client.get(f"/jobs/{job_id}/metrics?from_step=2&to_step=3&fields=loss, scale").json()
    assert list(ranged["columns"]) == ["step", "loss", "scale"]
    assert ranged["columns"]["step"] == [2, 3]


def test_buckets_lose_no_spike(client: TestClient, running: tuple[str, int], trainer: Trainer) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 50)
    trainer.steps(job_id, fence, 51, 51, loss=1000.0, overflow=True)
    trainer.steps(job_id, fence, 52, 100)
    page = client.get(f"/jobs/{job_id}/metrics?max_points=10&fields=loss,overflow").json()
    assert (page["downsampled"], page["bucket_steps"], page["count"]) == (True, 10, 10)
    assert max(page["columns"]["loss_max"]) == 1000.0
    assert sum(page["columns"]["overflow"]) == 1
    assert page["columns"]["step"] == list(range(10, 101, 10))
    forward = client.get(f"/jobs/{job_id}/metrics?max_points=5&after_step=90&fields=loss").json()
    assert forward["columns"]["step"] == [92, 94, 96, 98, 100]


def test_csv_and_ndjson_carry_the_same_rows(
    client: TestClient, running: tuple[str, int], trainer: Trainer
) -> None:
    job_id, fence = running
    trainer.steps(job_id, fence, 1, 2)
    trainer.steps(job_id, fence, 3, 3, loss=math.nan, nan=True)
    path = f"/jobs/{job_id}/metrics"
    columns = client.get(path).json()["columns"]
    expected = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = client.get(path, headers={"accept": "application/x-ndjson"})
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in lines.text.splitlines()] == expected
    table = client.get(path, headers={"accept": "text/csv"})
    assert table.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [{key: str(value).lower() for key, value in row.items()} for row in rows] == [
        {key: str(value).lower() for key, value in row.items()} for row in expected
    ]
    assert (table.headers["x-next-after-step"], table.headers["x-last-step"]) == ("3", "3")


@pytest.mark.parametrize(
    ("accept", "status", "content_type"),
    [
        ("*/*", 200, "application/json"),
        ("text/*", 200, "text/csv; charset=utf-8"),
        ("text/csv;q=0.5, application/json;q=0.9", 200, "application/json"),
        ("text/csv, */*;q=0.1", 200, "text/csv; charset=utf-8"),
        ("application/json;q=0, */*", 200, "text/csv; charset=utf-8"),
        ("text/html", 406, "application/problem+json"),
        ("application/json;q=nonsense", 406, "application/problem+json"),
    ],
)
def test_the_accept_header_decides(
    client: TestClient, submit: Submit, accept: str, status: int, content_type: str
) -> None:
    answer = client.get(f"/jobs/{submit()}/metrics", headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (status, content_type)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("after_step=-1", "after_step"),
        ("after_step=99999999999999999999", "after_step"),
        ("after_step=1&from_step=1", "after_step"),
        ("from_step=3&to_step=2", "to_step"),
        ("limit=10001", "limit"),
        ("limit=0", "limit"),
        ("fields=los", "fields"),
        ("fields=,", "fields"),
        ("max_points=0", "max_points"),
        ("after=3", "after"),
    ],
)
def test_a_wrong_parameter_of_the_record_is_named(
    client: TestClient, submit: Submit, query: str, parameter: str
) -> None:
    answer = client.get(f"/jobs/{submit()}/metrics?{query}")
    assert answer.status_code == 422
    assert [error["parameter"] for error in answer.json()["errors"]] == [parameter]


def test_events_come_in_order_and_by_pages(
    client: TestClient, running: tuple[str, int], database: Database
) -> None:
    job_id, fence = running
    with database.begin() as session:
        events.append(
            session,
            job_id,
            type="worker",
            level="error",
            message="last words \ud800",
            data={"x": math.nan},
            fence=fence,
        )
    first = client.get(f"/jobs/{job_id}/events?limit=2").json()
    assert [event["seq"] for event in first["items"]] == [1, 2]
    assert set(first["items"][0]) == {"seq", "at", "type", "level", "message", "data"}
    rest = client.get(f"/jobs/{job_id}/events?after={first['next_after']}").json()
    assert [event["seq"] for event in rest["items"]] == list(range(3, 3 + len(rest["items"])))
    assert rest["items"][-1]["data"] == {"x": "NaN"}
    end = client.get(f"/jobs/{job_id}/events?after={rest['next_after']}").json()
    assert end == {"items": [], "next_after": rest["next_after"]}
    assert client.get(f"/jobs/{job_id}/events?limit=0").status_code == 422
