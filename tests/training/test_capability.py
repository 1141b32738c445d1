"""What a worker says of itself, and the step it takes before a job comes."""

import json
import subprocess
import sys

import pytest
import torch

from halfstep.worker.training.device import capability, speed, warmup


def test_the_probe_fits_the_workers_record() -> None:
    found = capability.probe()
    assert found["device_type"] in {"cpu", "cuda"}
    assert found["memory_bytes"] > 2**20
    assert found["device_count"] >= 1
    assert isinstance(found["bf16"], bool)
    assert isinstance(found["fp16"], bool)
    assert found["device_name"]
    assert set(found["speed"]) >= {"float32", "float16", "bfloat16"}
    assert found["speed"] == json.loads(json.dumps(found["speed"]))


def test_the_warm_up_measures_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a second, and each job's process would pay it."""
    monkeypatch.setattr(speed, "measure", lambda _device: pytest.fail("measured"))
    warmup.take_a_step()


def test_the_warm_up_draws_nothing_and_creates_no_cuda_context() -> None:
    before = torch.get_rng_state()
    warmup.take_a_step()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.cuda.is_initialized()


def test_after_the_warm_up_a_job_imports_nothing_of_torch() -> None:
    """The first optimizer pulls in torch._dynamo, a second of it; a warm process has paid that."""
    program = """
import sys, tempfile
from pathlib import Path
from tests.training.jobs import job, run
from halfstep.worker.training.device import warmup
from halfstep.worker.training.loop import StopRequest
warmup.take_a_step()
before = {name for name in sys.modules if name.split(".")[0] == "torch"}
assert "torch._dynamo" in before
run(job(precision={}), Path(tempfile.mkdtemp()), stop_after=1, request=StopRequest.CANCEL)
late = {name for name in sys.modules if name.split(".")[0] == "torch"} - before
assert not late, late
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
