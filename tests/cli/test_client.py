"""The client commands against a scripted service: what is asked, what is shown, how they end."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from halfstep.service.client import watching
from tests.cli.conftest import Run, Serve
from tests.cli.stub import Answer, Asked

ID = "01a208d3-6485-7a26-8d7f-6d81f0290b39"
OTHER = "01a208d3-6999-7a26-8d7f-6d81f0290b39"
STATS: dict[str, Any] = {
    "job_id": ID,
    "state": "running",
    "is_terminal": False,
    "attempt": 1,
    "current_step": 120,
    "total_steps": 450,
    "epoch": 2,
    "progress": 0.2667,
    "eta_seconds": 75.0,
    "loss": 0.21314,
    "average_loss": "NaN",
    "current_scale": 65536.0,
    "average_scale": 65000.5,
    "overflow_count": 3,
    "underflow_count": 1,
    "nan_count": 2,
    "skipped_steps": 5,
    "overflow_rate": 0.025,
    "overflow_budget_exceeded": False,
    "underflow_estimate": 0.001,
    "grad_norm": "Infinity",
    "learning_rate": 0.001,
    "memory_usage": 0.123,
    "memory_allocated_bytes": 3 * 2**30,
    "memory_reserved_bytes": 4 * 2**30,
    "memory_peak_bytes": 5 * 2**30,
    "precision": {"mode": "automatic", "precision_level": "fp16", "compute_dtype": "float16"},
    "evaluation": {
        "step": 100,
        "split": "test",
        "loss": 0.31,
        "metrics": {"accuracy": 0.9611},
        "seconds": 0.1,
    },
    "last_overflow": {"step": 17, "layer": "fc2", "kind": "inf"},
    "performance_metrics": {
        "steps_per_second": 123.4,
        "samples_per_second": 3948.8,
        "step_time_ms": {"p50": 7.5, "p95": 9.25, "max": 40.0},
        "host_syncs_per_step": 0.0,
    },
}
JOB: dict[str, Any] = {
    "id": ID,
    "name": "digits [amp]",
    "state": "running",
    "is_terminal": False,
    "status_reason": None,
    "attempt": 1,
    "worker": "gpu-1",
    "created_at": "2026-01-02T03:04:05Z",
    "started_at": "2026-01-02T03:04:06Z",
    "finished_at": None,
    "stats": STATS,
}


def over(state: str, **job: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Final stats and Job."""
    return (
        {
            **STATS,
            "state": state,
            "is_terminal": True,
            "progress": 1.0,
            "current_step": 450,
            "eta_seconds": None,
        },
        {**JOB, "state": state, "is_terminal": True, "finished_at": "2026-01-02T03:05:16Z", **job},
    )


def service(
    *, job: dict[str, Any] = JOB, stats: dict[str, Any] = STATS, items: Sequence[dict[str, Any]] = (JOB,)
) -> Callable[[Asked], Answer]:
    def answer(asked: Asked) -> Answer:
        if asked.path == "/jobs" and asked.method == "POST":
            return Answer(202, job)
        if asked.path == "/jobs":
            return Answer(200, {"items": list(items), "next_cursor": None})
        if asked.path == f"/jobs/{ID}/stats":
            return Answer(200, stats, {"etag": '"7"'})
        if asked.path == f"/jobs/{ID}/cancel":
            return Answer(200, {**job, "state": "cancelling"})
        if asked.path == f"/jobs/{ID}":
            return Answer(200, job)
        return Answer(404, {"title": "Not Found", "detail": f"there is nothing at {asked.path}"})

    return answer


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\nmodel: {name: mlp}\ndataset: {name: digits}\n")
    return str(path)


def test_submit_prints_the_id_alone_for_scripts(serve: Serve, halfstep: Run, spec: str) -> None:
    stub = serve(service())
    ran = halfstep("submit", spec, "--key", "tk_abc", "--idempotency-key", "once")
    assert (ran.code, ran.out) == (0, f"{ID}\n")
    [asked] = stub.asked
    assert asked.body == {"name": "digits", "model": {"name": "mlp"}, "dataset": {"name": "digits"}}
    assert asked.headers["authorization"] == "Bearer tk_abc"
    assert asked.headers["idempotency-key"] == "once"
    assert asked.headers["content-type"] == "application/json"


def test_the_key_may_come_from_the_environment_and_none_is_sent_without_one(
    serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = serve(service())
    halfstep("jobs")
    monkeypatch.setenv("HALFSTEP_API_KEY", "tk_env")
    halfstep("jobs")
    assert [asked.headers.get("authorization") for asked in stub.asked] == [None, "Bearer tk_env"]


def test_a_refusal_is_shown_with_each_place(serve: Serve, halfstep: Run, spec: str) -> None:
    document = {
        "type": "about:blank",
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "The job is not valid.",
        "code": "invalid_request",
        "errors": [
            {
                "pointer": "/precision/initial_scale",
                "detail": "must be positive; use 65536 [or leave it out]",
            },
            {"pointer": "", "detail": "model is missing"},
        ],
    }
    serve(lambda asked: Answer(422, document))
    ran = halfstep("submit", spec)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "422 Unprocessable Content: The job is not valid.",
        "  /precision/initial_scale  must be positive; use 65536 [or leave it out]",
        "  /  model is missing",
    ]


def test_without_a_key_the_remedy_is_named(serve: Serve, halfstep: Run) -> None:
    serve(lambda asked: Answer(401, {"title": "Unauthorized", "detail": "This server needs a key"}))
    ran = halfstep("jobs")
    assert ran.code == 1
    assert "HALFSTEP_API_KEY" in ran.err


@pytest.mark.parametrize(("status", "body"), [(502, "<html>Bad gateway</html>"), (500, '["list"]')])
def test_an_answer_that_is_no_problem_document_is_still_shown(
    serve: Serve, halfstep: Run, status: int, body: str
) -> None:
    serve(lambda asked: Answer(status, body))
    ran = halfstep("jobs")
    assert ran.code == 1
    assert str(status) in ran.err
    assert "Traceback" not in ran.err


def test_something_else_at_the_address_is_named(serve: Serve, halfstep: Run) -> None:
    serve(lambda asked: Answer(200, "<html>hello</html>"))
    ran = halfstep("jobs")
    assert ran.code == 1
    assert "did not answer with JSON" in ran.err
    assert "HALFSTEP_URL" in ran.err


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1", "halfstep up"),
        ("localhost:8000", "http://HOST:PORT"),
        ("ftp://x", "http://HOST:PORT"),
    ],
)
def test_an_address_without_a_service(halfstep: Run, url: str, says: str) -> None:
    ran = halfstep("jobs", "--url", url)
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert says in ran.err


def test_a_bad_file_is_refused_before_anything_is_sent(serve: Serve, halfstep: Run, tmp_path: Path) -> None:
    stub = serve(service())
    (tmp_path / "a.yaml").write_text("x: [")
    ran = halfstep("submit", str(tmp_path / "a.yaml"))
    assert ran.code == 1
    assert "a.yaml cannot be read" in ran.err
    assert stub.asked == []


def test_jobs_is_a_table_with_whole_ids(serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = serve(service())
    monkeypatch.setenv("COLUMNS", "60")
    ran = halfstep(
        "jobs",
        "--state",
        "running",
        "--state",
        "queued",
        "--tag",
        "team:vision",
        "--name",
        "n",
        "--limit",
        "3",
    )
    assert stub.asked[0].query == [
        ("limit", "3"),
        ("state", "running"),
        ("state", "queued"),
        ("tag", "team:vision"),
        ("name", "n"),
    ]
    heading, row = ran.out.splitlines()
    assert heading.split() == ["id", "name", "state", "step", "loss", "overflows", "created"]
    assert row.split()[:7] == [ID, "digits", "[amp]", "running", "120/450", "0.2131", "3"]


def test_a_wrong_state_is_wrong_usage(halfstep: Run) -> None:
    assert halfstep("jobs", "--state", "sleeping").code == 2


def test_stats_shows_every_figure(serve: Serve, halfstep: Run) -> None:
    serve(service())
    ran = halfstep("stats", ID)
    assert ran.code == 0
    shown = dict(line.split("  ", 1) for line in ran.out.splitlines())
    figures = {label.strip(): " ".join(value.split()) for label, value in shown.items()}
    assert figures["job"] == f"digits [amp] {ID}"
    assert figures["state"] == "running"
    assert figures["steps"] == "120/450 (26.7%), epoch 2, attempt 1"
    assert figures["accuracy (test)"] == "0.9611"
    assert figures["loss (test)"] == "0.31 at step 100"
    assert figures["loss"] == "0.2131 (epoch average NaN)"
    assert figures["gradient norm"] == "Infinity"
    assert figures["precision"] == "automatic fp16 float16"
    assert figures["loss scale"] == "65536 (average 6.5e+04)"
    assert figures["overflows"] == "3 (rate 0.025)"
    assert figures["last overflow"] == "step 17, inf, layer fc2"
    assert figures["NaN steps"] == "2"
    assert figures["underflows"] == "1 (estimate 0.001)"
    assert figures["skipped steps"] == "5"
    assert figures["memory"] == "3.0 GiB, peak 5.0 GiB, 12.3% of the device"
    assert figures["speed"] == "123.4 steps/s, 3949 samples/s"
    assert figures["step time"] == "p50 7.5 ms, p95 9.25 ms, max 40 ms"
    assert figures["time"].endswith("1 min 15 s to go")


def test_json_is_the_services_own_document(serve: Serve, halfstep: Run, spec: str) -> None:
    serve(service())
    assert json.loads(halfstep("stats", ID, "--json").out) == STATS
    assert json.loads(halfstep("jobs", "--json").out) == {"items": [JOB], "next_cursor": None}
    assert json.loads(halfstep("submit", spec, "--json").out) == JOB
    assert json.loads(halfstep("cancel", ID, "--json").out)["state"] == "cancelling"


def test_an_id_may_be_a_unique_beginning(serve: Serve, halfstep: Run) -> None:
    stub = serve(service(items=(JOB, {**JOB, "id": OTHER})))
    ran = halfstep("cancel", ID[:16].upper())
    assert (ran.code, ran.out) == (0, f"{ID} cancelling\n")
    assert stub.asked[-1].method == "POST"
    ambiguous = halfstep("cancel", ID[:10])
    assert (ambiguous.code, len([a for a in stub.asked if a.method == "POST"])) == (1, 1)
    assert "2 jobs have ids that start with" in ambiguous.err
    assert "no job of the newest 2" in halfstep("stats", "ffff").err
    assert "not a job id" in halfstep("stats", "../keys").err


def test_a_beginning_is_looked_for_page_by_page(serve: Serve, halfstep: Run) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.path == "/jobs":
            last = ("cursor", "more") in asked.query
            return Answer(
                200,
                {"items": [JOB if last else {**JOB, "id": OTHER}], "next_cursor": None if last else "more"},
            )
        return service()(asked)

    serve(answer)
    assert halfstep("cancel", ID[:16]).out == f"{ID} cancelling\n"


def test_dry_run_stores_nothing_and_shows_warnings(serve: Serve, halfstep: Run, spec: str) -> None:
    resolved = {
        "valid": True,
        "resolved": {},
        "capable_workers": 2,
        "warnings": ["precision_level: fp16 on a CPU is slow"],
    }
    stub = serve(lambda asked: Answer(200, resolved))
    ran = halfstep("submit", spec, "--dry-run")
    assert stub.asked[0].query == [("dry_run", "true")]
    assert ran.out.splitlines() == [
        "valid; live workers that could run it: 2",
        "warning: precision_level: fp16 on a CPU is slow",
    ]


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_watching_ends_with_the_jobs_outcome(
    serve: Serve, halfstep: Run, spec: str, state: str, code: int
) -> None:
    reason = {"code": "out_of_memory_device", "message": "The device is full.", "detail": None}
    final, job = over(state, status_reason=reason if state == "failed" else None)
    serve(service(job=job, stats=final))
    ran = halfstep("submit", spec, "--watch")
    assert ran.code == code
    assert f"{state} step 450/450 loss 0.2131 scale 65536 overflows 3 skipped 5" in ran.out
    assert "accuracy (test)" in ran.out
    assert "1 min 10 s" in ran.out
    assert ("out_of_memory_device: The device is full." in ran.out) == (state == "failed")


def test_watching_asks_only_for_what_has_changed(
    serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PAUSE_SECONDS", 0.01)
    final, ended = over("succeeded")
    script = [
        Answer(200, STATS, {"etag": '"1"'}),
        Answer(304, None, {"etag": '"1"'}),
        Answer(200, {**STATS, "loss": "NaN"}, {"etag": '"2"'}),
        Answer(200, final, {"etag": '"3"'}),
    ]
    polls: list[Asked] = []

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/stats"):
            polls.append(asked)
            return script[len(polls) - 1]
        return Answer(200, ended if len(polls) == 4 else JOB)

    serve(answer)
    ran = halfstep("watch", ID, "--json")
    assert ran.code == 0
    assert [json.loads(line)["loss"] for line in ran.out.splitlines()] == [0.21314, "NaN", 0.21314]
    assert [poll.headers.get("if-none-match") for poll in polls] == [None, '"1"', '"1"', '"2"']
    assert [dict(poll.query).get("wait_seconds") for poll in polls] == [None, "10", "10", "10"]


def test_watching_outlives_a_service_that_is_away_for_a_while(
    serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "FIRST_RETRY_SECONDS", 0.01)
    final, job = over("succeeded")
    script = [
        Answer(503, {"title": "Service Unavailable", "detail": "The database is away."}),
        Answer(200, final),
    ]
    polls: list[int] = []

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/stats"):
            polls.append(1)
            return script[len(polls) - 1]
        return Answer(200, job)

    serve(answer)
    ran = halfstep("watch", ID)
    assert ran.code == 0
    assert "waiting: The database is away." in ran.out


def test_watching_gives_up_in_the_end_and_at_once_where_waiting_is_no_help(
    serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(watching, "AWAY_SECONDS", 0.2)
    stub = serve(lambda asked: Answer(503, {"title": "Service Unavailable", "detail": "away"}))
    assert halfstep("watch", ID).code == 1
    assert len(stub.asked) > 2
    gone = serve(lambda asked: Answer(404, {"title": "Not Found", "detail": "no such job"}))
    ran = halfstep("watch", ID)
    assert (ran.code, len(gone.asked)) == (1, 1)
    assert "no such job" in ran.err


def test_interrupting_the_view_leaves_the_job(
    serve: Serve, halfstep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = serve(service())

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halfstep.service.client.watching.time.sleep", interrupted)
    ran = halfstep("watch", ID)
    assert ran.code == 130
    assert f"halfstep cancel {ID}" in ran.out
    assert all(asked.method == "GET" for asked in stub.asked)
