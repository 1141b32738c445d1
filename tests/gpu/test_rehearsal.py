"""The tests for a CUDA device, on a pretended one, and what the pretended one refuses as CUDA would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import ROOT, SOURCES

CELLS = "test_every_cell or test_automatic_is_torch_amp"

pytestmark = [pytest.mark.slow]


def rehearse(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A pytest of its own on the pretended device."""
    if shutil.which("g++") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("g++ is missing: the pretended CUDA device is built with it")
        pytest.skip("the pretended CUDA device is built with g++, which is missing")
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.gpu.rehearsal.plugin",
            "-p",
            "no:randomly",
            "-q",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("chosen", "least"), [(CELLS, 25), (f"not ({CELLS})", 30)], ids=["cells", "steps"])
def test_what_is_for_a_cuda_device_passes_on_a_pretended_one(chosen: str, least: int) -> None:
    done = rehearse("-m", "gpu", "-k", chosen, "tests/gpu")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts.keys() <= {"passed", "deselected"}, "a test was skipped"
    assert counts["passed"] >= least


REFUSED = """
import pytest
import torch

from tests.gpu.rehearsal.tensors import DEVICE


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_a_read_is_a_wait():
    there = torch.ones(2, device="cuda")
    DEVICE.waits.clear()
    float(there.sum())
    there.cpu()
    there.nonzero()
    there[there > 0]
    assert DEVICE.waits.total() == 4


def test_a_wait_is_an_error_in_debug_mode():
    there = torch.ones(2, device="cuda")
    there.to("cpu", non_blocking=True)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        there.cpu()


def test_memory_is_counted_and_ends():
    before = torch.cuda.memory_allocated()
    held = torch.empty(2**20, device="cuda")
    assert torch.cuda.memory_allocated() == before + 2**22
    view = held[:10]
    del held
    assert torch.cuda.memory_allocated() == before + 2**22
    del view
    assert torch.cuda.memory_allocated() == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**34, device="cuda")


def test_numbers_are_those_of_the_cpu():
    torch.manual_seed(0)
    here = torch.nn.Linear(4, 3)
    there = torch.nn.Linear(4, 3)
    there.load_state_dict(here.state_dict())
    there.cuda()
    data = torch.randn(5, 4)
    here(data).square().sum().backward()
    there(data.cuda()).square().sum().backward()
    assert there.weight.device.type == "cuda"
    assert torch.equal(there.weight.grad.cpu(), here.weight.grad)
"""


def test_the_pretended_device_refuses_and_counts_what_cuda_does(tmp_path: Path) -> None:
    file = tmp_path / "test_refused.py"
    file.write_text(REFUSED, encoding="utf-8")
    done = rehearse("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
