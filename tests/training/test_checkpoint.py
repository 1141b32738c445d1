"""A checkpoint on disk is whole or absent, and nothing that was altered is ever loaded."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from halfstep.worker.training.checkpoints import writing
from halfstep.worker.training.checkpoints.reading import load
from halfstep.worker.training.checkpoints.writing import (
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointInfo,
    Payload,
)


def payload(value: float = 1.0) -> Payload:
    weight = torch.full((3, 4), value)
    return Payload(
        weights={"a.weight": weight, "b.tied": weight, "c.scalar": torch.tensor(value)},
        state={"step": 7, "nested": [{"x": torch.arange(5)}, None, "text", 1.5]},
    )


def saved(directory: Path, step: int = 7, value: float = 1.0, fence: int = 3) -> CheckpointInfo:
    return writing.save(directory, fence, step, payload(value))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    info = saved(tmp_path)
    loaded = load(info.ref)
    assert loaded.weights.keys() == {"a.weight", "b.tied", "c.scalar"}
    assert torch.equal(loaded.weights["b.tied"], torch.ones(3, 4))
    assert loaded.weights["b.tied"] is loaded.weights["a.weight"]
    assert torch.equal(loaded.state["nested"][0]["x"], torch.arange(5))
    assert loaded.state["nested"][1:] == [None, "text", 1.5]
    assert "000003" in info.path.name
    assert info.bytes == sum(file.stat().st_size for file in info.path.iterdir())
    assert set(safetensors.torch.load_file(info.path / WEIGHTS_FILE)) == {"a.weight", "c.scalar"}


def test_equal_weights_have_equal_bytes_whatever_the_fence(tmp_path: Path) -> None:
    assert (
        saved(tmp_path, fence=1).sha256 == saved(tmp_path, fence=2).sha256 == saved(tmp_path, step=9).sha256
    )
    assert saved(tmp_path, fence=1).sha256 != saved(tmp_path, value=2.0, fence=4).sha256


def test_the_order_of_writing_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is synced before its rename, the directory around the manifest, the parent last."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(f"sync {'dir ' if path.is_dir() else ''}{path.name.split('.tmp')[0]}")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    name = saved(tmp_path).path.name
    process = os.getpid()
    assert done == [
        f"sync .{WEIGHTS_FILE}.{process}",
        f"rename {WEIGHTS_FILE}",
        f"sync .{STATE_FILE}.{process}",
        f"rename {STATE_FILE}",
        f"sync dir {name}",
        f"sync .{MANIFEST_FILE}.{process}",
        f"rename {MANIFEST_FILE}",
        f"sync dir {name}",
        f"sync dir {tmp_path.name}",
    ]


def test_leftovers_of_older_attempts_are_removed(tmp_path: Path) -> None:
    kept, left, present = saved(tmp_path, fence=1), saved(tmp_path, step=8, fence=1), saved(tmp_path, fence=2)
    (tmp_path / "other").mkdir()
    writing.remove_unreferenced(tmp_path, [kept.ref], below_fence=2)
    assert not left.path.exists()
    assert {path.name for path in tmp_path.iterdir()} == {kept.path.name, present.path.name, "other"}
