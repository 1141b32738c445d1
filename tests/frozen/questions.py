"""What the frozen installation is asked: every route in every state, and what its refusals say.

`reads` change nothing. `writes` are one story, each request after the one before; `<new-1>` is the first id
that it makes. Used when answers are recorded; tests send what was recorded.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.frozen.exchanges import Answer, Ask, Exchange
from tests.frozen.making import TRAINED

JSON = {"content-type": "application/json"}
CSV, NDJSON = {"accept": "text/csv"}, {"accept": "application/x-ndjson"}
ABSENT = "01a00000-0000-7000-8000-000000000000"

Send = Callable[[Ask], Answer]


class Asking:
    """Sends requests with a key, and keeps them with their answers."""

    def __init__(self, send: Send, keys: dict[str, str], jobs: dict[str, str]) -> None:
        self._send, self._keys, self.jobs = send, keys, jobs
        self.exchanges: list[Exchange] = []

    def get(self, path: str, *, method: str = "GET", key: str | None = "acme", **more: Any) -> Answer:
        """Ask as the holder of a key."""
        headers = dict(more.pop("headers", {}))
        if key is not None:
            headers["authorization"] = f"Bearer {self._keys.get(key, key)}"
        ask = Ask(method=method, path=path, headers=headers, **more)
        answer = self._send(ask)
        self.exchanges.append(Exchange(ask, answer))
        return answer

    def post(
        self, path: str, document: Any = None, *, headers: dict[str, str] | None = None, key: str = "acme"
    ) -> Answer:
        """Post a JSON document, or text as it is."""
        body = document if document is None or isinstance(document, str) else json.dumps(document)
        more = {**(JSON if body is not None else {}), **(headers or {})}
        return self.get(path, method="POST", key=key, headers=more, body=body)


def reads(asking: Asking) -> None:
    """Everything that changes nothing."""
    _doors(asking)
    _lists(asking)
    for name, job_id in asking.jobs.items():
        if not name.startswith("beta") and name != "gone":
            _job(asking, job_id)
    _records(asking)
    _checkpoints(asking)
    _refusals(asking)


def _doors(asking: Asking) -> None:
    for path in ("/health/live", "/health/ready", "/health/live?x=1"):
        asking.get(path, key=None)
    asking.get("/jobs", key=None)
    asking.get("/jobs", key=None, headers={"authorization": "Basic abc"})
    for key in ("unknown", "expired", "revoked", "acme_reader"):
        asking.get("/jobs?limit=1", key=key)
    asking.post("/jobs", {}, key="acme_reader")
    for path in ("/components", "/workers"):
        asking.get(path)
    for kind in ("model", "dataset", "loss", "optimizer", "scheduler", "nothing"):
        asking.get(f"/components?kind={kind}")


def _lists(asking: Asking) -> None:
    asking.get("/jobs")
    asking.get("/jobs?limit=100")
    asking.get("/jobs", key="beta")
    for key in ("acme", "beta"):
        cursor = ""
        while cursor is not None:
            page = asking.get(f"/jobs?limit=4{cursor and '&cursor=' + cursor}", key=key)
            cursor = json.loads(page.body)["next_cursor"]
    ends = ("succeeded", "failed", "cancelled")
    for state in ("queued", "starting", "running", "pausing", "paused", "cancelling", *ends):
        asking.get(f"/jobs?state={state}")
    asking.get("/jobs?state=paused&state=pausing&limit=2")
    asking.get("/jobs?tag=team:vision")
    asking.get("/jobs?tag=team:speech&tag=run:long")
    asking.get("/jobs?tag=kind:a:b")
    asking.get("/jobs?tag=note:gr%C3%B6%C3%9Fer:%20%C2%BD")
    asking.get("/jobs?name=queued")
    asking.get("/jobs?name=nothing")
    for query in (
        "limit=0",
        "limit=101",
        "limit=x",
        "cursor=abc",
        "cursor=!",
        "state=done",
        "tag=x",
        "name=",
        "what=1",
    ):
        asking.get(f"/jobs?{query}")


def _job(asking: Asking, job_id: str) -> None:
    job = f"/jobs/{job_id}"
    is_over = bool(json.loads(asking.get(job).body)["is_terminal"])
    etag = asking.get(f"{job}/stats").headers["etag"]
    asking.get(f"{job}/stats", headers={"if-none-match": etag})
    asking.get(f"{job}/stats", headers={"if-none-match": f'"x", W/{etag}'})
    asking.get(f"{job}/stats?wait_seconds=0.1", headers={"if-none-match": etag})
    asking.get(f"{job}/stats?wait_seconds=1", headers={"if-none-match": '"0"'})
    asking.get(f"{job}/events")
    asking.get(f"{job}/events?limit=2&after=1")
    asking.get(f"{job}/events?after=100000")
    asking.get(f"{job}/metrics")
    for headers in (CSV, NDJSON):
        asking.get(f"{job}/metrics?limit=12", headers=headers)
    asking.get(f"{job}/metrics?max_points=5")
    asking.get(f"{job}/checkpoints")
    asking.get(f"{job}/stream?after_step=1000000", open_end=not is_over)
    asking.get(f"{job}/stream?fields=loss&after_event=3&after_step=3", open_end=not is_over)
    asking.get(job, key="beta")
    for rest in ("stats", "events", "metrics", "checkpoints", "stream"):
        asking.get(f"{job}/{rest}", key="beta")


def _records(asking: Asking) -> None:
    for name in ("first_chunks", "both_chunks", "under_way", "lost"):
        job = f"/jobs/{asking.jobs[name]}"
        after = 0
        while True:
            page = json.loads(asking.get(f"{job}/metrics?after_step={after}&limit=3000").body)
            if not page["count"]:
                break
            after = page["next_after_step"]
        for headers in (CSV, NDJSON):
            asking.get(f"{job}/metrics?limit=300&after_step=550", headers=headers)
            asking.get(f"{job}/metrics?max_points=30", headers=headers)
        for points in (1, 2, 7, 64, 500):
            asking.get(f"{job}/metrics?max_points={points}")
            asking.get(f"{job}/metrics?max_points={points}&from_step=100&to_step=8400&fields=loss,skipped")
        asking.get(f"{job}/metrics?max_points=3&after_step=250")
        asking.get(f"{job}/metrics?from_step=250&to_step=260")
        asking.get(f"{job}/metrics?from_step=508&to_step=520&fields=compute_dtype,%20grad_norm,loss")
        asking.get(f"{job}/metrics?fields=step&limit=10")
    running = f"/jobs/{asking.jobs['running']}"
    asking.get(f"{running}/stream", open_end=True)
    for name in ("succeeded", "failed", "lost", "first_chunks"):
        job = f"/jobs/{asking.jobs[name]}"
        stream = asking.get(f"{job}/stream")
        identifiers = [line[4:] for line in stream.body.splitlines() if line.startswith("id: ")]
        asking.get(f"{job}/stream", headers={"last-event-id": identifiers[len(identifiers) // 2]})
        asking.get(f"{job}/stream", headers={"last-event-id": identifiers[-1]})
        asking.get(f"{job}/stream", headers={"last-event-id": "s1.e1.j000000"})
    accepts = (
        *("*/*", "text/*", "text/csv;q=0.2, application/x-ndjson;q=0.7", "application/json;q=0, */*"),
        *("image/png", "text/csv;q=x", ""),
    )
    for accept in accepts:
        asking.get(f"{running}/metrics?limit=2", headers={"accept": accept})


def _checkpoints(asking: Asking) -> None:
    for name in ("succeeded", "retry", "paused", "under_way", "run_through"):
        job = f"/jobs/{asking.jobs[name]}"
        for kept in json.loads(asking.get(f"{job}/checkpoints").body)["items"]:
            model, etag = f"{job}/checkpoints/{kept['step']}/model", f'"{kept["sha256"]}"'
            asking.get(model)
            asking.get(model, method="HEAD")
            asking.get(model, headers={"if-none-match": etag})
            asking.get(model, method="HEAD", headers={"if-none-match": etag})
            for part in ("bytes=0-9", "bytes=100-", "bytes=-7", "bytes=99999999-", "bytes=5-2", "lines=1"):
                asking.get(model, headers={"range": part})
            asking.get(model, headers={"range": "bytes=0-9", "if-range": etag})
            asking.get(model, headers={"range": "bytes=0-9", "if-range": '"another"'})
            asking.get(model, key="beta")
    for step in ("1", "0", "x"):
        asking.get(f"/jobs/{asking.jobs['succeeded']}/checkpoints/{step}/model")


def _refusals(asking: Asking) -> None:
    for job_id in (ABSENT, asking.jobs["gone"], "x", "%00", "01A00000-0000-7000-8000-000000000000"):
        for rest in ("", "/stats", "/events", "/metrics", "/checkpoints", "/checkpoints/1/model", "/stream"):
            asking.get(f"/jobs/{job_id}{rest}")
    job = f"/jobs/{asking.jobs['running']}"
    for path, queries in (
        ("stats", ("wait_seconds=31", "wait_seconds=nan", "wait_seconds=-1", "x=1")),
        ("events", ("after=-1", "limit=0", "limit=1001", "after=9007199254740993", "x")),
        (
            "metrics",
            (
                *(
                    "after_step=1&from_step=1",
                    "from_step=5&to_step=4",
                    "fields=losss",
                    "fields=,",
                    "limit=10001",
                ),
                *("max_points=0", "max_points=x", "after_step=-1", "field=loss", "fields=nothing_like_it"),
            ),
        ),
        ("stream", ("after_step=-1", "fields=x", "y=1")),
        ("checkpoints", ("x=1",)),
    ):
        for query in queries:
            asking.get(f"{job}/{path}?{query}")
    paths = [
        *("/", "/nothing", "/jobs/", f"{job}/", f"{job}/nothing", "/jobs", job, "/components", "/workers"),
        *(
            f"{job}/{rest}"
            for rest in ("stats", "events", "metrics", "checkpoints", "stream", "cancel", "retry")
        ),
        f"{job}/checkpoints/1/model",
    ]
    for path in paths:
        for method in ("HEAD", "OPTIONS", "PUT", "PATCH"):
            asking.get(path, method=method)
    for path in ("/jobs", f"{job}/nothing"):
        asking.get(path, method="DELETE")
    for path in (f"{job}/cancel", f"{job}/pause", f"{job}/resume", f"{job}/retry"):
        asking.get(path)
    for path in (job, f"{job}/stats"):
        asking.post(path, {})


SPEC: dict[str, Any] = {"model": {"name": "mlp"}, "dataset": {"name": "synthetic"}}
INVALID: Sequence[Any] = (
    *("", "{", "[]", "nul", '{"model": 1, "model": 2}', "\ufeff{}", "1e999"),
    {},
    {"model": {"name": "mlp"}},
    {**SPEC, "model": {"name": "mpl"}},
    {**SPEC, "model": {"name": "mlp", "params": {"hidden": "wide", "widht": 1}}},
    {**SPEC, "loss": {"name": "mse"}},
    {**SPEC, "name": ""},
    {**SPEC, "name": "a\u0000b"},
    {**SPEC, "tags": {"a": 1}},
    {**SPEC, "tags": {str(number): "x" for number in range(33)}},
    {**SPEC, "priority": 1001, "max_attempts": 0},
    {**SPEC, "training": {"epochs": 0, "batch_size": "32", "keep_checkpoints": 1}},
    {**SPEC, "training": {"compile": "default"}},
    {**SPEC, "precision": {"mode": "manual", "precision_level": "dynamic"}},
    {**SPEC, "precision": {"mode": "adaptiv", "initial_scale": -1}},
    {**SPEC, "resources": {"device": "tpu", "gpus": 2}},
    {**SPEC, "extra": True, "trainning": {}},
)
VALID: Sequence[dict[str, Any]] = (
    SPEC,
    {**SPEC, "precision": {"precision_level": "fp16"}},
    {**SPEC, "precision": {"precision_level": "bf16"}, "resources": {"device": "cuda"}},
    {
        **SPEC,
        "training": {"epochs": 3, "max_steps": 10},
        "scheduler": {"name": "cosine", "params": {"total": 5}},
    },
    {**SPEC, "name": "größer", "tags": {"a": "b"}, "priority": 3, "resources": {"min_memory_bytes": 2**50}},
)


def writes(asking: Asking) -> None:
    """A story that submits, steers, retries and deletes."""
    for document in INVALID:
        asking.post("/jobs", document)
    asking.post("/jobs", json.dumps(SPEC), headers={"content-type": "text/plain"})
    asking.get("/jobs", method="POST", headers=JSON)
    for document in VALID:
        asking.post("/jobs?dry_run=true", document)
        asking.post("/jobs", document)
    asking.post("/jobs?dry_run=perhaps", SPEC)
    # The same key and body give the same job; its etag and its first events go with it.
    for document in (SPEC, SPEC, {**SPEC, "name": "another"}):
        asking.post("/jobs", document, headers={"idempotency-key": "once"})
    asking.post("/jobs", SPEC, headers={"idempotency-key": "key-queued"})
    asking.post("/jobs", SPEC, headers={"idempotency-key": "no spaces"})
    asking.post("/jobs", SPEC, headers={"idempotency-key": "once"}, key="beta")
    for rest in ("", "/stats", "/events", "/metrics", "/checkpoints"):
        asking.get(f"/jobs/<new-1>{rest}")
    for name, job_id in [*asking.jobs.items(), ("absent", ABSENT), ("malformed", "x")]:
        if name in {"succeeded", "both_chunks", "run_through"}:
            continue
        job = f"/jobs/{job_id}"
        asking.get(job, method="DELETE", key="beta" if name == "beta_queued" else "acme")
        for action in _actions(name):
            asking.post(f"{job}/{action}", {} if action == "retry" else None)
            asking.post(f"{job}/{action}")
        if name not in {"absent", "malformed"} and not name.startswith("beta"):
            asking.get(f"{job}/events")
            asking.get(job)
    succeeded = f"/jobs/{asking.jobs['succeeded']}"
    kept = json.loads(asking.get(f"{succeeded}/checkpoints").body)["items"]
    for body in (
        {"from_checkpoint": kept[0]["step"]},
        {"from_checkpoint": 7},
        {"from": 1},
        "[]",
        {"from_checkpoint": "x"},
    ):
        asking.post(f"{succeeded}/retry", body)
        asking.post(f"{succeeded}/retry", body, headers={"idempotency-key": "retry"})
    for name in ("succeeded", "both_chunks", "retry"):
        asking.get(f"/jobs/{asking.jobs[name]}", method="DELETE")
        asking.get(f"/jobs/{asking.jobs[name]}")
    asking.get(f"{succeeded}/retry", method="POST")
    asking.get("/jobs?limit=100")
    asking.get("/jobs?limit=100", key="beta")


def beside(asking: Asking) -> None:
    """What has become of the jobs that a worker, a dispatcher and an API of 0.1 have had in hand since."""
    changed = ("given_back", "queued", "retry", "under_way", "queued_gpu", "running", "paused", "cancelled")
    for name in (*changed, "gone", "first_chunks"):
        job = f"/jobs/{asking.jobs[name]}"
        for rest in (
            "",
            "/stats",
            "/events?limit=1000",
            "/metrics?limit=3000",
            "/metrics?max_points=9",
            "/checkpoints",
        ):
            asking.get(f"{job}{rest}")
    asking.get(f"/jobs/{asking.jobs['given_back']}/stream")
    asking.get("/jobs?limit=100")
    asking.get("/jobs?tag=old:api")
    asking.get("/workers")
    asking.get("/components")
    asking.post("/jobs", TRAINED | {"tags": {"old": "api"}}, headers={"idempotency-key": "of-old"})


def _actions(name: str) -> Iterator[str]:
    # The order matters: what a job that is paused answers to cancel is seen of another that is.
    yield from ("resume", "pause", "resume", "cancel", "pause") if name != "paused" else ("pause", "cancel")
    yield "retry"
