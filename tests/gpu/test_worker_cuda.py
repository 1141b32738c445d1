"""A worker beside a CUDA device: what it measures there, and that a waiting process holds none of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfstep.worker.training.device import speed
from halfstep.worker.training.device.capability import probe
from tests.e2e.cluster import SOURCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.real_device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

WAITING = """
import ctypes
from halfstep.worker.job import execution

execution.prepare(probe=False)
import torch

assert not torch.cuda.is_initialized()
driver = ctypes.CDLL("libcuda.so.1")
assert driver.cuInit(0) == 0
flags, active = ctypes.c_uint(), ctypes.c_int(-1)
assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
assert active.value == 0, "a context exists"
"""


def test_a_waiting_process_has_no_context(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": SOURCES, "HALFSTEP_DATA_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WAITING], check=True, timeout=180, env=environment, cwd=tmp_path)


def test_the_probe_measures_the_gpu(tmp_path: Path) -> None:
    precisions = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    found = probe(tmp_path)
    assert set(found["speed"]) == {"float32", "float16", "bfloat16", "tf32"}
    assert found["speed"]["float16"]["matmul"] > 1
    assert precisions == (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
    )
    assert list((tmp_path / speed.DIRECTORY).glob("*.json"))
