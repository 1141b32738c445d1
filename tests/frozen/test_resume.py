"""A job that version 0.1 left in the middle goes on under today's worker, to the bit.

What it must come to is what 0.1 recorded of the same job undisturbed (`run_through`). Both were made with
the libraries held to instructions that every x86-64 has, and so is the worker here: sums are then the same on
every such machine with the same torch.
"""

import platform
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cluster import Cluster
from tests.frozen.installation import Installation
from tests.frozen.making import PORTABLE

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.redis]

# Not those that tell of the machine: memory and time.
EXACT = (
    "epoch,loss,scale,overflow,nan,underflow,skipped,has_inf,has_nan,underflow_estimate,grad_norm,"
    "learning_rate,compute_dtype"
)


@pytest.fixture
def cluster(tmp_path: Path, installed: Installation, migrated_url: str, redis_url: str) -> Iterator[Cluster]:
    """Today's API, dispatcher and one worker over the migrated installation."""
    if platform.machine() != "x86_64":
        pytest.skip("the job under way was made on x86-64, and other machines add in another order")
    made_with = torch_of(installed)
    if made_with.partition("+")[0] != torch.__version__.partition("+")[0]:
        pytest.skip(f"the job under way was made with torch {made_with}, here is {torch.__version__}")
    made = Cluster(tmp_path, migrated_url, redis_url, worker_device="cpu")
    made.environment |= PORTABLE
    made.client.headers["authorization"] = f"Bearer {installed.keys['acme']}"
    try:
        made.start_api()
        made.start("dispatch", "halfstep.service.dispatch")
        made.start_worker("today")
        yield made
    finally:
        made.stop()


def torch_of(installed: Installation) -> str:
    """The torch of the worker that made the job."""
    connection = sqlite3.connect(installed.folder / "halfstep.db")
    found = connection.execute(
        "SELECT json_extract(versions, '$.torch') FROM workers WHERE id NOT LIKE 'worker-%'"
    ).fetchone()
    connection.close()
    return str(found[0])


def figures(evaluation: dict[str, Any]) -> tuple[Any, ...]:
    return evaluation["step"], evaluation["loss"], evaluation["metrics"]


def test_a_job_that_was_under_way_goes_on_to_the_bit(cluster: Cluster, installed: Installation) -> None:
    job_id, reference = installed.jobs["under_way"], installed.jobs["run_through"]
    left = cluster.get(f"/jobs/{job_id}/checkpoints")["items"][0]["step"]
    found = cluster.wait(job_id, seconds=500)
    assert (found["state"], found["attempt"]) == ("succeeded", 2), found["status_reason"]

    events = cluster.get(f"/jobs/{job_id}/events", limit=1000)["items"]
    [resumed] = [event["data"] for event in events if "steps_repeated" in (event["data"] or {})]
    assert resumed["step"] == left
    assert resumed["steps_repeated"] > 0
    assert cluster.columns(job_id, EXACT) == cluster.columns(reference, EXACT)
    weights = [cluster.get(f"/jobs/{each}/checkpoints")["items"][0]["sha256"] for each in (job_id, reference)]
    assert weights[0] == weights[1]
    undisturbed = cluster.job(reference)["stats"]
    assert figures(found["stats"]["evaluation"]) == figures(undisturbed["evaluation"])
    for name in (
        "current_step",
        "overflow_count",
        "nan_count",
        "skipped_steps",
        "average_loss",
        "current_scale",
    ):
        assert found["stats"][name] == undisturbed[name], name
