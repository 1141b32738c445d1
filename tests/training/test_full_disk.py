"""A disk that refuses at any stage of a checkpoint costs that checkpoint, not the one before, nor the job."""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.errors import StorageFailed
from tests.training.jobs import job, run, same_numbers, weights_sha256
from tests.training.test_checkpoint import saved

# Stage → what is called there, and which of its calls belongs to it. A checkpoint is three files, each
# written, synced and renamed, and three syncs of directories.
STAGES: dict[str, tuple[Any, str, int]] = {
    "directory": (Path, "mkdir", 1),
    "weights written": (safetensors.torch, "save_file", 0),
    "weights synced": (os, "fsync", 0),
    "weights renamed": (Path, "replace", 0),
    "state written": (torch, "save", 0),
    "state synced": (os, "fsync", 1),
    "state renamed": (Path, "replace", 1),
    "directory synced": (os, "fsync", 2),
    "manifest written": (Path, "write_text", 0),
    "manifest synced": (os, "fsync", 3),
    "manifest renamed": (Path, "replace", 2),
    "directory synced after the manifest": (os, "fsync", 4),
    "directory above synced": (os, "fsync", 5),
}
FULL = OSError(errno.ENOSPC, "No space left on device")
ILL = OSError(errno.EIO, "Input/output error")
# As torch and safetensors tell of the same.
FULL_IN_TORCH = RuntimeError(
    "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file"
)
FULL_IN_SAFETENSORS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception) -> Iterator[list[bool]]:
    """The disk refuses at this stage; whether it had to is what the list tells."""
    place, name, number = STAGES[stage]
    real: Callable[..., Any] = getattr(place, name)
    calls = 0
    hit: list[bool] = []

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            hit.append(True)
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, call)
        yield hit


@pytest.mark.parametrize("error", [FULL, ILL], ids=["full", "ill"])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_half_written_is_left_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    good = saved(tmp_path, step=6)
    refused = pytest.raises(StorageFailed, match="free disk space")
    with refusing(monkeypatch, stage, error) as hit, refused:
        saved(tmp_path)
    assert hit
    assert [path.name for path in tmp_path.iterdir()] == [good.path.name]
    load(good.ref)
    load(saved(tmp_path).ref)


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        *((stage, FULL) for stage in STAGES),
        ("weights written", FULL_IN_SAFETENSORS),
        ("state written", FULL_IN_TORCH),
    ],
)
def test_training_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    spec = job(training={"checkpoint_every_steps": 4, "epochs": 2})
    _, whole = run(spec, tmp_path / "whole")
    with refusing(monkeypatch, stage, error) as hit:
        outcome, recorder = run(spec, tmp_path / "cut")
    assert hit
    assert outcome.step == 8
    [told] = recorder.coded("checkpoint_failed")
    assert told["step"] == 4
    assert [info.step for info in recorder.infos] == [8]
    assert same_numbers(recorder.rows, whole.rows)
    assert weights_sha256(recorder) == weights_sha256(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_at_the_end_it_is_a_clear_failure_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    spec = job(training={"checkpoint_every_steps": 5})
    _, recorder = run(spec, tmp_path, stop_after=11)
    kept = list(recorder.refs)
    with refusing(monkeypatch, stage, FULL) as hit, pytest.raises(StorageFailed) as failure:
        run(spec, tmp_path, recorder, fence=2)
    assert hit
    assert failure.value.code == "storage_error"
    assert "No space left on device" in failure.value.message
    assert recorder.refs == kept
    for ref in kept:
        load(ref)


def test_a_limit_that_the_kernel_sets_is_met_like_a_full_disk(tmp_path: Path) -> None:
    """No function is replaced here: files may not become longer than the first one needs."""
    good = saved(tmp_path, step=6)
    longest = max(path.stat().st_size for path in good.path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (1, 100, longest - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(StorageFailed):
                saved(tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == [good.path.name]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    load(good.ref)
    load(saved(tmp_path).ref)
