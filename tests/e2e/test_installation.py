"""The product as its operators run it: separate processes over PostgreSQL and Redis, workers that die."""

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, alive, children_of, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.redis]

SMALL = {
    "name": "small",
    "model": {"name": "mlp", "params": {"hidden": [32]}},
    "dataset": {"name": "digits"},
    "precision": {"mode": "automatic", "precision_level": "bf16"},
    "training": {"epochs": 1, "batch_size": 64},
}


def long_job(steps: int = 20_000, **training: Any) -> dict[str, Any]:
    return {
        **SMALL,
        "name": "long",
        "training": {"max_steps": steps, "batch_size": 16, "evaluate_every_steps": 1_000_000, **training},
    }


@pytest.fixture
def cluster(tmp_path: Path, postgres_database: str, redis_url: str) -> Iterator[Cluster]:
    made = Cluster(tmp_path, postgres_database, redis_url)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def serving(cluster: Cluster) -> Cluster:
    """With API and dispatcher up, and no worker yet."""
    cluster.start_api()
    cluster.start("dispatch", "halfstep.service.dispatch")
    return cluster


def test_twenty_jobs_at_once_on_two_workers(serving: Cluster) -> None:
    serving.start_worker("one")
    serving.start_worker("two")
    # Each of the twenty may be over before the other worker's next process is warm: two that last show that
    # both workers train at the same time.
    lasting = [serving.submit(long_job()) for _ in range(2)]
    ids = [serving.submit({**SMALL, "name": f"job-{n}"}) for n in range(20)]

    def listed() -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = serving.get("/jobs", limit=100)["items"]
        at_work = sum(item["state"] in {"starting", "running"} for item in items)
        assert at_work <= 2, "no worker has more than its one job"
        return items

    def both_train() -> bool:
        return {item["id"] for item in listed() if item["state"] == "running"} == set(lasting)

    wait_for("both workers train", both_train, 120)
    assert {serving.job(job_id)["worker"] for job_id in lasting} == {"one", "two"}
    for job_id in lasting:
        assert serving.client.post(f"/jobs/{job_id}/cancel").status_code == 200
    wait_for("all jobs end", lambda: all(item["is_terminal"] for item in listed()), 300)
    ended = [serving.job(job_id) for job_id in ids]
    assert {job["state"] for job in ended} == {"succeeded"}
    assert {job["worker"] for job in ended} == {"one", "two"}
    assert {job["attempt"] for job in ended} == {1}
    for job in ended:
        assert serving.columns(job["id"], "step")["step"] == list(range(1, job["stats"]["total_steps"] + 1))


def test_a_killed_worker_loses_no_job(serving: Cluster) -> None:
    workers = {name: serving.start_worker(name) for name in ("one", "two")}
    job_id = serving.submit(long_job(2_000, checkpoint_every_steps=100))
    running = wait_for(
        "a checkpoint is taken", lambda: (j := serving.job(job_id))["stats"]["current_step"] > 300 and j, 90
    )
    victim = running["worker"]
    children = children_of(workers[victim].pid)
    assert children
    workers[victim].kill()
    wait_for("its processes died with it", lambda: not any(alive(pid) for pid in children), 5)
    killed = time.monotonic()
    ended = serving.wait(job_id, seconds=180)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    assert ended["worker"] == ({"one", "two"} - {victim}).pop()
    states = [t["state"] for t in ended["transitions"]]
    assert states == ["queued", "starting", "running", "queued", "starting", "running", "succeeded"]
    columns = serving.columns(job_id)
    assert columns["step"] == list(range(1, 2_001))
    resumed = [
        e for e in serving.get(f"/jobs/{job_id}/events")["items"] if "steps_repeated" in (e["data"] or {})
    ]
    assert [e["data"]["step"] % 100 for e in resumed] == [0]
    assert resumed[0]["data"]["step"] > 0
    assert time.monotonic() - killed < 150


def test_a_drained_worker_gives_its_job_back_uncharged(serving: Cluster) -> None:
    first = serving.start_worker("first")
    job_id = serving.submit(long_job(1_500))
    wait_for("it trains", lambda: serving.job(job_id)["stats"]["current_step"] > 200, 90)
    stopped = time.monotonic()
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 0
    assert time.monotonic() - stopped < 30
    waiting = serving.job(job_id)
    assert (waiting["state"], waiting["attempt"]) == ("queued", 1)
    reached = waiting["stats"]["current_step"]
    serving.start_worker("second")
    ended = serving.wait(job_id)
    assert (ended["state"], ended["attempt"], ended["worker"]) == ("succeeded", 1, "second")
    assert serving.columns(job_id, "step")["step"] == list(range(1, 1_501))
    resumed = [
        e["data"]
        for e in serving.get(f"/jobs/{job_id}/events")["items"]
        if "steps_repeated" in (e["data"] or {})
    ]
    assert resumed == [{"step": reached, "steps_repeated": 0}]


def test_a_cancelled_job_stops_at_a_step_and_stays_cancelled(serving: Cluster) -> None:
    serving.start_worker("one")
    job_id = serving.submit(long_job())
    wait_for("it trains", lambda: serving.job(job_id)["stats"]["current_step"] > 100, 90)
    answer = serving.client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelling")
    ended = serving.wait(job_id, seconds=30)
    assert ended["state"] == "cancelled"
    assert ended["status_reason"]["code"] == "cancelled_by_user"
    kept = serving.columns(job_id, "step")["step"]
    assert kept == list(range(1, ended["stats"]["current_step"] + 1))
    after = serving.submit(SMALL)
    assert serving.wait(after)["state"] == "succeeded"
    assert serving.columns(job_id, "step")["step"] == kept


def test_priority_decides_over_age_and_messages(serving: Cluster) -> None:
    low = serving.submit({**SMALL, "name": "low", "priority": 0})
    high = serving.submit({**SMALL, "name": "high", "priority": 5})
    serving.start_worker("one")
    ended = [serving.wait(low), serving.wait(high)]
    assert ended[1]["started_at"] < ended[0]["started_at"]


def test_a_scale_far_too_high_shows_its_overflows_and_then_trains(serving: Cluster) -> None:
    serving.start_worker("one")
    job_id = serving.submit(
        {
            **SMALL,
            "precision": {
                "mode": "automatic",
                "precision_level": "fp16",
                "initial_scale": 2.0**40,
                "max_scale": 2.0**40,
            },
            "optimizer": {"name": "adamw", "params": {"lr": 0.01}},
            "training": {"max_steps": 80, "batch_size": 64},
        }
    )
    ended = serving.wait(job_id)
    assert ended["state"] == "succeeded"
    columns = serving.columns(job_id)
    assert columns["step"] == list(range(1, 81))
    first_good = columns["overflow"].index(False)
    assert first_good >= 5
    assert columns["scale"][: first_good + 1] == [2.0 ** (40 - n) for n in range(first_good + 1)]
    assert columns["skipped"] == columns["overflow"]
    assert not any(columns["nan"])
    assert all(math.isfinite(loss) for loss in columns["loss"])
    stats = ended["stats"]
    assert stats["overflow_count"] == stats["skipped_steps"] == sum(columns["overflow"])
    assert stats["nan_count"] == 0
    losses = columns["loss"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[first_good : first_good + 10])


def test_a_component_that_fails_says_whose_fault_it_is(serving: Cluster) -> None:
    serving.start_worker("one")
    job_id = serving.submit({**SMALL, "training": {"max_steps": 50, "time_limit_seconds": 0.001}})
    ended = serving.wait(job_id)
    assert (ended["state"], ended["status_reason"]["code"]) == ("failed", "time_limit")
    assert "time_limit_seconds" in ended["status_reason"]["message"]
