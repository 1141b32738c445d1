"""Pause, resume, retry and download as a client meets them: real processes, a real worker that is killed."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.test_installation import SMALL, long_job

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.redis]


@pytest.fixture
def serving(tmp_path: Path, postgres_database: str, redis_url: str) -> Iterator[Cluster]:
    made = Cluster(tmp_path, postgres_database, redis_url)
    try:
        made.start_api()
        made.start("dispatch", "halfstep.service.dispatch")
        yield made
    finally:
        made.stop()


def post(serving: Cluster, job_id: str, verb: str, status: int = 200, **options: Any) -> dict[str, object]:
    answer = serving.client.post(f"/jobs/{job_id}/{verb}", **options)
    assert answer.status_code == status, answer.text
    document: dict[str, object] = answer.json()
    return document


def weights_sha256(serving: Cluster, job_id: str) -> str:
    sha256: str = serving.get(f"/jobs/{job_id}/checkpoints")["items"][0]["sha256"]
    return sha256


def test_a_paused_job_frees_its_device_and_goes_on_as_if_it_had_not_been(serving: Cluster) -> None:
    serving.start_worker("one")
    spec = long_job(2_000)
    undisturbed = serving.submit(spec)
    assert serving.wait(undisturbed)["state"] == "succeeded"
    job_id = serving.submit(spec)
    wait_for("it trains", lambda: serving.job(job_id)["stats"]["current_step"] > 100, 90)
    assert post(serving, job_id, "pause")["state"] == "pausing"
    paused = serving.wait(job_id, ["paused"], 30)
    assert (paused["attempt"], paused["status_reason"]) == (1, None)
    reached = paused["stats"]["current_step"]
    [kept] = serving.get(f"/jobs/{job_id}/checkpoints")["items"]
    assert kept["step"] == reached < 2_000
    # The device is free while it is paused.
    assert serving.wait(serving.submit(SMALL))["state"] == "succeeded"
    assert serving.job(job_id)["state"] == "paused"
    assert post(serving, job_id, "resume")["state"] == "queued"
    ended = serving.wait(job_id)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
    states = [t["state"] for t in ended["transitions"]]
    assert states == [
        "queued", "starting", "running", "pausing", "paused", "queued", "starting", "running", "succeeded",
    ]  # fmt: skip
    columns, whole = (serving.columns(each, "step,loss,scale") for each in (job_id, undisturbed))
    assert columns["step"] == list(range(1, 2_001))
    assert columns == whole
    assert weights_sha256(serving, job_id) == weights_sha256(serving, undisturbed)


GATED_MODEL = """
import time
from pathlib import Path
from halfstep.worker.training.components.models.mlp import MlpParameters, build_mlp
from halfstep.worker.training.components.registry import register_model
from halfstep.worker.training.data.dataset import InputKind, Task

@register_model("gated", MlpParameters, summary="An mlp that is built once a file `open` is there.",
                inputs=(InputKind.FEATURES,), tasks=(Task.CLASSIFICATION,))
def build(parameters, data):
    while not Path("open").exists():
        time.sleep(0.02)
    return build_mlp(parameters, data)
"""


def test_a_pause_of_a_starting_job_comes_true(serving: Cluster) -> None:
    (serving.folder / "gated_model.py").write_text(GATED_MODEL)
    serving.environment["HALFSTEP_COMPONENT_MODULES"] = '["gated_model"]'
    serving.start_worker("one")
    job_id = serving.submit({**long_job(), "model": {"name": "gated"}})
    serving.wait(job_id, ["starting"], 60)
    for _ in range(2):
        assert post(serving, job_id, "pause")["state"] == "starting"
    assert "not over yet" in str(post(serving, job_id, "resume", 409)["detail"])
    (serving.folder / "open").touch()
    paused = serving.wait(job_id, ["paused"], 60)
    assert paused["attempt"] == 1
    states = [t["state"] for t in paused["transitions"]]
    assert states == ["queued", "starting", "running", "pausing", "paused"]
    post(serving, job_id, "resume")
    serving.wait(job_id, ["running"], 60)
    post(serving, job_id, "cancel")
    serving.wait(job_id)


def test_a_worker_that_dies_while_pausing_leaves_a_paused_job(serving: Cluster) -> None:
    worker = serving.start_worker("one")
    job_id = serving.submit(long_job(checkpoint_every_steps=50))
    wait_for("a checkpoint is taken", lambda: serving.get(f"/jobs/{job_id}/checkpoints")["items"], 90)
    assert post(serving, job_id, "pause")["state"] == "pausing"
    worker.kill()
    paused = serving.wait(job_id, ["paused"], 60)
    assert paused["attempt"] == 1
    newest = serving.get(f"/jobs/{job_id}/checkpoints")["items"][0]["step"]
    post(serving, job_id, "resume")
    serving.start_worker("two")
    serving.wait(job_id, ["running"], 90)
    told = [
        e["data"]["step"]
        for e in serving.get(f"/jobs/{job_id}/events", limit=1000)["items"]
        if "steps_repeated" in (e["data"] or {})
    ]
    assert told == [newest]
    post(serving, job_id, "cancel")
    serving.wait(job_id)


def test_a_retry_goes_on_from_a_checkpoint_of_a_job_that_is_deleted(serving: Cluster, tmp_path: Path) -> None:
    serving.start_worker("one")
    whole = serving.submit(long_job(400, checkpoint_every_steps=100, keep_checkpoints=4))
    assert serving.wait(whole)["state"] == "succeeded"
    expected, columns = weights_sha256(serving, whole), serving.columns(whole, "step,loss,scale")
    child = str(post(serving, whole, "retry", 202, json={"from_checkpoint": 200})["id"])
    assert serving.client.delete(f"/jobs/{whole}").status_code == 204
    ended = serving.wait(child)
    assert (ended["state"], ended["from_checkpoint"], ended["parent_id"]) == ("succeeded", 200, None)
    assert serving.columns(child, "step,loss,scale") == columns
    assert weights_sha256(serving, child) == expected
    target = tmp_path / "weights.safetensors"
    base = str(serving.client.base_url).rstrip("/")
    command = [
        sys.executable,
        "-m",
        "halfstep.service.cli",
        "download",
        child,
        "-o",
        str(target),
        "--url",
        base,
    ]
    subprocess.run(command, check=True, timeout=60)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == expected
    assert safetensors.torch.load_file(target)
