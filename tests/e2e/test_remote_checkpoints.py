"""Two hosts that share a database and a checkpoint URL, and no disk: a job goes on at the other."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, alive, children_of, wait_for
from tests.e2e.test_installation import long_job

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.redis]


@pytest.fixture
def serving(tmp_path: Path, postgres_database: str, redis_url: str) -> Iterator[Cluster]:
    made = Cluster(tmp_path, postgres_database, redis_url, checkpoint_url=f"file://{tmp_path / 'store'}")
    try:
        made.start_api()
        made.start("dispatch", "halfstep.service.dispatch")
        yield made
    finally:
        made.stop()


def test_a_job_killed_on_one_host_goes_on_at_another_to_the_bit(serving: Cluster, tmp_path: Path) -> None:
    a = serving.start_worker("a", data_dir=tmp_path / "a")
    spec = long_job(1_500, checkpoint_every_steps=100)
    undisturbed = serving.submit(spec)
    assert serving.wait(undisturbed)["state"] == "succeeded"
    job_id = serving.submit(spec)
    wait_for("it has two checkpoints", lambda: serving.get(f"/jobs/{job_id}/checkpoints")["items"][1:], 90)
    children = children_of(a.pid)
    a.kill()
    a.wait()
    wait_for("its processes are gone", lambda: not any(alive(pid) for pid in children), 20)
    serving.start_worker("b", data_dir=tmp_path / "b")
    ended = serving.wait(job_id)
    assert (ended["state"], ended["attempt"], ended["worker"]) == ("succeeded", 2, "b")
    told = [e["data"] or {} for e in serving.get(f"/jobs/{job_id}/events", limit=1000)["items"]]
    [resumed] = [data["step"] for data in told if "steps_repeated" in data]
    assert resumed >= 200
    assert not [data for data in told if data.get("code") in {"checkpoint_damaged", "resume_not_exact"}]
    whole, again = (serving.columns(each, "step,loss,scale") for each in (undisturbed, job_id))
    assert again == whole
    kept, other = (serving.get(f"/jobs/{each}/checkpoints")["items"] for each in (job_id, undisturbed))
    assert kept[0]["sha256"] == other[0]["sha256"]
    # The API, which shares no disk with either, gives the weights out, whole and in parts.
    model = f"/jobs/{job_id}/checkpoints/{kept[0]['step']}/model"
    weights = serving.client.get(model).content
    assert hashlib.sha256(weights).hexdigest() == kept[0]["sha256"]
    assert serving.client.get(model, headers={"range": "bytes=8-99"}).content == weights[8:100]
    # Each checkpoint that is listed is at the store, and nothing else.
    assert len(list((tmp_path / "store" / "jobs" / job_id / "checkpoints").iterdir())) == len(kept)
    assert serving.client.delete(f"/jobs/{job_id}").status_code == 204
    wait_for("its files go", lambda: not (tmp_path / "store" / "jobs" / job_id).exists(), 20)


@pytest.mark.parametrize("part", ["halfstep.worker.app", "halfstep.service.api", "halfstep.service.dispatch"])
def test_a_url_that_nothing_serves_is_told_at_the_start(tmp_path: Path, part: str) -> None:
    url = "nosuch://me:word@bucket/prefix"
    installation = Cluster(tmp_path, f"sqlite:///{tmp_path / 'none.db'}", "", checkpoint_url=url)
    assert installation.start("wrong", part).wait(60) != 0
    installation.stop()
    told = (tmp_path / "wrong.log").read_text()
    assert "HALFSTEP_CHECKPOINT_URL=nosuch://***@bucket/prefix cannot be used" in told
    assert "such as s3://bucket/prefix" in told
    assert "word" not in told
