"""Jobs whose process dies in every attempt: they fail with its last words, and take no worker down."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.test_installation import SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.redis]

POISON = """
import ctypes, os, signal, sys
from typing import Literal
from torch import nn
from halfstep.worker.training.components import InputKind, Parameters, Task, register_model

class PoisonParameters(Parameters):
    way: Literal["kill", "group", "segv", "exit"]

class Poison(nn.Module):
    def __init__(self, way, data):
        super().__init__()
        self.way, self.steps = way, 0
        self.out = nn.Linear(data.shape[0], data.outputs)

    def forward(self, features):
        self.steps += self.training
        if self.steps == 3:
            print(f"about to die by {self.way}", file=sys.stderr)
            if self.way == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.way == "group":
                os.killpg(0, signal.SIGKILL)
            elif self.way == "segv":
                ctypes.string_at(0)
            elif self.way == "exit":
                os._exit(3)
        return self.out(features)

@register_model("poison", PoisonParameters, summary="Ends its process at the third step.",
                inputs=(InputKind.FEATURES,), tasks=(Task.CLASSIFICATION,))
def build(parameters, data):
    return Poison(parameters.way, data)
"""


@pytest.fixture
def serving(tmp_path: Path, postgres_database: str, redis_url: str) -> Iterator[Cluster]:
    (tmp_path / "poison.py").write_text(POISON)
    made = Cluster(tmp_path, postgres_database, redis_url, component_modules='["poison"]')
    try:
        made.start_api()
        made.start("dispatch", "halfstep.service.dispatch")
        yield made
    finally:
        made.stop()


def poisoned(serving: Cluster, way: str, attempts: int) -> str:
    model = {"name": "poison", "params": {"way": way}}
    return serving.submit({**SMALL, "model": model, "max_attempts": attempts})


def test_a_process_that_dies_costs_its_job_alone(serving: Cluster) -> None:
    worker = serving.start_worker("one")
    ways = {"kill": -9, "group": -9, "segv": -11, "exit": 3}
    ids = {way: poisoned(serving, way, attempts=2) for way in ways}
    good = serving.submit(SMALL)
    for way, returncode in ways.items():
        ended = serving.wait(ids[way])
        reason = ended["status_reason"]
        assert (ended["state"], ended["attempt"], reason["code"]) == ("failed", 2, "worker_lost")
        assert "each of its 2 attempts" in reason["message"]
        assert reason["detail"]["returncode"] == returncode
        assert f"about to die by {way}" in reason["detail"]["last_words"]
        told = serving.get(f"/jobs/{ids[way]}/events")["items"]
        assert sum("last_words" in (event["data"] or {}) for event in told) == 2
    assert serving.wait(good)["state"] == "succeeded"
    assert worker.poll() is None
