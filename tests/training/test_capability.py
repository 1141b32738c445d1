"""What a worker says of itself, and the step it takes before a job comes."""

import subprocess
import sys

import torch

from worker.training import capability, warmup


def test_the_probe_fits_the_workers_record() -> None:
    found = capability.probe()
    assert found["device_type"] in {"cpu", "cuda"}
    assert found["memory_bytes"] > 2**20
    assert found["device_count"] >= 1
    assert isinstance(found["bf16"], bool)
    assert isinstance(found["fp16"], bool)
    assert found["device_name"]
    assert set(found["matmul_relative"]) == {"float16", "bfloat16"}
    assert all(speed > 0 for speed in found["matmul_relative"].values())


def test_the_relative_speed_is_measured_once() -> None:
    assert capability.relative_speed("cpu") is capability.relative_speed("cpu")


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
from worker.training import warmup
from worker.training.loop import StopRequest
warmup.take_a_step()
before = {name for name in sys.modules if name.split(".")[0] == "torch"}
assert "torch._dynamo" in before
run(job(precision={}), Path(tempfile.mkdtemp()), stop_after=1, request=StopRequest.CANCEL)
late = {name for name in sys.modules if name.split(".")[0] == "torch"} - before
assert not late, late
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
