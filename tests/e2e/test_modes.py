"""Each precision mode as a job through the whole service: what its record, statistics and events say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.conftest import own_postgres, own_redis
from tests.e2e.test_installation import SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.redis]

CNN = {"name": "cnn", "params": {"channels": [4, 8], "hidden": 16}}
JOBS: dict[str, dict[str, Any]] = {
    "automatic": {"precision_level": "bf16"},
    "manual": {"precision_level": "bf16"},
    "selective": {"precision_level": "bf16", "selective_layers": ["conv1", "conv2", "fc1", "fc2"]},
    "adaptive": {"precision_level": "dynamic", "adaptive_threshold": 0.0},
    "gradient_scaling": {"precision_level": "fp32"},
}
COMPUTED = {
    "automatic": {"bfloat16"},
    "manual": {"bfloat16"},
    "selective": {"bfloat16"},
    "adaptive": {"float32", "bfloat16"},
    "gradient_scaling": {"float32"},
}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("modes")
    with own_postgres() as database, own_redis() as broker:
        made = Cluster(folder, database, broker)
        try:
            made.start_api()
            made.start("dispatch", "halfstep.service.dispatch")
            made.start_worker("one")
            yield made
        finally:
            made.stop()


@pytest.mark.parametrize("mode", JOBS)
def test_a_mode_is_a_job(serving: Cluster, mode: str) -> None:
    job_id = serving.submit(
        {
            **SMALL,
            "model": CNN,
            "precision": {"mode": mode, **JOBS[mode]},
            "training": {"max_steps": 40, "batch_size": 8, "evaluate_every_steps": 40},
        }
    )
    ended = serving.wait(job_id)
    assert ended["state"] == "succeeded", ended["status_reason"]
    columns = serving.columns(job_id)
    assert columns["step"] == list(range(1, 41))
    assert set(columns["compute_dtype"]) == COMPUTED[mode]
    scales = set(columns["scale"])
    assert scales == ({65536.0} if mode == "gradient_scaling" else {1.0})
    assert not any(columns["skipped"])
    stats = ended["stats"]
    assert stats["precision"]["mode"] == mode
    assert stats["precision"]["compute_dtype"] == columns["compute_dtype"][-1]
    assert stats["evaluation"]["step"] == 40
    told = [e for e in serving.get(f"/jobs/{job_id}/events")["items"] if e["type"] == "precision"]
    changes = [event for event in told if event["data"]["code"] != "slow_precision"]
    assert bool(changes) == (mode == "adaptive")
    for change in changes:
        assert change["data"]["from"] != change["data"]["to"]
        assert change["data"]["reason"]


def test_an_overflow_names_its_layer_and_direction(serving: Cluster) -> None:
    job_id = serving.submit(
        {
            **SMALL,
            "precision": {
                "mode": "automatic",
                "precision_level": "fp16",
                "initial_scale": 2.0**40,
                "max_scale": 2.0**40,
            },
            "training": {"max_steps": 40, "batch_size": 16, "evaluate_every_steps": 40},
        }
    )
    ended = serving.wait(job_id)
    assert ended["state"] == "succeeded", ended["status_reason"]
    last = ended["stats"]["last_overflow"]
    overflows = serving.columns(job_id, "step,overflow")
    assert last["step"] == max(s for s, o in zip(overflows["step"], overflows["overflow"], strict=True) if o)
    assert last["layer"]
    assert last["kind"] == "backward"
    told = [e for e in serving.get(f"/jobs/{job_id}/events")["items"] if e["type"] == "overflow"]
    assert told
    assert len(told) < sum(overflows["overflow"])  # first of a run, then rate-limited
    assert told[0]["data"]["layer"]
    assert told[0]["data"]["kind"] == "backward"


def test_layers_that_the_model_lacks_fail_with_the_names_it_has(serving: Cluster) -> None:
    job_id = serving.submit(
        {
            **SMALL,
            "precision": {"mode": "selective", "precision_level": "bf16", "selective_layers": ["conv1"]},
        }
    )
    ended = serving.wait(job_id)
    assert ended["state"] == "failed"
    assert "selective_layers" in ended["status_reason"]["message"]
    assert "conv1" in ended["status_reason"]["message"]


def test_what_the_worker_measured_is_what_a_submission_and_its_job_are_warned_of(serving: Cluster) -> None:
    speed = serving.get("/workers")["items"][0]["capability"]["speed"]
    assert set(speed) == {"float32", "float16", "bfloat16"}
    figure = speed["float16"]["matmul"]
    slow = figure < 1  # but for the newest ones, CPUs emulate it
    job_id = serving.submit({**SMALL, "precision": {"precision_level": "fp16"}})
    serving.wait(job_id)
    events = serving.get(f"/jobs/{job_id}/events")["items"]
    told = [event["data"] for event in events if (event["data"] or {}).get("code") == "slow_precision"]
    assert [data["relative_speed"] for data in told] == [figure] * slow
    warned = [event["message"] for event in events if event["type"] == "warning"]
    assert any(f"run at {figure:.2g} times float32's speed" in message for message in warned) == slow
